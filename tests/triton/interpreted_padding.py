"""Operands whose rows, or columns, are padded to 16 bytes, under Triton's interpreter.

Every operand is a slice of a wider matrix of NaN, so that padding which reached a product, or a
store beyond the width of a result, would show.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import osf_kernels
from osf_kernels.backends import triton as backend
from osf_kernels.backends.jobs import Coefficients, Problem, Update
from osf_kernels.backends.triton import configs, dispatch
from osf_kernels.backends.triton.views import View
from osf_kernels.plan import Step
from osf_kernels.testing import assert_error_within, project_eager, project_reference
from tests.helpers import generator_for, randn
from tests.triton.jobs import assert_coefficients, assert_multiply, assert_update

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
M, N = 48, 40
# Blocks of 16 of a rank, and of 32, which hold every rank here whole.
CONFIGS = (
    configs.Projection(16, 16, 16, 32, 16, 32, 4, 1, 1),
    configs.Projection(16, 16, 32, 32, 16, 16, 4, 1, 1),
)


def padded(values: Tensor, down: bool = False) -> Tensor:
    """The values in the middle of a wider matrix of NaN, lines on 16-byte boundaries."""
    if down:
        return padded(values.mT).mT
    vector = 16 // values.itemsize
    rows, columns = values.shape
    width = (columns // vector + 3) * vector
    wide = torch.full((rows + 2, width), torch.nan, dtype=values.dtype)
    return wide[1:-1, vector : vector + columns].copy_(values)


def outside(t: Tensor) -> Tensor:
    """What the storage of a slice holds beside it."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    beside = torch.ones(storage.numel(), dtype=torch.bool)
    beside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return storage[beside]


def draw(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator, down: bool) -> Tensor:
    values = padded(torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype), down)
    assert View.of(values).layout.aligned
    return values


def coefficients_job(
    ranks: tuple[int, int], dtype: torch.dtype, g: torch.Generator, down: bool, offset: bool
) -> Coefficients:
    r, k = ranks
    x, U, V = (draw(*shape, dtype, g, down) for shape in ((M, N), (M, r), (N, k)))
    A, B = (padded(torch.full(shape, torch.nan), down) for shape in ((r, N), (M, k)))
    return Coefficients(x, U, V, A, B, torch.rand(r, generator=g) if offset else None)


def run_coefficients(job: Coefficients, config: configs.Projection) -> None:
    backend.coefficients([job], config=config)
    # What lies around an output here is NaN; ``assert_coefficients`` looks for sevens.
    A, B = (t.clone() for t in (job.A, job.B) if t is not None)
    assert_coefficients(job._replace(A=A, B=B))
    for out in (job.A, job.B):
        assert out is not None
        assert bool(outside(out).isnan().all())


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients(dtype: torch.dtype, down: bool) -> None:
    g = generator_for(dtype, down)
    for config in CONFIGS:
        run_coefficients(coefficients_job((21, 13), dtype, g, down, False), config)
        run_coefficients(coefficients_job((13, 13), dtype, g, down, True), config)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update(dtype: torch.dtype, down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that end in the first chunk of 16, in the second, and with it; and in one of 32."""
    monkeypatch.setitem(configs.FILL, "sm_80", 1)  # so that a task has more than one tile across
    g = generator_for(dtype, down, "update")
    for (r, k), config in itertools.product(((13, 21), (32, 5)), CONFIGS):
        L1, L2 = draw(M, r, dtype, g, down), draw(M, k, torch.float32, g, down)
        R1, R2 = draw(r, N, torch.float32, g, not down), draw(k, N, dtype, g, not down)
        x = draw(M, N, dtype, g, down)
        job = Update(x, x, L1, R1, L2, R2, -1.0, 1.0)
        before = x.clone()
        backend.update([job], config=config)
        assert_update(job, before)
        assert bool(outside(x).isnan().all())


@pytest.mark.parametrize("down", [False, True])
def test_matrix_of_ragged_shape(down: bool) -> None:
    """x itself is a slice: neither of its dimensions is of whole vectors."""
    g = generator_for("ragged", down)
    x, U, V = (draw(*shape, torch.bfloat16, g, down) for shape in ((45, 37), (45, 9), (37, 11)))
    A, B = (padded(torch.full(shape, torch.nan), down) for shape in ((9, 37), (45, 11)))
    run_coefficients(Coefficients(x, U, V, A, B), CONFIGS[0])
    job = Update(x, x, U, A, B, V.mT, -1.0, 1.0)
    before = x.clone()
    backend.update([job], config=CONFIGS[0])
    assert_update(job, before)
    assert bool(outside(x).isnan().all())


@pytest.mark.parametrize("down", [False, True])
def test_a_matrix_that_is_kept_has_zeros_for_padding(
    down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Dual in turn" multiplies what its first update has stored in the workspace."""
    monkeypatch.setattr(configs, "projection_config", lambda *_: CONFIGS[0])
    g = generator_for("kept", down)
    x = draw(*((50, 33) if down else (33, 50)), torch.float32, g, down)
    before = x.clone()
    U, V = (torch.linalg.qr(torch.randn(size, 4, generator=g))[0] for size in x.shape)
    step = Step("dual in turn", "left", -1.0, 1.0, 0, 0, 0, "", "")
    made = dispatch.program([Problem(x, x, U, V, step)], 1 << 30, kept=0, halves=False)
    memory = torch.empty(made.workspace_bytes, dtype=torch.uint8).fill_(0xFF)
    made.run([memory.data_ptr()])
    # What is less its projection onto the complement.
    truth, peer = project_reference(before, U, V), project_eager(before, U, V)
    assert_error_within(x, before.double() - truth, before - peer, scale=before)


def test_products_in_float32_accuracy() -> None:
    g = generator_for("products")
    A = draw(M, N, torch.bfloat16, g, False)
    Q = draw(N, 21, torch.float32, g, False)[None]
    out = padded(torch.full((M, 21), torch.nan))
    backend.multiply([A], Q, out[None], config=configs.Multiply(16, 16, 16, 4, 1))
    assert_multiply([A], Q, out[None].clone(), False)
    assert bool(outside(out).isnan().all())


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_project(mode: str, padding: None) -> None:
    """Bases sliced from wider ones, and coefficients whose rows the library pads."""
    g = generator_for("project", mode)
    x = randn(M, N, dtype=torch.bfloat16, generator=g)
    U, V = (
        padded(torch.linalg.qr(randn(rows, rank, dtype=torch.float32, generator=g))[0].bfloat16())
        for rows, rank in ((M, 21), (N, 13))
    )
    with osf_kernels.use_backend("triton"):
        actual = osf_kernels.project(x, U, V, mode=mode)  # type: ignore[arg-type]
    reference = project_reference(x, U, V, mode=mode)  # type: ignore[arg-type]
    eager = project_eager(x, U.clone(), V.clone(), mode=mode)  # type: ignore[arg-type]
    assert_error_within(actual, reference, eager, scale=x)


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library allocates is padded on the CPU too."""
    monkeypatch.setattr("osf_kernels._padding.pads", lambda device: True)
