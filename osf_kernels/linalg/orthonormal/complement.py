"""complement: the orthonormal columns that complete a basis, by products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels.cpu import HOUSEHOLDER_BLOCK as BLOCK
from osf_kernels.linalg import primitives


def complement(Q: Tensor, columns: int | None = None) -> Tensor:
    """P with [Q, P] orthogonal: PᵀP = I, PᵀQ = 0.

    For every orthogonal Z, H = I − W M⁻¹ Wᵀ with W = Q + [Z; 0] and M = I + ZᵀQ₁, where Q₁ are
    the first r rows of Q and Q₂ the others, is orthogonal and takes Q to −[Z; 0]. So the last
    columns of Hᵀ complete Q: P = [0; I] − W M⁻ᵀ Q₂ᵀ. With Z from the QR factorization Q₁ = Z R
    with a positive diagonal, M = I + R has no eigenvalue below 1. Here Z is block diagonal and
    each block so chosen, while Q₁ + Z is factorized: as stable as Householder QR, for every Q,
    with neither pivoting nor a check.

    Args:
        Q: (b, m, r) with r ≤ m, orthonormal columns.
        columns: how many of the m − r, from the first; None for all.

    Returns:
        P (b, m, columns) of the working dtype, as orthonormal, and as orthogonal to Q, as the
        columns of Q are to each other.

    Mutates nothing; doesn't synchronize; draws no random numbers.

    Source: Schreiber & Parlett 1988, Block reflectors; the choice of Z follows Ballard et al.
    2014, Reconstructing Householder vectors from Tall-Skinny QR.
    """
    Q = Q.to(primitives.working_dtype(Q.dtype))
    b, m, r = Q.shape
    wanted = m - r if columns is None else min(columns, m - r)
    P = Q.new_empty(b, m, wanted)
    if P.numel() == 0:
        return P
    LU, Z = _factors(Q[:, :r])
    # M = Zᵀ(Q₁ + Z) = Zᵀ L Z U, so M⁻ᵀ = Zᵀ L⁻ᵀ Z U⁻ᵀ.
    X = torch.linalg.solve_triangular(LU.mT, Q[:, r : r + wanted].mT, upper=False)
    blocks = [slice(i, min(i + BLOCK, r)) for i in range(0, r, BLOCK)]
    for i, at in enumerate(blocks):
        X[:, at] = Z[i] @ X[:, at]
    X = torch.linalg.solve_triangular(LU.mT, X, upper=True, unitriangular=True)
    for i, at in enumerate(blocks):
        X[:, at] = Z[i].mT @ X[:, at]
    negated = -Q
    for i, at in enumerate(blocks):
        negated[:, at, at] -= Z[i]
    torch.matmul(negated, X, out=P)
    P[:, r:].diagonal(dim1=-2, dim2=-1).add_(1)
    return P


def reflector(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Y (..., m, r) and N (..., r, r) with H = I − Y N Yᵀ orthogonal and Hᵀ Q = −[Z; 0].

    The last m − r columns of H complete Q, as those of ``complement`` do: [0; I] − Y N Y₂ᵀ, where
    Y₂ are the last rows of Y. Here Z is the polar factor of the first rows Q₁ = Z P, to rounding,
    so that N = (I + P)⁻¹ has eigenvalues from 1/2 to 1: as well conditioned as can be, at the price
    of a singular value decomposition (r, r). The orthogonality of H asks that of Z alone.

    Args:
        Q: (..., m, r) with r < m, orthonormal columns. What they lack of it is mended first.

    Returns:
        Y and N in float64. Mutates nothing; draws no random numbers.

    Source: Schreiber & Parlett 1988, Block reflectors, section 3.
    """
    r = Q.shape[-1]
    Q = _mended(Q.double())
    top = Q[..., :r, :]
    Z = _mended(_mended(_polar(top)))
    M = top.mT @ Z
    M.diagonal(dim1=-2, dim2=-1).add_(1)
    Y = Q.clone()
    Y[..., :r, :] += Z
    return Y, torch.linalg.inv(M)


def _polar(A: Tensor) -> Tensor:
    """The orthogonal polar factor of A (..., r, r) in float64, as accurate as float32.

    The first rows of orthonormal columns have 1 as a singular value many times over. There LAPACK's
    divide and conquer fails now and then in float32: seen of MKL for 307 columns of 384 rows, with
    one thread and not with two. In float64 it hasn't been seen to.
    """
    try:
        left, _, right = torch.linalg.svd(A.float())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        left, _, right = torch.linalg.svd(A)
    factor: Tensor = (left @ right).double()
    return factor


def _mended(Q: Tensor) -> Tensor:
    """The columns after one Newton–Schulz step: off from orthonormal by the square of before."""
    return Q @ (1.5 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) - 0.5 * (Q.mT @ Q))


def _factors(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(LU, Z) with A + Z = L Z U for block diagonal orthogonal Z, given by its blocks.

    U is upper triangular with a diagonal ≥ 1, L unit lower triangular; LU holds both.
    """
    LU = A.clone()
    r = A.shape[-1]
    Zs: list[Tensor] = []
    for start in range(0, r, BLOCK):
        at, after = slice(start, start + BLOCK), slice(start + BLOCK, r)
        Z, R = torch.linalg.qr(LU[:, at, at])
        sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(A.dtype)
        Z, R = Z * sign[:, None, :], R * sign[:, :, None]
        R.diagonal(dim1=-2, dim2=-1).add_(1)
        Zs.append(Z)
        LU[:, at, at] = R
        if start + BLOCK < r:
            right = Z.mT @ LU[:, at, after]
            under = torch.linalg.solve_triangular(R, LU[:, after, at], upper=True, left=False)
            LU[:, after, after].baddbmm_(under, right, alpha=-1)
            LU[:, at, after] = right
            LU[:, after, at] = under @ Z.mT
    return LU, Zs
