"""FreeBasis: orthonormal, orthogonal to what is protected, and one basis however it is held."""

from __future__ import annotations

import copy

import pytest
import torch

from osf_kernels import Basis, FreeBasis, FreeSide, Refusal
from tests.helpers import generator_for

F64 = torch.float64


def columns(size, count, generator, batch=(), kind="random"):
    """Orthonormal columns in float64."""
    if kind == "unit":  # the leading rows are the identity
        return torch.eye(size, dtype=F64)[:, :count].expand(*batch, size, count).contiguous()
    if kind == "last":  # the leading rows are zero: every polar factor of them serves
        return torch.eye(size, dtype=F64).flip(0)[:, :count].expand(*batch, size, count).clone()
    Y = torch.randn(*batch, size, count, generator=generator, dtype=F64)
    if kind == "graded":  # the leading rows are close to zero, of every size
        Y[..., :count, :] *= torch.logspace(0, -12, count, dtype=F64)
    return torch.linalg.qr(Y)[0]


CASES = [
    *[(96, 24, kind) for kind in ("random", "unit", "last", "graded")],
    *[(96, 60, kind) for kind in ("random", "last", "graded")],
    (50, 1, "random"),
    (50, 49, "random"),
    (41, 17, "graded"),
    (7, 3, "unit"),
]


@pytest.mark.parametrize(("size", "count", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_completes_what_is_protected(size, count, kind, dtype):
    Q = columns(size, count, generator_for(size, count), kind=kind)
    free = FreeBasis.of(Q.to(dtype), size)
    F = free.columns().to(F64)
    eps = torch.finfo(dtype).eps
    assert F.shape == (size, size - count)
    assert free.held == FreeSide.of(size, count).held
    # float32 columns that are given are off by their own rounding, which is mended to its square.
    assert (F.mT @ F - torch.eye(size - count, dtype=F64)).abs().max() <= 8 * eps
    assert (F.mT @ Q).abs().max() <= 8 * eps


def test_columns_that_are_off_are_mended():
    """LAPACK's float32 columns of trained weights are orthonormal to 2e-5 only."""
    Q = columns(120, 30, generator_for(1))
    rough = Q + 2e-5 * torch.randn(120, 30, generator=generator_for(2), dtype=F64) / 120**0.5
    rough = rough.float().double()
    off = (rough.mT @ rough - torch.eye(30, dtype=F64)).norm(2)
    F = FreeBasis.of(rough, 120).columns()
    span = torch.linalg.qr(rough)[0]
    assert off > 1e-5
    assert (F.mT @ span).norm(2) <= off**2
    assert (F.mT @ F - torch.eye(90, dtype=F64)).norm(2) <= off**2
    rounded = FreeBasis.of(rough.float(), 120).columns().double()
    assert (rounded.mT @ span).norm(2) <= off / 10


@pytest.mark.parametrize("count", [10, 30, 50])  # as a reflector, and as columns
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_are_those_of_its_columns(count, batch):
    generator = generator_for(count, len(batch))
    free = FreeBasis.of(columns(64, count, generator, batch), 64)
    F = free.columns()
    x = torch.randn(*batch, 5, 64, generator=generator, dtype=F64)
    y = torch.randn(*batch, 5, 64 - count, generator=generator, dtype=F64)
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(free.reduce(x), x @ F, **close)
    torch.testing.assert_close(free.reduce_rows(x.mT), F.mT @ x.mT, **close)
    torch.testing.assert_close(free.expand(y), y @ F.mT, **close)
    torch.testing.assert_close(free.expand_rows(y.mT), F @ y.mT, **close)


@pytest.mark.parametrize("count", [0, 20, 40])
@pytest.mark.parametrize("rows", [(0, 10), (10, 33), (33, 64), (25, 25)])
def test_products_of_some_rows(count, rows):
    """Parts of a side add up to it, or lie in their places, wherever it is cut."""
    generator = generator_for(count)
    free = FreeBasis.of(columns(64, count, generator) if count else None, 64)
    F = free.columns() if count else torch.eye(64, dtype=F64)
    at = slice(*rows)
    x = torch.randn(5, at.stop - at.start, generator=generator, dtype=F64)
    y = torch.randn(5, 64 - count, generator=generator, dtype=F64)
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(free.reduce(x, at), x @ F[at], **close)
    torch.testing.assert_close(free.reduce_rows(x.mT, at), F[at].mT @ x.mT, **close)
    torch.testing.assert_close(free.expand(y, at), y @ F[at].mT, **close)
    torch.testing.assert_close(free.expand_rows(y.mT, at), F[at] @ y.mT, **close)


@pytest.mark.parametrize("width", [16, 13])
def test_odd_widths_are_as_right_as_even_ones(width):
    generator = generator_for(width)
    free = FreeBasis.of(Basis(columns(48, width, generator).float(), "low"), 48)
    x = torch.randn(33, 48, generator=generator)
    expected = x.double() @ free.columns().double()
    assert (free.reduce(x).double() - expected).abs().max() <= 1e-5


def test_free_columns_are_held_as_they_are():
    given = columns(40, 12, generator_for(3)).float()
    free = FreeBasis.of(Basis(given, "low"), 40)
    assert free.tensors[0].data_ptr() == given.data_ptr()
    assert (free.size, free.width, free.held) == (40, 12, "columns")


def test_what_is_held_is_the_smaller():
    for count in range(1, 100):
        side = FreeSide.of(100, count)
        reflector, dense = count * (100 + count), 100 * (100 - count)
        assert side.elements == min(reflector, dense)
    free = FreeBasis.of(columns(100, 20, generator_for(4)).float(), 100)
    assert free.nbytes == 4 * FreeSide.of(100, 20).elements == 4 * free.side.elements


@pytest.mark.parametrize("basis", [None, torch.empty(9, 0), Basis(torch.eye(9), "low")])
def test_a_side_without_protection(basis):
    free = FreeBasis.of(basis, 9)
    x = torch.randn(4, 9, generator=generator_for(5))
    torch.testing.assert_close(free.reduce(x), x)
    torch.testing.assert_close(free.expand(x), x)
    assert free.width == 9


@pytest.mark.parametrize("basis", [torch.eye(9), Basis(torch.empty(9, 0), "low")])
def test_a_side_that_is_protected_whole(basis):
    free = FreeBasis.of(basis, 9)
    assert free.width == 0
    assert free.reduce(torch.randn(4, 9)).shape == (4, 0)
    assert (free.expand(torch.randn(4, 0)) == 0).all()


def test_some_matrices_of_a_batch():
    generator = generator_for(6)
    free = FreeBasis.of(columns(20, 4, generator, (5,)), 20)
    x = torch.randn(2, 3, 20, generator=generator, dtype=F64)
    expected = x @ free.columns()[1:3]
    torch.testing.assert_close(free.of_batch(-3, slice(1, 3)).reduce(x), expected)
    shared = FreeBasis.of(columns(20, 4, generator), 20)
    assert shared.of_batch(-3, slice(1, 3)) is shared


def test_it_is_shared_and_moved():
    free = FreeBasis.of(columns(20, 4, generator_for(7)), 20)
    assert copy.deepcopy(free) is free
    assert copy.copy(free) is free
    assert free.to(torch.device("cpu"), F64) is free
    narrow = free.to(dtype=torch.float32)
    assert all(part.dtype == torch.float32 for part in narrow.tensors)
    assert repr(free) == "FreeBasis(20×16, held as reflector)"


@pytest.mark.parametrize(
    ("basis", "text"),
    [
        ("U", "tensor, a Basis or None, got str"),
        (torch.eye(8), "to have 9 rows"),
        (torch.zeros(9, 10), "at most as many columns"),
        (torch.zeros(9), "to have 9 rows"),
    ],
)
def test_refuses(basis, text):
    with pytest.raises(Refusal, match=text) as refusal:
        FreeBasis.of(basis, 9)
    assert (refusal.value.op, refusal.value.argument) == ("FreeBasis", "basis")
