"""Factors: what every method returns for a batch of matrices of one shape."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """Triplets U (b, m, r), S (b, r), V (b, n, r) and how right they are.

    ``residual`` (b,) is relative to σ₁; ``iterations`` has one number for each matrix; ``ok`` (b,)
    is False where a fast factorization broke down and the method wants to run in its safe way. Low
    bases are there where they cost nothing. ``leading`` (b,) is False where A was found to have a
    larger singular value than the last of these beside them; None where the method has them all.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    iterations: list[int]
    ok: Tensor
    U_low: Tensor | None = None
    V_low: Tensor | None = None
    leading: Tensor | None = None

    def swapped(self) -> Factors:
        """The factors of Aᵀ."""
        return self._replace(U=self.V, V=self.U, U_low=self.V_low, V_low=self.U_low)
