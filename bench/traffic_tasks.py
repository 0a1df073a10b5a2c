"""What the tasks of a planned launch touch: tiles of matrices, step by step.

The Triton backend plans a launch as a list of tasks. Each task reads a record of integers, and the
docstring of ``osf_kernels/backends/triton/tasks.py`` lists the fields of a record. ``Tasks`` reads
the records as the kernel does, and yields the steps of each task. A ``Step`` names the tiles that a
program reads and writes, the FLOPs of the step, and the counters of the step. This file computes no
tile and knows no time: ``traffic`` runs the steps through a cache.

``tests/triton/interpreted_traffic.py`` compares what each task touches here with what the kernel
touches under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.l2 import LINE_BYTES

SECTOR_BYTES = 32  # Lines move between L2 and a processor in sectors of this size.


class Region(NamedTuple):
    """A tile of a matrix in memory."""

    address: int
    strides: tuple[int, int]  # The strides are in bytes.
    rows: int
    columns: int
    item: int  # An element has this many bytes.

    def lines(self) -> list[int]:
        """The cache lines that the tile lies in, in the order of their first use."""
        (down, across), rows, columns = self.strides, self.rows, self.columns
        if rows <= 0 or columns <= 0:
            return []
        if across != self.item and down == self.item:
            down, across, rows, columns = across, down, columns, rows
        starts = self.address + np.arange(rows, dtype=np.int64) * down
        if across != self.item:
            every = (starts[:, None] + np.arange(columns) * across).ravel() // LINE_BYTES
            return list(dict.fromkeys(every.tolist()))
        first, last = starts // LINE_BYTES, (starts + columns * self.item - 1) // LINE_BYTES
        most = int((last - first).max()) + 1
        every = first[:, None] + np.arange(most)
        every = every[every <= last[:, None]]
        return list(dict.fromkeys(every.tolist()))

    @property
    def bytes(self) -> int:
        """The bytes of the tile's elements."""
        return max(0, self.rows) * max(0, self.columns) * self.item

    @property
    def moved(self) -> int:
        """The bytes that move between L2 and a processor, which are whole sectors."""
        lines, width = self.rows, self.columns
        if self.strides[1] != self.item and self.strides[0] == self.item:
            lines, width = width, lines
        return max(0, lines) * -(-max(0, width) * self.item // SECTOR_BYTES) * SECTOR_BYTES


class Step(NamedTuple):
    """One step of a task: a program reads, computes and stores tiles, or waits, or counts up."""

    reads: Sequence[Region] = ()
    writes: Sequence[Region] = ()
    flops: int = 0
    # The program waits until this counter has reached this count.
    wait: tuple[int, int] | None = None
    # The program counts up this counter once everything before this step is stored.
    signal: int | None = None
    last_read: bool = False  # No task reads the written tiles again.


class View(NamedTuple):
    """A matrix that a record names."""

    address: int
    row_stride: int  # Both strides are in elements.
    column_stride: int
    rows: int
    columns: int
    item: int  # An element has this many bytes.

    def tile(self, row: int, column: int, rows: int, columns: int) -> Region:
        """The part of a tile that lies within the matrix."""
        rows, columns = min(rows, self.rows - row), min(columns, self.columns - column)
        strides = self.row_stride * self.item, self.column_stride * self.item
        address = self.address + row * strides[0] + column * strides[1]
        return Region(address, strides, rows, columns, self.item)

    @property
    def mT(self) -> View:
        """The matrix transposed, in the same memory."""
        return View(
            self.address, self.column_stride, self.row_stride, self.columns, self.rows, self.item
        )


def _part(parts: View, number: int) -> View:
    """One of the parts of a sum. The parts lie one behind the other in memory."""
    size = parts.rows * parts.columns * parts.item
    return parts._replace(address=parts.address + number * size)


class Tasks:
    """The tasks of a planned launch, in the order in which programs claim the tasks.

    A task is a pair: the place of a record, and which tile of that record the task makes. The place
    of a record is the index of the record's first field.

    Args:
        launch: the planned launch.
        metadata: the array of one call: the counters, then the addresses of the call's arguments.
    """

    def __init__(self, launch: Any, metadata: Sequence[int]) -> None:
        self.counters, count = launch.counts
        self.order = [(task >> 32, task & 0xFFFFFFFF) for task in launch.constant[:count]]
        self._records = launch.constant[count:]
        self._bases = metadata[self.counters :]
        self._config, self._constants = launch.config, launch.constants
        # For the record of each C, this is how many tiles of C are claimed so far.
        self.claimed: dict[int, int] = {}
        self.programs_per_processor: int = launch.config.programs_per_sm
        self.config = " ".join(f"{name}={value}" for name, value in launch.config._asdict().items())

    def _item(self, name: str) -> int:
        dtype: torch.dtype = self._constants[name]
        return dtype.itemsize

    def waits_for(self, place: int) -> tuple[int, int]:
        """A counter, and the count that the task waits for. A count of 0 means no wait."""
        return self._records[place + 1], self._records[place + 2]

    def counts_up(self, place: int) -> int:
        """The counter that the task counts up at its end."""
        return int(self._records[place + 3])

    def is_update(self, place: int) -> bool:
        """Whether the record is of an update. Other records are of sums."""
        return bool(self._records[place] == 3)

    def steps(self, place: int, local: int) -> Iterator[Step]:
        """The steps of a task, in the order of ``kernels/reduction.py`` and ``kernels/update.py``.

        For the record of a C, the steps are those of one tile of C.
        """
        ways = (self._sum, self._sum, self._of_C, self._update)
        return ways[self._records[place]](place, local)

    def stages(self, place: int) -> int:
        """How many steps of the task may be under way at once."""
        config = self._config
        stages: int = config.update_stages if self.is_update(place) else config.reduction_stages
        return stages

    def _view(self, at: int, rows: int, columns: int, item: int) -> View:
        place, row_stride, column_stride = self._records[at : at + 3]
        return View(self._address(place), row_stride, column_stride, rows, columns, item)

    def _address(self, place: int) -> int:
        return self._bases[place >> 48] + (place & 0xFFFFFFFFFFFF)

    def _first_part(self, place: int) -> View:
        """The first of the parts that a record's sum is cut into."""
        q, rank = self._records[place + 7], self._records[place + 12]
        padded = -(-rank // 4) * 4
        return View(self._address(self._records[place + 13]), padded, 1, q, padded, 4)

    def _sum(self, place: int, local: int) -> Iterator[Step]:
        """The steps of a tile of A or B, or of a tile of one part of A or B."""
        record, config = self._records[place : place + 37], self._config
        kind, q, length, rank = record[0], record[7], record[8], record[12]
        block_q, block_r = config.block_q, config.block_r
        chunks = -(-rank // block_r)
        panels = -(-q // block_q)
        panel, chunk = local // chunks % panels, local % chunks * block_r
        row, part = panel * block_q, local // (chunks * panels)
        x_name, basis_name, out_name, other_name = ("X", "UVAB"[kind], "AB"[kind], "VU"[kind])
        width = min(block_r, rank - chunk)
        if record[14]:
            for i in range(record[14]):
                yield Step([_part(self._first_part(place), i).tile(row, chunk, block_q, block_r)])
        else:
            x = self._view(place + 4, q, length, self._item(x_name))
            if kind == 0:
                x = self._view(place + 4, length, q, self._item(x_name)).mT
            basis = self._view(place + 9, length, rank, self._item(basis_name))
            first = part * record[34]
            for k in range(first, min(first + record[34], length), config.block_k):
                x_tile = x.tile(row, k, block_q, config.block_k)
                basis_tile = basis.tile(k, chunk, config.block_k, block_r)
                flops = 2 * x_tile.rows * x_tile.columns * width
                yield Step([x_tile, basis_tile], flops=flops)
            if record[13]:
                stored = _part(self._first_part(place), part).tile(row, chunk, block_q, block_r)
                yield Step(writes=[stored])
                return
        if record[18]:
            initial = self._view(place + 18, q, rank, self._item("INITIAL"))
            yield Step([initial.tile(row, chunk, block_q, block_r)])
        if record[36]:
            yield from self._make_C(place + record[36])
        reads = []
        other = self._view(place + 24, q, record[27], self._item(other_name))
        height, flops = min(block_q, q - row), 0
        if record[28]:
            yield Step(wait=(record[31], record[32]))
            c = self._view(place + 28, record[27], rank, 4)
            reads += [other.tile(row, 0, block_q, other.columns)]
            reads += [c.tile(0, chunk, other.columns, block_r)]
            flops = 3 * 2 * height * other.columns * width
        elif record[22]:
            reads.append(other.tile(row, chunk, block_q, block_r))
        out = self._view(place + 15, q, rank, self._item(out_name))
        yield Step(reads, [out.tile(row, chunk, block_q, block_r)], flops)
        if record[35]:
            c = place + record[35]
            yield from self._product_of_C(c, chunk, 0, width, self._records[c + 12], panel)
            made = _part(self._first_part(c), panel)
            yield Step(writes=[made.tile(chunk, 0, width, made.columns)])

    def _product_of_C(
        self, place: int, row: int, column: int, rows: int, columns: int, part: int
    ) -> Iterator[Step]:
        """The product that makes a tile of C, or of a part of C, from what is stored of A or B."""
        record, block_k = self._records[place : place + 36], self._config.block_k
        x = self._view(place + 4, record[8], record[7], self._item("FROM")).mT
        basis = self._view(place + 9, record[8], record[12], self._item("BY"))
        first = part * record[34]
        for k in range(first, min(first + record[34], record[8]), block_k):
            x_tile, basis_tile = (
                x.tile(row, k, rows, block_k),
                basis.tile(k, column, block_k, columns),
            )
            flops = 2 * x_tile.rows * x_tile.columns * basis_tile.columns
            yield Step([x_tile, basis_tile], flops=flops)

    def _make_C(self, place: int) -> Iterator[Step]:
        """The steps that make those tiles of C that no program has claimed before.

        This method claims the tiles in ``claimed``.
        """
        record = self._records[place : place + 35]
        _, tiles = self._tiles_of_C(place)
        while self.claimed.setdefault(place, 0) < tiles:
            self.claimed[place] += 1
            yield Step(wait=(record[1], record[2]))
            yield from self._of_C(place, self.claimed[place] - 1)
            yield Step(signal=record[3])

    def _tiles_of_C(self, place: int) -> tuple[int, int]:
        """How many chunks the rank is cut into, and how many tiles C has."""
        q, rank = self._records[place + 7], self._records[place + 12]
        chunks = -(-rank // self._config.block_r)
        return chunks, chunks * -(-q // self._constants["BLOCK_C"])

    def _of_C(self, place: int, tile: int) -> Iterator[Step]:
        """The steps of one tile of C: its parts or its product, and then the store."""
        record, rows, columns = self._records, self._constants["BLOCK_C"], self._config.block_r
        chunks, _ = self._tiles_of_C(place)
        q, rank = record[place + 7], record[place + 12]
        where = tile // chunks * rows, tile % chunks * columns, rows, columns
        if self._constants["C_IN_PARTS"]:
            for i in range(record[place + 14]):
                yield Step([_part(self._first_part(place), i).tile(*where)])
        else:
            yield from self._product_of_C(place, *where, 0)
        reads = []
        if record[place + 18]:
            initial = self._view(place + 18, q, rank, self._item("INITIAL"))
            reads.append(initial.tile(*where))
        out = self._view(place + 15, q, rank, 4)
        yield Step(reads, [out.tile(*where)])

    def _update(self, place: int, local: int) -> Iterator[Step]:
        """The steps of an update: a panel of rows, and a strip of columns tile by tile."""
        record, config, constants = self._records[place : place + 32], self._config, self._constants
        m, n, r, k = record[10], record[11], record[20], record[27]
        out = self._view(place + 4, m, n, self._item("OUT"))
        x = self._view(place + 7, m, n, self._item("READ"))
        left = [
            self._view(place + at, m, rank, self._item(name))
            for at, rank, name in ((14, r, "L1"), (21, k, "L2"))
            if rank
        ]
        right = [
            self._view(place + at, rank, n, self._item(name))
            for at, rank, name in ((17, r, "R1"), (24, k, "R2"))
            if rank
        ]
        panels = -(-m // config.block_m)
        row, first = local % panels * config.block_m, local // panels * record[31]
        whole = constants["WHOLE"]
        if whole:
            yield Step([view.tile(row, 0, config.block_m, view.columns) for view in left])
        for column in range(first, min(first + record[31], n), config.block_n):
            reads = [x.tile(row, column, config.block_m, config.block_n)] if record[13] else []
            reads += [view.tile(0, column, view.rows, config.block_n) for view in right]
            if not whole:
                reads += [view.tile(row, 0, config.block_m, view.columns) for view in left]
            if record[28]:
                addend = self._view(place + 28, m, n, self._item("ADDEND"))
                reads.append(addend.tile(row, column, config.block_m, config.block_n))
            stored = out.tile(row, column, config.block_m, config.block_n)
            flops = 2 * stored.rows * stored.columns * (r + k)
            yield Step(reads, [stored], flops, last_read=True)
