"""The tasks of a launch: their waits, their order, sums in parts. No triton needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from bench import traffic_tasks
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.operands import WORKSPACE
from osf_kernels.backends.triton import configs, tasks
from osf_kernels.backends.triton.launches import Launch, split
from osf_kernels.forms import FORMS, First
from tests.triton.task_checks import (
    BF16,
    FP16,
    FP32,
    META,
    UPDATE,
    A,
    B,
    C,
    Made,
    Operands,
    Task,
    assert_in_order,
    assert_progress,
    job,
    numbers,
    of_jobs,
    of_problems,
    problem,
    read,
    record_of,
    tiles_in,
)

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
    "c of nothing": lambda new: [
        problem(new, 256, 128, (16, 0), "inner", "left"),
        problem(new, 128, 256, (0, 16), "inner", "right"),
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
    assert ordered > 10 * len(problems) or name.endswith("nothing")


@pytest.mark.parametrize("name", ["dual", "wide ranks", "every form", "restore", "c of nothing"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_waits_end_and_suffice_where_matrices_take_turns(name: str, share: float) -> None:
    """In a workspace that holds some of the matrices at once."""
    new = Operands()
    problems = LISTS[name](new)
    whole = of_problems(problems, fill=48).workspace_bytes
    limit = int(share * whole)
    made = of_problems(problems, fill=48, limit=limit)
    assert made.workspace_bytes <= max(limit, *(p.arena.bytes for p in made.planned))
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


def test_parts_of_c_of_half_a_step_are_refused() -> None:
    config = configs.projection_config("sm_90", "bfloat16", 64)._replace(block_q=32, block_k=64)
    with pytest.raises(ValueError, match="expected block_q to be a multiple of block_k"):
        of_problems([problem(Operands(), 256, 256, (16, 16))], config=config)


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


def test_ready_coefficients_are_rounded_to_the_dtype_of_the_products() -> None:
    """By tasks that make the parts of C, so that there are some where they have that dtype too."""
    new = Operands()
    for dtype, kinds in ((BF16, [A, C, B, UPDATE]), (FP32, [A, C, B, UPDATE])):
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
    model = traffic_tasks.Tasks(launch, [0] * len(launch.metadata))
    for (first, panel), task in zip(found, updates, strict=True):
        written = [each.writes[0] for each in model.steps(place, task.tile) if each.writes]
        starts = [each.address for each in written]
        corner = (panel * config.block_m * 2048 + first) * 2
        end = corner + 2 * min(config.strip, 2048 - first)
        assert starts == list(range(corner, end, 2 * config.block_n))


def test_few_updates_take_narrower_strips() -> None:
    """So that each processor has a task, if there are tiles enough."""
    config = configs.projection_config("sm_90", "bfloat16", 64)
    for fill in (1, 16, 64, 10**6):
        (launch,) = of_problems([problem(Operands(), 1024, 1024, (64, 64))], fill=fill).launches
        count = sum(task.kind == UPDATE for task in read(launch))
        panels = 1024 // config.block_m
        most = panels * 1024 // config.block_n
        assert count == most or count >= fill
        assert count in (most, panels * -(-1024 // config.strip)) or count < 2 * fill


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
        assert set(cuts_of(of_problems([each]))) == set("ABC")
    many = of_problems(problems * 24)
    assert set(cuts_of(many)) == {"C"}
    sums = [task for launch in many.launches for task in read(launch) if task.kind in (A, B)]
    assert len(sums) >= configs.FILL["sm_90"]
    assert set(cuts_of(of_problems([problem(new, 64, 64, (8, 8))]))) == {"C"}, "too short"
    (bare,) = of_problems([problem(new, 64, 64, (8, 8))]).launches
    assert not bare.constants["HAS_PARTS"]


def test_sums_are_split_where_tiles_are_fewer_than_half_of_what_fills_the_machine() -> None:
    shape = (2048, 1024, (64, 64))
    config = configs.projection_config("sm_90", "bfloat16", 64)
    tiles = (2048 + 1024) // config.block_q
    for count in (1, 3):
        problems = [problem(Operands(), *shape) for _ in range(count)]
        for fill, split_ones in ((2 * count * tiles, {"C"}), (2 * count * tiles + 2, set("ABC"))):
            assert set(cuts_of(of_problems(problems, fill=fill))) == split_ones
    (launch,) = of_problems([problem(Operands(), *shape)], fill=2).launches
    assert not launch.constants["HAS_PARTS"]


@pytest.mark.parametrize(("n", "kinds"), [(128, {A}), (1024, {A, B})])
def test_parts_are_added_once_and_in_order(n: int, kinds: set[int]) -> None:
    """One record is of all parts of a sum, and one adds what they have written."""
    new = Operands()
    made = of_problems([problem(new, 4096, n, (16, 40))])
    (launch,) = made.launches
    order = read(launch)
    adding: dict[int, Task] = {}
    for task in order:
        if task.kind in (A, B) and record_of(launch, task.record)[14]:
            adding.setdefault(task.record, task)
    assert [task.kind for task in adding.values()] == sorted(kinds)
    # Where arguments start doesn't matter here.
    model = traffic_tasks.Tasks(launch, [0] * len(launch.metadata))
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
        assert set(own[15:34] + own[35:]) == {0}, "what follows the sum is for the one that adds"
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


@pytest.mark.parametrize("name", ["dual", "float32", "odd", "restore", "wide ranks"])
def test_c_is_of_parts_of_the_tiles_of_a_or_a_product(name: str) -> None:
    """Of ranks within a block each tile of A makes a part, and all are added once, in order."""
    made = of_problems(LISTS[name](Operands()), fill=48)
    seen = 0
    for launch in made.launches:
        config, in_parts = launch.config, launch.constants["C_IN_PARTS"]
        assert isinstance(config, configs.Projection)
        model = traffic_tasks.Tasks(launch, [0] * len(launch.metadata))
        order = read(launch)
        for place in {task.record for task in order if task.kind == C}:
            seen += 1
            c = record_of(launch, place)
            q, columns, count = c[7], c[12], c[14]
            assert in_parts == (max(q, columns) <= config.block_r)
            ((counter, until),) = {wait for t in order if t.record == place for wait in t.waits}
            makers = [t for t in order if t.counts == counter]
            assert len(makers) == until
            reads = [r for step in model.steps(place, 0) for r in step.reads]
            if not in_parts:
                assert (count, c[13]) == (0, 0)
                continue
            assert count == -(-record_of(launch, makers[0].record)[7] // config.block_q)
            # Of each part the first tile, in the order of the panels that made them.
            starts = [r.address for r in reads[:count]]
            stored = {}
            for t in makers:
                *_, last = model.steps(t.record, t.tile)
                assert t.record + record_of(launch, t.record)[35] == place
                stored[t.tile] = last.writes[-1].address
            assert starts == [stored[tile] for tile in sorted(stored)][:count]
            assert len(set(starts)) == count
    assert seen


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


def test_turns_take_halves_of_the_workspace_or_all_of_it() -> None:
    new = Operands()
    problems = [problem(new, 4096, 4096, (64, 64)) for _ in range(6)]
    whole = of_problems(problems)
    each = whole.workspace_bytes // 6
    assert whole.planned[0].arena.bytes == each
    for limit, expected in (
        (6 * each, 6 * each),
        (4 * each, 4 * each),
        (2 * each, 2 * each),
        (2 * each - 1, each),  # a matrix takes more than half: one after another
        (each - 1, each),  # a matrix alone takes more
    ):
        made = of_problems(problems, limit=limit)
        (launch,) = made.launches
        assert made.workspace_bytes == expected
        assert_progress(launch)
