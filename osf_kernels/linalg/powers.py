"""Krylov spaces of one or two blocks, of powers: nothing is orthonormalized between products.

Where few products are wanted, what lies between them takes most of the time. Here they follow one
another, while the matrix is in a cache, and all the rest is done once, on small Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.residual import residual_from_gram
from osf_kernels.linalg.small import leading_right

# On σᵢ = i^-½ at n = 2048 rounding is 4e-6 of the residual of one block of 32 columns, 3e-4 of that
# of two and 6e-2 of that of three.
MOST_STEPS = 2
# What rounding may be of the residual: the stated one is then off by some 1e-4 of itself, on power
# laws, gaps, exponential decay and trained weights.
ROUNDING_SHARE = 0.003


def from_powers(
    As: Sequence[Tensor], noise: Tensor, norms: Sequence[float], rank: int, *, steps: int
) -> Factors:
    """The leading triplets by a Rayleigh–Ritz step in the space of Z = [A B, A (AᵀA) B, …],
    B = Aᵀ noise, of ``steps`` blocks.

    With G = AᵀZ and ZᵀZ = RᵀR, Z R⁻¹ is orthonormal, and the eigenvectors of
    R⁻ᵀ GᵀG R⁻¹ = P Σ² Pᵀ give U = Z R⁻¹ P and V = G R⁻¹ P Σ⁻¹. AᵀU = V Σ holds by construction,
    and A G, of which all but the last block is in Z, gives A V − U Σ. By products with A and Aᵀ the
    space on the left is the better by one of a space [B, (AᵀA) B, …] on the right.

    Args:
        As: b matrices (m, n) of one shape, dtype and device.
        noise: (1 or b, m, w).
        norms: ‖A‖_F of each, by which the powers are kept in range.
        rank: at most steps·w ≤ min(m, n).

    Returns:
        Factors, orthonormal to rounding where ok, which is False where the powers depend on each
        other so much that rounding tells in the residual.

    Source: Halko, Martinsson & Tropp 2011 (the Rayleigh–Ritz step on the left); Hoemmen 2010 (the
    matrix powers kernel of communication-avoiding Krylov methods).
    """
    dtype, width = noise.dtype, steps * noise.shape[-1]
    scales = [norm ** -(steps + 1) if norm else 1.0 for norm in norms]
    Z, G = primitives.power_products(As, noise, scales, steps=steps)
    # In float64 orthonormality costs no second pass: products of float32 numbers are exact in it.
    Z, G = Z.double(), G.double()
    whole = Z.mT @ Z
    K = whole[:, :width, :width]
    inverse, _ = primitives.cholesky_inverse(K)  # NaN where it fails, which eigh would raise for
    squares = torch.nan_to_num(inverse.mT @ (G.mT @ G) @ inverse)
    S, P, ok = leading_right(squares, rank, dtype)
    left = inverse @ P
    right = left / S.unsqueeze(-2)
    # A V − U Σ = Z X, as A G is Z without its first block.
    X = torch.nn.functional.pad(right, (0, 0, noise.shape[-1], 0))
    X[:, :width] -= left * S.unsqueeze(-2)
    residual = residual_from_gram(X.mT @ whole @ X, S.to(dtype))
    # The most that a column of U has of the rounding of Z.
    growth = (K.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * left.square()).sum(-2).amax(-1).sqrt()
    ok = ok & (growth * torch.finfo(dtype).eps <= ROUNDING_SHARE * residual)
    U, V = Z[..., :width] @ left, G @ right
    return Factors(U.to(dtype), S.to(dtype), V.to(dtype), residual, [steps] * len(As), ok)
