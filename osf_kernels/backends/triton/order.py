"""The order in which the programs of a launch claim its tasks.

What is read again is to be in L2 still, and a task comes behind those that it waits for; where it
waits for C, behind those that C is made from. Pure Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["Chained", "Tasks", "in_order"]

# Of numbers of tasks: where the record is, times 2³², and the number of the tile.
Tasks = list[range]


class Chained(NamedTuple):
    """The tasks of each link of a chain.

    Attributes:
        bytes: of the matrix that they read again.
        turn: its first links wait for all tasks of the turn before the last.
    """

    links: list[Tasks]
    bytes: int
    turn: int


def in_order(chains: Sequence[Chained], fill: int, room: float) -> Iterator[range]:
    """The tasks of all chains in an order that keeps what waits behind what it waits for.

    ``room``: bytes of L2 for what is read again. Chains go in groups that have work for every
    processor. The last links of a group read again what its first ones have read: they come next,
    so that it is still in L2. Where the next group finds room there too, its first links come
    before, and run while those would wait.
    """
    groups = [*_groups(chains, fill, room), []]
    ahead = False  # whether the first links of a group are through
    for group, following in itertools.pairwise(groups):
        if not ahead:
            yield from _first_links(group)
        ahead = sum(chain.bytes for chain in (*group, *following)) <= room
        ahead = ahead and not _waits(following, group)
        if ahead:
            yield from _first_links(following)
        for chain in reversed(group):
            yield from chain.links[-1]


def _waits(following: Sequence[Chained], group: Sequence[Chained]) -> bool:
    """Whether the first links of a group wait for the last ones of the group before."""
    return bool(following) and following[0].turn > group[0].turn + 1


def _first_links(group: Sequence[Chained]) -> Iterator[range]:
    """All but the last ones, those of one place in their chains side by side."""
    for place in range(max((len(chain.links) - 1 for chain in group), default=0)):
        for chain in group:
            if place < len(chain.links) - 1:
                yield from chain.links[place]


def _groups(chains: Sequence[Chained], fill: int, room: float) -> Iterator[list[Chained]]:
    """Of one turn, as many as keep the processors busy or as are read again within ``room``."""
    group: list[Chained] = []
    for chain in chains:
        tasks = 2 * sum(
            len(tiles) for each in group for links in each.links[:-1] for tiles in links
        )
        full = tasks >= fill or sum(each.bytes for each in (*group, chain)) > room
        if group and (full or chain.turn != group[0].turn):
            yield group
            group = []
        group.append(chain)
    if group:
        yield group
