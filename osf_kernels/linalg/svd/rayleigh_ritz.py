"""The SVDs of small factors that Rayleigh–Ritz steps end in."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives

# Lower limits of σ_r/σ₁ for left vectors A v/σ_r by eigenvectors v of a Gram matrix. Below them one
# polishing step doesn't restore the orthogonality of the left vectors. GRAM_LIMIT is for a Gram
# matrix in the dtype of the vectors.
GRAM_LIMIT = 1e-2
# For a float64 Gram matrix beside float32 vectors: singular values are noise below 1e-8, and before
# that 80 equal ones lose 7·80·eps/(σ_r/σ₁)², which at 1e-6 is too much.
DOUBLE_GRAM_LIMIT = 1e-5
# For the Jacobi kernel, which has the vectors of a triangle in float32.
KERNEL_LIMIT = 1e-3


class SmallSVD(NamedTuple):
    """The leading triplets of M (b, p, l), in M's dtype."""

    U: Tensor  # (b, p, rank)
    S: Tensor  # (b, rank), descending
    V: Tensor  # (b, l, rank)
    ok: Tensor  # (b,) False where the spectrum is too steep for the fast way
    growth: Tensor  # (b,) bound on ‖I − UᵀU‖ / eps, infinite where none is known


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
    # A factorization that broke down leaves NaN, for which eigh raises. On a CPU a look at the
    # trace of the Gram matrix takes a tenth of the time of a pass over M.
    X = M.double()
    if not cpu.looks_are_free(M):
        X = _zeroed(X)
    G = X.mT @ X
    if cpu.looks_are_free(M) and not bool(G.diagonal(dim1=-2, dim2=-1).sum().isfinite()):
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
        # Then float32 divides without loss, in half the time.
        flat = cpu.looks_are_free(M) and bool((S[..., -1] > GRAM_LIMIT * S[..., 0]).all())
        U = M @ divided.to(M.dtype) if flat else X @ divided
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank]
    return SmallSVD(U.to(M.dtype), S.to(M.dtype), V.to(M.dtype), ok, growth)


def leading_right(G: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(S, V, ok): leading singular values and right vectors of every X with XᵀX = G, in float64.

    By the Jacobi kernel, in ``dtype``, where a block of the GPU holds the triangle of X; else by
    the eigenvectors of G. ok (b,) is False where the spectrum is too steep for either.

    Args:
        G: (b, l, l) float64, finite.
    """
    ok, limit = torch.ones(len(G), dtype=torch.bool, device=G.device), DOUBLE_GRAM_LIMIT
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
