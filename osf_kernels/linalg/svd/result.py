"""TruncatedSVD: singular triplets, and how right they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from osf_kernels.basis import Basis

TENSORS = ("U", "S", "V", "residual", "captured", "converged", "U_low", "V_low")


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedSVD:
    """The leading singular triplets A ≈ U diag(S) Vᵀ, and how right they are.

    Two figures, since they differ: ``residual`` says how nearly these are singular triplets of A,
    ``captured`` how much of A they hold. Neither says that they are the *leading* ones where σ_r
    and σ_{r+1} are close: there no leading subspace is well defined, and no more than residual and
    captured is promised.

    Attributes:
        U: (..., m, r) orthonormal columns, float32 (float64 of a float64 A).
        S: (..., r) singular values, descending.
        V: (..., n, r) orthonormal columns; V.mT are rows. In each column the first element whose
            magnitude is the largest, to 512 eps, is positive, which fixes the sign of U's.
        residual: (...) ‖[A V − U Σ; AᵀU − V Σ]‖₂ / σ₁, which bounds √(‖A v − σ u‖² +
            ‖Aᵀu − σ v‖²) / σ₁ of every triplet; σ₁ is S[0]. Measured: exactly for Krylov spaces in
            blocks of up to 48 columns, else by power iteration from below: 20 % too small at most,
            or half of it where one direction stands out among a thousand. Where it decides whether
            ``tol`` is met it is measured closer. Below some 50 eps it is rounding.
        captured: (...) Σ S² / ‖A‖²_F, at most 1: the share of A that the triplets hold, ‖A V‖²_F /
            ‖A‖²_F but for the residual; 1 for A = 0.
        iterations: how many steps the method took, each a product with A and one with Aᵀ. The
            product that makes a sketch and those that measure the residual aren't counted. 1 for
            direct methods.
        method: the one that ran: "randomized", "gram", "warm", "deflated" or "exact".
        converged: (...) boolean: these are the leading triplets, to ``tol``. The residual is at
            most ``tol``, and where a method may have missed a leading triplet, nothing larger was
            found beside these. The default of ``tol`` is 2.5·√min(m, n) eps and at least 10 eps, up
            to nine times the residual of torch.linalg.svd in that dtype. Without a ``tol`` "exact",
            which is torch.linalg.svd, and "gram", which goes to float64 or to torch.linalg.svd
            above the default, always converge. None in results of earlier versions that were made
            without a ``tol``.
        U_low: (..., m, m − r) orthonormal, orthogonal to U; None unless complement=True.
        V_low: (..., n, n − r) likewise of V.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    captured: Tensor
    iterations: int
    method: str
    converged: Tensor | None = None
    U_low: Tensor | None = None
    V_low: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., m, n) of the matrix that was decomposed."""
        return (*self.U.shape[:-1], self.V.shape[-2])

    @property
    def rank(self) -> int:
        """r, the number of triplets."""
        return self.S.shape[-1]

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        worst = f"{float(self.residual.max()):.1e}" if self.residual.numel() else "none"
        low = "" if self.U_low is None else ", with low bases"
        wrong = self.converged is not None and not bool(self.converged.all())
        said = f"residual {worst}" + (", not converged" if wrong else "")
        return f"TruncatedSVD({size}, rank {self.rank}, {self.method}, {said}{low})"

    def unbind(self) -> list[TruncatedSVD]:
        """The results of a batch's matrices, in order; views."""
        batch = len(self.shape) - 2
        count = math.prod(self.shape[:batch])
        each = {
            name: None if x is None else x.reshape(count, *x.shape[batch:])
            for name, x in ((name, getattr(self, name)) for name in TENSORS)
        }
        return unbound(each, [self.iterations] * count, self.method)

    def left(self) -> Basis:
        """The protected span of the left side, by the smaller of U and U_low."""
        return _smaller(self.U, self.U_low)

    def right(self) -> Basis:
        """The protected span of the right side, by the smaller of V and V_low."""
        return _smaller(self.V, self.V_low)


def _smaller(high: Tensor, low: Tensor | None) -> Basis:
    if low is not None and low.shape[-1] < high.shape[-1]:
        return Basis(low, "low")
    return Basis(high, "high")


def unbound(
    batched: Mapping[str, Tensor | None], iterations: Sequence[int], method: str
) -> list[TruncatedSVD]:
    """One result for each matrix, of tensors (b, ...) by their names."""
    rows: Any = {k: [None] * len(iterations) if x is None else x for k, x in batched.items()}
    return [
        TruncatedSVD(**{k: x[i] for k, x in rows.items()}, iterations=taken, method=method)
        for i, taken in enumerate(iterations)
    ]
