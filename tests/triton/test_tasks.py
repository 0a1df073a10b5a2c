"""Which matrices share a launch, its tasks, their order and waits. No triton needed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import traffic
from osf_kernels import gpu
from osf_kernels._padding import is_aligned
from osf_kernels.backends.chains import Chain, chain_of, chain_of_halves, chain_of_job
from osf_kernels.backends.jobs import Coefficients, Problem, Update
from osf_kernels.backends.operands import WORKSPACE, Arena, Lie, Operand, Placed
from osf_kernels.backends.triton import configs, groups, tasks
from osf_kernels.backends.triton.launches import Launch, split
from osf_kernels.backends.triton.views import Layout, View, accurate_rule, dot_rule
from osf_kernels.forms import FORMS, First, Name
from osf_kernels.plan import Step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
META = torch.device("meta")
ANY_SIZE = 1 << 62
A, B, C, UPDATE = range(4)  # kinds of tasks
SUM_FIELDS, UPDATE_FIELDS = 35, 32  # of a record

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
    """One of the tasks of a launch."""

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
    return list(launch.constant[start : start + (UPDATE_FIELDS if kind == UPDATE else SUM_FIELDS)])


def argument_of(address: int) -> int:
    """Whose address a record has; WORKSPACE where it is an address itself."""
    return max(WORKSPACE, (address >> tasks.ARGUMENT_BITS) - 1)


def read(launch: Launch) -> list[Task]:
    """The tasks in their order."""
    counters, count = launch.counts
    assert launch.metadata[:counters] == [0] * counters, "a counter that isn't at zero"
    found = []
    for entry in launch.constant[:count]:
        place, tile = entry >> 32, entry & 0xFFFFFFFF
        record = record_of(launch, place)
        kind, counter, until, counts = record[:4]
        waits = [(counter, until)] if until else []
        if kind < C and record[32]:
            waits.append((record[31], record[32]))
        adds = kind != UPDATE and record[14] > 0
        matrix = WORKSPACE if adds else argument_of(record[4])
        found.append(Task(place, tile, kind, waits, counts, matrix))
    assert len(found) == launch.tasks
    return found


def tiles_in(launch: Launch, place: int) -> int:
    """How many tiles a record is of."""
    record, config = record_of(launch, place), launch.config
    assert isinstance(config, configs.Projection)
    if record[0] == UPDATE:
        return -(-record[10] // config.block_m) * -(-record[11] // record[31])
    tiles = -(-record[7] // config.block_q) * -(-record[12] // config.block_r)
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
        model = traffic.Tasks(launch, list(map(placed, launch.metadata)))
        done = list(_known_done(order))
        writer = np.full(end // 2 + 1, -1, dtype=np.int32)  # of every two bytes
        reads: list[tuple[int, np.ndarray[Any, Any]]] = []
        mask = np.zeros(end // 2 + 1, dtype=bool)
        for i, task in enumerate(order):
            steps = list(model.steps(task.record, task.tile))
            own_reads = _places_of([region for step in steps for region in step.reads])
            own_writes = _places_of([region for step in steps for region in step.writes])
            others = np.unique(writer[np.concatenate([own_reads, own_writes])])
            for other in others[others >= 0].tolist():
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


def _places_of(regions: Sequence[traffic.Region]) -> np.ndarray[Any, Any]:
    """Where tiles lie, in pairs of bytes."""
    found = [np.zeros(0, dtype=np.int64)]
    for region in dict.fromkeys(regions):
        rows = region.address + np.arange(region.rows, dtype=np.int64) * region.strides[0]
        columns = np.arange(region.columns, dtype=np.int64) * region.strides[1]
        elements = (rows[:, None] + columns).ravel() // 2
        found.append((elements[:, None] + np.arange(region.item // 2)).ravel())
    return np.unique(np.concatenate(found))


# --- what shares a launch --------------------------------------------------------------------


def test_a_whole_model_takes_one_launch() -> None:
    """A hundred matrices of many shapes: sums, parts of them, what corrects them, updates."""
    new = Operands()
    shapes = [(64 * i, 128 * (1 + i % 5)) for i in range(1, 101)]
    problems = [problem(new, m, n, (32, 32)) for m, n in shapes]
    (launch,) = of_problems(problems).launches
    assert launch.kernel == "projection"
    order = read(launch)
    assert {task.kind for task in order} == {A, B, C, UPDATE}
    assert {task.matrix for task in order if task.kind == UPDATE} == {
        each.x.data_ptr().argument for each in problems
    }
    assert_progress(launch)


def test_jobs_of_one_kind_take_one_launch() -> None:
    jobs = [job(64 * i, 128, 64, 48) for i in range(1, 40, 4)]
    (sums,) = of_jobs(jobs)
    assert {task.kind for task in read(sums)} == {A, B}
    (updates,) = of_jobs([update_job(each) for each in jobs])
    assert {task.kind for task in read(updates)} == {UPDATE}
    for launch in (sums, updates):
        assert_progress(launch)


def test_dtypes_layouts_and_configs_take_launches_of_their_own() -> None:
    new = Operands()
    like = problem(new, 512, 512, (64, 64))
    for other in (
        problem(new, 512, 512, (64, 64), dtype=FP32),
        problem(new, 512, 512, (64, 64), basis=FP32),
        problem(new, 512, 512, (128, 128)),
        problem(new, 513, 511, (64, 64)),
    ):
        assert len(of_problems([like, other]).launches) == 2
    # Neither shapes, ranks of one block nor forms of the same layouts.
    for other in (
        problem(new, 1024, 256, (40, 64)),
        problem(new, 512, 512, (64, 64), "sequential"),
        problem(new, 512, 512, (64, 64), values=True),
    ):
        assert len(of_problems([like, other]).launches) == 1


def test_constant_is_tasks_then_records() -> None:
    """And holds nothing that another call could have otherwise."""
    new = Operands()
    problems = [problem(new, 640, 512, (64, 64)) for _ in range(3)]
    (launch,) = of_problems(problems).launches
    counters, count = launch.counts
    assert count == launch.tasks
    assert all(type(number) is int for number in launch.constant)
    order = read(launch)
    places = sorted({task.record for task in order})
    length = len(launch.constant) - count
    assert places[0] == 0
    # Each record is as long as its kind's, and none is without a task.
    kinds = {task.record: task.kind for task in order}
    sizes = [after - before for before, after in itertools.pairwise([*places, length])]
    assert [UPDATE_FIELDS if kinds[place] == UPDATE else SUM_FIELDS for place in places] == sizes
    assert launch.constants["HAS_PARTS"]
    assert sum(kind == UPDATE for kind in kinds.values()) == len(problems), "a record an update"
    # Of a record every tile has a task.
    for place in places:
        tiles = sorted(task.tile for task in order if task.record == place)
        assert tiles == list(range(tiles_in(launch, place)))
    assert {counter for task in order for counter, _ in task.waits} < set(range(2, counters))


def test_metadata_is_counters_then_the_addresses_of_arguments() -> None:
    """The first address is of none, so that a word without a number is the address itself."""
    new = Operands()
    problems = [problem(new, 640, 512, (64, 64)) for _ in range(3)]
    (launch,) = of_problems(problems).launches
    counters = launch.counts[0]
    assert launch.metadata[:counters] == [0] * counters
    assert not any(isinstance(number, Placed) for number in launch.metadata[: counters + 1])
    none, *arguments = launch.metadata[counters:]
    assert none == 0
    assert [(int(each), getattr(each, "argument", None)) for each in arguments] == [
        (0, argument) for argument in range(1 + len(new.ends))
    ]
    # The records name every one of them and no more.
    named = {
        argument_of(record_of(launch, task.record)[at])
        for task in read(launch)
        for at in ((4, 7, 14, 17, 21, 24) if task.kind == UPDATE else (4, 9, 15))
    }
    assert named == set(range(len(arguments)))


def test_an_address_is_an_argument_and_what_is_added() -> None:
    """Of a tensor whose address is known it is that, and the call brings no argument."""
    new = Operands()
    x = new(64, 256).narrow(1, 128, 128)
    out, ready = new(64, 128), new(128, 16).mT
    held = torch.empty(64, 16, dtype=BF16)
    (launch,) = of_jobs([Update(out, x, held, ready, None, None, -1.0, 1.0)])
    record = record_of(launch, read(launch)[0].record)
    bits = tasks.ARGUMENT_BITS
    assert record[4:7] == [3 << bits, 128, 1]
    assert record[7:10] == [(2 << bits) + 256, 256, 1]
    assert record[14:17] == [held.data_ptr(), 16, 1]
    assert record[17:20] == [4 << bits, 1, 16]
    assert len(launch.metadata) == launch.counts[0] + 5


def test_arguments_are_as_many_as_a_record_can_name() -> None:
    lie, most = Lie((64, 64), (64, 1), BF16, 0, is_padded=False), 2**15 - 2
    basis = torch.empty(64, 16, dtype=BF16, device=META)

    def planned(argument: int) -> list[Launch]:
        x = Operand.lying(lie, META, argument)
        return of_jobs([Update(x, x, basis, basis.mT, None, None, -1.0, 1.0)])

    (launch,) = planned(most)
    address = record_of(launch, 0)[4]
    assert argument_of(address) == most
    assert address < 1 << 63, "a word of the array"
    with pytest.raises(ValueError, match=f"expected at most {most} matrices in a list"):
        planned(most + 1)


# --- that waits end, and suffice -------------------------------------------------------------

Listed = Callable[[Operands], list[Problem]]


def every_form(new: Operands) -> list[Problem]:
    firsts: tuple[First, ...] = ("left", "right")
    return [
        problem(new, 320, 192, (24, 40), form, first)
        for form, first in itertools.product(FORMS, firsts)
        if FORMS[form].calls
    ]


LISTS: dict[str, Listed] = {
    "dual": lambda new: [problem(new, 256 + 64 * i, 320, (64, 40)) for i in range(4)],
    "long": lambda new: [problem(new, 64, 1536, (16, 16)), problem(new, 1536, 64, (16, 8))],
    "wide ranks": lambda new: [problem(new, 320, 256, (200, 136)) for _ in range(2)],
    "float32": lambda new: [problem(new, 192, 256, (16, 16), dtype=FP32) for _ in range(2)],
    "float16": lambda new: [problem(new, 192, 256, (16, 16), dtype=FP16) for _ in range(2)],
    "two dtypes": lambda new: [
        problem(new, 192, 256, (16, 24), form, basis=FP32)
        for form in ("dual", "mixed", "inner", "sequential")
    ],
    "odd": lambda new: [problem(new, 193, 255, (15, 17), form) for form in ("dual", "inner")],
    "every form": every_form,
    "restore": lambda new: [
        problem(new, 256, 192, (24, 24), values=True),
        problem(new, 256, 192, (24, 24), values=True, rest=True),
        problem(new, 192, 320, (24, 24), "dual in turn"),
    ],
    "nothing": lambda new: [
        problem(new, 0, 64, (8, 8)),
        problem(new, 128, 64, (0, 0)),
        problem(new, 128, 128, (8, 0)),
    ],
}


@pytest.mark.parametrize("name", LISTS)
def test_waits_end_and_suffice(name: str) -> None:
    new = Operands()
    problems = LISTS[name](new)
    made = of_problems(problems, fill=48)
    for launch in made.launches:
        assert_progress(launch)
    ordered = assert_in_order(made, new.ends)
    assert ordered > 10 * len(problems) or name == "nothing"


@pytest.mark.parametrize("name", ["dual", "wide ranks", "every form", "restore"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_waits_end_and_suffice_where_matrices_take_turns(name: str, share: float) -> None:
    """In a workspace that holds some of the matrices at once."""
    new = Operands()
    problems = LISTS[name](new)
    whole = of_problems(problems, fill=48).workspace_bytes
    limit = int(share * whole)
    made = of_problems(problems, fill=48, limit=limit)
    assert made.workspace_bytes <= max(limit, 2 * max(p.arena.bytes for p in made.planned))
    for launch in made.launches:
        assert_progress(launch)
    assert_in_order(made, new.ends)


@pytest.mark.parametrize("room", [0.0, 4e5])
def test_waits_end_and_suffice_whatever_fits_l2(room: float) -> None:
    new = Operands()
    made = of_problems(LISTS["dual"](new), fill=48, room=room)
    for launch in made.launches:
        assert_progress(launch)
    assert_in_order(made, new.ends)


def test_halves_wait_for_their_parts_alone() -> None:
    new = Operands()
    problems = [
        problem(new, 64, 2048, (16, 16))._replace(A=new(16, 2048, FP32), B=new(64, 16, FP32), S=S)
        for S in (None, torch.empty(16, device=META))
    ]
    made = of_problems(problems, halves=True)
    assert any(launch.constants["HAS_PARTS"] for launch in made.launches)
    for launch in made.launches:
        assert_progress(launch)
        assert {task.kind for task in read(launch)} == {A, B}
    assert assert_in_order(made, new.ends)


def test_ready_coefficients_are_read_as_they_are() -> None:
    """Where they have the dtype of the products; otherwise they are rounded to it first."""
    new = Operands()
    for dtype, kinds in ((BF16, [C, B, UPDATE]), (FP32, [A, C, B, UPDATE])):
        ready = problem(new, 128, 64, (16, 16))._replace(
            A=new(16, 64, dtype), B=new(128, 16, dtype)
        )
        made = of_problems([ready])
        (launch,) = made.launches
        assert_progress(launch)
        assert_in_order(made, new.ends)
        found = [task.kind for task in read(launch)]
        assert sorted(set(found), key=found.index) == kinds


@pytest.mark.parametrize(
    ("field", "change"), [(2, 1), (2, -1), (1, 1)], ids=["never", "too few", "another counter"]
)
def test_a_wrong_wait_is_seen(field: int, change: int) -> None:
    new = Operands()
    (launch,) = of_problems([problem(new, 256, 256, (16, 16))]).launches
    place = next(task.record for task in read(launch) if task.kind == UPDATE)
    numbers(launch)[launch.counts[1] + place + field] += change
    with pytest.raises(AssertionError, match=r"waits for|comes behind"):
        assert_progress(launch)


def test_a_wrong_order_is_seen() -> None:
    new = Operands()
    (launch,) = of_problems([problem(new, 256, 256, (16, 16))]).launches
    _, count = launch.counts
    numbers(launch)[:count] = reversed(numbers(launch)[:count])
    with pytest.raises(AssertionError, match="before it come"):
        assert_progress(launch)


def test_a_tile_that_is_computed_twice_is_seen() -> None:
    """And another not at all, though as many are counted."""
    (launch,) = of_problems([problem(Operands(), 512, 512, (16, 16))]).launches
    first = next(i for i, task in enumerate(read(launch)) if task.kind == UPDATE)
    numbers(launch)[first] = numbers(launch)[first + 1]
    with pytest.raises(AssertionError, match="computed twice"):
        assert_progress(launch)


def test_parts_in_the_memory_of_another_sum_are_seen() -> None:
    new = Operands()
    made = of_problems([problem(new, 512, 512, (16, 16))])
    (launch,) = made.launches
    assert assert_in_order(made, new.ends)
    start = launch.counts[1]
    places = {kind: [t.record for t in read(launch) if t.kind == kind] for kind in (A, B)}
    memory = record_of(launch, places[B][0])[13]
    assert memory not in (0, record_of(launch, places[A][0])[13])
    for place in set(places[A]):
        numbers(launch)[start + place + 13] = memory
    assert_progress(launch)
    with pytest.raises(AssertionError, match=r"may come before|may still read"):
        assert_in_order(made, new.ends)


def test_a_missing_wait_is_seen() -> None:
    new = Operands()
    made = of_problems([problem(new, 256, 256, (16, 16))])
    (launch,) = made.launches
    start = launch.counts[1]
    for kind, said in ((UPDATE, "may come before|may still read"), (C, "may come before")):
        place = next(task.record for task in read(launch) if task.kind == kind)
        kept = numbers(launch)[start + place + 2]
        numbers(launch)[start + place + 2] = 0
        with pytest.raises(AssertionError, match=said):
            assert_in_order(made, new.ends)
        numbers(launch)[start + place + 2] = kept


# --- the order -------------------------------------------------------------------------------


def phases(launch: Launch) -> list[tuple[int, str]]:
    """(matrix, "sums" or "update") in the order, runs of tasks as one; C and sums of parts, which
    read the workspace, count to the run they are in."""
    runs = [
        (task.matrix, "update" if task.kind == UPDATE else "sums")
        for task in read(launch)
        if task.matrix != WORKSPACE
    ]
    return [run for run, _ in itertools.groupby(runs)]


def order_of(size: int, count: int, architecture: str = "sm_90", fill: int = 32) -> list[str]:
    """Of square bfloat16 matrices, as letters in the order: s and u with the matrix's number."""
    new = Operands()
    problems = [problem(new, size, size, (64, 64)) for _ in range(count)]
    numbers = {each.x.data_ptr().argument: i for i, each in enumerate(problems)}
    made = of_problems(problems, architecture=architecture, fill=fill)
    (launch,) = made.launches
    assert_progress(launch)
    return [f"{what[0]}{numbers[matrix]}" for matrix, what in phases(launch)]


def test_an_update_follows_its_sums_where_two_matrices_do_not_fit_l2() -> None:
    """32 MiB each; 40 MiB of 50 may be taken. All of a matrix that is read twice is there."""
    assert order_of(4096, 3) == ["s0", "u0", "s1", "u1", "s2", "u2"]


def test_the_next_matrix_comes_first_where_two_fit_l2() -> None:
    """8 MiB each: while an update would wait for its coefficients, the next ones are summed."""
    assert order_of(2048, 4) == ["s0", "s1", "u0", "s2", "u1", "s3", "u2", "u3"]
    # 18 MiB each and 32 of 40 MiB: two do not fit.
    assert order_of(3072, 3, "sm_80") == ["s0", "u0", "s1", "u1", "s2", "u2"]
    assert order_of(3072, 3, "sm_90") == ["s0", "s1", "u0", "s2", "u1", "u2"]


def test_small_matrices_go_in_groups_that_fill_the_machine() -> None:
    """As many as have work for every processor, the last of which is updated first."""
    order = order_of(256, 6, fill=64)
    sums = next(i for i, each in enumerate(order) if each.startswith("u"))
    assert sums > 2
    assert order[:sums] == [f"s{i}" for i in range(sums)] or set(order[:sums]) == {
        f"s{i}" for i in range(len(set(order[:sums])))
    }
    updates = [int(each[1:]) for each in order if each.startswith("u")]
    assert sorted(updates) == list(range(6))
    assert updates != sorted(updates)
    # Where a single one has enough, they go one by one.
    alone = order_of(256, 4, fill=1)
    assert alone == ["s0", "s1", "u0", "s2", "u1", "s3", "u2", "u3"]


def test_an_update_begins_where_the_sums_have_ended() -> None:
    """Panels and strips go backwards: what was read last is in L2 for certain."""
    new = Operands()
    (launch,) = of_problems([problem(new, 1024, 2048, (64, 64))], fill=4).launches
    config = launch.config
    assert isinstance(config, configs.Projection)
    panels = 1024 // config.block_m
    updates = [task for task in read(launch) if task.kind == UPDATE]
    (place,) = {task.record for task in updates}
    assert record_of(launch, place)[31] == config.strip
    # Panels come first in a tile's number, then strips.
    found = [(task.tile // panels * config.strip, task.tile % panels) for task in updates]
    assert found == [
        (first, panel)
        for first in reversed(range(0, 2048, config.strip))
        for panel in reversed(range(panels))
    ]
    # As the model has it, which is held against the kernel.
    model = traffic.Tasks(launch, [0] * len(launch.metadata))
    for (first, panel), task in zip(found, updates, strict=True):
        written = [each.writes[0] for each in model.steps(place, task.tile) if each.writes]
        starts = [each.address for each in written]
        corner = (panel * config.block_m * 2048 + first) * 2
        assert starts == list(range(corner, corner + 2 * config.strip, 2 * config.block_n))


def test_few_updates_take_narrower_strips() -> None:
    """So that each processor has a task, if there are tiles enough."""
    config = configs.projection_config("sm_90", "bfloat16", 64)
    for fill in (1, 16, 64, 10**6):
        (launch,) = of_problems([problem(Operands(), 1024, 1024, (64, 64))], fill=fill).launches
        count = sum(task.kind == UPDATE for task in read(launch))
        panels = 1024 // config.block_m
        most = panels * 1024 // config.block_n
        assert count == most or count >= fill
        assert count in (most, panels * 1024 // config.strip) or count < 2 * fill


# --- sums in parts ---------------------------------------------------------------------------


def cuts_of(made: Made) -> list[str]:
    return [
        planned.chain[i].step.into  # type: ignore[union-attr]
        for planned in made.planned
        for i in planned.cuts
    ]


def test_a_list_that_fills_the_machine_splits_no_sum_but_those_of_c() -> None:
    """Matrices that by themselves would leave processors idle are split only by themselves."""
    new = Operands()
    shapes = [(2048, 512, (64, 64)), (512, 2048, (64, 40))]
    problems = [problem(new, *shape) for shape in shapes]
    for each in problems:
        assert {"A", "B"} <= set(cuts_of(of_problems([each])))
    many = of_problems(problems * 24)
    assert set(cuts_of(many)) == {"C"}
    sums = [task for launch in many.launches for task in read(launch) if task.kind in (A, B)]
    assert len(sums) >= configs.FILL["sm_90"]
    assert not cuts_of(of_problems([problem(new, 64, 64, (8, 8))])), "too short"
    (bare,) = of_problems([problem(new, 64, 64, (8, 8))]).launches
    assert not bare.constants["HAS_PARTS"]


def test_sums_are_split_where_tiles_are_fewer_than_half_of_what_fills_the_machine() -> None:
    """Of C = A V those of each alone count, as others wait for it."""
    shape = (2048, 1024, (64, 64))
    config = configs.projection_config("sm_90", "bfloat16", 64)
    tiles = (2048 + 1024) // config.block_q
    for count in (1, 3):
        problems = [problem(Operands(), *shape) for _ in range(count)]
        for fill, split_ones in ((2 * count * tiles, {"C"}), (2 * count * tiles + 2, set("ABC"))):
            assert set(cuts_of(of_problems(problems, fill=fill))) == split_ones
    (launch,) = of_problems([problem(Operands(), *shape)], fill=2).launches
    assert not launch.constants["HAS_PARTS"]


@pytest.mark.parametrize(("n", "kinds"), [(128, {A}), (1024, {A, B, C})])
def test_parts_are_added_once_and_in_order(n: int, kinds: set[int]) -> None:
    """One record is of all parts of a sum, and one adds what they have written."""
    new = Operands()
    made = of_problems([problem(new, 4096, n, (16, 40))])
    (launch,) = made.launches
    order = read(launch)
    adding: dict[int, Task] = {}
    for task in order:
        if task.kind != UPDATE and record_of(launch, task.record)[14]:
            adding.setdefault(task.record, task)
    assert [task.kind for task in adding.values()] == sorted(kinds, key=[A, C, B].index)
    # Where arguments start doesn't matter here.
    model = traffic.Tasks(launch, [0] * len(launch.metadata))
    for place, task in adding.items():
        added = record_of(launch, place)
        ((counter, until),) = task.waits[:1]
        written = [each for each in order if each.counts == counter]
        assert len(written) == until, "all of its parts"
        (own_place,) = {each.record for each in written}
        own = record_of(launch, own_place)
        assert own[:1] + own[4:14] == added[:1] + added[4:14], "the same sum, in the same memory"
        parts, (q, length, rank, part) = added[14], (own[at] for at in (7, 8, 12, 34))
        assert parts > 1
        assert own[14] == 0, "a product"
        assert set(own[15:34]) == {0}, "what follows the sum is for the one that adds"
        assert length == (4096 if task.kind == A else n)
        assert (parts - 1) * part < length <= parts * part
        assert part % launch.config.block_k == 0
        tiles = tiles_in(launch, place)
        assert sorted(each.tile for each in written) == list(range(parts * tiles))
        size = q * -(-rank // 4) * 16
        memory = own[13] & (1 << tasks.ARGUMENT_BITS) - 1
        for tile in range(tiles):
            reads = [region for step in model.steps(place, tile) for region in step.reads]
            starts = [region.address for region in reads[:parts]]
            assert starts == [starts[0] + i * size for i in range(parts)]
            assert memory <= starts[0] < memory + size
            assert reads[:parts] == [
                region
                for i in range(parts)
                for step in model.steps(own_place, i * tiles + tile)
                for region in step.writes
            ]


def test_parts_cover_the_sum_once() -> None:
    for tiles in (1, 7, 32, 500):
        for length in (1, 31, 255, 256, 4096, 5000):
            for step in (32, 64):
                parts, part = split(tiles, length, step, 128)
                assert part % step == 0
                assert (parts - 1) * part < length <= parts * part
                assert parts == 1 or part >= min(configs.SHORTEST_SPLIT, length) // 2
    assert split(128, 4096, 64, 128)[0] == 1, "a tile for every processor"
    assert split(0, 0, 64, 128) == (1, 0)


def test_small_output_fills_the_machine() -> None:
    """A 64-wide output over a long sum is split into about as many tiles as there are SMs."""
    (made,) = of_jobs([job(16384, 64, 64, 64)])
    assert made.tasks >= 128


# --- the workspace ---------------------------------------------------------------------------


def test_turns_take_two_halves_of_the_workspace() -> None:
    new = Operands()
    problems = [problem(new, 4096, 4096, (64, 64)) for _ in range(6)]
    whole = of_problems(problems)
    each = whole.workspace_bytes // 6
    assert whole.planned[0].arena.bytes == each
    for limit, expected in (
        (6 * each, 6 * each),
        (4 * each, 4 * each),
        (2 * each, 2 * each),
        (each, 2 * each),  # a matrix alone takes more than half: it gets what it takes, twice
    ):
        made = of_problems(problems, limit=limit)
        (launch,) = made.launches
        assert made.workspace_bytes == expected
        assert_progress(launch)


# --- configs ---------------------------------------------------------------------------------


def chosen(
    dtype: torch.dtype, basis: torch.dtype, rank: int, precision: str = "tf32x3", odd: bool = False
) -> tuple[configs.Math, int, bool]:
    """What a config is chosen by."""
    asked: list[tuple[configs.Math, int, bool]] = []

    def choose(_: Chain, *by: Any) -> configs.Projection:
        asked.append(by)
        return configs.projection_config("sm_90", *by)

    arena = Arena(META)
    shape = (255, 257) if odd else (256, 256)
    each = problem(Operands(), *shape, (rank, 8), dtype=dtype, basis=basis)
    coefficient, _ = dot_rule(dtype, (basis,), (FP32,), "tf32x3")
    groups.plan_chain(chain_of(each, coefficient, arena.new), arena, precision, choose)
    (found,) = asked
    return found


def test_a_config_is_chosen_by_math_and_the_larger_rank() -> None:
    assert chosen(BF16, BF16, 16) == ("bfloat16", 16, True)
    assert chosen(BF16, BF16, 4)[1] == 8
    assert chosen(BF16, BF16, 16, "ieee")[0] == "bfloat16"
    for dtypes in ((FP32, FP32), (BF16, FP32), (FP32, BF16), (FP16, FP32)):
        assert chosen(*dtypes, 16)[0] == "float32"
    assert chosen(FP32, FP32, 16, "tf32")[0] == "tf32"
    assert chosen(BF16, BF16, 16, odd=True)[2] is False
    assert chosen(BF16, BF16, 15)[2] is False  # rows of 30 bytes


def test_float16_is_multiplied_in_tf32() -> None:
    """Its coefficients may pass 65504, but sixteen bits are exact in TF32.

    C is of float32 coefficients and takes more; but beside products of a matrix it is small.
    """
    assert chosen(FP16, FP16, 16)[0] == "tf32"
    (launch,) = of_problems([problem(Operands(), 256, 256, (16, 8), dtype=FP16)]).launches
    assert (launch.constants["C_DOT"], launch.constants["C_PRECISION"]) == (FP32, "tf32x3")
    assert launch.config == configs.projection_config("sm_90", "tf32", 16)
    assert launch.config != configs.projection_config("sm_90", "float32", 16)


def test_blocks_hold_the_rank_up_to_the_last() -> None:
    """The last config serves ranks beyond all blocks, which it may do by a smaller one."""
    for architecture in configs.ARCHITECTURES:
        rows = [row for math, row in configs.shipped(architecture) if math == "bfloat16"]
        blocks = [row.block_r for row in rows[:-1]]
        assert blocks == sorted(set(blocks))
        for rank in (1, 16, 32, 33, 64, 65, 128, 129, 1000):
            config = configs.projection_config(architecture, "bfloat16", rank)
            assert config == next((row for row in rows if row.block_r >= rank), rows[-1])
            assert config.block_r >= rank or config == rows[-1]


# --- views -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "layout"),
    [
        (torch.zeros(64, 64), Layout.ROW),
        (torch.zeros(64, 64).mT, Layout.COLUMN),
        (torch.zeros(64, 66), Layout.UNALIGNED_ROW),  # rows of 264 bytes
        (torch.zeros(64, 65)[:, :64], Layout.UNALIGNED_ROW),
        (torch.zeros(64, 68)[:, 1:65], Layout.UNALIGNED_ROW),  # starts off a boundary
        (torch.zeros(64, 72)[:, 4:68], Layout.ROW),
        (torch.zeros(64, 128)[:, ::2], Layout.GENERAL),
        (torch.zeros(1, 64).expand(64, 64), Layout.ROW),
        (torch.zeros(64, 80)[:, :77], Layout.PADDED_ROW),
        (torch.zeros(64, 80)[:, 4:77], Layout.PADDED_ROW),
        (torch.zeros(64, 80)[1:, :79], Layout.PADDED_ROW),
        (torch.zeros(64 * 80 - 1).as_strided((64, 77), (80, 1)), Layout.UNALIGNED_ROW),
        (torch.zeros(64 * 80 - 4).as_strided((64, 76), (80, 1)), Layout.ROW),
        (torch.zeros(64, 76).as_strided((60, 77), (76, 1)), Layout.UNALIGNED_ROW),  # overlap
        (torch.zeros(64, 80, dtype=torch.bfloat16)[:, :76], Layout.PADDED_ROW),
        (torch.zeros(64, 84, dtype=torch.bfloat16)[:, :77], Layout.UNALIGNED_ROW),
    ],
)
def test_layout(view: Tensor, layout: Layout) -> None:
    assert View.of(view).layout is layout
    assert is_aligned(view) is layout.aligned
    turned = {
        Layout.ROW: Layout.COLUMN,
        Layout.UNALIGNED_ROW: Layout.UNALIGNED_COLUMN,
        Layout.PADDED_ROW: Layout.PADDED_COLUMN,
        Layout.GENERAL: Layout.GENERAL,
    }
    flipped = turned.get(layout, Layout.ROW)
    assert View.of(view).mT.layout is flipped


def test_columns_are_scheduled_as_rows() -> None:
    """x.mT in column order is the same launch as x, bases and outputs exchanged."""
    c = job(128, 256, 16, 32)
    assert c.U is not None
    assert c.V is not None
    assert c.A is not None
    assert c.B is not None
    turned = Coefficients(c.x.mT, c.V, c.U, c.B.mT, c.A.mT)
    assert of_jobs([c]) == of_jobs([turned])
    update = update_job(c)
    other = Update(c.x.mT, c.x.mT, c.V, c.B.mT, c.A.mT, c.U.mT, -1.0, 1.0)
    assert of_jobs([update]) == of_jobs([other])


def test_dot_rule() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert dot_rule(bf16, (bf16,), (fp32,), "tf32x3") == (bf16, "ieee")
    assert dot_rule(fp16, (fp16,), (), "tf32x3") == (fp16, "ieee")
    assert dot_rule(fp16, (fp16,), (fp32,), "tf32x3") == (fp32, "tf32")
    assert dot_rule(bf16, (fp16,), (), "tf32x3") == (fp32, "tf32")
    for precision in ("tf32x3", "ieee"):
        assert accurate_rule(fp32, precision) == (fp32, precision)
        assert accurate_rule(bf16, precision) == (bf16, "ieee")
        assert accurate_rule(fp16, precision) == (bf16, "ieee")
    assert accurate_rule(fp32, "tf32") == (fp32, "tf32x3")
    for dtypes in ((fp32, fp32), (fp32, bf16), (bf16, fp32)):
        for precision in ("tf32x3", "tf32", "ieee"):
            assert dot_rule(*((dtypes[0]), dtypes[1:]), (), precision) == (fp32, precision)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="got float64; float64 runs on the torch backend"):
        of_jobs([job(8, 8, 2, 2, torch.float64)])
    with pytest.raises(TypeError, match="expected S to be float32"):
        of_jobs([job(8, 8, 2, 2)._replace(S=torch.zeros(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="beta to be 0, 1 or -1"):
        of_jobs([update_job(job(8, 8, 2, 2), beta=0.5)])
    long = torch.zeros(1).expand(1, 2**31)
    with pytest.raises(ValueError, match="no dimension beyond"):
        View.of(long)


def test_nothing_to_do_launches_nothing() -> None:
    assert of_jobs([]) == []
    assert of_jobs([job(0, 0, 2, 2), job(8, 8, 0, 0)]) == []
    assert of_jobs([update_job(job(0, 8, 2, 2)), update_job(job(8, 0, 2, 2))]) == []


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_86"),
    ],
)
def test_capability(capability: tuple[int, int], row: str) -> None:
    assert configs.architecture_of_capability(*capability) == row


def run_python(root: Path, code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_imports_without_triton(root: Path) -> None:
    """The package imports, and says why it cannot be used."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from osf_kernels.backends import triton\n"
        "print(triton.unavailable_reason())"
    )
    assert "triton cannot be imported: " in run_python(root, code)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_unavailable_on_a_cpu_unless_interpreted(root: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom osf_kernels.backends import triton\n"
        "print(triton.unavailable_reason(torch.device('cpu')), triton.unavailable_reason())"
    )
    assert "only with TRITON_INTERPRET=1" in run_python(root, code, TRITON_INTERPRET="0")
    assert run_python(root, code, TRITON_INTERPRET="1").split() == ["None", "None"]


def test_import_does_not_load_triton(root: Path) -> None:
    code = "import sys, osf_kernels, osf_kernels.backends.triton\nprint('triton' in sys.modules)"
    assert run_python(root, code).strip() == "False"
