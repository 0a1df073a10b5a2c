"""How a model's list is cut so that its coefficients and partial sums fit the workspace.

Planned over meta tensors: nothing is allocated, and a GPU isn't needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from bench.models import llama_2_7b
from osf_kernels.backends import cuda, grouped
from osf_kernels.backends.jobs import Coefficients, Problem, Stage, in_stages
from osf_kernels.backends.operands import Arena
from osf_kernels.backends.triton import configs
from osf_kernels.plan import Matrix, choose
from tests.emulator.harness import compiler, workspace_bytes

BF16, F32 = torch.bfloat16, torch.float32
LIMIT = grouped.WORKSPACE_BYTES
# How many slices Llama-2-7B's 224 matrices take, by backend, rank and dtype of the bases. Those of
# "cuda" are many at rank 128, as it has a part of A for each 256 (float32: 128) rows of a matrix.
SLICES = {
    ("triton", 128, BF16): 6,
    ("triton", 128, F32): 6,
    ("triton", 2048, BF16): 96,
    ("triton", 2048, F32): 96,
    ("cuda", 128, BF16): 80,
    ("cuda", 128, F32): 160,
    ("cuda", 2048, BF16): 160,
    ("cuda", 2048, F32): 160,
}


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


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What plans a backend's launches, for an H200."""
    if request.param == "cuda":
        return cuda
    dispatch = pytest.importorskip("osf_kernels.backends.triton.dispatch", exc_type=ImportError)
    monkeypatch.setattr(dispatch.launch, "architecture", lambda device: "sm_90")
    return dispatch


def shapes_in(calls: Sequence[Sequence[Stage]]) -> list[tuple[int, int]]:
    return [tuple(stages[0][0].x.shape) for stages in calls]


def sums_in(calls: Iterable[Sequence[Stage]]) -> list[Coefficients]:
    jobs = (job for stages in calls for stage in stages for job in stage)
    return [job for job in jobs if isinstance(job, Coefficients)]


@pytest.mark.parametrize("basis_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("rank", [128, 2048])
def test_a_model_is_cut_to_the_workspace(kernels: Any, rank: int, basis_dtype: torch.dtype) -> None:
    """No slice exceeds it, nor does a matrix alone; the next matrix wouldn't have fitted."""
    shapes = [(m, n) for m, n in llama_2_7b()]
    assert len(shapes) == 224
    problems = problems_of(shapes, rank, basis_dtype)
    slices = grouped.sliced(problems, kernels, LIMIT)
    assert list(itertools.chain.from_iterable(shapes_in(calls) for _, calls in slices)) == shapes
    name = "cuda" if kernels is cuda else "triton"
    assert len(slices) == SLICES[name, rank, basis_dtype]

    def needed(arena: Arena, calls: Sequence[Sequence[Stage]]) -> int:
        parts = sum(map(kernels.parts_bytes, sums_in(calls)))
        return arena.bytes + parts + kernels.spare_bytes(arena.device)

    assert max(itertools.starmap(needed, slices)) <= LIMIT
    for (_, calls), (_, following) in itertools.pairwise(slices[:12]):
        tried = problems_of([*shapes_in(calls), shapes_in(following)[0]], rank, basis_dtype)
        (together,) = grouped.sliced(tried, kernels, 1 << 62)
        assert needed(*together) > LIMIT
    if name == "triton":
        assert_unsplit(kernels, slices)


def assert_unsplit(dispatch: Any, slices: Sequence[tuple[Arena, list[list[Stage]]]]) -> None:
    """Sums over a model's matrix are split in no slice that is full.

    Those of the small C = A V may be, where even a full slice has fewer tiles of C than there are
    processors: within what is spared for that.
    """
    device, fill = torch.device("meta"), configs.FILL["sm_90"]

    def planned(jobs: list[Coefficients], fill: int | None = None) -> list[Any]:
        options = (None, None, "tf32x3", False, fill)
        launches: list[Any] = dispatch._plan_coefficients(device, jobs, *options)
        return launches

    for arena, calls in slices[:-1]:
        assert arena.bytes <= LIMIT
        stages = [s for s in in_stages(map(iter, calls)) if isinstance(s[0], Coefficients)]
        for i, jobs in enumerate(stages):
            for made, unsplit in zip(planned(jobs), planned(jobs, 1), strict=True):
                assert made.kernel == "two_pass"
                assert (unsplit.sums, unsplit.workspace_elements) == (0, 0)
                if unsplit.tiles >= fill:
                    assert made == unsplit
                else:
                    assert i > 0, "sums over a model's matrix"
                    assert made.tiles <= 2 * fill
                    assert 4 * made.workspace_elements <= dispatch.spare_bytes(device)
                assert arena.bytes + 4 * made.workspace_elements <= LIMIT


def test_a_matrix_beyond_the_workspace_has_a_slice_of_its_own(kernels: Any) -> None:
    shapes = [(4096, 4096), (4096, 11008), (512, 512), (512, 512), (11008, 4096), (512, 512)]
    spare = kernels.spare_bytes(torch.device("meta"))
    slices = grouped.sliced(problems_of(shapes, 64, BF16), kernels, (29 << 17) + spare)
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
