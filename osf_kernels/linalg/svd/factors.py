"""Factors: what every method returns for a batch of matrices of one shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Triplets U (b, m, r), S (b, r), V (b, n, r) and how right they are.

    Attributes:
        residual: (b,) relative to σ₁.
        iterations: one number for each matrix.
        ok: (b,) False where a fast factorization broke down, so that the method is to run again
            with ``safe``.
        U_low, V_low: (b, m, m − r) and (b, n, n − r), where they cost nothing.
        leading: (b,) False where A was found to have a singular value beside these that is larger
            than the last of them; None where the method has all of the leading ones.
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

    def merged(self, indices: Tensor, others: Factors) -> Factors:
        """These factors with ``others`` for some of the matrices; bases are written in place."""

        def put(old: Tensor | None, new: Tensor | None) -> Tensor | None:
            if old is None or new is None:
                return None
            large = old.dim() == 3
            return old.index_copy_(0, indices, new) if large else old.index_copy(0, indices, new)

        swapped: dict[str, Any] = {
            name: put(getattr(self, name), getattr(others, name))
            for name in ("U", "S", "V", "residual", "ok", "U_low", "V_low")
        }
        iterations = list(self.iterations)
        for i, other in zip(indices.tolist(), others.iterations, strict=True):
            iterations[i] = other
        if self.leading is not None or others.leading is not None:
            swapped["leading"] = put(self._leading(), others._leading())
        return self._replace(iterations=iterations, **swapped)

    def _leading(self) -> Tensor:
        return torch.ones_like(self.ok) if self.leading is None else self.leading
