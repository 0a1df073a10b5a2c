"""How far what is protected of a confined weight has moved, from a few random columns of it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import free_block, free_matrix
from osf_torch.free.current import current, update_of
from osf_torch.free.merging import cut_of, part_of
from osf_torch.free.spec import Place, Spec
from osf_torch.quantized import Stored
from osf_torch.sharding import is_dtensor, local, sum_over
from osf_torch.sharing import whole as whole_of

PROBES = 8  # columns: they find a norm to a quarter, whichever direction moved
DRIFT_LIMIT = 1e-5  # after thousands of steps, of float32 bases
ROUNDED_LIMIT = 5e-3  # of bases of 16 bits, orthonormal to 4e-3
TINY = 1e-300  # in a denominator that may be zero


class Reference(NamedTuple):
    """What a weight times random columns Ω (n, c) was, in float64.

    Attributes:
        protected: H(W) Ω, of the protected part H(W) = W − U_l U_lᵀ W V_l V_lᵀ.
        whole: W Ω, of W as ``state_dict`` has it.
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
    Omega = Omega.expand(inside.shape)  # of a batch of bases
    # Two products of one shape: of more columns at once a processor may round each otherwise, and
    # ``base_moved`` compares with the first one.
    whole, within = _times(place, Omega), _times(place, inside)
    left = spec.left.to(dtype=torch.float64)
    protected = whole - left.expand(left.reduce(within.mT)).mT
    if _is_rounded_sum(place):
        whole = current(place).double().reshape(spec.matrix_shape) @ Omega
    return Reference(protected, whole)


def _is_rounded_sum(place: Place) -> bool:
    """Whether ``state_dict`` rounds the sum of W and what is beside it, as no layer does."""
    beside = place.spec.update == "beside" and place.is_attached and not place.spec.is_opaque
    return beside and place.weight.element_size() < 4 and not is_dtensor(place.weight)


@torch.no_grad()
def base_moved(place: Place, before: Reference) -> float:
    """‖W − W₀‖ / ‖W₀‖ of a weight that C stands beside, an estimate to a quarter; 0 to rounding
    where nothing has written to it."""
    return relative(alone(place), before.whole)


@torch.no_grad()
def alone(place: Place) -> Tensor:
    """W Ω in float64, without what stands beside W."""
    Omega = _probes(place.spec.right.size).to(place.device)
    Omega = Omega.expand(*place.spec.matrix_shape[:-2], *Omega.shape)
    return _times(place, Omega, alone=True)


@torch.no_grad()
def released(before: Spec, after: Spec, weight: Tensor) -> float:
    """‖P(H)‖ / ‖H‖ of the part H of a weight that ``before`` protects, where P is what ``after``
    leaves free; in float64, of a sharded weight a collective."""
    W = whole_of(weight.detach()).reshape(before.matrix_shape).double()
    H = W - _free_part(before, W)
    return float(_free_part(after, H).norm() / H.norm().clamp_min(TINY))


def _free_part(spec: Spec, W: Tensor) -> Tensor:
    """U_l U_lᵀ W V_l V_lᵀ."""
    left, right = (side.to(W.device, torch.float64) for side in (spec.left, spec.right))
    return free_matrix(free_block(W, left, right), left, right)


class Drift(NamedTuple):
    """Attributes:
    moved: ‖H(W) − H(W₀)‖ / ‖H(W₀)‖, an estimate to a quarter.
    limit: what rounding explains of it.
    """

    moved: float
    limit: float


def drift(place: Place, before: Reference) -> Drift:
    """Of the current weight; of a sharded one by a collective."""
    now = reference(place)
    moved = relative(now.protected, before.protected)
    grown = float(now.whole.norm() / before.protected.to(now.whole.device).norm().clamp_min(TINY))
    return Drift(moved, _limit(place) * max(1.0, grown))


def _limit(place: Place) -> float:
    """What rounding explains of a drift: of products in float32 over many steps, of bases, and of a
    weight that was rounded to half precision, whatever it has become since.

    It is relative to all of the weight, which is rounded as a whole: one whose free part has grown
    past what is protected may drift by as much more.
    """
    spec = place.spec
    eps = 0.0 if spec.is_opaque else torch.finfo(place.weight.dtype).eps  # which nothing rounds
    if spec.is_rounded:
        eps = max(eps, torch.finfo(torch.bfloat16).eps)
    sizes = [t.element_size() for side in (spec.left, spec.right) for t in side.tensors]
    return (ROUNDED_LIMIT if min(sizes, default=4) == 2 else DRIFT_LIMIT) + 2 * eps


def explained(place: Place) -> str:
    """What has moved the protected part by more than rounding does, and the remedy."""
    if not _is_finite(place):
        remedy = "load a checkpoint of this run"
    elif place.spec.is_opaque:
        remedy = "load the model anew, and its C by confine(model, state)"
    else:
        remedy = (
            "load a checkpoint of this run, or Confined.release(), and confine what the weights "
            "are now"
        )
    return f"{cause(place)}; {remedy}"


def cause(place: Place) -> str:
    """What has moved the protected part by more than rounding does, as far as it can be told."""
    if not _is_finite(place):
        return (
            f"its free block {place.spec.trainable[0]!r} isn't finite, as after a step with a loss "
            "or gradient that wasn't"
        )
    if place.spec.is_opaque:
        return "something has written to what the quantized weight is stored in"
    return "something has written to the weight itself"


def _is_finite(place: Place) -> bool:
    """Whether what is trained of the weight is."""
    return all(bool(torch.isfinite(local(t.detach())).all()) for t in place.trained())


def relative(now: Tensor, before: Tensor) -> float:
    """‖now − before‖ / ‖before‖."""
    before = before.to(now.device)
    return float((now - before).norm() / before.norm().clamp_min(TINY))


def _times(place: Place, columns: Tensor, *, alone: bool = False) -> Tensor:
    """The current weight's matrix times columns (..., n, c), whole on every rank; ``alone``
    without what stands beside it."""
    spec, packed = place.spec, place.stored
    adds = spec.update == "beside" and place.is_attached and not alone
    if packed is not None:
        found = _stored_times(packed, spec.name, columns)
        return found + _update_times(place, columns) if adds else found
    W = local(place.weight.detach()).double()
    cut = cut_of(spec.name, place.weight)
    if cut is None:
        if adds:
            W = W + local(update_of(place)).double()
        return W.reshape(spec.matrix_shape) @ columns
    # What this rank holds, in its place among zeros.
    _, _, rows, across = part_of(spec, cut)
    W = W.reshape(W.shape[0], spec.right.size) if spec.is_flat else W
    found = columns.new_zeros(*spec.matrix_shape[:-2], spec.left.size, columns.shape[-1])
    mine, factor = found, columns if across is None else columns[..., across, :]
    for part in () if spec.is_flat else cut.cuts:
        if part.dim < -2:
            mine = mine.narrow(part.dim, part.start, part.size)
            if factor.dim() >= -part.dim:  # of a batch of bases, and not the same for all
                factor = factor.narrow(part.dim, part.start, part.size)
    (mine if rows is None else mine[..., rows, :]).copy_(W @ factor)
    (found,) = sum_over(cut.groups, [found])
    if adds:
        found += _update_times(place, columns)
    return found


def _stored_times(packed: Stored, name: str, columns: Tensor) -> Tensor:
    """A quantized weight times columns; of a batch one matrix is dequantized at a time."""
    *lead, _, _ = packed.shape
    found = []
    for i in range(math.prod(lead)):
        W = packed.matrix(name, i, "Confined.drift").double()
        found.append(W @ (columns[i] if columns.dim() == 3 else columns))
    return torch.stack(found) if lead else found[0]


def _update_times(place: Place, columns: Tensor) -> Tensor:
    """U_l C V_lᵀ times columns, of a sharded weight or a quantized one."""
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
