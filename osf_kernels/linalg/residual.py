"""How nearly U, S, V are singular triplets: ‖R‖₂ / σ₁ of R = [A V − U Σ; AᵀU − V Σ].

The 2-norm bounds √(‖A v − σ u‖² + ‖Aᵀu − σ v‖²) of every triplet, and with the gap to the next
singular value the angle between the subspaces (Wedin 1972). It is had by block power iteration,
which takes products with a few columns where each triplet's own residual takes one with all r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from osf_kernels.backends import primitives

# Eight columns and two steps come within some 10 % of the norm of a matrix of pure noise, the
# flattest of spectra, and closer to any other.
PROBES = 8
STEPS = 2
# What float64 finds of it on random and on trained weights is 2 to 10 eps.
ROUNDING = 8.0


def residual_of(As: Sequence[Tensor], U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """‖R‖₂ / σ₁, (b,), of triplets of b matrices."""
    m, scale = U.shape[-2], S.unsqueeze(-1)

    def apply(X: Tensor) -> Tensor:
        top = primitives.multiply(As, V @ X) - U @ (scale * X)
        bottom = primitives.multiply(As, U @ X, transpose=True) - V @ (scale * X)
        return torch.cat([top, bottom], -2)  # (b, m + n, k)

    def transposed(Y: Tensor) -> Tensor:
        top, bottom = Y[:, :m], Y[:, m:]
        X = V.mT @ primitives.multiply(As, top, transpose=True) - scale * (U.mT @ top)
        return X + U.mT @ primitives.multiply(As, bottom) - scale * (V.mT @ bottom)

    return _relative(_norm(apply, transposed, S), S)


def residual_in(R: Tensor, S: Tensor) -> Tensor:
    """The same of an R that is at hand, (b, p, r): all of it that isn't zero but for rounding.

    Of that, ``ROUNDING`` stands in, so that no tolerance below it is called met.
    """
    rounding = torch.full_like(S[:, 0], ROUNDING * torch.finfo(S.dtype).eps)
    return torch.hypot(_relative(_norm(R.matmul, R.mT.matmul, S), S), rounding)


def _norm(
    apply: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], S: Tensor
) -> Tensor:
    """‖R‖₂ from below, (b,), by R and Rᵀ times a few columns."""
    b, r = S.shape
    if r == 0:
        return S.new_zeros(b)
    # Always the same probes: the caller's generator is for sketches.
    generator = torch.Generator(S.device).manual_seed(r)
    X = torch.randn(b, r, min(PROBES, r), dtype=S.dtype, device=S.device, generator=generator)
    for _ in range(STEPS):
        X = torch.linalg.qr(transposed(apply(torch.linalg.qr(X)[0])))[0]
    Y = torch.nan_to_num(apply(X).double())  # eigvalsh raises for what a breakdown leaves
    squares: Tensor = torch.linalg.eigvalsh(Y.mT @ Y)[:, -1]
    return squares.clamp_min(0).sqrt().to(S.dtype)


def _relative(norm: Tensor, S: Tensor) -> Tensor:
    if not S.shape[-1]:
        return norm
    return norm / S.amax(-1).clamp_min(torch.finfo(S.dtype).tiny)
