"""SVDs of the small factors that the iterations end in, and the polish of what comes out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg.orthonormal import looks_are_free

# Singular values below this share of the largest are noise in the square root of a float64 Gram
# matrix (1e-8), and the left vectors that come from dividing by them lose orthogonality before:
# 80 equal ones by 7·80·eps/share², which at 1e-6 is more than one polishing step mends.
GRAM_LIMIT = 1e-5
# The same for eigenvectors in float32, as the Jacobi kernel has them.
KERNEL_LIMIT = 1e-3
# Above this share float32 divides by them without a loss that one polishing step doesn't mend.
FLAT_LIMIT = 1e-2


# What a product may make of rounding before its columns are polished, by a bound that is some five
# times what it does.
POLISH_GROWTH = 4.0


class SmallSVD(NamedTuple):
    """U (b, p, rank), S (b, rank) descending and V (b, l, rank) of M (b, p, l), in M's dtype.

    ``ok`` (b,) is False where the spectrum was too steep for the way that was taken. ``growth``
    (b,) bounds how far from orthonormal U is, in roundings; it is infinite where that isn't known.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    ok: Tensor
    growth: Tensor


def leading_svd(M: Tensor, rank: int, *, safe: bool) -> SmallSVD:
    """The ``rank`` leading triplets of a batch of small or tall matrices.

    The fast way is the eigendecomposition of the float64 Gram matrix, or the Jacobi kernel where a
    block of the GPU holds the matrix or its triangle. The safe way is LAPACK's SVD in float64, and
    always ok. On a GPU the kernel doesn't synchronize; eigh does.

    Args:
        M: (b, p, l) with p ≥ l ≥ rank.
    """
    ok = torch.ones(len(M), dtype=torch.bool, device=M.device)
    growth = torch.full((len(M),), math.inf, device=M.device)
    if not safe and primitives.small_svd_backend(M) == "cuda":
        U, S, V = primitives.small_svd(M)
        ok = S.isfinite().all(-1)
        return SmallSVD(U[..., :rank], S[..., :rank], V[..., :rank], ok, growth)
    # eigh raises for NaN, which is how a factorization that broke down says so. On a CPU a look at
    # the trace of the Gram matrix takes a tenth of the time of a pass over M.
    X = M.double()
    if not looks_are_free(M):
        X = _zeroed(X)
    G = X.mT @ X
    if looks_are_free(M) and not bool(G.diagonal(dim1=-2, dim2=-1).sum().isfinite()):
        X = _zeroed(X)
        G = X.mT @ X
    if safe:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        V = Vh.mT
    else:
        S, V, ok = leading_right(G, rank, M.dtype)
        divided = V / S.unsqueeze(-2)
        lengths = G.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # ‖m‖² of the columns of M
        growth = (lengths * divided.square()).sum(-2).amax(-1).sqrt()
        # A look at a CPU's numbers is free, and float32 then takes half the time.
        flat = looks_are_free(M) and bool((S[..., -1] > FLAT_LIMIT * S[..., 0]).all())
        U = M @ divided.to(M.dtype) if flat else X @ divided
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank]
    return SmallSVD(U.to(M.dtype), S.to(M.dtype), V.to(M.dtype), ok, growth)


def leading_right(G: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(S, V, ok): leading singular values and right vectors of every X with XᵀX = G, in float64.

    By the Jacobi kernel, in ``dtype``, where a block of the GPU holds the triangle of X; else by
    the eigenvectors of G. ok (b,) is False where the spectrum is too steep for a Gram matrix.

    Args:
        G: (b, l, l) float64, finite.
    """
    ok, limit = torch.ones(len(G), dtype=torch.bool, device=G.device), GRAM_LIMIT
    if primitives.small_svd_backend(G.new_empty(G.shape, dtype=dtype)) == "cuda":
        R, info = torch.linalg.cholesky_ex(G, upper=True)
        ok, limit = info == 0, KERNEL_LIMIT
        _, S, V = primitives.small_svd(R.to(dtype))
        S, V = S[..., :rank].double(), V[..., :rank].double()
    else:
        squares, V = torch.linalg.eigh(G)
        S, V = squares.flip(-1)[..., :rank].clamp_min(0).sqrt(), V.flip(-1)[..., :rank]
    return S, V, ok & (S[..., -1] > limit * S[..., 0])


def _zeroed(X: Tensor) -> Tensor:
    """X with 0 for NaN and Inf."""
    return torch.nan_to_num(X, nan=0.0, posinf=0.0, neginf=0.0)


def polished(Q: Tensor) -> Tensor:
    """Q (3 I − QᵀQ) / 2 of nearly orthonormal columns: the nearest orthonormal ones to first
    order, one Newton–Schulz step. A defect δ becomes δ²."""
    # Half of a small Gram matrix takes longer than the whole on a CPU.
    small = looks_are_free(Q) and Q.shape[-1] < primitives.GRAM_BLOCKED_FROM
    G = Q.mT @ Q if small else primitives.gram(list(Q))
    correction = G.mul_(-0.5)
    correction.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return Q @ correction


def column_norms(X: Tensor) -> Tensor:
    """‖x‖ of each column of (b, m, r). torch's norm over rows takes ten times as long on a CPU."""
    return X.square().sum(-2).sqrt_()
