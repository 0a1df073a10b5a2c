"""How nearly U, S, V are singular triplets: ‖R‖₂ / σ₁ of R = [A V − U Σ; AᵀU − V Σ].

The 2-norm bounds √(‖A v − σ u‖² + ‖Aᵀu − σ v‖²) of every triplet, and with the gap to the next
singular value the angle between the subspaces (Wedin 1972). Block power iteration finds it by
products with a few columns, where the residuals of the triplets themselves take a product with all
r. It finds it from below: where a decision hangs on it, ``confirmed`` takes more steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.svd.factors import Factors

# Steps of the power iteration where a decision hangs on the residual: four see all of the values
# that ``cpu.RESIDUAL_STEPS`` see a share of.
CONFIRMING_STEPS = 4
# A residual below this share of the tolerance stays below it.
SURELY_MET = 1 / 3
# Tolerances below this, in eps, are near the rounding of an iterative method's residual: up to 50
# eps of it, measured in float64. The parts of R that are zero in exact arithmetic aren't computed,
# so that they don't show it.
NEAR_ROUNDING = 128.0
# Upper limit of the residual, in eps·√min(m, n), of a result that is called as right as an SVD's
# where no tolerance is given. torch.linalg.svd has .28 where one value stands far above the rest
# (n = 160, 512), .3 to .6 on power laws, 1.2 on flat spectra. Below LEAST_TOL eps every result is
# called right.
DEFAULT_TOL = 2.5
LEAST_TOL = 10.0
# Stands for the parts of R that are zero in exact arithmetic, in eps: measured in float64 on random
# and on trained weights they are 2 to 10.
ROUNDING = 8.0


def confirmed(As: Sequence[Tensor], factors: Factors, tol: float | None) -> Factors:
    """The factors with residuals measured anew where ``tol`` would be called met too easily: where
    the residual is within a factor of three of ``tol``, or ``tol`` is near rounding.
    """
    S = factors.S
    if tol is None or not S.shape[-1]:
        return factors
    near = factors.residual <= tol
    if tol > NEAR_ROUNDING * torch.finfo(S.dtype).eps:
        near = near & (factors.residual > SURELY_MET * tol)
    at = torch.nonzero(near).flatten()  # synchronizes
    if not len(at):
        return factors
    chosen = [As[i] for i in at.tolist()]
    triplets = factors.U[at], S[at], factors.V[at]
    measured = residual_of(chosen, *triplets, steps=CONFIRMING_STEPS)
    worse = torch.maximum(measured, factors.residual[at])
    return factors._replace(residual=factors.residual.index_copy(0, at, worse))


def limit(tol: float | None, dtype: torch.dtype, size: int) -> float:
    """The largest residual of a result that is called right, for min(m, n) = size."""
    if tol is not None:
        return tol
    return max(LEAST_TOL, DEFAULT_TOL * math.sqrt(size)) * torch.finfo(dtype).eps


def residual_of(
    As: Sequence[Tensor],
    U: Tensor,
    S: Tensor,
    V: Tensor,
    *,
    AV: Tensor | None = None,
    right_is_exact: bool = False,
    steps: int = cpu.RESIDUAL_STEPS,
) -> Tensor:
    """‖R‖₂ / σ₁, (b,), of triplets of b matrices; of A V − U Σ alone if ``right_is_exact``.

    Args:
        AV: A V, which saves half of the products with A.
        right_is_exact: AᵀU = V Σ holds by construction.
    """
    m, scale = U.shape[-2], S.unsqueeze(-1)

    # [X, Σ X] in one product, since the passes over U, V and A take most of the time.
    def apply(X: Tensor) -> Tensor:
        k, both = X.shape[-1], torch.cat([X, scale * X], -1)
        right, left = V @ both, U @ both
        image = primitives.multiply(As, right[..., :k]) if AV is None else AV @ X
        top = image - left[..., k:]  # (b, m, k)
        if right_is_exact:
            return top
        bottom = primitives.multiply(As, left[..., :k], transpose=True) - right[..., k:]
        return torch.cat([top, bottom], -2)  # (b, m + n, k)

    def transposed(Y: Tensor) -> Tensor:
        k, top, bottom = Y.shape[-1], Y[:, :m], Y[:, m:]
        if AV is None:
            image = V.mT @ primitives.multiply(As, top, transpose=True)
        else:
            image = AV.mT @ top
        if right_is_exact:
            return image - scale * (U.mT @ top)
        left = U.mT @ torch.cat([primitives.multiply(As, bottom), top], -1)
        return image + left[..., :k] - scale * (V.mT @ bottom + left[..., k:])

    norm = _relative(_norm(apply, transposed, S, steps), S)
    return torch.hypot(norm, rounding(S)) if right_is_exact else norm


def residual_in(
    apply: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], S: Tensor
) -> Tensor:
    """Relative 2-norm of an implicit R, given by X ↦ R X and Y ↦ RᵀY.

    The part of R that is zero in exact arithmetic is not computed; a floor of ROUNDING·eps stands
    for it, so that no tolerance below the floor is called met.
    """
    return torch.hypot(_relative(_norm(apply, transposed, S), S), rounding(S))


def residual_through(outer: Tensor, inner: Tensor | None, S: Tensor) -> Tensor:
    """Relative 2-norm of R = outer · inner, exactly, with the floor of :func:`residual_in`.

    Args:
        outer: (b, m, k).
        inner: (b, k, r), or None for the identity.
    """
    outer = outer.double()
    G = outer.mT @ outer
    if inner is not None:
        inner = inner.double()
        G = inner.mT @ G @ inner
    return residual_from_gram(G, S)


def residual_from_gram(G: Tensor, S: Tensor) -> Tensor:
    """Relative 2-norm of an R with G = RᵀR (b, r, r) in float64, floored alike."""
    squares = largest_eigenvalue(G)
    return torch.hypot(_relative(squares.sqrt().to(S.dtype), S), rounding(S))


def rounding(S: Tensor) -> Tensor:
    """The floor of residuals, (b,)."""
    return torch.full_like(S[:, 0], ROUNDING * torch.finfo(S.dtype).eps)


def _norm(
    apply: Callable[[Tensor], Tensor],
    transposed: Callable[[Tensor], Tensor],
    S: Tensor,
    steps: int = cpu.RESIDUAL_STEPS,
) -> Tensor:
    """A lower bound of ‖R‖₂, (b,), by power iteration on a few columns; infinite where R isn't
    finite."""
    b, r = S.shape
    if r == 0:
        return S.new_zeros(b)
    # The same probes in every call: the caller's generator is for sketches.
    generator = torch.Generator(S.device).manual_seed(r)
    X = torch.randn(
        b, r, min(cpu.RESIDUAL_PROBES, r), dtype=S.dtype, device=S.device, generator=generator
    )
    for _ in range(steps):
        X = torch.linalg.qr(transposed(apply(torch.linalg.qr(X)[0])))[0]
    Y = apply(X).double()
    return largest_eigenvalue(Y.mT @ Y).sqrt().to(S.dtype)


def largest_eigenvalue(G: Tensor) -> Tensor:
    """λ_max of Gram matrices (b, k, k); infinite for one that isn't finite."""
    finite = G.isfinite().all(-1).all(-1)
    G = torch.nan_to_num(G)  # eigvalsh raises for the NaN of a breakdown
    values: Tensor = torch.linalg.eigvalsh(G)[:, -1]
    return torch.where(finite, values.clamp_min(0), math.inf)


def _relative(norm: Tensor, S: Tensor) -> Tensor:
    if not S.shape[-1]:
        return norm
    return norm / S.amax(-1).clamp_min(torch.finfo(S.dtype).tiny)
