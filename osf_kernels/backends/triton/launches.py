"""One kernel launch as it is planned, and the launches of sums over several programs.

Pure arithmetic. Imports torch, never triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import configs
from .views import ceil_div

__all__ = ["Group", "Launch", "SummedGroup", "split"]


class Launch(NamedTuple):
    """One kernel launch, but for the device."""

    kernel: str  # "projection", "multiply" or "gram"
    config: configs.Config
    constants: dict[str, object]  # constexpr arguments; dtypes are torch's
    metadata: list[int]  # of each call its own
    counts: tuple[int, ...]  # what the kernel is told beside the arrays, in its order
    tasks: int  # more programs than these have nothing to do
    workspace_elements: int = 0  # of float32 parts, of a kernel that has them apart
    constant: Sequence[int] = ()  # the same in every call


class Group:
    """Problems of one launch under construction."""

    def __init__(self) -> None:
        self.starts = [0]
        self.records: list[int] = []

    def add(self, tiles: int, record: Sequence[int]) -> None:
        self.starts.append(self.starts[-1] + tiles)
        self.records.extend(record)

    @property
    def problems(self) -> int:
        return len(self.starts) - 1

    @property
    def tiles(self) -> int:
        return self.starts[-1]

    @property
    def metadata(self) -> list[int]:
        return [*self.starts, *self.records]


class SummedGroup:
    """Problems of one launch under construction, and the sums of their parts."""

    def __init__(self) -> None:
        self.products = Group()
        self.sums = Group()
        self.workspace_elements = 0

    def reserve(self, parts: int, rows: int, columns: int) -> int:
        """Where so many parts start in the workspace."""
        offset = self.workspace_elements
        self.workspace_elements += parts * rows * ceil_div(columns, 4) * 4
        return offset

    def launch(self, kernel: str, config: configs.Config, constants: dict[str, object]) -> Launch:
        return Launch(
            kernel,
            config,
            constants,
            [0, 0, *self.products.metadata, *self.sums.metadata],
            (self.products.problems, self.products.tiles, self.sums.problems),
            self.products.tiles + self.sums.tiles,
            self.workspace_elements,
        )


def split(tiles: int, length: int, step: int, fill: int) -> tuple[int, int]:
    """(parts, length of a part, a multiple of step) of sums of so many ``tiles``.

    Where there is a tile for every processor, none is split.
    """
    parts = max(1, min(ceil_div(fill, max(1, tiles)), length // configs.SHORTEST_SPLIT))
    part = ceil_div(ceil_div(length, parts), step) * step
    return max(1, ceil_div(length, part)) if part else 1, part
