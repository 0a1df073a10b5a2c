"""truncated_svd from an earlier result: by its bases, and by its low block alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from osf_kernels import truncated_svd
from osf_kernels.testing import matrix_with_spectrum
from tests.helpers import generator_for
from tests.triplets import assert_sound, draw, measured_residual, overlap


def drifted(A: Tensor, share: float) -> Tensor:
    noise = torch.randn(A.shape, generator=generator_for("drift", share))
    return A + noise * (share * A.norm() / noise.norm())


@pytest.mark.parametrize("start", ["result", "columns"])
def test_a_warm_start_follows_a_small_drift_in_one_round(start: str) -> None:
    A, _, _, _ = draw(200, 160)
    earlier = truncated_svd(A, 20, method="exact")
    moved = drifted(A, 1e-3)
    warm = earlier if start == "result" else earlier.V
    result = truncated_svd(moved, 20, method="warm", warm_start=warm)
    assert (result.method, result.iterations) == ("warm", 1)
    assert_sound(moved, result)
    _, S, Vh = torch.linalg.svd(moved.double())
    assert overlap(Vh.mT, result.V) > 0.999
    best = float(S[:20].square().sum() / S.square().sum())
    assert float(result.captured) > 0.9999 * best


@pytest.mark.parametrize("columns", [5, 20, 40])
@pytest.mark.parametrize(("m", "n"), [(200, 160), (160, 200)])
def test_a_warm_start_goes_on_until_it_meets_tol(columns: int, m: int, n: int) -> None:
    A, _, _, _ = draw(m, n)
    earlier = truncated_svd(A, columns, method="exact")
    moved = drifted(A, 0.3)
    result = truncated_svd(moved, 20, method="warm", warm_start=earlier, tol=1e-5)
    assert result.iterations > 1
    assert bool(result.converged)
    assert_sound(moved, result)


def test_auto_drops_a_warm_start_that_does_not_fit() -> None:
    A, _, _, _ = draw(100, 100)
    earlier = truncated_svd(A, 20, method="exact")
    other, _, _, V = draw(100, 100, seed=1)
    assert truncated_svd(drifted(A, 1e-4), 20, warm_start=earlier).method == "warm"
    result = truncated_svd(other, 20, warm_start=earlier)
    assert result.method != "warm"
    assert overlap(V, result.V) > 0.999


def test_deflated_takes_the_low_block_alone() -> None:
    """After updates that were kept out of the protected span, of a size that reorders triplets."""
    A, _, _, _ = draw(90, 70)
    earlier = truncated_svd(A, 42, method="exact", complement=True)
    assert earlier.U_low is not None
    assert earlier.V_low is not None
    update = torch.randn(A.shape, generator=generator_for("update")) * 0.05
    P, Q = earlier.U_low, earlier.V_low
    moved = A + P @ (P.mT @ update @ Q) @ Q.mT
    for rank in (10, 42, 60, 70):
        result = truncated_svd(moved, rank, method="deflated", warm_start=earlier, complement=True)
        truth = truncated_svd(moved.double(), rank, method="exact")
        assert_sound(moved, result)
        assert float(result.residual) < 1e-5
        torch.testing.assert_close(result.S.double(), truth.S, rtol=1e-4, atol=1e-6)
        assert overlap(truth.V, result.V) > 1 - 1e-5
    assert truncated_svd(moved, 42, warm_start=earlier).method == "deflated"


@pytest.mark.parametrize("shape", [(90, 70), (70, 90)])
def test_deflated_reorders_each_of_a_batch_and_writes_nothing_of_the_earlier(
    shape: tuple[int, int],
) -> None:
    """None overtakes in the first; in the others some and most do."""
    As = [draw(*shape, seed=seed)[0] for seed in range(3)]
    earlier = [truncated_svd(A, 42, method="exact", complement=True) for A in As]
    before = [copy.deepcopy(one) for one in earlier]
    moved = []
    for size, A, one in zip((0.0, 0.03, 0.3), As, earlier, strict=True):
        assert one.U_low is not None
        assert one.V_low is not None
        update = torch.randn(A.shape, generator=generator_for("batch", size)) * size
        low = one.U_low.mT @ update @ one.V_low
        moved.append(A + one.U_low @ low @ one.V_low.mT)
    found = truncated_svd(moved, 42, method="deflated", warm_start=earlier, complement=True)
    for A, result, one, held in zip(moved, found, earlier, before, strict=True):
        truth = truncated_svd(A.double(), 42, method="exact")
        assert_sound(A, result)
        assert float(result.residual) < 1e-5
        assert overlap(truth.U, result.U) > 1 - 1e-5
        for name in ("U", "S", "V", "U_low", "V_low"):
            assert torch.equal(getattr(one, name), getattr(held, name))


def test_deflated_says_when_weights_moved_in_the_protected_span() -> None:
    A, _, _, _ = draw(90, 70)
    earlier = truncated_svd(A, 42, method="exact", complement=True)
    moved = drifted(A, 0.1)
    result = truncated_svd(moved, 42, method="deflated", warm_start=earlier)
    assert float(result.residual) > 1e-3
    with pytest.warns(RuntimeWarning, match=r"residuals above tol=0.0001: A has"):
        late = truncated_svd(moved, 42, method="deflated", warm_start=earlier, tol=1e-4)
    assert not bool(late.converged)
    assert truncated_svd(moved, 42, warm_start=earlier).method != "deflated"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["columns", "V", "U", "S", "U_low", "V_low"])
def test_a_warm_start_that_is_not_finite_is_refused(bad: float, field: str) -> None:
    A, _, _, _ = draw(64, 48)
    earlier = copy.deepcopy(truncated_svd(A, 30, complement=field != "V"))
    V = getattr(earlier, "V" if field == "columns" else field)
    V.view(-1)[3] = bad
    start = V if field == "columns" else earlier
    methods = ("warm",) if field in ("columns", "V") else ("deflated", "auto")
    for method, tol in itertools.product(methods, (None, 1e-3)):
        with pytest.raises(
            ValueError, match=rf"warm_start of A to be finite.*A has 1 of {V.numel()}"
        ):
            truncated_svd(A, 30, method=method, warm_start=start, tol=tol)


def test_a_start_too_large_to_multiply_by_is_not_called_right() -> None:
    A, _, _, _ = draw(64, 48)
    start = torch.randn(48, 10) * 1e37
    with pytest.warns(RuntimeWarning, match="residuals above"):
        result = truncated_svd(A, 10, method="warm", warm_start=start, tol=1e-3, niter=1)
    assert not bool(result.converged)


def test_earlier_results_of_a_list_may_differ_in_rank() -> None:
    As = [draw(64, 48, seed=seed)[0] for seed in range(3)]
    earlier = [truncated_svd(A, r, complement=True) for A, r in zip(As, (20, 24, 20), strict=True)]
    results = truncated_svd(As, 24, warm_start=earlier)
    for A, result in zip(As, results, strict=True):
        assert result.method == "deflated"
        assert_sound(A, result)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (90, 64), (64, 90)])
def test_beyond_half_a_warm_start_goes_on_too(m: int, n: int) -> None:
    A, _, _, V = draw(m, n)
    generator = generator_for("start", m, n)
    start = torch.randn(n, 40, generator=generator)
    result = truncated_svd(A, 40, method="warm", warm_start=start, tol=1e-5)
    assert bool(result.converged)
    assert result.iterations == 2
    assert_sound(A, result)
    assert overlap(V, result.V) > 0.9999


def test_columns_that_fill_up_a_start_are_those_a_loop_has() -> None:
    As = [draw(80, 60, seed=seed)[0] for seed in range(4)]
    starts = [torch.randn(60, k, generator=generator_for(k)) for k in (3, 12, 7, 5)]

    def run(A: object, start: object) -> object:
        generator = torch.Generator().manual_seed(0)
        return truncated_svd(A, 12, method="warm", warm_start=start, generator=generator)

    for A, start, result in zip(As, starts, run(As, starts), strict=True):
        alone = run(A, start)
        assert overlap(alone.V.double(), result.V) > 1 - 1e-5


def test_a_residual_close_to_its_limit_is_measured_closer() -> None:
    """One direction that moved by more than the tolerance, among a thousand that moved by less."""
    n, rank = 640, 620
    generator = generator_for("outlier")
    S = torch.linspace(1, 0.5, n, dtype=torch.float64)
    A, U, V = matrix_with_spectrum(n, n, S, dtype=torch.float64, generator=generator)
    earlier = truncated_svd(A.float(), rank, method="exact", complement=True)
    moved = torch.full((n,), 0.4e-3, dtype=torch.float64)
    moved[300] = 1.3e-3
    B = ((U * (S + moved)) @ V.mT).float()
    with pytest.warns(RuntimeWarning, match="residuals above"):
        result = truncated_svd(B, rank, method="deflated", warm_start=earlier, tol=1e-3)
    assert not bool(result.converged)
    assert float(result.residual) > 0.7 * measured_residual(B, result)
