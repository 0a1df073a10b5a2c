"""truncated_svd: float64, tolerances near rounding, and what doesn't depend on the company."""

from __future__ import annotations

import warnings

import pytest
import torch

from osf_kernels import truncated_svd
from osf_kernels.testing import matrix_with_spectrum, orthonormality_ratio, svd_ratio
from tests.helpers import generator_for
from tests.triplets import COLD, draw, measured_residual, overlap

HARD_IN_DOUBLE = {
    "Hilbert": lambda n: 1 / (torch.arange(1, n + 1).double()[:, None] + torch.arange(n)),
    "graded rows": lambda n: torch.randn(n, n).double() * 10.0 ** (-torch.arange(n)[:, None] / 2),
    "graded columns": lambda n: torch.randn(n, n).double() * 10.0 ** (-torch.arange(n) / 2),
    "steep": lambda n: draw(n, n, "steep", torch.float64)[0],
    "rank deficient": lambda n: torch.randn(n, 5).double() @ torch.randn(5, n).double(),
    "gap": lambda n: draw(n, n, "gap", torch.float64)[0],
}


@pytest.mark.parametrize("method", ["gram", "exact", "randomized", "auto"])
@pytest.mark.parametrize("name", list(HARD_IN_DOUBLE))
@pytest.mark.parametrize("rank", [16, 64])
def test_float64_is_right_to_its_own_rounding(name: str, method: str, rank: int) -> None:
    A = HARD_IN_DOUBLE[name](64)
    result = truncated_svd(A, rank, method=method, tol=1e-12)
    assert bool(result.converged)
    assert max(orthonormality_ratio(result.U), orthonormality_ratio(result.V)) < 30
    assert measured_residual(A, result) < 1e-12
    if rank == 64:
        assert svd_ratio(A, result.U, result.S, result.V) < 30


def test_float64_warm_starts_have_orthonormal_factors() -> None:
    S = torch.arange(1, 65).double() ** -4
    A, _, _ = matrix_with_spectrum(200, 64, S, dtype=torch.float64)
    result = truncated_svd(A, 16, warm_start=torch.randn(64, 16).double(), tol=1e-6)
    assert max(orthonormality_ratio(result.U), orthonormality_ratio(result.V)) < 30
    assert measured_residual(A, result) < 1e-6


def test_gram_takes_float64_where_the_tolerance_asks_for_it() -> None:
    A, _, _, _ = draw(200, 200)
    assert float(truncated_svd(A, 150, method="gram").residual) > 6e-7
    result = truncated_svd(A, 150, method="gram", tol=6e-7)
    assert bool(result.converged)
    assert measured_residual(A, result) < 6e-7


def test_a_tolerance_near_rounding_is_measured() -> None:
    """What is zero but for rounding is not called so by a constant."""
    for seed in range(8):
        A, _, _ = matrix_with_spectrum(
            260, 260, 1 / torch.arange(1, 261).double(), generator=generator_for("near", seed)
        )
        start = torch.randn(260, 1, generator=generator_for("start", seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = truncated_svd(A, 1, method="warm", warm_start=start, tol=2e-6)
        assert not bool(result.converged) or measured_residual(A, result) < 2.2e-6


def test_what_continues_a_space_that_ends_is_the_same_in_any_company() -> None:
    generator = generator_for("rank deficient")
    As = [
        torch.randn(120, 8, generator=generator) @ torch.randn(8, 120, generator=generator)
        for _ in range(4)
    ]

    def run(A: object) -> object:
        return truncated_svd(A, 20, method="randomized", generator=torch.Generator().manual_seed(0))

    reverse = run(As[::-1])[::-1]
    for A, result, other in zip(As, run(As), reverse, strict=True):
        for found in (run(A), other):
            assert overlap(found.V.double(), result.V) > 1 - 1e-4


def test_iterations_are_each_matrixs_own() -> None:
    As = [draw(200, 200, "power law")[0], draw(200, 200, "flat")[0]]
    options = {"method": "randomized", "tol": 1e-3, "oversample": 8}
    together = truncated_svd(As, 8, **options, generator=torch.Generator().manual_seed(0))
    alone = [truncated_svd(A, 8, **options, generator=torch.Generator().manual_seed(0)) for A in As]
    assert [r.iterations for r in together] == [r.iterations for r in alone]
    assert together[0].iterations != together[1].iterations


def test_signs_of_ties_are_the_same_by_every_method() -> None:
    """Columns whose elements are equal in magnitude: rounding doesn't choose among them."""
    H = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    A = -H @ torch.diag(torch.tensor([4.0, 3, 2, 1])) @ H
    Vs = [truncated_svd(A, 3, method=method).V for method in COLD]
    for V in Vs:
        assert (V[0] > 0).all()
        torch.testing.assert_close(V, Vs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda A: truncated_svd(A.expand(2, 8, 8), [2, 3]), TypeError, r"A\.unbind\(\)"),
        (lambda A: truncated_svd(A, 2, generator=3), TypeError, r"torch\.Generator or None, got"),
        (lambda A: truncated_svd(A, 2, tol="1"), TypeError, "tol to be a positive number"),
        (lambda A: truncated_svd(A.to("meta"), 2), ValueError, "got a meta tensor"),
        (lambda A: truncated_svd(A, 2, warm_start=A.to(torch.cfloat)), TypeError, "real dtype"),
        (
            lambda A: truncated_svd(torch.stack([A, A, A * torch.nan])[None], 2),
            ValueError,
            r"A\[0, 2\] has 64 of 64",
        ),
    ],
)
def test_more_bad_input_is_refused_by_name(call, kind, message) -> None:
    with pytest.raises(kind, match=message):
        call(torch.eye(8))


def test_ranks_may_be_numbers_of_any_library() -> None:
    np = pytest.importorskip("numpy")
    A = draw(20, 16)[0]
    assert truncated_svd(A, np.int64(3)).rank == 3
    assert truncated_svd(A, np.float32(0.5)).rank == 8


@pytest.mark.slow
def test_it_runs_as_it_is_within_a_compiled_function() -> None:
    @torch.compile(backend="eager")
    def scaled(A):
        return truncated_svd(2 * A, 5, method="randomized").S / 2

    for n in (60, 80):
        A = draw(n, n)[0]
        torch.testing.assert_close(scaled(A), truncated_svd(A, 5).S, rtol=1e-3, atol=0)


def test_a_result_shows_what_it_is_and_no_numbers() -> None:
    result = truncated_svd(draw(20, 16)[0].expand(3, 20, 16), 4, complement=True)
    shown = repr(result)
    assert shown.startswith(f"TruncatedSVD(3x20x16, rank 4, {result.method}, residual ")
    assert shown.endswith(", with low bases)")
    assert len(shown) < 100
