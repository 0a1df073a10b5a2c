"""Small SVDs that iterations end in, and the norm that ``captured`` is a share of."""

from __future__ import annotations

import pytest
import torch

from osf_kernels import truncated_svd
from osf_kernels.linalg.inputs import _frobenius_norm
from osf_kernels.linalg.small import POLISH_GROWTH, leading_svd
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
