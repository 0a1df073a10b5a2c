"""A weight's factors: how they are found, and the forward pass through them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osf_kernels import truncated_svd

# From this min(m, n) on, and this share of it held high, leading triplets by eigenvectors and the
# SVD of the low block take less time than one SVD: .6 s against .9 s at 1024 with ρ = .5 on a CPU,
# even at 768. On a GPU, where LAPACK's divide and conquer isn't, unmeasured.
SPLIT_SIZE = {"cpu": 1024, "cuda": 256}
SPLIT_RATIO = 0.4


def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """W = U_high S_high V_high + U_low S_low V_low, the thin SVD split behind triplet ``top_k``.

    Args:
        weight: (m, n) of any floating dtype; computed in float32 (float64 of float64).
        top_k: how many triplets are high, at most min(m, n).

    Returns:
        U_high (m, k), S_high (k,), V_high (k, n), and the trainable parameters U_low, S_low, V_low,
        of the weight's dtype; rank_high = k. U's columns and V's rows are orthonormal, between
        high and low too.

    Raises:
        ValueError: NaN or Inf in a weight of ``SPLIT_SIZE`` and more.

    Mutates nothing; synchronises; draws no random numbers.
    """
    k = min(top_k, *weight.shape)
    if weight.is_meta:  # shapes are all there is
        U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
        V = V.mT
    else:
        W = weight.detach()
        U, S, V = _thin_svd(W if W.dtype == torch.float64 else W.float(), k)

    def kept(factor: Tensor) -> Tensor:
        return factor.to(weight.dtype).clone(memory_format=torch.contiguous_format)

    return {
        "U_high": kept(U[:, :k]),
        "S_high": kept(S[:k]),
        "V_high": kept(V[:, :k].mT),
        "U_low": nn.Parameter(kept(U[:, k:])),
        "S_low": nn.Parameter(kept(S[k:])),
        "V_low": nn.Parameter(kept(V[:, k:].mT)),
        "rank_high": k,
    }


def _thin_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of W, all min(m, n) triplets in order."""
    m, n = W.shape
    if m < n:  # LAPACK takes twice the time for a wide matrix of rows
        V, S, U = _thin_svd(W.mT.contiguous(), k)
        return U, S, V
    if n < SPLIT_SIZE.get(W.device.type, SPLIT_SIZE["cuda"]) or not SPLIT_RATIO * n <= k < n:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U, S, Vh.mT
    Q = None
    if m > n:  # the low block of what is tall is tall itself
        Q, W = torch.linalg.qr(W)
    high = truncated_svd(W, k, complement=True)
    whole = truncated_svd(W, n, method="deflated", warm_start=high)
    return whole.U if Q is None else Q @ whole.U, whole.S, whole.V


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y = base(x) + (U_low S_low V_low − the same as they began) x, in factors."""
    result: Tensor = self.base_layer(x, *args, **kwargs)
    adapter = self.active_adapters[0] if self.active_adapters else None
    if self.disable_adapters or self.merged or adapter not in self.osf_svd_params:
        return result
    params = self.osf_svd_params[adapter]
    U, S, V = params["U_low"], params["S_low"], params["V_low"]
    U0, S0, V0 = (
        getattr(self, f"_osf_{name}_init")[adapter] for name in ("U_low", "S_low", "V_low")
    )
    dtype = torch.promote_types(U.dtype, U0.dtype)
    U, S, V, U0, S0, V0 = (factor.to(dtype) for factor in (U, S, V, U0, S0, V0))
    h = self._cast_input_dtype(x, dtype)
    began = F.linear(F.linear(h, V0) * S0, U0)
    # S goes to the smaller factor: what it multiplies is kept for the backward pass.
    if h.shape[:-1].numel() > U.shape[0]:
        now = F.linear(F.linear(h, V), U * S)
    else:
        now = F.linear(F.linear(h, V) * S, U)
    return result + (now - began).to(x.dtype)
