"""The search for a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def climb(grid: Sequence[float], score: Callable[[float], float]) -> dict[float, float]:
    """Rate -> score of those tried: the two in the middle of the grid, ascending, then on in the
    direction of the better one for as long as that goes up. Each is tried once."""
    found: dict[float, float] = {}

    def at(place: int) -> float:
        rate = grid[place]
        if rate not in found:
            found[rate] = score(rate)
        return found[rate]

    low, high = len(grid) // 2 - 1, len(grid) // 2
    ahead = at(high) > at(low)
    place, stride = (high, 1) if ahead else (low, -1)
    while 0 <= place + stride < len(grid) and at(place + stride) > at(place):
        place += stride
    return found
