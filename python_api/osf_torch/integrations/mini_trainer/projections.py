"""The two projections of a layer's low factors, and those of a whole model at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osf_kernels import Basis, apply_, coefficients, padded, project_, project_many_
from osf_torch.integrations.mini_trainer.layout import (
    SVDDict,
    aligned,
    gathered,
    rank_of_shards,
    whole,
)
from osf_torch.integrations.mini_trainer.low_bases import low_basis
from osf_torch.sharding import is_dtensor, local

Spans = Literal["high", "low"]


@torch.no_grad()
def project_gradient_to_orthogonal_space(
    svd_dict: SVDDict, *, skip_u: bool = False, cache_holder: nn.Module | None = None
) -> None:
    """dU ← (I − U_high U_highᵀ) dU and dV ← dV (I − V_highᵀ V_high), in place.

    Args:
        svd_dict: factors as from :func:`create_svd_dict`, plain or DTensors; a ``.grad`` that is
            None is left out.
        skip_u: leave dU alone, for a caller that projects it itself.
        cache_holder: the module that owns the factors. With one, the smaller of the high basis
            and its complement is used, and V_high is cached on it where OSFT_CACHE_V is set.

    Raises:
        ValueError: shapes that don't fit, a placement that isn't Replicate or Shard, V_high with
            fewer rows than rank_high on a single rank.

    Mutates the gradients; a collective only where they, or V_high, are sharded.
    """
    _project_factors(svd_dict, _gradient, skip_u, cache_holder)


@torch.no_grad()
def project_parameter_to_orthogonal_space(
    svd_dict: SVDDict, *, skip_u: bool = False, cache_holder: nn.Module | None = None
) -> None:
    """U_low ← (I − U_high U_highᵀ) U_low and V_low ← V_low (I − V_highᵀ V_high), in place.

    Args, Raises: as :func:`project_gradient_to_orthogonal_space`, for the parameters themselves.

    Mutates U_low and V_low; a collective only where they, or V_high, are sharded.
    """
    _project_factors(svd_dict, _value, skip_u, cache_holder)


def project_gradients(model: nn.Module) -> None:
    """:func:`project_gradient_to_orthogonal_space` for every OSFT module of a model at once."""
    _project_model(model, _gradient)


def project_parameters(model: nn.Module) -> None:
    """:func:`project_parameter_to_orthogonal_space` for every OSFT module of a model at once."""
    _project_model(model, _value)


Pick = Callable[[Tensor], Tensor | None]


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def _value(parameter: Tensor) -> Tensor | None:
    return parameter.data


class _Side(NamedTuple):
    """One local projection: x ← x − H x (dim 0) or x − x H (dim 1), H the basis' protected span.

    ``groups`` are those over which the coefficients are summed.
    """

    x: Tensor
    basis: Basis
    dim: int
    groups: tuple[dist.ProcessGroup, ...]

    @property
    def bases(self) -> tuple[Basis | None, Basis | None]:
        return (self.basis, None) if self.dim == 0 else (None, self.basis)


def _project_factors(svd_dict: SVDDict, pick: Pick, skip_u: bool, holder: nn.Module | None) -> None:
    sides = [] if skip_u else _sides(svd_dict, pick, "U", holder)
    _project(sides + _sides(svd_dict, pick, "V", holder))


@torch.no_grad()
def _project_model(model: Any, pick: Pick) -> None:
    names = ("osft_params", "osft_U_high", "osft_S_high", "osft_V_high")
    sides, waiting = [], []
    for module in model.modules():
        if not all(hasattr(module, name) for name in names):
            continue
        svd_dict = model.get_svd_dict_for_module(module)
        sides += _sides(svd_dict, pick, "U", module)
        if is_dtensor(svd_dict["V_high"]) or rank_of_shards(svd_dict) is not None:
            waiting.append((svd_dict, module))
        else:
            sides += _sides(svd_dict, pick, "V", module)
    _project(sides)
    for svd_dict, module in waiting:  # one gathered V_high in memory at a time
        _project(_sides(svd_dict, pick, "V", module))


def _project(sides: Iterable[_Side]) -> None:
    alone: list[_Side] = []
    summed: dict[tuple[object, ...], list[_Side]] = {}
    for side in sides:
        if side.groups:
            key = (side.groups, side.x.device, side.x.dtype == torch.float64)
            summed.setdefault(key, []).append(side)
        else:
            alone.append(side)
    if len(alone) == 1:
        project_(alone[0].x, *alone[0].bases)
    elif alone:
        lefts, rights = zip(*(side.bases for side in alone), strict=True)
        project_many_([side.x for side in alone], lefts, rights)
    for members in summed.values():
        _project_summed(members)


def _project_summed(sides: list[_Side]) -> None:
    """Coefficients of all sides in one all-reduce a group, which all of them share."""
    halves = [list(coefficients(side.x, *side.bases)) for side in sides]
    parts = [half[side.dim] for half, side in zip(halves, sides, strict=True)]
    flat = torch.cat([part.flatten() for part in parts])
    for group in sides[0].groups:
        dist.all_reduce(flat, group=group)
    totals = flat.split([part.numel() for part in parts])
    for side, half, part, total in zip(sides, halves, parts, totals, strict=True):
        half[side.dim] = padded(total.view(part.shape))
        apply_(side.x, *side.bases, half[0], half[1])


def _sides(svd_dict: SVDDict, pick: Pick, letter: str, holder: nn.Module | None) -> list[_Side]:
    """The side of one letter, none where there is no gradient. Gathers a sharded V_high."""
    x, high = pick(svd_dict[f"{letter}_low"]), svd_dict[f"{letter}_high"]
    if x is None:
        return []
    dim = 0 if letter == "U" else 1  # the one that is summed over
    rank = rank_of_shards(svd_dict)
    if rank is not None:
        high = local(high)
    spans: Spans = "high"
    if dim == 1 and holder is not None and _caches_v():
        held = _cached_v(high, rank, holder)
    elif dim == 1 and rank is not None:
        held = gathered(high, rank)
    else:
        low = None if holder is None or rank is not None else low_basis(high, dim)
        held, spans = (high, "high") if low is None else (low, "low")
    x, held, groups = aligned(x, held, dim, letter)
    if dim == 0 and rank is not None:
        assert dist.group.WORLD is not None
        groups = (dist.group.WORLD,)
    return [_Side(x, Basis(held if dim == 0 else held.mT, spans), dim, groups)]


PEER = "mini_trainer.osft_utils"
_CACHE = "_osft_v_high_full"  # mini_trainer's name, which its reinitialization deletes


def _caches_v() -> bool:
    peer = sys.modules.get(PEER)
    default = os.getenv("OSFT_CACHE_V", "0") == "1"
    return bool(getattr(peer, "OSFT_CACHE_V", default))


def _cached_v(V_high: Tensor, rank: int | None, holder: nn.Module) -> Tensor:
    cached: Tensor | None = getattr(holder, _CACHE, None)
    if cached is None:
        full = whole(V_high) if rank is None else gathered(V_high, rank)
        cached = full.detach()  # no parameter, which the module would register
        setattr(holder, _CACHE, cached)
    return cached
