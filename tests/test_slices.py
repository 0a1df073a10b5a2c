"""How a model's list shares the workspace, which holds some of its matrices at once.

Planned over meta tensors: nothing is allocated, and a GPU isn't needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from bench.models import llama_2_7b
from osf_kernels.backends import cuda, grouped
from osf_kernels.backends.chains import Reduction
from osf_kernels.backends.cuda.slices import sliced
from osf_kernels.backends.jobs import Coefficients, Problem, Stage
from osf_kernels.backends.operands import Arena
from osf_kernels.backends.triton import configs
from osf_kernels.plan import Matrix, choose
from tests.emulator.harness import compiler, workspace_bytes

BF16, F32 = torch.bfloat16, torch.float32
LIMIT = grouped.WORKSPACE_BYTES
# How many slices Llama-2-7B's 224 matrices take on "cuda", by rank and dtype of the bases: many at
# rank 128, as it has a part of A for each 256 (float32: 128) rows of a matrix.
SLICES = {(128, BF16): 80, (128, F32): 160, (2048, BF16): 160, (2048, F32): 160}


def problems_of(
    shapes: Sequence[tuple[int, int]], rank: int, basis_dtype: torch.dtype
) -> list[Problem]:
    def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    problems = []
    for m, n in shapes:
        x = matrix(m, n, BF16)
        U, V = matrix(m, rank, basis_dtype), matrix(n, rank, basis_dtype)
        name = str(basis_dtype).removeprefix("torch.")
        step = choose(
            Matrix(m, n, rank, rank, dtype="bfloat16", basis_dtype=name), "complement", "cuda"
        )
        problems.append(Problem(x, x, U, V, step))
    return problems


# --- triton: one launch, in which halves of the workspace take turns ---


class Planned(NamedTuple):
    """What a backend made of a list."""

    launches: list[Any]
    matrices: list[Any]  # ``groups.Planned`` of each
    workspace_bytes: int


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plans a list on Triton, for an H200."""
    dispatch = pytest.importorskip("osf_kernels.backends.triton.dispatch", exc_type=ImportError)
    monkeypatch.setattr(dispatch.launch, "architecture", lambda device: "sm_90")
    plan_launches, seen = dispatch.tasks.projection_launches, []

    def watched(planned: Any, **options: Any) -> Any:
        made = plan_launches(planned, **options)
        seen.append((made, planned))
        return made

    monkeypatch.setattr(dispatch.tasks, "projection_launches", watched)

    def planned(problems: Sequence[Problem], limit: int = LIMIT) -> Planned:
        program = dispatch.program(problems, limit, kept=1, halves=False)
        ((launches, size), matrices) = seen.pop()
        assert (program.calls, program.workspace_bytes) == (len(launches), size)
        return Planned(launches, list(matrices), size)

    return planned


@pytest.mark.parametrize("basis_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("rank", [128, 2048])
def test_a_model_is_one_launch(plan: Any, rank: int, basis_dtype: torch.dtype) -> None:
    """Of all 224 matrices, with no sum in parts but those of the small C = A V."""
    problems = problems_of(llama_2_7b(), rank, basis_dtype)
    assert len(problems) == 224
    made = plan(problems)
    (launch,) = made.launches
    assert len(made.matrices) == 224
    most = max(each.arena.bytes for each in made.matrices)
    assert 0 < made.workspace_bytes <= max(LIMIT, 2 * most)
    if 2 * most <= LIMIT:
        assert sum(each.arena.bytes for each in made.matrices) > LIMIT, "or none takes turns"
    for each in made.matrices:
        split = {each.chain[i].step.into for i in each.cuts}
        assert split <= {"C"}
    # All that a sum over a model's matrix makes is a tile for each processor or more.
    fill, sums = (
        configs.FILL["sm_90"],
        [
            link.step
            for each in made.matrices
            for link in each.chain
            if isinstance(link.step, Reduction) and link.step.into != "C"
        ],
    )
    assert len(sums) == 2 * 224
    tiles = sum(
        -(-step.out.shape[0] // launch.config.block_q)
        * -(-step.out.shape[1] // launch.config.block_r)
        for step in sums
    )
    assert launch.tasks > tiles >= fill
    # A call copies its own numbers to the device, which are few: counters and an address a matrix
    # (here they are no arguments). A record isn't one of a tile.
    assert len(launch.metadata) + len(problems) < 5_000
    assert len(launch.constant) - launch.tasks < 50_000
    if (rank, basis_dtype) == (128, BF16):
        assert len(launch.constant) < 250_000


def test_a_matrix_beyond_half_the_workspace_gets_what_it_takes(plan: Any) -> None:
    """And no more: what follows it in turn gets the same memory."""
    small, large = (512, 512), (4096, 11008)
    alone = [
        plan(problems_of([shape], 64, BF16), 1 << 62).workspace_bytes for shape in (small, large)
    ]
    assert 2 * alone[0] < alone[1]
    listed = problems_of([small, large, small, small, large, small], 64, BF16)
    whole = plan(listed, 1 << 62)
    # In a list fewer sums are cut.
    most = max(each.arena.bytes for each in whole.matrices)
    assert whole.workspace_bytes == sum(each.arena.bytes for each in whole.matrices)
    for limit in (1, most, 2 * most - 32):
        tight = plan(listed, limit)
        assert len(tight.launches) == 1
        assert most <= tight.workspace_bytes <= max(limit, most)
    roomy = plan(listed, 2 * most + 64)
    assert roomy.workspace_bytes <= 2 * most + 64


# --- cuda: slices ---


def shapes_in(calls: Sequence[Sequence[Stage]]) -> list[tuple[int, int]]:
    return [tuple(stages[0][0].x.shape) for stages in calls]


def sums_in(calls: Iterable[Sequence[Stage]]) -> list[Coefficients]:
    jobs = (job for stages in calls for stage in stages for job in stage)
    return [job for job in jobs if isinstance(job, Coefficients)]


@pytest.mark.parametrize("basis_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("rank", [128, 2048])
def test_a_model_is_cut_to_the_workspace(rank: int, basis_dtype: torch.dtype) -> None:
    """No slice exceeds it, nor does a matrix alone; the next matrix wouldn't have fitted."""
    shapes = [(m, n) for m, n in llama_2_7b()]
    assert len(shapes) == 224
    problems = problems_of(shapes, rank, basis_dtype)
    slices = sliced(problems, LIMIT, cuda.parts_bytes)
    assert list(itertools.chain.from_iterable(shapes_in(calls) for _, calls in slices)) == shapes
    assert len(slices) == SLICES[rank, basis_dtype]

    def needed(arena: Arena, calls: Sequence[Sequence[Stage]]) -> int:
        return arena.bytes + sum(map(cuda.parts_bytes, sums_in(calls)))

    assert max(itertools.starmap(needed, slices)) <= LIMIT
    for (_, calls), (_, following) in itertools.pairwise(slices[:12]):
        tried = problems_of([*shapes_in(calls), shapes_in(following)[0]], rank, basis_dtype)
        (together,) = sliced(tried, 1 << 62, cuda.parts_bytes)
        assert needed(*together) > LIMIT


def test_a_matrix_beyond_the_workspace_has_a_slice_of_its_own() -> None:
    shapes = [(4096, 4096), (4096, 11008), (512, 512), (512, 512), (11008, 4096), (512, 512)]
    slices = sliced(problems_of(shapes, 64, BF16), 29 << 17, cuda.parts_bytes)
    assert [shapes_in(calls) for _, calls in slices] == [
        [(4096, 4096)],
        [(4096, 11008)],
        [(512, 512), (512, 512)],
        [(11008, 4096)],
        [(512, 512)],
    ]


def test_parts_of_sums_are_those_that_the_extension_lays_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the byte, for jobs of every kind, on machines of few and of many processors."""
    if compiler() is None:
        pytest.skip("no C++ compiler (g++)")
    g = torch.Generator().manual_seed(3)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    jobs = []
    for i in range(400):
        longest = (40, 700, 12000)[i % 3]
        m, n, r, k = below(longest), below(longest), below(300), below(300)
        if i % 5 == 0:
            r = k
        if i % 7 == 0:
            r, k = (0, k) if i % 2 else (r, 0)
        if i % 11 == 0:
            m, n = (0, n) if i % 2 else (m, 0)
        dtypes = [(BF16, torch.float16, F32)[below(3)] for _ in "xUV"]
        if i % 2:
            dtypes = dtypes[:1] * 3
        x, U, V = (matrix(*s, d) for s, d in zip(((m, n), (m, r), (n, k)), dtypes, strict=True))
        A, B = matrix(r, n, F32), matrix(m, k, F32)
        left, right = (
            (None, None) if i % 9 == j else pair for j, pair in enumerate(((U, A), (V, B)))
        )
        jobs.append(Coefficients(x, left[0], right[0], left[1], right[1]))
    for processors in (1, 4, 132, 1000):
        monkeypatch.setattr(cuda, "_processors", lambda device, found=processors: found)
        expected = workspace_bytes(jobs, processors)
        assert [cuda.parts_bytes(job) for job in jobs] == expected
        assert len(set(expected)) > 300
