"""Krylov spaces of one or two blocks, of powers: nothing is orthonormalized between products.

Where few products are wanted, the steps between them take most of the time. Here the products
follow one another, while the matrix is in a cache, and all other steps are done once, on small Gram
matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels.linalg import primitives
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.rayleigh_ritz import leading_right
from osf_kernels.linalg.svd.residual import residual_from_gram

# On σᵢ = i^-½ at n = 2048 rounding is 4e-6 of the residual of one block of 32 columns, 3e-4 of that
# of two and 6e-2 of that of three.
MOST_STEPS = 2
# Upper limit of rounding relative to the residual: the stated residual is then off by some 1e-4 of
# itself, on power laws, gaps, exponential decay and trained weights.
ROUNDING_SHARE = 0.003


def run(group: Group, noise: Tensor, *, steps: int) -> Factors:
    """The leading triplets by a Rayleigh–Ritz step in the space of Z = [A B, A (AᵀA) B, …],
    B = Aᵀ noise, of ``steps`` blocks.

    With G = AᵀZ and ZᵀZ = RᵀR, Z R⁻¹ is orthonormal, and the eigenvectors of
    R⁻ᵀ GᵀG R⁻¹ = P Σ² Pᵀ give U = Z R⁻¹ P and V = G R⁻¹ P Σ⁻¹. AᵀU = V Σ holds by construction,
    and A G, of which all but the last block is in Z, gives A V − U Σ. The space on the left has one
    product with A more than the space [B, (AᵀA) B, …] on the right, and is better by that.

    Args:
        group: of rank ≤ steps·w ≤ min(m, n); ‖A‖_F keeps the powers in range.
        noise: (1 or b, m, w).

    Returns:
        Factors, orthonormal to rounding where ok, which is False where the powers depend on each
        other so much that rounding shows in the residual.

    Source: Halko, Martinsson & Tropp 2011 (the Rayleigh–Ritz step on the left); Hoemmen 2010 (the
    matrix powers kernel of communication-avoiding Krylov methods).
    """
    dtype, width = noise.dtype, steps * noise.shape[-1]
    scales = [norm ** -(steps + 1) if norm else 1.0 for norm in group.norms]
    Z, G = primitives.power_products(group.As, noise, scales, steps=steps)
    # In float64 orthonormality costs no second pass: products of float32 numbers are exact in it.
    Z, G = Z.double(), G.double()
    whole = Z.mT @ Z
    K = whole[:, :width, :width]
    inverse, _ = primitives.cholesky_inverse(K)  # NaN where it fails, which eigh would raise for
    squares = torch.nan_to_num(inverse.mT @ (G.mT @ G) @ inverse)
    S, P, ok = leading_right(squares, group.rank, dtype)
    left = inverse @ P
    right = left / S.unsqueeze(-2)
    # A V − U Σ = Z X, as A G is Z without its first block.
    X = torch.nn.functional.pad(right, (0, 0, noise.shape[-1], 0))
    X[:, :width] -= left * S.unsqueeze(-2)
    residual = residual_from_gram(X.mT @ whole @ X, S.to(dtype))
    # The largest factor by which a column of U amplifies rounding in Z.
    growth = (K.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * left.square()).sum(-2).amax(-1).sqrt()
    ok = ok & (growth * torch.finfo(dtype).eps <= ROUNDING_SHARE * residual)
    U, V = Z[..., :width] @ left, G @ right
    return Factors(U.to(dtype), S.to(dtype), V.to(dtype), residual, [steps] * len(group.As), ok)
