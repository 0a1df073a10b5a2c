"""orthonormalize: orthonormal columns of tall-skinny matrices, one batch at a time.

The fast path is Cholesky QR: products of matrices, without a decision on the host. It says for each
matrix whether its result holds. The safe path is for the others: Householder QR in float64 and the
SVD of its triangle.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.cholesky_qr import cholesky_qr, rank_tolerance, scale_columns
from osf_kernels.linalg.orthonormal.operator import admit, operator


@overload
def orthonormalize(Y: Tensor, *, return_rank: Literal[False] = False) -> Tensor: ...
@overload
def orthonormalize(Y: Tensor, *, return_rank: Literal[True]) -> tuple[Tensor, Tensor]: ...
def orthonormalize(Y: Tensor, *, return_rank: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Q with QᵀQ = I and range(Q) ⊇ range(Y).

    Where Y has full numerical rank, Q is the Q of Y's QR factorization with a positive diagonal
    of R: Q[:, :j] spans Y[:, :j] for every j. Where Y hasn't, the first ``rank`` columns span
    range(Y), in order of the singular values of Y with unit columns, and the others complete
    them; then no column of Q belongs to one of Y's.

    The numerical rank counts the singular values of Y with its columns scaled to unit norm that
    exceed 4·√m·eps·σ₁, with eps of Q's dtype: a Y in bfloat16 is taken to be exact. So the rank
    doesn't depend on the scale of a column: one of 1e-30 counts, and a zero column doesn't.

    Args:
        Y: (..., m, r) with m ≥ r, float32, bfloat16, float16 or float64.
        return_rank: also return the numerical rank.

    Returns:
        Q (..., m, r), float32 (float64 of a float64 Y), orthonormal to a few eps: LAPACK's ratio
        ‖I − QᵀQ‖₁ / (m·eps) is under 30 whatever Y is. Every column of Y lies in range(Q) but for
        some √r·eps of its norm. With return_rank also the rank, (...) int64.

    Raises:
        TypeError: Y is no tensor, sparse, or of another dtype.
        ValueError: m < r; NaN or Inf in Y; autograd differentiates Y.

    Mutates nothing; synchronizes once, and again only where a matrix takes the safe path; draws
    no random numbers; not differentiable. Two calls agree bit for bit.

    Source: Cholesky QR with a shifted first pass, Fukaya et al. 2020 (arXiv 1809.11085).
    """
    admit("orthonormalize", Y)
    Q, rank = _orthonormalize(Y)
    return (Q, rank) if return_rank else Q


def _fast(Y: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    found = cholesky_qr(Y)
    rank = torch.full((len(Y),), Y.shape[-1], device=Y.device)
    return (found.Q.to(primitives.working_dtype(Y.dtype)), rank), found.finite, found.full


def _safe(Y: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, rank) of any finite Y: Householder QR in float64, and the SVD of its triangle.

    Args:
        Y: (b, m, r) with m ≥ r, finite.

    Returns:
        Q (b, m, r) of the working dtype and rank (b,) int64, as orthonormalize promises.
    """
    dtype = primitives.working_dtype(Y.dtype)
    Q, R = torch.linalg.qr(scale_columns(Y.double()))
    norms = torch.linalg.vector_norm(R, dim=-2, keepdim=True)
    U, sigma, _ = torch.linalg.svd(R / torch.where(norms > 0, norms, 1))
    rank = (sigma > rank_tolerance(Y.shape[-2], dtype) * sigma[:, :1]).sum(-1)
    deficient = (rank < Y.shape[-1])[:, None, None]
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return torch.where(deficient, Q @ U, Q * sign[:, None, :]).to(dtype), rank


_orthonormalize = operator("orthonormalize(Tensor Y) -> (Tensor, Tensor)", _fast, _safe)
