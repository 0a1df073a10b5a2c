"""Who wrote to weights: how a guard left them, and which of them are otherwise since.

Two things tell. torch counts the writes of plain in-place operators to a tensor; what writes to
``weight.data``, or to a DTensor's local tensor, isn't counted and shows in the weight's norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from osf_torch.protected import Protected, readable
from osf_torch.sharding import groups_of, local, sum_over


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
        self._weights = [item.weight for item in self._items]
        self._at = {id(item): i for i, item in enumerate(self._items)}
        self._places: list[tuple[torch.device, torch.dtype]] = []
        self._groups: list[_Group] = []
        self.take()

    def take(self) -> None:
        """The weights are now as the guard knows them: after a step, or pinned."""
        self._versions = [weight._version for weight in self._weights]
        if not self._uncounted:
            return
        places = [(weight.device, weight.dtype) for weight in self._weights]
        if places == self._places:
            for group in self._groups:
                group.take()
        else:
            self._places = places
            self._groups = self._grouped()

    def _grouped(self) -> list[_Group]:
        at_once = {id(item) for item in readable(self._items)}
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, (item, place) in enumerate(zip(self._items, self._places, strict=True)):
            alike.setdefault((*place, id(item) in at_once), []).append(i)
        return [
            _Group(at, [self._items[i] for i in at], at_once=bool(key[-1]))
            for key, at in alike.items()
        ]

    def changed(self, among: Sequence[Protected] | None = None) -> list[Protected]:
        """Those that are known to be otherwise, without a synchronisation or a collective."""
        chosen = self._items if among is None else among
        if not chosen:
            return []
        versions = [weight._version for weight in self._weights]
        # What torch counts, of a DTensor it counts on every rank alike.
        found = {
            i
            for i, (left, now) in enumerate(zip(self._versions, versions, strict=True))
            if left != now
        }
        every = range(len(self._items))
        wanted = set(every if among is None else [self._at[id(item)] for item in among]) - found
        for group in self._groups:
            found |= group.look(wanted)
        return [item for item in chosen if self._at[id(item)] in found] if found else []

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
        return [item for i, item in enumerate(self._items) if i in found]


class _Group:
    """The weights of one device and dtype, their norms as they were left, and what was seen.

    Args:
        at: where their items stand in the list.
        at_once: whether the host reads their norms without waiting.
    """

    def __init__(self, at: list[int], items: list[Protected], *, at_once: bool) -> None:
        self._at, self._items, self._at_once = at, items, at_once
        self._weights = [item.weight for item in items]
        self._are_plain = all(item.is_plain for item in items)
        self.take()
        self._seen = torch.zeros_like(self._left, dtype=torch.bool)

    def take(self) -> None:
        """They are now as they should be."""
        self._left = self._norms(self._weights)

    def look(self, wanted: set[int]) -> set[int]:
        """Which of ``wanted``, places in the list, differ; where that can't be read it is noted."""
        mine = [j for j, i in enumerate(self._at) if i in wanted]
        if not mine:
            return set()
        every = len(mine) == len(self._at)
        now = self._norms(self._weights if every else [self._weights[j] for j in mine])
        left = (self._left if every else self._left[mine]).to(now.device)  # it may have moved
        # NaN is as NaN was: weights that aren't finite are for verify to tell.
        differ = (now != left) & ~(now.isnan() & left.isnan())
        if not self._at_once:
            self._seen[mine] |= differ.to(self._seen.device)
            return set()
        return {self._at[j] for j, differs in zip(mine, differ.tolist(), strict=True) if differs}

    def read(self) -> set[int]:
        """The places of those that were noted, on any rank."""
        seen, self._seen = self._seen.to(torch.int32), torch.zeros_like(self._seen)
        for group in groups_of(item.sharding for item in self._items):
            mine = [
                j
                for j, item in enumerate(self._items)
                if item.sharding is not None and group in item.sharding.groups
            ]
            (seen[mine],) = sum_over([group], [seen[mine]])
        return {i for i, count in zip(self._at, seen.tolist(), strict=True) if count}

    def _norms(self, weights: Sequence[Tensor]) -> Tensor:
        """‖W‖_F of what this rank holds of each, in one call."""
        held = [weight.detach() for weight in weights]
        return torch.stack(norms(held if self._are_plain else [local(t) for t in held]))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norms of tensors of one dtype and device, of at least float32, in one call."""
    dtype = torch.float32 if tensors[0].element_size() == 2 else None
    return list(torch._foreach_norm(list(tensors), 2, dtype))
