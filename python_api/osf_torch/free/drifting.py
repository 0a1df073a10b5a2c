"""How far what is protected of a confined weight has moved, from a few random columns of it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from osf_torch.free.functions import update_of
from osf_torch.free.merging import part_of
from osf_torch.free.spec import Place
from osf_torch.sharding import local, sharding_of, sum_over
from osf_torch.sharing import whole as whole_of

PROBES = 8  # columns: they find a norm to a quarter, whichever direction moved
TINY = 1e-300  # in a denominator that may be zero


class Reference(NamedTuple):
    """What a weight times random columns Ω (n, c) was, in float64.

    Attributes:
        protected: H(W) Ω, of the protected part H(W) = W − U_l U_lᵀ W V_l V_lᵀ.
        whole: W Ω.
    """

    protected: Tensor
    whole: Tensor


@torch.no_grad()
def reference(place: Place) -> Reference:
    """Of the current weight; of a sharded one whole on every rank, by a collective."""
    spec = place.spec
    device = place.device
    spec.follow(device)
    Omega = _probes(spec.right.size).to(device)
    right = spec.right.to(dtype=torch.float64)
    inside = right.expand(right.reduce(Omega.mT)).mT  # V_l V_lᵀ Ω
    both = _times(place, torch.cat([Omega.expand_as(inside), inside], -1))
    whole, within = both[..., :PROBES], both[..., PROBES:]
    left = spec.left.to(dtype=torch.float64)
    free = left.expand(left.reduce(within.mT)).mT
    return Reference(whole - free, whole)


def drift(place: Place, before: Reference) -> float:
    """‖H(W) − H(W₀)‖ / ‖H(W₀)‖, an estimate to a quarter."""
    return relative(reference(place).protected, before.protected)


def relative(now: Tensor, before: Tensor) -> float:
    """‖now − before‖ / ‖before‖."""
    before = before.to(now.device)
    return float((now - before).norm() / before.norm().clamp_min(TINY))


def _times(place: Place, columns: Tensor) -> Tensor:
    """The current weight's matrix times columns (..., n, c), whole on every rank."""
    spec = place.spec
    W = local(place.weight.detach()).double()
    cut = sharding_of(place.weight)
    if cut is None:
        if spec.update == "beside" and place.is_attached:
            W = W + update_of(place).double()
        return W.reshape(spec.matrix_shape) @ columns
    # What this rank holds, in its place among zeros.
    _, _, rows, across = part_of(spec, cut)
    W = W.reshape(W.shape[0], spec.right.size) if spec.is_flat else W
    lead = spec.matrix_shape[:-2]
    found = columns.new_zeros(*lead, spec.left.size, columns.shape[-1])
    if across is not None:
        found += W @ columns[..., across, :]
    else:
        dim = -2 if rows is not None else cut.dim
        found.narrow(dim, cut.start, cut.size).copy_(W @ columns)
    (found,) = sum_over(cut.group, [found])
    if spec.update == "beside" and place.is_attached:
        found += _update_times(place, columns)
    return found


def _update_times(place: Place, columns: Tensor) -> Tensor:
    """U_l C V_lᵀ times columns, of a sharded weight."""
    spec = place.spec
    left, right = (side.to(dtype=torch.float64) for side in (spec.left, spec.right))
    inner = right.reduce(columns.mT).mT  # (..., q, c)
    for factor in reversed(place.trained()):
        inner = whole_of(factor.detach()).double() @ inner
    return left.expand(inner.mT).mT


@lru_cache(maxsize=64)
def _probes(n: int) -> Tensor:
    """Random columns (n, c), the same every time, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(n)
    return torch.randn(n, PROBES, generator=generator, dtype=torch.float64, device="cpu")
