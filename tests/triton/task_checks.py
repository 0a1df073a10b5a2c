"""Plans lists of matrices without values, reads back a launch's tasks and checks their order.

What a test asks of the tasks holds whatever runs when: that no wait is endless, and that none is
missing. No triton needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import traffic_tasks
from osf_kernels import gpu
from osf_kernels.backends.chains import Chain, chain_of, chain_of_halves, chain_of_job
from osf_kernels.backends.jobs import Coefficients, Problem, Update
from osf_kernels.backends.operands import WORKSPACE, Arena, Lie, Operand, Placed
from osf_kernels.backends.triton import configs, groups, tasks
from osf_kernels.backends.triton.launches import Launch
from osf_kernels.backends.triton.views import dot_rule
from osf_kernels.forms import First, Name
from osf_kernels.plan import Step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
META = torch.device("meta")
ANY_SIZE = 1 << 62
A, B, C, UPDATE = range(4)  # kinds of tasks
FIELDS = (37, 37, 36, 32)  # of a record of each kind

# --- lists, planned --------------------------------------------------------------------------


class Operands:
    """Matrices without values, each of them an argument of its own."""

    def __init__(self) -> None:
        self.ends: dict[int, int] = {}  # of each argument, in bytes

    def __call__(self, rows: int, columns: int, dtype: torch.dtype = BF16) -> Operand:
        number = WORKSPACE + 1 + len(self.ends)
        self.ends[number] = rows * columns * dtype.itemsize
        lie = Lie((rows, columns), (columns, 1), dtype, 0, is_padded=False)
        return Operand.lying(lie, META, number)


def problem(
    new: Operands,
    m: int,
    n: int,
    ranks: tuple[int, int],
    form: Name = "dual",
    first: First = "left",
    *,
    dtype: torch.dtype = BF16,
    basis: torch.dtype | None = None,
    values: bool = False,
    rest: bool = False,
) -> Problem:
    """One matrix in place; with ``values`` and ``rest`` what restoring pins."""
    (r, k), held = ranks, basis or dtype
    x = new(m, n, dtype)
    U = new(m, r, held) if form != "right" else None
    V = new(n, k, held) if form != "left" else None
    # Of those that keep one side's result, g is part of the sum.
    beta = 1.0 if form.startswith("dual") or form == "sequential" else 0.0
    step = Step(form, first, -1.0 if beta else 1.0, beta, 0, 0, 0, "", "")
    S = torch.empty(r, device=META) if values else None
    pins: tuple[Any, Any] = (new(r, n), new(m, k)) if rest else (None, None)
    return Problem(x, x, U, V, step, S, rest_A=pins[0], rest_B=pins[1])


class Made(NamedTuple):
    """A list, planned."""

    launches: list[Launch]
    workspace_bytes: int
    planned: list[groups.Planned]


def made_of(
    chains: Sequence[tuple[Chain, Arena]],
    architecture: str = "sm_90",
    *,
    limit: int = ANY_SIZE,
    fill: int | None = None,
    room: float | None = None,
    precision: str = "tf32x3",
    config: configs.Projection | None = None,
) -> Made:
    def choose(_: Chain, math: configs.Math, rank: int, aligned: bool) -> configs.Projection:
        return config or configs.projection_config(architecture, math, rank, aligned)

    planned = [groups.plan_chain(chain, arena, precision, choose) for chain, arena in chains]
    launches, size = tasks.projection_launches(
        planned,
        fill=fill or configs.FILL[architecture],
        room=gpu.room_in_l2(architecture) if room is None else room,
        limit=limit,
    )
    return Made(launches, size, planned)


def of_problems(problems: Sequence[Problem], *, halves: bool = False, **options: Any) -> Made:
    chains = []
    for each in problems:
        arena = Arena(META)
        bases = [t.dtype for t in (each.U, each.V) if t is not None]
        coefficient, _ = dot_rule(each.x.dtype, bases, (FP32,), "tf32x3")
        chain = chain_of_halves(each) if halves else chain_of(each, coefficient, arena.new)
        chains.append((chain, arena))
    return made_of(chains, **options)


def of_jobs(jobs: Sequence[Coefficients | Update], **options: Any) -> list[Launch]:
    chains = [(chain_of_job(job), Arena(META)) for job in jobs]
    return made_of(chains, **options).launches


def job(m: int, n: int, r: int, k: int, dtype: torch.dtype = BF16) -> Coefficients:
    def matrix(rows: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=META)

    A, B = matrix(r, n, FP32), matrix(m, k, FP32)
    return Coefficients(matrix(m, n), matrix(m, r), matrix(n, k), A, B)


def update_job(c: Coefficients, beta: float = 1.0) -> Update:
    assert c.V is not None
    return Update(c.x, c.x, c.U, c.A, c.B, c.V.mT, -1.0, beta)


# --- a launch, read back ---------------------------------------------------------------------


class Task(NamedTuple):
    """One of the tasks of a launch, or a tile of a C.

    Such a tile is claimed by the first that needs C, so that it is as a task right before that.
    """

    record: int  # where it is
    tile: int
    kind: int
    waits: list[tuple[int, int]]  # for counters, up to what
    counts: int  # the counter that it counts up
    matrix: int  # the argument that it reads or writes first; WORKSPACE for parts and coefficients


def numbers(launch: Launch) -> list[int]:
    """What is the same in every call, to read or to change."""
    assert isinstance(launch.constant, list)
    return launch.constant


def record_of(launch: Launch, place: int) -> list[int]:
    start = launch.counts[1] + place
    kind = launch.constant[start]
    return list(launch.constant[start : start + FIELDS[kind]])


def argument_of(address: int) -> int:
    """Whose address a record has; WORKSPACE where it is an address itself."""
    return max(WORKSPACE, (address >> tasks.ARGUMENT_BITS) - 1)


def read(launch: Launch) -> list[Task]:
    """The tasks in their order."""
    counters, count = launch.counts
    assert launch.metadata[:counters] == [0] * counters, "a counter that isn't at zero"
    found: list[Task] = []
    made: set[int] = set()  # the Cs
    for entry in launch.constant[:count]:
        place, tile = entry >> 32, entry & 0xFFFFFFFF
        record = record_of(launch, place)
        waits = _waits(record)
        if record[0] < C and record[36]:
            c_place = place + record[36]
            if c_place not in made:
                found += _tiles_of_C(launch, c_place)
            made.add(c_place)
        if record[0] < C and record[32]:
            waits.append((record[31], record[32]))
        adds = record[0] != UPDATE and record[14] > 0
        matrix = WORKSPACE if adds else argument_of(record[4])
        found.append(Task(place, tile, record[0], waits, record[3], matrix))
    assert sum(task.kind != C for task in found) == launch.tasks
    return found


def _waits(record: list[int]) -> list[tuple[int, int]]:
    _, counter, until, *_ = record
    return [(counter, until)] if until else []


def _tiles_of_C(launch: Launch, place: int) -> list[Task]:
    record = record_of(launch, place)
    assert record[0] == C
    tiles = tiles_in(launch, place)
    return [Task(place, i, C, _waits(record), record[3], WORKSPACE) for i in range(tiles)]


def tiles_in(launch: Launch, place: int) -> int:
    """How many tiles a record is of."""
    record, config = record_of(launch, place), launch.config
    assert isinstance(config, configs.Projection)
    if record[0] == UPDATE:
        return -(-record[10] // config.block_m) * -(-record[11] // record[31])
    rows = launch.constants["BLOCK_C"] if record[0] == C else config.block_q
    assert isinstance(rows, int)
    tiles = -(-record[7] // rows) * -(-record[12] // config.block_r)
    return tiles if record[14] else tiles * max(1, -(-record[8] // record[34]))


def assert_progress(launch: Launch) -> None:
    """Waits end whatever runs when: what is waited for comes before, and is exactly enough."""
    order = read(launch)
    whole: dict[int, int] = {}
    for task in order:
        assert 2 <= task.counts < launch.counts[0], "a counter of the scheduler's own, or none"
        whole[task.counts] = whole.get(task.counts, 0) + 1
    before: dict[int, int] = {}
    for i, task in enumerate(order):
        for counter, until in task.waits:
            assert before.get(counter, 0) == until, (
                f"task {i} waits for {until} of counter {counter}, before it come "
                f"{before.get(counter, 0)}"
            )
            assert whole[counter] == until, "some of what it waits for comes behind"
        before[task.counts] = before.get(task.counts, 0) + 1
    assert len({task[:2] for task in order}) == len(order), "a tile is computed twice"
    claims = [record_of(launch, task.record)[35] for task in order if task.kind == C]
    assert not {*claims} & {*whole, 0, 1}, "a counter of claims that others count up"


def assert_in_order(made: Made, ends: dict[int, int]) -> int:
    """Whatever runs when, a task reads what was written for it and overwrites what was read.

    Every pair of tasks of which one writes what the other reads or writes must be ordered by their
    waits, and be it by way of others. Returns how many such pairs there were.
    """
    starts, end = {WORKSPACE: 1 << 8}, (1 << 8) + made.workspace_bytes
    for number, size in ends.items():
        starts[number] = end = -(-end // 16) * 16
        end += size

    def placed(number: int) -> int:
        return int(number) + (starts[number.argument] if isinstance(number, Placed) else 0)

    ordered = 0
    for launch in made.launches:
        order = read(launch)
        model = traffic_tasks.Tasks(launch, list(map(placed, launch.metadata)))
        # Here tiles of C are tasks of their own.
        model.claimed.update({task.record: 1 << 30 for task in order if task.kind == C})
        done = list(_known_done(order))
        writer = np.full(end // 2 + 1, -1, dtype=np.int32)  # of every two bytes
        reads: list[tuple[int, np.ndarray[Any, Any]]] = []
        mask = np.zeros(end // 2 + 1, dtype=bool)
        for i, task in enumerate(order):
            steps = list(model.steps(task.record, task.tile))
            own_reads = _places_of([region for step in steps for region in step.reads])
            own_writes = _places_of([region for step in steps for region in step.writes])
            # Counted: the hash table of np.unique is slow in memory that compilers have used.
            touched = writer[np.concatenate([own_reads, own_writes])]
            for other in np.flatnonzero(np.bincount(1 + touched, minlength=1)[1:]).tolist():
                assert done[i] >> other & 1, f"task {i} may come before {other}, which writes"
                ordered += 1
            mask[own_writes] = True
            for other, found in reads:
                if mask[found].any():
                    assert done[i] >> other & 1, f"task {i} writes what {other} may still read"
                    ordered += 1
            mask[own_writes] = False
            writer[own_writes] = i
            reads.append((i, own_reads))
    return ordered


def _known_done(order: Sequence[Task]) -> Iterator[int]:
    """Of each task those that are done when it begins, as bits."""
    counting: dict[int, int] = {}  # of a counter, the tasks before that count it and theirs
    for i, task in enumerate(order):
        done = 0
        for counter, _ in task.waits:
            done |= counting[counter]
        yield done
        counting[task.counts] = counting.get(task.counts, 0) | done | 1 << i


def _places_of(regions: Sequence[traffic_tasks.Region]) -> np.ndarray[Any, Any]:
    """Where tiles lie, in pairs of bytes; more than once where they overlap."""
    found = [np.zeros(0, dtype=np.int64)]
    for region in dict.fromkeys(regions):
        rows = region.address + np.arange(region.rows, dtype=np.int64) * region.strides[0]
        columns = np.arange(region.columns, dtype=np.int64) * region.strides[1]
        elements = (rows[:, None] + columns).ravel() // 2
        found.append((elements[:, None] + np.arange(region.item // 2)).ravel())
    return np.concatenate(found)
