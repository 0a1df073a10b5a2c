"""A = Uᵀx and B = xV under Triton's interpreter (see interpreter.py)."""

from __future__ import annotations

import itertools

import pytest
import torch

from osf_kernels.backends import triton as backend
from osf_kernels.backends.chains import chain_of_job
from osf_kernels.backends.jobs import Coefficients
from osf_kernels.backends.operands import Arena
from osf_kernels.backends.triton import configs, groups, tasks
from tests.helpers import generator_for
from tests.triton.jobs import LAYOUTS, assert_coefficients, draw, draw_coefficients
from tests.triton.watching import records_of, watch

# Small tiles, so that small matrices have several and every edge is ragged.
CONFIG = configs.Projection(32, 16, 16, 32, 16, 32, 4, 1, 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What float16 shares with bfloat16 runs for it in the full suite.
QUICK_DTYPES = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16)


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split sums of small matrices too."""
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 32)


def run(jobs: list[Coefficients], float32_precision: str | None = None) -> None:
    backend.coefficients(jobs, config=CONFIG, float32_precision=float32_precision)


def bits(job: Coefficients) -> list[torch.Tensor]:
    return [t.clone() for t in (job.A, job.B) if t is not None]


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype) -> None:
    g = generator_for(dtype)
    job = draw_coefficients((75, 41), (20, 13), g, dtype=dtype)
    run([job])
    assert_coefficients(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "basis"),
    [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] != pair[1]],
    ids=str,
)
def test_mixed_dtypes(dtype: torch.dtype, basis: torch.dtype) -> None:
    g = generator_for(dtype, basis)
    job = draw_coefficients((70, 34), (9, 17), g, dtype=dtype, basis=basis)
    run([job])
    assert_coefficients(job)


@pytest.mark.slow
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("basis_layout", LAYOUTS)
def test_strides(x_layout: str, basis_layout: str) -> None:
    """Every class of strides gives the numbers of contiguous copies."""
    g = generator_for(x_layout, basis_layout)
    job = draw_coefficients(
        (72, 40),
        (16, 8),
        g,
        dtype=torch.float16,
        x_layout=x_layout,
        basis_layout=basis_layout,
        offset=False,
    )
    run([job])
    assert_coefficients(job)


@pytest.mark.slow
def test_expanded_and_transposed_views() -> None:
    g = generator_for("views")
    row = torch.randn(1, 40, generator=g)
    x = row.expand(56, 40)
    Vh = draw(8, 40, torch.float32, g)
    U = draw(56, 1, torch.float32, g).expand(56, 6)
    A = torch.full((40, 6), torch.nan).mT
    B = torch.full((8, 56), torch.nan).mT
    for matrix, left, right, a, b in ((x, U, Vh.mT, A, B), (x.mT, Vh.mT, U, B.mT, A.mT)):
        job = Coefficients(matrix, left, right, a, b)
        run([job])
        assert_coefficients(job)


def test_list_of_mixed_shapes() -> None:
    """Any mix of shapes, ranks and dtypes in one call, to the bit what a rerun gives.

    A loop gives these bits too where the launch of the list doesn't fill the machine, as here.
    """
    g = generator_for("list")
    shapes = [((33, 70), (5, 5)), ((8, 8), (1, 3)), ((100, 17), (17, 4)), ((64, 32), (32, 16))]
    jobs = [
        draw_coefficients(shape, ranks, g, dtype=dtype)
        for (shape, ranks), dtype in zip(
            shapes, (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16), strict=True
        )
    ]
    run(jobs)
    for job in jobs:
        assert_coefficients(job)
    listed = [bits(job) for job in jobs]
    for again in (jobs, *([job] for job in jobs)):
        for job in again:
            for out in (job.A, job.B):
                out.fill_(torch.nan)  # type: ignore[union-attr]
        run(list(again))
        for job in again:
            before = listed[[other is job for other in jobs].index(True)]
            assert all(map(torch.equal, bits(job), before))


def test_sums_are_split() -> None:
    """The cases above do split sums: parts are written, and added in the same launch."""
    job = draw_coefficients((130, 41), (20, 13), generator_for("split"))
    arena = Arena(torch.device("cpu"))
    planned = groups.plan_chain(chain_of_job(job), arena, "ieee", lambda *_: CONFIG)
    (made,), workspace_bytes = tasks.projection_launches(
        [planned], fill=128, room=1 << 20, limit=1 << 20
    )
    # The sum over 130 rows, of A; that over 41 columns is too short.
    ((place, cut),) = planned.cuts.items()
    assert planned.chain[place].step.into == "A"
    assert (cut.parts, cut.length) == (3, 48)
    assert workspace_bytes == cut.memory.numel() * 4 == 3 * 41 * 20 * 4
    assert made.constants["HAS_PARTS"]
    # The parts, what adds three of them, and B.
    assert [fields[14] for fields in records_of(made)] == [0, 3, 0]
    assert made.tasks == 3 * 4 + 4 + 5


def test_a_list_that_fills_the_machine_splits_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone a matrix has parts; among others it has none, is as accurate, and has the same bits
    in every run."""
    monkeypatch.setitem(configs.FILL, "sm_80", 64)
    watching = watch(monkeypatch)
    g = generator_for("full")
    jobs = [draw_coefficients((130, 41), (20, 13), g) for _ in range(4)]
    run(jobs[:1])
    assert_coefficients(jobs[0])
    run(jobs)
    listed = [bits(job) for job in jobs]
    run(jobs)
    for job, before in zip(jobs, listed, strict=True):
        assert_coefficients(job)
        assert all(map(torch.equal, bits(job), before))
    alone, together, again = watching.planned
    assert together.metadata == again.metadata
    assert (alone.constants["HAS_PARTS"], together.constants["HAS_PARTS"]) == (True, False)
    assert [fields[14] for fields in records_of(alone)] == [0, 3, 0]
    assert [fields[14] for fields in records_of(together)] == [0] * 8
    assert alone.tasks * 4 > together.tasks


@pytest.mark.parametrize(
    "basis_layout", ["rows", pytest.param("unaligned", marks=pytest.mark.slow)]
)
def test_offset(basis_layout: str) -> None:
    g = generator_for(basis_layout)
    job = draw_coefficients((72, 40), (12, 12), g, basis_layout=basis_layout, offset=True)
    strided = torch.rand(36, generator=g)[::3]
    for S, root in ((job.S, True), (strided, True), (strided, False)):
        each = job._replace(S=S, root=root)
        down = each._replace(x=each.x.mT.contiguous().mT)
        for one in (each, down):
            run([one])
            assert_coefficients(one)


def test_offsets_of_a_root_and_of_others_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = watch(monkeypatch)
    g = generator_for("roots")
    jobs = [
        draw_coefficients((72, 40), (12, 12), g, offset=True, root=root) for root in (True, False)
    ]
    run(jobs)
    (made,) = watching.planned
    # Where a sum is stored, whether S is taken off: of the one without root not of A.
    assert [fields[22] != 0 for fields in records_of(made) if fields[15]] == [True] * 2 + [
        False,
        True,
    ]
    for job in jobs:
        assert_coefficients(job)


def test_offset_without_a_split() -> None:
    """Where one program holds the whole sum, it subtracts the offset itself."""
    g = generator_for("direct")
    job = draw_coefficients((20, 24), (7, 7), g, offset=True, dtype=torch.bfloat16)
    run([job])
    assert_coefficients(job)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_output_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    g = generator_for(dtype, "out")
    job = draw_coefficients((70, 40), (9, 10), g, dtype=dtype, out=dtype)
    run([job])
    assert_coefficients(job)


@pytest.mark.parametrize("ranks", [(None, 9), (9, None), (0, 9), (9, 0), (0, 0)])
def test_one_side(ranks: tuple[int | None, int | None]) -> None:
    g = generator_for(ranks)
    job = draw_coefficients((40, 50), ranks, g, dtype=torch.bfloat16)
    run([job])
    assert_coefficients(job)
    columns = job._replace(x=job.x.mT.contiguous().mT)
    run([columns])
    assert_coefficients(columns)


@pytest.mark.parametrize("shape", [(0, 12), (12, 0), (0, 0), (1, 1), (1, 50), (50, 1)])
def test_degenerate_shapes(shape: tuple[int, int]) -> None:
    """A sum over nothing is zero, written all the same, less the offset."""
    g = generator_for(shape)
    for offset, root in ((False, True), (True, True), (True, False)):
        job = draw_coefficients(shape, (3, 3), g, offset=offset, root=root)
        backend.coefficients([job])
        assert_coefficients(job)


def test_empty_list() -> None:
    backend.coefficients([])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_beyond_the_block(dtype: torch.dtype) -> None:
    g = generator_for("rank", dtype)
    job = draw_coefficients((50, 70), (45, 37), g, dtype=dtype)
    run([job])
    assert_coefficients(job)


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
# numpy, under the interpreter, warns of an Inf times a zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_non_finite_values_stay(value: float) -> None:
    g = generator_for(value)
    for dtype in (torch.float32, torch.bfloat16):
        job = draw_coefficients((70, 40), (9, 10), g, dtype=dtype)
        job.x[37, 21] = value
        run([job])
        assert job.A is not None
        assert job.B is not None
        assert not bool(job.A[:, 21].isfinite().any())
        assert not bool(job.B[37].isfinite().any())
        clean = torch.ones(40, dtype=torch.bool)
        clean[21] = False
        assert bool(job.A[:, clean].isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_float32_precisions(precision: str) -> None:
    g = generator_for(precision)
    job = draw_coefficients((70, 40), (9, 10), g)
    run([job], float32_precision=precision)
    assert_coefficients(job, precision)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pinned_configs(dtype: torch.dtype) -> None:
    """The table's own tiles, chosen by rule, on a list."""
    g = generator_for(dtype, "pinned")
    shapes = [((150, 90), (8, 30)), ((130, 270), (64, 60))]
    jobs = [draw_coefficients(shape, ranks, g, dtype=dtype) for shape, ranks in shapes]
    backend.coefficients(jobs)
    for job in jobs:
        assert_coefficients(job)


@pytest.mark.slow
def test_ill_scaled_values() -> None:
    """Columns over twenty decades: the error follows each one's own size."""
    g = generator_for("scales")
    job = draw_coefficients((70, 40), (9, 10), g)
    job.x.mul_(torch.logspace(-10, 10, 40))
    run([job])
    assert_coefficients(job)
