"""What is protected in the next task: the leading directions of the weights as they are now, or
what was protected and what the weights read beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Protocol

from torch import Tensor, nn

from osf_torch.coverage import log, named_in, require_others
from osf_torch.grown import Grown
from osf_torch.inputs import input_subspaces
from osf_torch.refresh import refresh
from osf_torch.selection import Rank, Ranks, is_named, listed, named_weights
from osf_torch.subspaces import Subspace, Subspaces


class Named(Protocol):
    """A weight by its name in the model."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def matrix_shape(self) -> tuple[int, ...]: ...


def ranks_of(
    items: Sequence[Named],
    present: Mapping[str, int],
    ranks: Ranks | None,
    widen: Rank | None,
    operator: str,
) -> Ranks:
    """The ranks that were given, or the present ones, widened. A turn that was given neither, so
    that nobody has chosen to decompose the weights, is told what forgets less.

    Raises:
        ValueError, TypeError: as ``Guard.next_task``.
    """
    if ranks is not None and widen is not None:
        raise ValueError(
            f"osf_torch.{operator}: expected ranks or widen, got both; ranks says the new "
            "ranks, widen how much the present ones grow"
        )
    if ranks is not None:
        return ranks
    if widen is None:
        log.warning(
            "osf_torch.%s: without batches the weights are decomposed as they are now, which holds "
            "less of the task that ends than what they read in it: pass some of its inputs as "
            "batches=, or widen=0 where there are none",
            operator,
        )
        widen = 0
    short = {item.name: min(item.matrix_shape[-2:]) for item in items}
    return {name: _widened(present[name], short[name], widen, operator) for name in short}


def renewed(
    model: nn.Module,
    items: Sequence[Named],
    *,
    ranks: Ranks,
    previous: Mapping[str, Subspace] | None,
    leave_out: Collection[str],
    options: Mapping[str, Any],
    operator: str,
) -> Subspaces:
    """New subspaces of the items' weights, in the same order.

    Args:
        previous: what was protected, where the protected parts are as they were, so that only the
            low block of a weight may differ, of which both low bases were kept.
        leave_out: what was left out by name so far; what ``options`` leave out comes to it.
        options: of ``refresh``.

    Raises:
        ValueError: as ``refresh``; ranks that leave a weight out.
        TypeError: an option that ``refresh`` doesn't have, or that is decided here.
    """
    _require_options(refresh, {"model", "ranks", "filter"}, options, operator)
    if isinstance(previous, Subspaces):
        # Not a warm start from the triplets alone: pinned as they are, W maps their span to
        # itself, and iterating from it never finds what outgrew it.
        kept = [previous[item.name].svd for item in items]
        if all(svd is not None and svd.U_low is not None for svd in kept):
            options = {"previous": previous, "keep": "all", "complement": True, **options}
    keys = {id(item.weight) for item in items}
    options = {**options, "leave_out": _left_out(model, keys, leave_out, options, operator)}
    found = refresh(model, ranks, filter=lambda _, parameter: id(parameter) in keys, **options)
    lost = [item.name for item in items if item.name not in found]
    if lost:
        raise ValueError(
            f"osf_torch.{operator}: expected ranks that leave each weight something to protect "
            f"and to train, got none for {listed(lost)}; give its rank as an int"
        )
    return found


def grown(
    model: nn.Module,
    items: Sequence[Named],
    *,
    batches: Iterable[Any],
    previous: Mapping[str, Subspace],
    leave_out: Collection[str],
    options: Mapping[str, Any],
    operator: str,
) -> Grown:
    """``previous`` of the items' weights, grown by what these read on batches, in the same order.

    Args:
        leave_out: as of ``renewed``.
        options: of ``input_subspaces``.

    Raises:
        ValueError: as ``input_subspaces``.
        TypeError: an option that ``input_subspaces`` doesn't have, or that is decided here.
    """
    decided = {"model", "batches", "previous", "filter"}
    _require_options(input_subspaces, decided, options, operator)
    keys = {id(item.weight) for item in items}
    options = {**options, "leave_out": _left_out(model, keys, leave_out, options, operator)}
    found = input_subspaces(
        model,
        batches,
        previous={item.name: previous[item.name] for item in items},
        filter=lambda _, parameter: id(parameter) in keys,
        **options,
    )
    order = {item.name: found[item.name] for item in items}
    return Grown(order, coverage=found.coverage, released=found.released)


def require_by_inputs(ranks: Ranks | None, widen: Rank | None, operator: str) -> None:
    """Refuses ranks of a turn whose inputs decide them."""
    given = [name for name, value in (("ranks", ranks), ("widen", widen)) if value is not None]
    if given:
        raise ValueError(
            f"osf_torch.{operator}: expected ranks and widen to be left out with batches, got "
            f"{listed(given)}; energy and min_free say how far bases grow by inputs"
        )


def _require_options(
    make: Callable[..., object], decided: set[str], options: Mapping[str, Any], operator: str
) -> None:
    known = set(inspect.signature(make).parameters) - decided
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"osf_torch.{operator}: expected options of {make.__name__}, "
            f"{', '.join(sorted(known))}, got {listed(unknown)}"
        )


def _left_out(
    model: nn.Module,
    keys: Collection[int],
    leave_out: Collection[str],
    options: Mapping[str, Any],
    operator: str,
) -> list[str]:
    """The names of what is left out, so far and by ``options``, beside the weights themselves.

    Raises:
        ValueError: ``options`` have one of the weights by its name.
    """
    require_others(model, options.get("leave_out"), keys, operator)
    patterns = [*leave_out, *named_in(model, options.get("leave_out"), None, operator)]
    return [
        name
        for name, parameter in named_weights(model).items()
        if id(parameter) not in keys and is_named([name], patterns)
    ]


def require_triplets(items: Sequence[Named], subspaces: Mapping[str, Subspace]) -> None:
    """Refuses subspaces that ``refresh`` would put something else in the place of."""
    other = [item.name for item in items if subspaces[item.name].S is None]
    if other:
        raise ValueError(
            "osf_torch.Guard.next_task: expected subspaces with S, triplets of the weights, got "
            f"others for {listed(other)}; triplets of as many directions would take their place. "
            "Pass batches=, which extends them by what the weights read, or call refresh and "
            "protect the model with what it returns"
        )


def _widened(rank: int, short: int, widen: object, operator: str) -> int:
    """The rank and ``widen`` more directions, or a share of ``short``; at most ``short``."""
    if isinstance(widen, bool) or not isinstance(widen, Real):
        raise TypeError(
            f"osf_torch.{operator}: expected widen to be an int or a float in [0, 1], got {widen!r}"
        )
    count = isinstance(widen, Integral)
    if not 0 <= float(widen) <= (math.inf if count else 1):
        raise ValueError(
            f"osf_torch.{operator}: expected widen to be an int of at least 0 or a float in "
            f"[0, 1], got {widen!r}; pass ranks for smaller ones"
        )
    more = float(widen) if count else round(float(widen) * short) or float(widen) > 0
    return max(1, int(min(short, rank + more)))
