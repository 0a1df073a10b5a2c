"""Products and small factorizations that linalg is made of, on every backend there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from osf_kernels import BackendUnavailableError, use_backend
from osf_kernels.linalg import primitives
from osf_kernels.testing import assert_error_within, orthonormality_ratio
from tests.helpers import DTYPES, generator_for, randn


def places(dtypes: tuple[torch.dtype, ...]) -> list[object]:
    """(device, backend, dtype) of every backend there is; float64 is computed by torch alone."""
    found: list[object] = [pytest.param("cpu", "auto", dtype) for dtype in dtypes]
    for backend in ("auto", "torch", "triton", "cuda"):
        found += [
            pytest.param("cuda", backend, dtype, marks=pytest.mark.gpu)
            for dtype in dtypes
            if dtype != torch.float64 or backend in ("auto", "torch")
        ]
    return found


PLACES = [
    pytest.param("cpu", "auto"),
    *(
        pytest.param("cuda", name, marks=pytest.mark.gpu)
        for name in ("auto", "torch", "triton", "cuda")
    ),
]


def matrices(device: str, dtype: torch.dtype, count: int, m: int, n: int) -> list[Tensor]:
    """Of different strides: rows, columns, and a view with gaps."""
    generator = generator_for("primitives", dtype, m, n)
    drawn = []
    for i in range(count):
        A = randn(m, n, dtype=dtype, generator=generator).to(device)
        padded = torch.zeros(2 * m, n + 3, dtype=dtype, device=device)
        padded[::2, :n] = A
        drawn.append((A, A.mT.contiguous().mT, padded[::2, :n])[i % 3])
    return drawn


@pytest.mark.parametrize(("device", "backend", "dtype"), places(DTYPES))
@pytest.mark.parametrize(("shared", "transpose"), [(False, False), (True, False), (True, True)])
def test_multiply(
    device: str, backend: str, dtype: torch.dtype, shared: bool, transpose: bool
) -> None:
    As = matrices(device, dtype, 3, 50, 37)
    work = primitives.working_dtype(dtype)
    rows = 50 if transpose else 37
    Q = randn(1 if shared else 3, rows, 11, dtype=work, generator=generator_for(7)).to(device)
    with use_backend(backend):
        Y = primitives.multiply(As, Q, transpose=transpose)
    assert Y.dtype == work
    for i, A in enumerate(As):
        X, q = (A.mT if transpose else A), Q[0 if shared else i]
        truth, peer = X.double() @ q.double(), X.to(work) @ q
        assert_error_within(Y[i], truth, peer, scale=truth)


@pytest.mark.parametrize(("device", "backend", "dtype"), places(DTYPES))
@pytest.mark.parametrize("first", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("width", [11, 40])
def test_multiply_twice_is_two_products(
    device: str, backend: str, dtype: torch.dtype, first: str, width: int
) -> None:
    """Whatever the first matrix lies in, and into a part of what is there already."""
    As = matrices(device, dtype, 3, 50, 37)
    shift = ("rows", "columns", "gaps").index(first)
    As = As[shift:] + As[:shift]
    work = primitives.working_dtype(dtype)
    Q = randn(3, 37, width, dtype=work, generator=generator_for(8, width)).to(device)
    with use_backend(backend):
        whole = primitives.empty_product(As, Q, width=2 * width).fill_(7)
        Y, Z = primitives.multiply_twice(As, Q, out=whole[..., width:])
        again = primitives.multiply(As, Q, out=whole[..., :width])
        plain, plainer = primitives.multiply_twice(As, Q)
        # A BLAS picks a kernel by strides and alignment too (cuBLAS; MKL on an EPYC), and another
        # kernel sums in another order.
        by_blas = primitives.products_backend(As[0]) == "torch"
    assert Y.data_ptr() == whole[..., width:].data_ptr()
    for out, same in ((again, Y), (whole[..., width:], Y), (plain, Y), (plainer, Z)):
        atol = 50 * torch.finfo(work).eps * float(same.abs().max()) if by_blas else 0.0
        torch.testing.assert_close(out, same, rtol=0, atol=atol)
    for i, A in enumerate(As):
        truth = A.double() @ Q[i].double()
        assert_error_within(Y[i], truth, A.to(work) @ Q[i], scale=truth)
        back = A.mT.double() @ Y[i].double()
        assert_error_within(Z[i], back, A.mT.to(work) @ Y[i], scale=back)


@pytest.mark.parametrize(("device", "backend", "dtype"), places(DTYPES))
@pytest.mark.parametrize("first", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_power_products_are_a_chain_of_products(
    device: str, backend: str, dtype: torch.dtype, first: str, shared: bool, steps: int
) -> None:
    As = matrices(device, dtype, 3, 50, 37)
    shift = ("rows", "columns", "gaps").index(first)
    As = As[shift:] + As[:shift]
    work = primitives.working_dtype(dtype)
    Q = randn(1 if shared else 3, 50, 7, dtype=work, generator=generator_for(9)).to(device)
    scales = [0.5, 1.0, 3.0]
    with use_backend(backend):
        Z, G = primitives.power_products(As, Q, scales, steps=steps)
    assert Z.shape == (3, 50, 7 * (steps + 1))
    assert G.shape == (3, 37, 7 * steps)
    assert Z.dtype == G.dtype == work
    for i, A in enumerate(As):
        start = scales[i] * (A.mT.to(work) @ Q[0 if shared else i])
        links = []
        for k in range(steps):
            here, there = slice(7 * k, 7 * (k + 1)), slice(7 * (k + 1), 7 * (k + 2))
            links.append((A.mT, Z[i, :, here], G[i, :, here]))
            links.append((A, G[i, :, here], Z[i, :, there]))
        for X, before, after in links:
            truth = X.double() @ before.double()
            assert_error_within(after, truth, X.to(work) @ before, scale=truth)
        torch.testing.assert_close(Z[i, :, :7], A.to(work) @ start, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("device", "backend", "dtype"), places(DTYPES))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("m", "n"), [(50, 37), (20, 1100)])
def test_gram(device: str, backend: str, dtype: torch.dtype, side: str, m: int, n: int) -> None:
    As = matrices(device, dtype, 2, m, n)
    As = As if side == "right" else [A.mT for A in As]
    with use_backend(backend):
        G = primitives.gram(As)
    assert torch.equal(G, G.mT)
    for X, one in zip(As, G, strict=True):
        work = X.to(primitives.working_dtype(dtype))
        truth = X.double().mT @ X.double()
        assert_error_within(one, truth, work.mT @ work, scale=truth)


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("size", [1, 5, 33])
def test_cholesky_inverse(device: str, backend: str, size: int) -> None:
    X = torch.randn(4, 3 * size, size, generator=generator_for("cholesky", size))
    G = (X.mT @ X).to(device)
    G[2] = -G[2]
    with use_backend(backend):
        inverse, info = primitives.cholesky_inverse(G)
    assert (info != 0).tolist() == [False, False, True, False]
    assert bool(inverse[2].isnan().all())
    for i in (0, 1, 3):
        assert torch.equal(inverse[i], inverse[i].triu())
        whole = inverse[i].double().mT @ G[i].double() @ inverse[i].double()
        error = (whole - torch.eye(size, device=device, dtype=torch.float64)).norm()
        condition = float(torch.linalg.cond(G[i].double()))
        assert error <= 10 * size * torch.finfo(torch.float32).eps * condition


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize(("p", "l"), [(1, 1), (20, 20), (45, 12)])
def test_small_svd(device: str, backend: str, p: int, l: int) -> None:
    M = torch.randn(3, p, l, generator=generator_for("svd", p, l)).to(device)
    with use_backend(backend):
        U, S, V = primitives.small_svd(M)
    truth = torch.linalg.svdvals(M.double())
    eps = torch.finfo(torch.float32).eps
    assert float(((S.double() - truth).abs() / truth[:, :1]).max()) <= 10 * l**0.5 * eps
    assert max(orthonormality_ratio(U), orthonormality_ratio(V)) < 30
    error = ((U * S.unsqueeze(-2)) @ V.mT - M).norm() / M.norm()
    assert float(error) <= 10 * l * eps


def test_an_explicit_backend_works_or_raises() -> None:
    A, Q = torch.randn(4, 3), torch.randn(1, 3, 2)
    for name in ("triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match=name), use_backend(name):
            primitives.multiply([A], Q)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_refuse_float64(backend: str) -> None:
    A = torch.ones(4, 3, dtype=torch.float64, device="cuda")
    with use_backend(backend), pytest.raises(TypeError, match="float64"):
        primitives.gram([A])
