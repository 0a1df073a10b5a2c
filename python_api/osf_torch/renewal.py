"""What Guard.next_task protects next: the leading directions of the weights as they are now."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import nn

from osf_torch import measures
from osf_torch.protected import Protected
from osf_torch.refresh import refresh
from osf_torch.selection import Rank, Ranks, listed
from osf_torch.subspaces import Subspace, Subspaces


def ranks_of(
    items: Sequence[Protected],
    subspaces: Mapping[str, Subspace],
    ranks: Ranks | None,
    widen: Rank | None,
) -> Ranks:
    """The ranks that were given, or those of ``subspaces``, widened.

    Raises:
        ValueError, TypeError: as ``Guard.next_task``.
    """
    if ranks is not None and widen is not None:
        raise ValueError(
            "osf_torch.Guard.next_task: expected ranks or widen, got both; ranks says the new "
            "ranks, widen how much the present ones grow"
        )
    _require_renewable(items, subspaces)
    if ranks is not None:
        return ranks
    return {
        item.name: _widened(
            measures.rank_of(subspaces[item.name], item.weight.shape),
            min(item.weight.shape),
            0 if widen is None else widen,
        )
        for item in items
    }


def renewed(
    model: nn.Module,
    items: Sequence[Protected],
    subspaces: Mapping[str, Subspace],
    ranks: Ranks,
    *,
    deflate: bool,
    options: Mapping[str, Any],
) -> tuple[Subspaces, list[Protected]]:
    """New subspaces of the items' weights, and items that hold them, in the same order.

    Args:
        deflate: whether the protected parts are as they were, so that only the low block of a
            weight may differ, of which both low bases were kept.
        options: of ``refresh``.

    Raises:
        ValueError: as ``refresh``; ranks that leave a weight out.
    """
    if deflate and isinstance(subspaces, Subspaces):
        # Not a warm start from the triplets alone: pinned as they are, W maps their span to
        # itself, and iterating from it never finds what outgrew it.
        kept = [subspaces[item.name].svd for item in items]
        if all(svd is not None and svd.U_low is not None for svd in kept):
            options = {"previous": subspaces, "keep": "all", "complement": True, **options}
    keys = {id(item.weight) for item in items}
    found = refresh(model, ranks, filter=lambda _, parameter: id(parameter) in keys, **options)
    lost = [item.name for item in items if item.name not in found]
    if lost:
        raise ValueError(
            "osf_torch.Guard.next_task: expected ranks that leave each weight something to protect "
            f"and to train, got none for {listed(lost)}; give its rank as an int"
        )
    return found, [Protected(item.name, item.weight, found[item.name]) for item in items]


def _require_renewable(items: Collection[Protected], subspaces: Mapping[str, Subspace]) -> None:
    """Refuses what ``refresh`` can't decompose, or would put something else in the place of."""
    batched = [item.name for item in items if item.weight.dim() != 2]
    if batched:
        raise ValueError(
            f"osf_torch.Guard.next_task: expected 2-D weights, got batched ones: {listed(batched)};"
            " refresh takes matrices: give such weights a guard of their own, and protect them "
            "again with bases of yours"
        )
    other = [item.name for item in items if subspaces[item.name].S is None]
    if other:
        raise ValueError(
            "osf_torch.Guard.next_task: expected subspaces with S, triplets of the weights, got "
            f"others for {listed(other)}; triplets of as many directions would take their place. "
            "Extend them by input_subspaces(..., previous=guard.subspaces), or call refresh, and "
            "protect the model with what you choose"
        )


def _widened(rank: int, short: int, widen: object) -> int:
    """The rank and ``widen`` more directions, or a share of ``short``; at most ``short``."""
    if isinstance(widen, bool) or not isinstance(widen, Real):
        raise TypeError(
            "osf_torch.Guard.next_task: expected widen to be an int or a float in [0, 1], got "
            f"{widen!r}"
        )
    count = isinstance(widen, Integral)
    if not 0 <= float(widen) <= (math.inf if count else 1):
        raise ValueError(
            "osf_torch.Guard.next_task: expected widen to be an int of at least 0 or a float in "
            f"[0, 1], got {widen!r}; pass ranks for smaller ones"
        )
    more = float(widen) if count else round(float(widen) * short) or float(widen) > 0
    return max(1, int(min(short, rank + more)))
