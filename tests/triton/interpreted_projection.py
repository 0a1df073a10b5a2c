"""The operators on the Triton backend under the interpreter, and the bytes they move.

What is counted are loads and stores of the kernel, which L2 serves: each sum over a matrix and each
update reads it once. How many of them reach memory depends on their order and on the size of L2;
``bench traffic`` models that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

import osf_kernels
from osf_kernels import Basis
from osf_kernels.backends import triton as backend
from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.triton import configs
from osf_kernels.basis import Spans
from osf_kernels.testing import (
    assert_error_within,
    project_eager,
    project_reference,
    random_basis,
    restore_reference,
)
from tests.helpers import generator_for, randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(40, 24), (24, 56), (33, 33)]
# Small tiles, so that small matrices have several and every edge is ragged.
SMALL = configs.Projection(32, 16, 16, 32, 16, 32, 4, 1, 1)
HELD = [("high", "high"), ("low", "low"), ("high", "low"), (None, "high"), ("low", None)]


def draw(
    held: tuple[str | None, str | None], dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], list[Basis | None], list[Basis | None]]:
    grads = [randn(*shape, dtype=dtype, generator=generator) for shape in SHAPES]

    def bases(axis: int) -> list[Basis | None]:
        spans = held[axis]
        return [
            None
            if spans is None
            else random_basis(
                shape[axis],
                7 + i,
                spans=spans,  # type: ignore[arg-type]
                dtype=dtype,
                generator=generator,
            )
            for i, shape in enumerate(SHAPES)
        ]

    return grads, bases(0), bases(1)


def check_list(mode: str, held: tuple[str | None, str | None], dtype: torch.dtype) -> None:
    grads, Us, Vs = draw(held, dtype, generator_for(mode, held, dtype))
    before = [g.clone() for g in grads]
    with osf_kernels.use_backend("triton"):
        osf_kernels.project_many_(grads, Us, Vs, mode=mode)  # type: ignore[arg-type]
    for g, x, U, V in zip(grads, before, Us, Vs, strict=True):
        reference = project_reference(x, U, V, mode=mode)
        assert_error_within(g, reference, project_eager(x, U, V, mode=mode), scale=x)


def test_project_many() -> None:
    check_list("complement", ("high", "high"), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("held", HELD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form(mode: str, held: tuple[str | None, str | None], dtype: torch.dtype) -> None:
    check_list(mode, held, dtype)


def test_meta_tensors_have_nothing_to_compute() -> None:
    g, U, V = (torch.empty(size, device="meta") for size in ((40, 24), (40, 4), (24, 3)))
    S = torch.empty(3, device="meta")
    with osf_kernels.use_backend("triton"):
        assert osf_kernels.project(g, U, V).is_meta
        osf_kernels.project_many_([g, g.mT], [U, V], [V, U])
        osf_kernels.prepare([g], [U], [V]).project_([g])
        osf_kernels.restore_(g, U[:, :3], V, S=S)
        assert [t.shape for t in osf_kernels.coefficients(g, U, V)] == [(4, 24), (40, 3)]


@pytest.mark.parametrize("spans", [("low", "high"), ("high", "low")], ids=str)
def test_little_that_is_kept_is_accurate(spans: tuple[Spans, Spans]) -> None:
    """Of a matrix that lies in the protected part but for a hundredth, that hundredth is kept to
    its own rounding: its coefficient is not rounded before the protected part is taken off it."""
    g = generator_for("kept", spans)
    m, n = 96, 128
    U, V = (
        random_basis(size, 24, spans=side, dtype=torch.bfloat16, generator=g)
        for size, side in zip((m, n), spans, strict=True)
    )
    high = V if spans[1] == "high" else U
    part = high.columns.double() @ high.columns.double().mT
    x = torch.randn(m, n, dtype=torch.float64, generator=g)
    protected = x @ part if high is V else part @ x
    x = (protected + x / 100).bfloat16()
    reference = project_reference(x, U, V)
    with osf_kernels.use_backend("triton"):
        y = osf_kernels.project(x, U, V).double()
    off, rounding = (y - reference).norm(), torch.finfo(torch.bfloat16).eps
    assert off < rounding * reference.norm() + 2**-15 * x.double().norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["complement", "core"])
def test_restore(mode: str, dtype: torch.dtype) -> None:
    """From singular values and from a dense protected part."""
    g = generator_for(mode, dtype, "restore")
    (W,), (U,), (V,) = (part[:1] for part in draw(("high", "high"), dtype, g))
    assert U is not None
    assert V is not None
    S = torch.rand(7, generator=g) + 0.5
    protected = randn(*W.shape, dtype=dtype, generator=g)
    X = torch.randn(W.shape, generator=g)
    rest = U.columns.float().mT @ X, X @ V.columns.float()
    rest_core = rest[0] @ V.columns.float()
    residual = rest_core if mode == "core" else rest
    for pin in ({"S": S}, {"S": S, "residual": residual}, {"protected": protected}):
        after = W.clone()
        with osf_kernels.use_backend("triton"):
            osf_kernels.restore_(after, U, V, mode=mode, **pin)  # type: ignore[arg-type]
        dense = (U.columns.double() * S) @ V.columns.double().mT if "S" in pin else protected
        if "residual" in pin:
            dense = dense + (X - project_reference(X, U, V, mode=mode))
        reference = restore_reference(W, U, V, protected=dense, mode=mode)
        peer = project_eager(W, U, V, mode=mode) + dense.to(dtype)
        assert_error_within(after, reference, peer, scale=W.double().abs() + dense.abs())


class Traffic:
    """Bytes of one matrix that kernels loaded and stored."""

    def __init__(self, matrix: Tensor) -> None:
        self.first = matrix.data_ptr()
        self.last = self.first + matrix.numel() * matrix.element_size()
        self.loaded = 0
        self.stored = 0

    def count(self, pointers: Any, mask: Any) -> int:
        inside = (pointers.data >= self.first) & (pointers.data < self.last) & mask.data
        width: int = pointers.get_element_ty().primitive_bitwidth // 8
        return int(inside.sum()) * width


@contextmanager
def counted(matrix: Tensor) -> Iterator[Traffic]:
    """Counts what the interpreter loads from and stores to a matrix, masked lanes left out."""
    traffic = Traffic(matrix)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += traffic.count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += traffic.count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield traffic


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_step_of_the_dual_form_reads_once(dtype: torch.dtype) -> None:
    """A, B and the update, each over many tiles: a read of g each and one write, to the byte."""
    gen = generator_for("bytes", dtype)
    m, n, r = 75, 90, 12
    g = randn(m, n, dtype=dtype, generator=gen)
    U, V = (randn(size, r, dtype=dtype, generator=gen) for size in (m, n))
    A, B = torch.empty(r, n), torch.empty(m, r)
    size = m * n * dtype.itemsize
    for job in (Coefficients(g, U, None, A, None), Coefficients(g, None, V, None, B)):
        with counted(g) as side:
            backend.coefficients([job], config=SMALL)
        assert (side.loaded, side.stored) == (size, 0)
    with counted(g) as both:
        backend.coefficients([Coefficients(g, U, V, A, B)], config=SMALL)
    assert (both.loaded, both.stored) == (2 * size, 0)
    with counted(g) as update:
        backend.update([Update(g, g, U, A, B, V.mT, -1.0, 1.0)], config=SMALL)
    assert (update.loaded, update.stored) == (size, size)


def test_operator_reads_three_times_and_writes_once() -> None:
    """The same of project_ as a caller calls it, in one launch, with the pinned config."""
    gen = generator_for("operator bytes")
    m, n, r = 70, 90, 6
    g = randn(m, n, dtype=torch.bfloat16, generator=gen)
    U, V = (random_basis(s, r, dtype=g.dtype, generator=gen) for s in (m, n))
    with osf_kernels.use_backend("triton"), counted(g) as traffic:
        osf_kernels.project_(g, U, V)
    size = m * n * 2
    assert (traffic.loaded, traffic.stored) == (3 * size, size)


@pytest.mark.slow
def test_rank_chunks_read_once_more_each() -> None:
    """A and B with a block that holds the rank, and with one that holds half of it; the update
    reads x once whatever the rank."""
    gen = generator_for("chunks")
    m, n, r = 70, 90, 20
    g = randn(m, n, dtype=torch.float32, generator=gen)
    U, V = (randn(size, r, dtype=g.dtype, generator=gen) for size in (m, n))
    job = Coefficients(g, U, V, torch.empty(r, n), torch.empty(m, r))
    size = m * n * 4
    for block_r, reads in ((32, 2), (16, 4)):
        config = SMALL._replace(block_r=block_r)
        with counted(g) as traffic:
            backend.coefficients([job], config=config)
        assert (traffic.loaded, traffic.stored) == (reads * size, 0)
        with counted(g) as update:
            backend.update([Update(g, g, U, job.A, job.B, V.mT, -1.0, 1.0)], config=config)
        assert (update.loaded, update.stored) == (size, size)


def test_beta_zero_reads_nothing() -> None:
    gen = generator_for("beta")
    x = randn(40, 33, dtype=torch.float32, generator=gen)
    L, R = (randn(*s, dtype=x.dtype, generator=gen) for s in ((40, 5), (5, 33)))
    out = torch.empty_like(x)
    with counted(x) as traffic:
        backend.update([Update(out, x, L, R, None, None, 1.0, 0.0)])
    assert (traffic.loaded, traffic.stored) == (0, 0)
