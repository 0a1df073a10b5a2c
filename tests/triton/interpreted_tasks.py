"""Whole projections by programs that run side by side, under Triton's interpreter.

Tasks of one launch wait for each other by counters. In whatever order programs run, and however few
are resident, each matrix has the bits that it has alone, and faults planted in the waiting show.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from osf_kernels.backends import triton as backend
from osf_kernels.backends.jobs import Coefficients, Problem
from osf_kernels.backends.triton import configs, dispatch, launch, tasks
from osf_kernels.backends.triton.kernels import projection as kernels
from osf_kernels.backends.triton.kernels import reduction as sums
from osf_kernels.forms import First, Name
from osf_kernels.plan import Step
from osf_kernels.testing import assert_error_within
from tests.helpers import generator_for, randn
from tests.triton.interleaving import Stuck, interleave
from tests.triton.watching import records_of, watch

CONFIG = configs.Projection(16, 16, 16, 16, 16, 32, 4, 1, 1)
# Fewer than there are tasks: some claim several. Fewer of them are resident side by side, or one:
# those that start when others have ended find what these have left.
PROGRAMS = 7
RESIDENT = (4, 1, 2)
SEEDS = range(3)
ROOM = 1 << 20  # of workspace, for every list here


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, short parts and several programs."""
    monkeypatch.setattr(configs, "projection_config", lambda *_: CONFIG)
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 16)
    monkeypatch.setattr(launch, "_INTERPRETED_PROGRAMS", PROGRAMS)


class Case(NamedTuple):
    """Projections of matrices of some shapes, each of its form."""

    steps: tuple[tuple[Name, First], ...]
    shapes: tuple[tuple[int, int], ...]
    fill: int = 1  # 1: no sum is in parts but C, and each matrix is a group of its own in the order
    share: float = 1.0  # of the workspace that all of them take side by side
    launches: int = 1
    dtype: torch.dtype = torch.float32
    ranks: tuple[int, int] = (6, 4)
    config: configs.Projection = CONFIG


BOTH: tuple[Name, First] = ("dual", "left")
TWO = ((40, 24), (20, 36))
HALF = ((40, 24), (24, 48))  # in 16 bits of whole vectors too
CASES = {
    "dual": Case((BOTH,) * 2, TWO),
    "in parts": Case((BOTH,) * 2, TWO, fill=96),
    "in turns": Case((BOTH,) * 4, ((20, 16), (24, 20), (16, 16), (20, 24)), share=0.6),
    "one by one": Case((BOTH,) * 4, ((20, 16), (24, 20), (16, 16), (20, 24)), share=0.0),
    # One group, of which the third matrix waits for the first.
    "in parts, in turns": Case((BOTH,) * 3, ((20, 32), (32, 20), (16, 32)), fill=64, share=0.8),
    "mixed": Case((("mixed", "left"),) * 2, TWO),
    # B is float32 until it is corrected, and bfloat16 then: two launches.
    "mixed, right": Case(
        (("mixed", "right"),) * 2, HALF, fill=96, launches=2, dtype=torch.bfloat16
    ),
    "inner": Case((("inner", "left"),) * 2, TWO, fill=96),
    # Parts of C in two steps; C in tiles that are products of what is stored.
    "long parts of C": Case((BOTH,) * 2, ((40, 72), (36, 64)), config=CONFIG._replace(block_q=32)),
    "ranks beyond a block": Case((BOTH, ("mixed", "left")), ((40, 72), (36, 64)), ranks=(20, 18)),
    "left": Case((("left", "left"),) * 3, (*HALF, (16, 16)), fill=96, dtype=torch.bfloat16),
    "right": Case((("right", "left"),) * 3, (*TWO, (16, 16))),
    "several forms": Case((BOTH, ("left", "left"), ("right", "left")), (*TWO, (24, 24)), fill=32),
    "sequential": Case((("sequential", "left"),) * 2, TWO, fill=96),
    # Its two updates don't share a launch; nor do matrices then, where the limit is small.
    "dual in turn": Case((("dual in turn", "left"),) * 2, TWO, launches=2),
    "dual in turn, one by one": Case((("dual in turn", "left"),) * 2, TWO, share=0.0, launches=4),
}
QUICK = ("dual", "in parts", "in turns", "one by one", "in parts, in turns")


class Run:
    """A case's matrices, projected in place."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.case = case = CASES[name]
        monkeypatch.setitem(configs.FILL, "sm_80", case.fill)
        monkeypatch.setattr(configs, "projection_config", lambda *_: case.config)
        g = generator_for("tasks", name)
        self.before, self.problems = [], []
        for (form, first), (m, n) in zip(case.steps, case.shapes, strict=True):
            x = randn(m, n, dtype=case.dtype, generator=g)
            U, V = (
                torch.linalg.qr(randn(size, rank, dtype=torch.float32, generator=g))[0].to(x.dtype)
                for size, rank in zip((m, n), case.ranks, strict=True)
            )
            kept = form in ("dual", "sequential", "left", "right")  # x less its projection
            alpha, beta = (-1.0, 1.0) if kept else (1.0, 0.0)
            step = Step(form, first, alpha, beta, 0, 0, 0, "", form)
            U, V = (None if form == "right" else U), (None if form == "left" else V)
            self.problems.append(Problem(x, x, U, V, step))
            self.before.append(x.clone())
        self.limit = int(case.share * self.program(ROOM).workspace_bytes)

    def program(self, limit: int | None = None) -> dispatch.Program:
        limit = self.limit if limit is None else limit
        return dispatch.program(self.problems, limit, kept=1, halves=False)

    def run(self, program: dispatch.Program, memory: Tensor | None = None) -> list[Tensor]:
        """The results, from the same values in a workspace of NaN."""
        if memory is None:
            memory = torch.empty(program.workspace_bytes, dtype=torch.uint8)
        memory.fill_(0xFF)
        for problem, before in zip(self.problems, self.before, strict=True):
            problem.x.copy_(before)
        program.run([memory.data_ptr()])
        return [problem.x.clone() for problem in self.problems]

    def alone(self) -> list[Tensor]:
        """The results of each in a program of its own, one after another."""
        results = []
        for problem, before in zip(self.problems, self.before, strict=True):
            problem.x.copy_(before)
            made = dispatch.program([problem], ROOM, kept=0, halves=False)
            memory = torch.empty(made.workspace_bytes, dtype=torch.uint8)
            made.run([memory.fill_(0xFF).data_ptr()])
            results.append(problem.x.clone())
        return results

    def check(self, results: Sequence[Tensor]) -> None:
        for result, before, problem in zip(results, self.before, self.problems, strict=True):
            truth, peer = (
                projected(problem, before.to(dtype), dtype)
                for dtype in (torch.float64, torch.float32)
            )
            assert_error_within(result, truth, peer.to(before.dtype), scale=before)


def projected(problem: Problem, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a form makes of x (forms.py)."""
    U, V = (None if t is None else t.to(dtype) for t in (problem.U, problem.V))
    left = x if U is None else U @ (U.mT @ x)
    right = x if V is None else x @ V @ V.mT
    both = left if V is None else left @ V @ V.mT
    form = problem.step.form
    if form in ("dual", "sequential", "dual in turn"):
        made = left + right - both
    elif form == "mixed":
        made = left - both if problem.step.first == "left" else right - both
    else:
        made = {"left": left, "right": right, "inner": both}[form]
    return problem.step.beta * x + problem.step.alpha * made


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_any_order_of_programs_gives_the_bits_of_each_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(name, monkeypatch)
    expected = run.alone()
    run.check(expected)
    watching = watch(monkeypatch)
    program = run.program()
    assert program.calls == len(watching.planned) == run.case.launches
    programs = [min(PROGRAMS, made.tasks) for made in watching.planned]
    assert max(made.tasks for made in watching.planned) > PROGRAMS
    seeds = SEEDS if name == "in parts" else range(2) if name in QUICK else range(6)
    for seed in seeds:
        with monkeypatch.context() as patch:
            launched = interleave(patch, seed, resident=RESIDENT[seed % 3])
            results = run.run(program)
        assert launched == programs
        assert all(map(torch.equal, results, expected)), seed
    in_parts = [
        any(fields[14] for fields in records_of(made) if fields[0] < 3) for made in watching.planned
    ]
    assert in_parts == [made.constants["HAS_PARTS"] for made in watching.planned]
    assert any(in_parts) == (run.case.fill > 1)
    # The counters are zero again, so that the same metadata serves the next call.
    for i, records in enumerate(watching.records):
        start = watching.planned[i % run.case.launches].counts[0]
        assert records[:start].tolist() == [0] * start


@pytest.mark.parametrize("name", ["in turns", "one by one", "in parts, in turns"])
def test_turns_take_less_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as may be, or as the largest takes alone, in one launch all the same."""
    run = Run(name, monkeypatch)
    roomy, tight = run.program(ROOM), run.program()
    assert roomy.calls == tight.calls == 1
    assert tight.workspace_bytes < roomy.workspace_bytes
    alone = [
        dispatch.program([problem], ROOM, kept=0, halves=False).workspace_bytes
        for problem in run.problems
    ]
    assert roomy.workspace_bytes == sum(alone)
    assert max(alone) <= tight.workspace_bytes <= max(run.limit, *alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dual", "in parts, in turns"])
def test_kept_records_serve_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call copies no records to the device, and its counters start at zero."""
    run = Run(name, monkeypatch)
    expected = run.alone()
    watching = watch(monkeypatch)
    program = run.program()
    memory = torch.empty(program.workspace_bytes, dtype=torch.uint8)
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            assert all(map(torch.equal, run.run(program, memory), expected)), seed
    assert watching.uploads == 1


# --- planted faults ------------------------------------------------------------------------


@triton.jit
def no_wait(counters, record, FIELD: tl.constexpr):
    pass


@triton.jit
def uncounted(counters, record, FIELD: tl.constexpr, AMD: tl.constexpr):
    pass


@triton.jit
def not_reset(counters, count, BLOCK: tl.constexpr):
    tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu")


@triton.jit
def reset_by_all(counters, count, BLOCK: tl.constexpr):
    for first in range(0, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        tl.store(counters + offsets, tl.zeros((BLOCK,), tl.int64), mask=offsets < count)


LAST = tl.constexpr(16)  # task of the case "dual"


@triton.jit
def backwards(counters):
    return LAST - tl.atomic_add(counters, 1, sem="relaxed", scope="gpu").to(tl.int32)


def assert_seen(run: Run, monkeypatch: pytest.MonkeyPatch, expected: Sequence[Tensor]) -> None:
    """In one of a dozen orders something else comes out than should."""
    program = run.program()
    for seed in range(12):
        with monkeypatch.context() as patch:
            interleave(patch, seed, resident=PROGRAMS)
            results = run.run(program)
        if not all(map(torch.equal, results, expected)):
            return
    pytest.fail("never seen")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("dual", "projection"),
        ("dual", "reduction"),
        pytest.param("in parts", "projection", marks=pytest.mark.slow),
        pytest.param("left", "projection", marks=pytest.mark.slow),
        pytest.param("mixed", "projection", marks=pytest.mark.slow),
        pytest.param("sequential", "projection", marks=pytest.mark.slow),
    ],
)
def test_a_task_that_does_not_wait_is_seen(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads what is not written yet, or writes what is still read. In ``reduction`` it is parts
    of C, which are added, and C, by which a coefficient is corrected."""
    run = Run(name, monkeypatch)
    expected = run.alone()
    monkeypatch.setattr(kernels if module == "projection" else sums, "wait", no_wait)
    assert_seen(run, monkeypatch, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in turns", "one by one", "in parts, in turns"])
def test_memory_that_is_not_waited_for_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the matrices of a half don't wait for those that used it before."""
    run = Run(name, monkeypatch)
    expected = run.alone()
    places = tasks._places

    def at_once(*args: object) -> tuple[list[tasks._Place], int]:
        made, end = places(*args)  # type: ignore[arg-type]
        return [place._replace(turn=place.turn % 2) for place in made], end

    monkeypatch.setattr(tasks, "_places", at_once)
    assert_seen(run, monkeypatch, expected)


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (kernels, "done", uncounted),
        pytest.param(sums, "done", uncounted, marks=pytest.mark.slow),
        pytest.param(kernels, "claim", backwards, marks=pytest.mark.slow),
    ],
    ids=["task", "tile of C", "claim"],
)
def test_a_wait_without_end_is_seen(
    module: ModuleType, name: str, mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a task or a tile of C that is not counted, or that nobody is left to claim."""
    run = Run("dual", monkeypatch)
    watching = watch(monkeypatch)
    monkeypatch.setattr(module, name, mutant)
    interleave(monkeypatch, 0, resident=2)
    with pytest.raises(InterpreterError, match=Stuck.__name__):
        run.run(run.program())
    (made,) = watching.planned
    assert made.tasks == LAST.value + 1


def test_counters_that_are_not_reset_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("dual", monkeypatch)
    watching = watch(monkeypatch)
    monkeypatch.setattr(kernels, "leave", not_reset)
    run.run(run.program())
    (made,), (metadata,) = watching.planned, watching.records
    counters = metadata[: made.counts[0]].tolist()
    assert counters[:2] == [made.tasks + PROGRAMS, PROGRAMS]
    # Each task has counted one of them up. The tile of either C was claimed and counted, and each
    # of the five tiles of B has claimed one more, in vain.
    assert sum(counters[2:]) == made.tasks + 2 * 2 + 5


@pytest.mark.slow
def test_counters_reset_too_early_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program that isn't the last to leave: others claim what was done, and do it again."""
    run = Run("dual", monkeypatch)
    expected = run.alone()
    monkeypatch.setattr(kernels, "leave", reset_by_all)
    results = run.run(run.program())
    assert not all(map(torch.equal, results, expected))


@pytest.mark.slow
def test_parts_are_added_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element a part: the sum is that of a loop over the parts in float32, to the bit."""
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 32)
    monkeypatch.setitem(configs.FILL, "sm_80", 1 << 10)
    g = generator_for("order of parts")
    m, n = 9 * 32, 20
    scales = torch.logspace(-3, 3, m)[torch.randperm(m, generator=g)]
    x = torch.randn(m, n, generator=g) * scales[:, None]
    U = torch.zeros(m, 4)
    U[::32] = 1.0
    V = torch.zeros(n, 4)
    A, B = torch.empty(4, n), torch.empty(m, 4)
    expected, reverse = torch.zeros(n), torch.zeros(n)
    for part in range(9):
        expected = expected + x[32 * part]
        reverse = reverse + x[m - 32 - 32 * part]
    assert not torch.equal(expected, reverse)
    for seed in SEEDS:
        with monkeypatch.context() as patch:
            interleave(patch, seed)
            backend.coefficients([Coefficients(x, U, V, A, B)], float32_precision="ieee")
        assert torch.equal(A, expected.expand(4, -1))


@pytest.mark.parametrize(
    ("form", "turned"),
    [
        ("left", False),
        pytest.param("left", True, marks=pytest.mark.slow),
        pytest.param("right", False, marks=pytest.mark.slow),
        pytest.param("right", True, marks=pytest.mark.slow),
    ],
)
def test_a_matrix_with_one_basis_goes_in_bands(
    form: Name, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains of their own, of the bits of the whole: in place, and into rows or columns."""
    g = generator_for("bands", form, turned)
    shape = (24, 600) if form == "left" else (600, 24)
    x = randn(*shape, dtype=torch.float32, generator=g)
    x = x.mT.contiguous().mT if turned else x
    basis = torch.linalg.qr(randn(24, 5, dtype=torch.float32, generator=g))[0]
    step = Step(form, "left", -1.0, 1.0, 0, 0, 0, "", form)

    def run(room: float) -> tuple[int, Tensor]:
        monkeypatch.setattr("osf_kernels.gpu.room_in_l2", lambda architecture: room)
        given = x.clone()
        U, V = (basis, None) if form == "left" else (None, basis)
        watching = watch(monkeypatch)
        made = dispatch.program([Problem(given, given, U, V, step)], ROOM, kept=0, halves=False)
        memory = torch.empty(made.workspace_bytes, dtype=torch.uint8)
        made.run([memory.fill_(0xFF).data_ptr()])
        (launched,) = watching.planned
        return launched.counts[0], given

    whole, expected = run(1 << 30)
    bands, actual = run(4.0 * x.numel() * 4 / 2.5)
    assert bands == whole + 2, "three bands, each with a counter"
    assert torch.equal(actual, expected)
    wide = x.double()
    E = basis.double() @ basis.double().mT
    truth = wide - (E @ wide if form == "left" else wide @ E)
    assert_error_within(actual, truth, truth.float(), scale=x)
