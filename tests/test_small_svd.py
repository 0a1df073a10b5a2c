"""Small SVDs that iterations end in, and the norm that ``captured`` is a share of."""

from __future__ import annotations

import pytest
import torch

from osf_kernels import truncated_svd
from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.cholesky_qr import POLISH_GROWTH
from osf_kernels.linalg.svd.arguments import _frobenius_norm
from osf_kernels.linalg.svd.rayleigh_ritz import leading_svd
from tests.helpers import generator_for

EPS = torch.finfo(torch.float32).eps


def defect(Q: torch.Tensor) -> float:
    Q = Q.double()
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return float(torch.linalg.matrix_norm(Q.mT @ Q - eye, ord=2))


@pytest.mark.parametrize("mixed", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("decades", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("columns", [8, 96])
def test_growth_bounds_what_left_vectors_lose(columns: int, decades: float, mixed: float) -> None:
    """A steep M whose columns are nearly its own singular directions loses nothing; one whose
    columns all mix loses as it is steep, and says so."""
    g = generator_for("growth", columns, decades, mixed)
    Q = torch.linalg.qr(torch.randn(300, columns, generator=g))[0]
    turn = torch.eye(columns) + mixed * torch.randn(columns, columns, generator=g)
    M = Q * torch.logspace(0, -decades, columns) @ torch.linalg.qr(turn)[0]
    found = leading_svd(M.unsqueeze(0), columns, safe=False)
    growth = float(found.growth)
    assert defect(found.U[0]) <= columns**0.5 * growth * EPS
    if mixed < 1:
        assert growth <= POLISH_GROWTH
    elif decades > 2:
        assert growth > POLISH_GROWTH


@pytest.mark.parametrize("decades", [0.0, 1.0, 2.5, 9.0])
def test_of_a_tall_matrix_the_triangle_goes_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, decades: float
) -> None:
    """Where a block holds the square but not the whole; torch stands in for the kernel here."""
    taken: list[tuple[int, ...]] = []

    def small_svd(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        taken.append(tuple(M.shape))
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U, S, Vh.mT

    g = generator_for("triangle", decades)
    Q, W = (torch.linalg.qr(torch.randn(2, n, 24, generator=g))[0] for n in (300, 24))
    sigma = torch.logspace(0, -decades, 24)
    M = Q * sigma @ W.mT
    plain = leading_svd(M, 10, safe=False)
    monkeypatch.setattr(primitives, "small_svd", small_svd)
    monkeypatch.setattr(
        primitives, "small_svd_backend", lambda M: "cuda" if M.shape[-2] <= 24 else "torch"
    )
    found = leading_svd(M, 10, safe=False)
    assert taken == [(2, 24, 24)]
    if decades > 8:  # a pivot that isn't positive, or σ below what a Gram matrix says
        M[1, :, 5] = M[1, :, 2]
        assert not bool(leading_svd(M, 24, safe=False).ok.any())
        return
    assert bool(found.ok.all())
    assert float((found.S - sigma[:10]).abs().max()) <= 20 * EPS
    torch.testing.assert_close(found.growth, plain.growth, rtol=1e-3, atol=1e-3)
    for i in range(2):
        assert defect(found.U[i]) <= 10**0.5 * float(found.growth[i]) * EPS + 20 * EPS
        rest = M[i].double() @ found.V[i].double() - found.U[i].double() * found.S[i].double()
        assert float(torch.linalg.matrix_norm(rest, ord=2)) <= 20 * EPS


@pytest.mark.parametrize("drift", [1e-3, 0.3])
@pytest.mark.parametrize("decades", [0.5, 3.0])
def test_warm_right_vectors_are_orthonormal_polished_or_not(drift: float, decades: float) -> None:
    g = generator_for("warm", drift, decades)
    U, V = (torch.linalg.qr(torch.randn(160, 120, generator=g))[0] for _ in range(2))
    W = U * torch.logspace(0, -decades, 120) @ V.mT
    earlier = truncated_svd(W, 24, method="exact")
    noise = torch.randn(W.shape, generator=g)
    moved = W + drift * W.norm() / noise.norm() * noise
    result = truncated_svd(moved, 24, method="warm", warm_start=earlier)
    assert defect(result.V) <= 10 * 24**0.5 * EPS
    assert defect(result.U) <= 10 * 24**0.5 * EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "columns", "every second row", "one line"])
def test_the_norm_is_right_however_many_numbers_there_are(dtype: torch.dtype, layout: str) -> None:
    g = generator_for("norm", dtype, layout)
    A = torch.randn(1100, 700, generator=g).to(dtype)
    A = {
        "rows": A,
        "columns": A.mT,
        "every second row": A[::2],
        "one line": A.reshape(1, -1),
    }[layout]
    wanted = float(A.double().square().sum().sqrt())
    assert float(_frobenius_norm(A)) == pytest.approx(wanted, rel=2e-6)


def test_captured_is_not_off_by_the_rounding_of_a_long_sum() -> None:
    """Equal numbers are the worst case: torch's float32 norm of these is 8e-4 too large."""
    A = torch.full((1024, 1024), 0.3333)
    assert float(truncated_svd(A, 1).captured) == pytest.approx(1, abs=1e-5)
