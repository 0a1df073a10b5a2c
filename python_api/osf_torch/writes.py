"""Who wrote to weights: how a guard left them, and which of them are otherwise since.

Two things tell. torch counts the writes of plain in-place operators to a tensor; what writes to
``weight.data``, or to a DTensor's local tensor, isn't counted and shows in the weight's norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from osf_torch.protected import Protected
from osf_torch.sharding import local, sum_over


class Left:
    """How a guard left its weights.

    Norms are read at once where that costs nothing, of whole weights on a CPU. Elsewhere a look
    would wait for the device, or take a collective: there differences add up on the device, and
    ``settled`` reads them. A float32 norm shows every write that changes it by 1e-7 of itself.

    Args:
        uncounted: whether writes that torch doesn't count are looked for: what is pinned would undo
            them.
    """

    def __init__(self, items: Iterable[Protected], *, uncounted: bool) -> None:
        self._items, self._uncounted = list(items), uncounted
        self._versions: dict[int, int] = {}
        self._groups: list[_Group] = []
        self.take()

    def take(self) -> None:
        """The weights are now as the guard knows them: after a step, or pinned."""
        self._versions = {id(item): item.weight._version for item in self._items}
        alike: dict[tuple[torch.device, torch.dtype, bool], list[Protected]] = {}
        for item in self._items if self._uncounted else ():
            held = local(item.weight.detach())
            alike.setdefault((held.device, held.dtype, item.is_readable), []).append(item)
        if [*alike.values()] == [group.items for group in self._groups]:
            for group in self._groups:
                group.left = _norms(group.items)
        else:
            self._groups = [_Group(items) for items in alike.values()]

    def changed(self, among: Sequence[Protected] | None = None) -> list[Protected]:
        """Those that are known to be otherwise, without a synchronisation or a collective."""
        chosen = self._items if among is None else among
        found = {id(item) for item in chosen if self._is_counted(item)}
        uncounted = {id(item) for item in chosen} - found
        for group in self._groups:
            found |= group.look(uncounted)
        return [item for item in chosen if id(item) in found]

    def settled(self) -> list[Protected]:
        """All that are otherwise, or were between two steps, since this was called last.

        Synchronises; of sharded weights a collective, and every rank has the same answer.
        """
        found = {id(item) for item in (*self.changed(), *self.noticed())}
        return [item for item in self._items if id(item) in found]

    def noticed(self) -> list[Protected]:
        """Those that were otherwise between two steps, where that couldn't be read at once.

        Synchronises and communicates as ``settled``.
        """
        found = set().union(*(group.read() for group in self._groups))
        return [item for item in self._items if id(item) in found]

    def _is_counted(self, item: Protected) -> bool:
        """Whether torch has counted a write since; of a DTensor on every rank alike."""
        return self._versions[id(item)] != item.weight._version


class _Group:
    """The weights of one device and dtype, their norms as they were left, and what was seen."""

    def __init__(self, items: list[Protected]) -> None:
        self.items = items
        self.left = _norms(items)
        self._seen = torch.zeros_like(self.left, dtype=torch.bool)

    def look(self, wanted: set[int]) -> set[int]:
        """The ids of those among ``wanted`` that differ; where that can't be read it is noted."""
        at = [i for i, item in enumerate(self.items) if id(item) in wanted]
        if not at:
            return set()
        now = _norms([self.items[i] for i in at])
        left = self.left if len(at) == len(self.items) else self.left[at]
        # NaN is as NaN was: weights that aren't finite are for verify to tell.
        differ = (now != left) & ~(now.isnan() & left.isnan())
        if self.items[0].is_readable:
            return {
                id(self.items[i]) for i, differs in zip(at, differ.tolist(), strict=True) if differs
            }
        self._seen[at] = self._seen[at] | differ
        return set()

    def read(self) -> set[int]:
        """The ids of those that were noted, on any rank."""
        seen, self._seen = self._seen.to(torch.int32), torch.zeros_like(self._seen)
        shards = {id(s.group): s.group for item in self.items if (s := item.sharding) is not None}
        for key, group in shards.items():
            at = [
                i
                for i, item in enumerate(self.items)
                if item.sharding and id(item.sharding.group) == key
            ]
            (seen[at],) = sum_over(group, [seen[at]])
        return {id(item) for item, count in zip(self.items, seen.tolist(), strict=True) if count}


def _norms(items: Sequence[Protected]) -> Tensor:
    """‖W‖_F of what this rank holds of each, of at least float32, in one call."""
    held = [local(item.weight.detach()) for item in items]
    dtype = torch.float32 if held[0].element_size() == 2 else None
    return torch.stack(list(torch._foreach_norm(held, 2, dtype)))
