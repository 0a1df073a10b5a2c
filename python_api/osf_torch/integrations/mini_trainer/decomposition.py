"""A weight's triplets, split into the frozen and the trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import truncated_svd

# How far the split's high triplets may be from those of float32, relative to σ₁: torch.linalg.svd
# leaves 5 to 15 eps.
RESIDUAL_LIMIT = 32 * torch.finfo(torch.float32).eps


def create_svd_dict(
    weight: Tensor,
    top_k: int,
    decompose_existing: bool = True,
    upcast_dtype: torch.dtype = torch.float32,
    output_dtype: torch.dtype | None = None,
    use_meta: bool = False,
) -> dict[str, Any]:
    """W = U_high diag(S_high) V_high + U_low diag(S_low) V_low, split after ``top_k`` triplets.

    Args:
        weight: (N, M), any floating dtype.
        top_k: k, how many triplets are frozen; capped to R = min(N, M).
        decompose_existing: False gives zeros of the right shapes, to be filled later.
        upcast_dtype: what the SVD is computed in, and is exact to; float32 for half precisions.
        output_dtype: of the factors; default ``upcast_dtype``.
        use_meta: with decompose_existing=False, factors on the meta device.

    Returns:
        U_high (N, k), S_high (k,), V_high (k, M): tensors; U_low (N, R − k), S_low (R − k,),
        V_low (R − k, M): parameters that require grad; rank_high: k. Contiguous, on weight's
        device. Columns of [U_high, U_low] and rows of [V_high; V_low] are orthonormal to rounding,
        S is descending.

    Raises:
        ValueError: weight isn't a matrix, is on the meta device with decompose_existing, holds
            NaN or Inf; top_k is negative.

    Mutates nothing; synchronizes; draws no random numbers.
    """
    if weight.ndim != 2:
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected weight to be a matrix, "
            f"got {tuple(weight.shape)}; a non-2D tensor is currently unsupported"
        )
    on_meta = use_meta or weight.is_meta
    if decompose_existing and on_meta:
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected a weight with data, got "
            "meta; it cannot decompose meta weights, pass decompose_existing=False"
        )
    if top_k < 0:
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected top_k to be at least 0, "
            f"got {top_k}"
        )
    m, n = weight.shape
    k = min(top_k, m, n)
    dtype = output_dtype or upcast_dtype
    if decompose_existing:
        split = _split_triplets if _splits(weight, upcast_dtype, k) else _whole_triplets
        factors = split(weight.detach().to(upcast_dtype), k, dtype)
    else:
        device = torch.device("meta") if on_meta else weight.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        p = min(m, n) - k
        factors = [(zeros(m, k), zeros(m, p)), (zeros(k), zeros(p)), (zeros(k, n), zeros(p, n))]
    svd_dict: dict[str, Any] = {}
    svd_dict |= {f"{x}_high": high for x, (high, _) in zip("USV", factors, strict=True)}
    svd_dict |= {f"{x}_low": nn.Parameter(low) for x, (_, low) in zip("USV", factors, strict=True)}
    return svd_dict | {"rank_high": k}


Factors = list[tuple[Tensor, Tensor]]  # (high, low) of U, of S, and of V in rows


def _splits(weight: Tensor, upcast_dtype: torch.dtype, k: int) -> bool:
    """Whether high and low triplets are computed apart.

    On a GPU torch.linalg.svd is Jacobi's and slow; eigenvectors of the Gram matrix and the SVD of
    the low block, (1 − ρ)³ of the work, are to be less (unmeasured). On a CPU LAPACK's SVD takes
    less time than float64 eigenvectors, and float32 ones leave 3 to 10 times its error on
    σᵢ = i^-½ (measured).
    """
    return weight.is_cuda and upcast_dtype != torch.float64 and 0 < k < min(weight.shape)


@torch.no_grad()
def _whole_triplets(W: Tensor, k: int, dtype: torch.dtype) -> Factors:
    """LAPACK's, split; at most one factor is held twice."""
    W = W if W.dtype == torch.float64 else W.float()
    if not bool(W.isfinite().all()):
        raise ValueError(
            "osf_torch.integrations.mini_trainer.create_svd_dict: expected weight to be finite, "
            "got NaN or Inf; mend it first"
        )
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    left = _own(U[:, :k], dtype), _own(U[:, k:], dtype)
    del U
    return [
        left,
        (_own(S[:k], dtype), _own(S[k:], dtype)),
        (_own(Vh[:k], dtype), _own(Vh[k:], dtype)),
    ]


@torch.no_grad()
def _split_triplets(W: Tensor, k: int, dtype: torch.dtype) -> Factors:
    """The high triplets from the Gram matrix in float64, and the SVD of what they leave."""
    A = W.double()
    high = truncated_svd(A, k, method="gram", complement=True)
    if float(high.residual) > RESIDUAL_LIMIT:
        return _whole_triplets(W, k, dtype)
    assert high.U_low is not None
    assert high.V_low is not None
    block = high.U_low.mT @ (A @ high.V_low)  # (N − k, M − k)
    low = truncated_svd(block, min(block.shape), method="exact")
    return [
        (_own(high.U, dtype), _own(high.U_low @ low.U, dtype)),
        (_own(high.S, dtype), _own(low.S, dtype)),
        (_own(high.V.mT, dtype), _own((high.V_low @ low.V).mT, dtype)),
    ]


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)
