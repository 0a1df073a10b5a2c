"""out = beta·x + alpha·(L1 R1 + L2 R2) + addend under Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch

from osf_kernels.backends import triton as backend
from osf_kernels.backends.jobs import Update
from osf_kernels.backends.triton import configs
from tests.helpers import generator_for
from tests.triton.jobs import LAYOUTS, assert_frame_kept, assert_update, draw, guarded

# In tasks of two tiles, over chunks of ranks; and of one, where a block holds most ranks whole.
CONFIGS = {
    "chunks": configs.Projection(32, 16, 16, 32, 16, 32, 4, 1, 1),
    "whole": configs.Projection(32, 16, 32, 32, 16, 16, 4, 1, 1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What float16 shares with bfloat16 runs for it in the full suite.
QUICK_DTYPES = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16)


@pytest.fixture(autouse=True)
def _wide_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a few tiles across, as where there are enough of them for every processor."""
    monkeypatch.setitem(configs.FILL, "sm_80", 1)


def draw_update(
    shape: tuple[int, int],
    ranks: tuple[int | None, int | None],
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    basis: torch.dtype | None = None,
    coefficient: torch.dtype = torch.float32,
    layout: str = "rows",
    factor_layout: str = "rows",
    alpha: float = -1.0,
    beta: float = 1.0,
    addend: bool = False,
) -> Update:
    """A job in place (with beta = 1 or −1) or into a guarded NaN matrix (with beta = 0)."""
    (m, n), (r, k) = shape, ranks
    basis = basis or dtype

    def factor(rows: int, columns: int, kind: torch.dtype) -> torch.Tensor:
        return draw(rows, columns, kind, generator, factor_layout)

    x = draw(m, n, dtype, generator, layout)
    out = x if beta else guarded(m, n, dtype)
    return Update(
        out,
        x if beta else torch.full((m, n), torch.nan, dtype=dtype),
        None if r is None else factor(m, r, basis),
        None if r is None else factor(r, n, coefficient),
        None if k is None else factor(m, k, coefficient),
        None if k is None else factor(n, k, basis).mT,
        alpha,
        beta,
        draw(m, n, dtype, generator) if addend else None,
    )


def run(*jobs: Update) -> None:
    """With each config, from the same values."""
    before = [job.x.clone() for job in jobs]
    for config in CONFIGS.values():
        for job, x in zip(jobs, before, strict=True):
            if job.out is job.x:
                job.x.copy_(x)
            else:
                job.out.fill_(torch.nan)
        backend.update(list(jobs), config=config)
        for job, x in zip(jobs, before, strict=True):
            assert_update(job, x)


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0])
def test_against_float64(dtype: torch.dtype, beta: float) -> None:
    """With beta = 0 both x and out hold NaN, so that a read of either shows."""
    g = generator_for(dtype, beta)
    job = draw_update((50, 37), (20, 13), g, dtype=dtype, beta=beta)
    run(job)
    if not beta:
        assert_frame_kept(job.out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "basis", "coefficient"),
    [
        (x, basis, coefficient)
        for x, basis, coefficient in itertools.product(DTYPES, DTYPES, DTYPES)
        if coefficient in (x, torch.float32) and not x == basis == torch.float32
    ],
    ids=str,
)
def test_mixed_dtypes(dtype: torch.dtype, basis: torch.dtype, coefficient: torch.dtype) -> None:
    g = generator_for(dtype, basis, coefficient)
    run(draw_update((40, 34), (9, 17), g, dtype=dtype, basis=basis, coefficient=coefficient))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor_layout", LAYOUTS)
def test_strides(layout: str, factor_layout: str) -> None:
    g = generator_for(layout, factor_layout)
    run(
        draw_update(
            (40, 48),
            (16, 8),
            g,
            dtype=torch.float16,
            layout=layout,
            factor_layout=factor_layout,
        )
    )


@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_writes_nothing_else(layout: str) -> None:
    g = generator_for(layout, "frame")
    job = draw_update((40, 33), (9, 8), g, layout=layout)
    storage = torch.empty(0).set_(job.x.untyped_storage())
    outside = torch.ones(storage.numel(), dtype=torch.bool)
    outside.as_strided(job.x.shape, job.x.stride(), job.x.storage_offset()).fill_(False)
    run(job)
    assert bool(storage[outside].isnan().all())


def test_out_of_place_from_an_expanded_x() -> None:
    g = generator_for("expanded")
    job = draw_update((40, 33), (9, 8), g, beta=0.0)
    run(job._replace(x=torch.randn(1, 33, generator=g).expand(40, 33), beta=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_transposed_list_equals_loop_and_rerun(name: str) -> None:
    """A list of mixed shapes, dtypes and orientations is to the bit what a loop gives.

    Of the second config a block holds the ranks of most of them whole when they run alone; beside
    one whose rank is beyond it they are looped over.
    """
    g = generator_for("list")
    jobs = [
        draw_update((33, 70), (5, 5), g),
        draw_update((8, 8), (1, 3), g, dtype=torch.bfloat16),
        draw_update((60, 17), (17, 4), g, layout="columns"),
        draw_update((17, 60), (40, 0), g, alpha=0.5),
        draw_update((30, 24), (3, 8), g, beta=0.0),
    ]
    inputs = [job.x.clone() for job in jobs]
    backend.update(jobs, config=CONFIGS[name])
    for job, x in zip(jobs, inputs, strict=True):
        assert_update(job, x)
    outs = [job.out.clone() for job in jobs]
    for batch in (jobs, *([job] for job in jobs)):
        for job in batch:
            i = [other is job for other in jobs].index(True)
            job.x.copy_(inputs[i])
        backend.update(list(batch), config=CONFIGS[name])
        for job in batch:
            i = [other is job for other in jobs].index(True)
            assert torch.equal(job.out, outs[i])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(None, 9), (9, None), (0, 9), (9, 0), (None, None), (0, 0)])
def test_missing_terms(ranks: tuple[int | None, int | None]) -> None:
    g = generator_for(ranks)
    for beta in (0.0, 1.0, -1.0):
        run(draw_update((24, 33), ranks, g, beta=beta, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 12), (12, 0), (1, 1), (1, 40), (40, 1)])
def test_degenerate_shapes(shape: tuple[int, int]) -> None:
    g = generator_for(shape)
    job = draw_update(shape, (3, 3), g)
    before = job.x.clone()
    backend.update([job])
    assert_update(job, before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_addend(dtype: torch.dtype, layout: str) -> None:
    g = generator_for(dtype, layout, "addend")
    run(draw_update((40, 33), (9, 8), g, dtype=dtype, layout=layout, addend=True))


def test_addend_alone() -> None:
    g = generator_for("addend alone")
    run(draw_update((20, 33), (None, None), g, addend=True, beta=0.0))


@pytest.mark.slow
def test_coefficients_as_x() -> None:
    """B −= U C on float32 coefficients with bfloat16 bases keeps float32 accuracy."""
    g = generator_for("B -= U C")
    run(draw_update((40, 20), (24, None), g, basis=torch.bfloat16))
    run(draw_update((12, 40), (None, 12), g, basis=torch.bfloat16))


def test_float16_takes_coefficients_beyond_its_range() -> None:
    g = generator_for("range")
    job = draw_update((40, 33), (9, 8), g, dtype=torch.float16)
    assert job.L1 is not None
    assert job.R1 is not None
    job.R1.fill_(2.0e5)  # beyond 65504; the sums are not
    job.L1.mul_(1e-3)
    run(job)
    assert bool(job.out.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# numpy, under the interpreter, warns of an Inf times a zero.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_non_finite_values_stay(name: str, value: float, dtype: torch.dtype) -> None:
    g = generator_for(value, dtype)
    for operand, place, rows, columns in (
        ("x", (21, 17), slice(21, 22), slice(17, 18)),
        ("R1", (3, 17), slice(None), slice(17, 18)),
        ("L2", (21, 3), slice(21, 22), slice(None)),
    ):
        job = draw_update((40, 33), (9, 8), g, dtype=dtype)
        getattr(job, operand)[place] = value
        backend.update([job], config=CONFIGS[name])
        assert not bool(job.out[rows, columns].isfinite().any()), operand
        rest = job.out.clone()
        rest[rows, columns] = 0
        assert bool(rest.isfinite().all()), operand


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pinned_configs(dtype: torch.dtype) -> None:
    g = generator_for(dtype, "pinned")
    jobs = [
        draw_update(shape, ranks, g, dtype=dtype)
        for shape, ranks in (((90, 150), (8, 30)), ((130, 140), (70, 60)))
    ]
    before = [job.x.clone() for job in jobs]
    backend.update(jobs)
    for job, x in zip(jobs, before, strict=True):
        assert_update(job, x)
