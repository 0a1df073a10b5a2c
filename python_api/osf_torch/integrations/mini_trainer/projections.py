"""The two projections of a layer's low factors, and those of a whole model at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from osf_kernels import Basis
from osf_torch.integrations.mini_trainer.layout import (
    SVDDict,
    aligned,
    gathered,
    held_here,
    rank_of_shards,
    whole,
)
from osf_torch.integrations.mini_trainer.low_bases import lists_of, low_basis
from osf_torch.lists import Entry, MatrixList, Side
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


class _Low(NamedTuple):
    """A low factor, or its gradient, to be projected on one side: what is held of it here.

    Attributes:
        held: the rows (of U's side) or columns (of V's) of the high basis or of its complement that
            fit x.
        source: what ``held`` comes from: of the module, or gathered for this call.
        whose: the module's id, and which factor it is.
    """

    x: Tensor
    held: Tensor
    spans: Spans
    side: Side
    source: Tensor
    whose: tuple[int, str]

    @property
    def is_lasting(self) -> bool:
        """Whether the basis lies where the module holds it, to be found there at the next call."""
        return self.held.data_ptr() == local(self.source).data_ptr()

    def basis(self) -> Basis:
        return Basis(self.held if self.side.dim == -2 else self.held.mT, self.spans)


def _project_factors(svd_dict: SVDDict, pick: Pick, skip_u: bool, holder: nn.Module | None) -> None:
    lows = [] if skip_u else _lows(svd_dict, pick, "U", holder)
    _project(lows + _lows(svd_dict, pick, "V", holder), holder)


@torch.no_grad()
def _project_model(model: Any, pick: Pick) -> None:
    names = ("osft_params", "osft_U_high", "osft_S_high", "osft_V_high")
    lows, waiting = [], []
    for module in model.modules():
        if not all(hasattr(module, name) for name in names):
            continue
        svd_dict = model.get_svd_dict_for_module(module)
        lows += _lows(svd_dict, pick, "U", module)
        if is_dtensor(svd_dict["V_high"]) or rank_of_shards(svd_dict) is not None:
            waiting.append((svd_dict, module))
        else:
            lows += _lows(svd_dict, pick, "V", module)
    _project(lows, model)
    for svd_dict, module in waiting:  # one gathered V_high in memory at a time
        _project(_lows(svd_dict, pick, "V", module), module)


def _project(lows: Sequence[_Low], holder: nn.Module | None) -> None:
    """All at once, those of shards by one collective a group."""
    xs = [low.side.view(low.x) for low in lows]

    def entries() -> list[Entry]:
        return [low.side.entry(low.basis()) for low in lows]

    if holder is None or not all(low.is_lasting for low in lows):
        MatrixList(xs, entries()).run_(xs)
        return
    keys = [
        (low.whose, (id(low.source), low.held.data_ptr(), low.spans), low.side.groups)
        for low in lows
    ]
    lists_of(holder).run_(keys, xs, entries, [(low.source, low.held) for low in lows])


def _lows(svd_dict: SVDDict, pick: Pick, letter: str, holder: nn.Module | None) -> list[_Low]:
    """That of one letter, none where there is no gradient. Gathers a sharded V_high."""
    x, high = pick(svd_dict[f"{letter}_low"]), held_here(svd_dict[f"{letter}_high"])
    if x is None:
        return []
    dim = 0 if letter == "U" else 1  # the one that is summed over
    rank = rank_of_shards(svd_dict)
    spans: Spans = "high"
    if dim == 1 and holder is not None and _caches_v():
        source = _cached_v(high, rank, holder)
    elif dim == 1 and rank is not None:
        source = gathered(high, rank)
    else:
        low = None if holder is None or rank is not None else low_basis(high, dim)
        source, spans = (high, "high") if low is None else (low, "low")
    x, held, groups = aligned(x, source, dim, letter)
    if dim == 0 and rank is not None:
        assert dist.group.WORLD is not None
        groups = (dist.group.WORLD,)
    return [_Low(x, held, spans, Side(dim - 2, groups), source, (id(holder), letter))]


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
