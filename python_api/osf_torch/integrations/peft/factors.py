"""A weight's factors as PEFT has them, and the forward pass through them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def decompose_weight_matrix(weight: Tensor, top_k: int) -> dict[str, Any]:
    """W = U_high S_high V_high + U_low S_low V_low, the thin SVD split behind triplet ``top_k``.

    PEFT's own factors to the bit, without PEFT. Any others would do for training, and none for an
    adapter: PEFT saves what the low factors are and decomposes the weight anew for what they were.

    Args:
        weight: (m, n) of any floating dtype; computed in float32, as PEFT does of float64 too.
        top_k: how many triplets are high, at most min(m, n).

    Returns:
        U_high (m, k), S_high (k,), V_high (k, n), and the trainable parameters U_low, S_low, V_low,
        of the weight's dtype; rank_high = k. U's columns and V's rows are orthonormal, between
        high and low too.

    Raises:
        ValueError: NaN or Inf.

    Mutates nothing; synchronises; draws no random numbers.
    """
    W = weight.detach().float()
    if not W.is_meta and not bool(W.isfinite().all()):
        raise ValueError(
            "osf_torch.integrations.peft.decompose_weight_matrix: expected weight to be finite, "
            "got NaN or Inf; mend it first"
        )
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    k = min(top_k, *weight.shape)

    def kept(factor: Tensor) -> Tensor:
        return factor.to(weight.dtype).clone(memory_format=torch.contiguous_format)

    return {
        "U_high": kept(U[:, :k]),
        "S_high": kept(S[:k]),
        "V_high": kept(V[:k]),
        "U_low": nn.Parameter(kept(U[:, k:])),
        "S_low": nn.Parameter(kept(S[k:])),
        "V_low": nn.Parameter(kept(V[k:])),
        "rank_high": k,
    }


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y = base(x) + (U_low S_low V_low − the same as they began) x, in factors.

    U S v − U₀ S₀ v₀ with v = V x and v₀ = V₀ x is (U − U₀) S v + U₀ (S₀ (v − v₀) + (S − S₀) v):
    every term has a difference of factors, which is 0 for those that haven't moved. So an untouched
    adapter adds 0 whatever kernels, dtypes and compilers make of it, and in half precision what
    training moved is not lost in what it began from.
    """
    result: Tensor = self.base_layer(x, *args, **kwargs)
    adapter = self.active_adapters[0] if self.active_adapters else None
    if self.disable_adapters or self.merged or adapter not in self.osf_svd_params:
        return result
    params = self.osf_svd_params[adapter]
    U, S, V = params["U_low"], params["S_low"], params["V_low"]
    # FSDP2 may have rounded what trains to a lower precision: what it began from is rounded alike.
    U0, S0, V0 = (
        getattr(self, f"_osf_{name}_init")[adapter].to(U.dtype)
        for name in ("U_low", "S_low", "V_low")
    )
    h = self._cast_input_dtype(x, U.dtype)
    moved = F.linear(h, V - V0)
    v = F.linear(h, V0) + moved
    # S goes to the smaller factor: what it multiplies is kept for the backward pass.
    if h.shape[:-1].numel() > U.shape[0]:
        turned = F.linear(v, (U - U0) * S)
    else:
        turned = F.linear(v * S, U - U0)
    delta = turned + F.linear(S0 * moved + (S - S0) * v, U0)
    return result + delta.to(x.dtype)
