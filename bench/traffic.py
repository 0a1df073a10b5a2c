"""What a projection moves between memory, L2 and processors, and the time that follows: a model.

The tasks of the launch that the Triton backend plans are run in a model: so many programs at once,
each of which claims the next task, waits where it must, asks for the tiles of a step while those
before are under way, and stores. Tiles come through a cache of the device's size (``l2``). What is
taken for granted of a device is in ``Device``. The bytes are counts. The times are the least that
this schedule allows: what instructions and latencies take beyond that is left out.

``tests/triton/interpreted_traffic.py`` holds what each task touches against what the kernel itself
touches under Triton's interpreter.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.l2 import LINE_BYTES, Cache

MIB = 1 << 20
SECTOR_BYTES = 32  # what is moved of a line


class Device(NamedTuple):
    """What the model assumes of a GPU.

    Sources: of memory, what gpu copies reach by data sheets less a tenth; L2 of an H100,
    5.5 to 6 TB/s of 114 processors (Chips and Cheese, "Nvidia's H100: Funny L2, and Tons of
    Bandwidth", 2023), here of 132; of an A100, 2560 to 3840 bytes a cycle.
    """

    name: str
    architecture: str
    processors: int
    l2_mib: int
    memory_tb_s: float  # what a copy reaches, not the data sheet's
    l2_tb_s: float  # of all processors together, reads and writes
    processor_gb_s: float  # between L2 and one processor: 64 bytes a cycle
    tensor_tflop_s: float  # bf16, what such tiles reach: .6 (mma.sync: .7) of the data sheet's
    task_us: float = 2.0  # from one task to the next: record, pointers, first tile asked for
    signal_us: float = 1.0  # from a count to the program that waits for it


H100 = Device("H100", "sm_90", 132, 50, 2.96, 6.6, 110.0, 590.0)
H200 = Device("H200", "sm_90", 132, 50, 4.2, 6.6, 110.0, 590.0)
A100 = Device("A100", "sm_80", 108, 40, 1.74, 4.0, 90.0, 218.0)
DEVICES = {each.name: each for each in (A100, H100, H200)}


class Region(NamedTuple):
    """A tile of a matrix in memory."""

    address: int
    strides: tuple[int, int]  # bytes
    rows: int
    columns: int
    item: int

    def lines(self) -> list[int]:
        """The cache lines it lies in."""
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
        return max(0, self.rows) * max(0, self.columns) * self.item

    @property
    def moved(self) -> int:
        """Bytes between L2 and a processor: whole sectors of lines."""
        lines, width = self.rows, self.columns
        if self.strides[1] != self.item and self.strides[0] == self.item:
            lines, width = width, lines
        return max(0, lines) * -(-max(0, width) * self.item // SECTOR_BYTES) * SECTOR_BYTES


class Step(NamedTuple):
    """What a program asks for, computes and stores, what it waits for, or what it counts up."""

    reads: Sequence[Region] = ()
    writes: Sequence[Region] = ()
    flops: int = 0
    wait: tuple[int, int] | None = None  # a counter, and up to what
    signal: int | None = None  # a counter, which is counted up once all before is stored
    last_read: bool = False  # what is stored isn't read again


@dataclass
class Traffic:
    """Of one launch."""

    tasks: int
    memory_read: int
    memory_written: int
    l2_bytes: int  # between L2 and processors
    update_bytes: int  # of these, of updates
    update_matrix_bytes: int  # of these, of the matrices themselves
    coefficient_bytes: int  # of coefficients and partial sums: written once, and read once
    us: float


class View(NamedTuple):
    """A matrix of a record."""

    address: int
    row_stride: int
    column_stride: int
    rows: int
    columns: int
    item: int

    def tile(self, row: int, column: int, rows: int, columns: int) -> Region:
        """As much of a tile as there is."""
        rows, columns = min(rows, self.rows - row), min(columns, self.columns - column)
        strides = self.row_stride * self.item, self.column_stride * self.item
        address = self.address + row * strides[0] + column * strides[1]
        return Region(address, strides, rows, columns, self.item)

    @property
    def mT(self) -> View:
        return View(
            self.address, self.column_stride, self.row_stride, self.columns, self.rows, self.item
        )


def _part(parts: View, number: int) -> View:
    """Of parts that lie one behind the other."""
    size = parts.rows * parts.columns * parts.item
    return parts._replace(address=parts.address + number * size)


class Tasks:
    """The tasks of a planned launch.

    Args:
        metadata: of a call: counters, then the addresses of its arguments.
    """

    def __init__(self, launch: Any, metadata: Sequence[int]) -> None:
        self.counters, count = launch.counts
        self.order = [(task >> 32, task & 0xFFFFFFFF) for task in launch.constant[:count]]
        self._records = launch.constant[count:]
        self._bases = metadata[self.counters :]
        self._config, self._constants = launch.config, launch.constants
        self.claimed: dict[int, int] = {}  # of the record of a C, how many of its tiles
        self.programs_per_processor: int = launch.config.programs_per_sm
        self.config = " ".join(f"{name}={value}" for name, value in launch.config._asdict().items())

    def _item(self, name: str) -> int:
        dtype: torch.dtype = self._constants[name]
        return dtype.itemsize

    def waits_for(self, place: int) -> tuple[int, int]:
        return self._records[place + 1], self._records[place + 2]

    def counts_up(self, place: int) -> int:
        return int(self._records[place + 3])

    def is_update(self, place: int) -> bool:
        return bool(self._records[place] == 3)

    def steps(self, place: int, local: int) -> Iterator[Step]:
        """As ``kernels/reduction.py`` and ``kernels/update.py`` go; of C, a tile of its sum."""
        ways = (self._sum, self._sum, self._of_C, self._update)
        return ways[self._records[place]](place, local)

    def stages(self, place: int) -> int:
        config = self._config
        stages: int = config.update_stages if self.is_update(place) else config.reduction_stages
        return stages

    def _view(self, at: int, rows: int, columns: int, item: int) -> View:
        place, row_stride, column_stride = self._records[at : at + 3]
        return View(self._address(place), row_stride, column_stride, rows, columns, item)

    def _address(self, place: int) -> int:
        return self._bases[place >> 48] + (place & 0xFFFFFFFFFFFF)

    def _first_part(self, place: int) -> View:
        """The first of a record's parts."""
        q, rank = self._records[place + 7], self._records[place + 12]
        padded = -(-rank // 4) * 4
        return View(self._address(self._records[place + 13]), padded, 1, q, padded, 4)

    def _sum(self, place: int, local: int) -> Iterator[Step]:
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
        """A tile of a part of C, or of all of it, of what is stored of A or B."""
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
        """Those tiles of C that no other program has claimed."""
        record = self._records[place : place + 35]
        _, tiles = self._tiles_of_C(place)
        while self.claimed.setdefault(place, 0) < tiles:
            self.claimed[place] += 1
            yield Step(wait=(record[1], record[2]))
            yield from self._of_C(place, self.claimed[place] - 1)
            yield Step(signal=record[3])

    def _tiles_of_C(self, place: int) -> tuple[int, int]:
        """(chunks of the rank, tiles)."""
        q, rank = self._records[place + 7], self._records[place + 12]
        chunks = -(-rank // self._config.block_r)
        return chunks, chunks * -(-q // self._constants["BLOCK_C"])

    def _of_C(self, place: int, tile: int) -> Iterator[Step]:
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


class _Program:
    """One of those that run at once."""

    def __init__(self) -> None:
        self.task: tuple[int, int] | None = None
        self.steps: Iterator[Step] = iter(())
        self.ended_us = 0.0  # what it computed last
        self.link_free_us = 0.0  # from L2
        self.ends: deque[float] = deque()  # of the steps that hold a stage
        self.stages = 1


def run(tasks: Tasks, device: Device, programs: int, cache: Cache) -> Traffic:
    """The launch in the model; the cache is left as it is at the end, and flushed for the count."""
    counts = [0] * tasks.counters
    tasks.claimed.clear()
    waiting: dict[int, list[tuple[int, int]]] = {}  # of a counter: (up to what, program)
    todo = iter(tasks.order)
    pool = [_Program() for _ in range(min(programs, len(tasks.order)))]
    events = [(0.0, i) for i in range(len(pool))]
    memory_free_us = l2_free_us = last_us = 0.0
    result = Traffic(len(tasks.order), 0, 0, 0, 0, 0, 0, 0.0)
    seen: set[tuple[int, bool]] = set()
    per_processor = device.tensor_tflop_s * 1e6 / device.processors  # FLOP a µs
    per_program = per_processor * device.processors / max(programs, 1)

    def wait(program: int, now: float, counter: int, until: int) -> bool:
        if counts[counter] >= until:
            return False
        waiting.setdefault(counter, []).append((until, program))
        return True

    def count_up(counter: int, now: float) -> None:
        counts[counter] += 1
        still = []
        for until, other in waiting.pop(counter, []):
            if counts[counter] >= until:
                pool[other].ended_us = max(pool[other].ended_us, now + device.signal_us)
                heapq.heappush(events, (now + device.signal_us, other))
            else:
                still.append((until, other))
        if still:
            waiting[counter] = still

    while events:
        now, index = heapq.heappop(events)
        program = pool[index]
        if program.task is None:
            program.task = next(todo, None)
            if program.task is None:
                continue
            place, local = program.task
            program.steps, program.stages = tasks.steps(place, local), tasks.stages(place)
            program.ends.clear()
            counter, until = tasks.waits_for(place)
            if until and wait(index, now, counter, until):
                continue
        step = next(program.steps, None)
        place = program.task[0]
        if step is None or step.signal is not None:  # once what was computed last is stored
            if program.ended_us > now:
                program.steps = itertools.chain([step] if step else [], program.steps)
                heapq.heappush(events, (program.ended_us, index))
                continue
            last_us = max(last_us, now)
            signal = None if step is None else step.signal
            count_up(tasks.counts_up(place) if signal is None else signal, now)
            if signal is None:
                program.task = None
            heapq.heappush(events, (now + (device.task_us if signal is None else 0.0), index))
            continue
        if step.wait is not None:
            counter, until = step.wait
            if not wait(index, now, counter, until):
                heapq.heappush(events, (now, index))
            continue
        reads = [line for region in step.reads for line in region.lines()]
        moved = sum(region.moved for region in (*step.reads, *step.writes))
        from_memory = cache.read(reads) * LINE_BYTES
        written_before = cache.written_bytes
        for region in step.writes:
            cache.write(region.lines(), evict_first=step.last_read)
        from_memory += cache.written_bytes - written_before
        l2_free_us = max(l2_free_us, now) + moved / (device.l2_tb_s * 1e6)
        memory_free_us = max(memory_free_us, now) + from_memory / (device.memory_tb_s * 1e6)
        link_us = moved / (device.processor_gb_s * 1e3) * programs / device.processors
        program.link_free_us = max(program.link_free_us, now) + link_us
        ready = max(l2_free_us, memory_free_us if from_memory else 0.0, program.link_free_us)
        program.ended_us = max(ready, program.ended_us) + step.flops / per_program
        result.l2_bytes += moved
        _count(result, tasks, place, step, seen)
        program.ends.append(program.ended_us)
        # The next step's tiles are asked for when a stage is free.
        free = now if len(program.ends) < program.stages else program.ends.popleft()
        heapq.heappush(events, (max(now, free), index))
    if any(waiting.values()):
        raise RuntimeError("bench traffic: tasks wait for what never comes")
    cache.flush()
    result.memory_read, result.memory_written = cache.read_bytes, cache.written_bytes
    result.us = last_us
    return result


def _count(
    result: Traffic, tasks: Tasks, place: int, step: Step, seen: set[tuple[int, bool]]
) -> None:
    """Adds what a step moves of updates, and of what lies in the workspace."""
    if tasks.is_update(place):
        moved = sum(region.bytes for region in (*step.reads, *step.writes))
        result.update_bytes += moved
        if step.writes:
            result.update_matrix_bytes += step.reads[0].bytes + step.writes[0].bytes
    for regions, stored in ((step.reads, False), (step.writes, True)):
        for region in regions:
            if region.address < WORKSPACE_END and (region.address, stored) not in seen:
                seen.add((region.address, stored))
                result.coefficient_bytes += region.bytes


# --- planning --------------------------------------------------------------

WORKSPACE_START = 1 << 20
WORKSPACE_END = 1 << 36


def planned(
    shapes: Sequence[tuple[int, int]],
    ranks: tuple[int | None, int | None],
    architecture: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    config: Any = None,
    limit: int | None = None,
) -> list[Tasks]:
    """The launches of a list of in-place projections onto the complement of high bases."""
    from osf_kernels import gpu
    from osf_kernels.backends import grouped
    from osf_kernels.backends.chains import Chain, chains_of
    from osf_kernels.backends.jobs import Problem
    from osf_kernels.backends.operands import WORKSPACE, Lie, Operand, Placed
    from osf_kernels.backends.triton import configs, groups, tasks
    from osf_kernels.backends.triton.views import dot_rule
    from osf_kernels.plan import Matrix, choose

    device = torch.device("meta")
    addresses = {WORKSPACE: WORKSPACE_START}
    numbers, free = itertools.count(1), WORKSPACE_END

    def operand(rows: int, columns: int) -> Operand:
        nonlocal free
        number = next(numbers)
        addresses[number] = free
        free += -(-rows * columns * dtype.itemsize // 512) * 512
        lie = Lie((rows, columns), (columns, 1), dtype, 0, is_padded=False)
        return Operand.lying(lie, device, number)

    def choose_config(
        chain: Chain, math: configs.Math, rank: int, aligned: bool
    ) -> configs.Projection:
        return config or configs.projection_config(architecture, math, rank, aligned)

    room = gpu.room_in_l2(architecture)
    r, k = ranks
    name = str(dtype).removeprefix("torch.")
    chains = []
    coefficient, _ = dot_rule(dtype, (dtype,), (torch.float32,), "tf32x3")
    for m, n in shapes:
        x = operand(m, n)
        U = None if r is None else operand(m, r)
        V = None if k is None else operand(n, k)
        step = choose(Matrix(m, n, r, k, dtype=name, basis_dtype=name), "complement", "cuda", True)
        problem = Problem(x, x, U, V, step)
        chains += [
            groups.plan_chain(chain, arena, "tf32x3", choose_config)
            for chain, arena in chains_of(problem, coefficient, room / 4)
        ]
    launches, _ = tasks.projection_launches(
        chains,
        fill=configs.FILL[architecture],
        room=room,
        limit=limit or grouped.WORKSPACE_BYTES,
    )

    def placed(number: int) -> int:
        base = addresses[number.argument] if isinstance(number, Placed) else 0
        return base + int(number)

    return [Tasks(each, list(map(placed, each.metadata))) for each in launches]
