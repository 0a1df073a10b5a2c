"""truncated_svd: every method against float64, on spectra easy and hard."""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osf_kernels import (
    TruncatedSVD,
    extend_basis,
    merge_basis,
    orthonormalize,
    polar,
    truncated_svd,
)
from osf_kernels.linalg.svd import auto, methods
from osf_kernels.linalg.svd.group import Group
from osf_kernels.testing import hard_matrices, orthonormality_ratio, svd_ratio
from tests.helpers import generator_for
from tests.triplets import COLD, SPECTRA, assert_sound, draw, overlap


@pytest.mark.parametrize("method", COLD)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(90, 90), (130, 60), (60, 130)])
def test_factors_are_orthonormal_and_their_residual_is_what_is_said(
    method: str, spectrum: str, m: int, n: int
) -> None:
    A, _, _, _ = draw(m, n, spectrum)
    for rank in (1, 7, 33, 60):
        assert_sound(A, truncated_svd(A, rank, method=method))


@pytest.mark.parametrize("method", COLD)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("complement", [False, True])
def test_leading_triplets_to_a_tolerance(method: str, spectrum: str, complement: bool) -> None:
    A, U, S, V = draw(150, 110, spectrum)
    rank = 27  # where "gap" has its gap
    result = truncated_svd(A, rank, method=method, tol=2e-5, complement=complement)
    assert bool(result.converged)
    assert_sound(A, result)
    error = (result.S.double() - S[:rank]).abs().max() / S[0]
    assert error <= 30 * torch.finfo(torch.float32).eps
    if spectrum != "flat":  # where no leading subspace is well defined
        assert overlap(U, result.U) > 1 - 1e-4
        assert overlap(V, result.V) > 1 - 1e-4
    best = S[:rank].square().sum() / S.square().sum()
    assert float(result.captured) == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("method", COLD)
@pytest.mark.parametrize("shape", [(40, 40), (70, 33), (33, 70)])
def test_hard_matrices(method: str, shape: tuple[int, int]) -> None:
    m, n = shape
    for name, A in hard_matrices(m, n):
        for rank in (1, 5, min(m, n)):
            result = truncated_svd(A, rank, method=method, complement=True)
            assert_sound(A, result)
            assert result.captured <= 1
            # Subnormal singular values are rounded to 2**-149.
            if rank == min(m, n) and name != "subnormal":
                assert svd_ratio(A, result.U, result.S, result.V) < 30, (name, rank)


@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [(1, 1, 1), (1, 9, 1), (9, 1, 1), (0, 5, 0), (5, 0, 0), (4, 3, 0), (3, 3, 3)],
)
@pytest.mark.parametrize("method", ["auto", *COLD])
def test_the_smallest_matrices(method: str, m: int, n: int, rank: int) -> None:
    A = torch.randn(m, n, generator=generator_for(m, n, rank))
    result = truncated_svd(A, rank, method=method, complement=True)
    assert_sound(A, result)
    assert result.U_low is not None
    assert result.U_low.shape == (m, m - rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["auto", *COLD])
def test_dtypes(dtype: torch.dtype, method: str) -> None:
    A, _, S, V = draw(80, 100, dtype=dtype)
    result = truncated_svd(A, 10, method=method, tol=1e-5)
    assert_sound(A, result)
    assert overlap(V, result.V) > 1 - 1e-6
    if dtype == torch.float64 and method == "exact":
        torch.testing.assert_close(result.S, S[:10], rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", ["auto", *COLD])
@pytest.mark.parametrize("complement", [False, True])
def test_a_list_gives_what_a_loop_gives(method: str, complement: bool) -> None:
    shapes = [(60, 80), (300, 260), (60, 80), (80, 60), (300, 260), (12, 12)]
    ranks = [5, 0.1, 0.5, 12, 30, 1]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16] * 2
    As = [draw(*shape, dtype=dtype)[0] for shape, dtype in zip(shapes, dtypes, strict=False)]
    options = {"method": method, "complement": complement}
    together = truncated_svd(As, ranks, generator=generator_for(1), **options)
    for A, rank, one in zip(As, ranks, together, strict=True):
        assert_sound(A, one)
        alone = truncated_svd(A, rank, generator=generator_for(1), **options)
        assert alone.method == one.method
        torch.testing.assert_close(one.S, alone.S, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.V, alone.V, rtol=0, atol=2e-3)
        assert float(one.captured) == pytest.approx(float(alone.captured), rel=1e-5)


def test_a_batch_is_a_list_of_its_matrices() -> None:
    A = torch.stack([draw(40, 50, seed=seed)[0] for seed in range(6)]).reshape(2, 3, 40, 50)
    result = truncated_svd(A, 8, complement=True, tol=1e-5)
    assert result.U.shape == (2, 3, 40, 8)
    assert result.V_low is not None
    assert result.V_low.shape == (2, 3, 50, 42)
    assert result.residual.shape == result.captured.shape == (2, 3)
    assert result.converged is not None
    assert bool(result.converged.all())
    for one, matrix in zip(result.unbind(), A.flatten(0, 1), strict=True):
        assert_sound(matrix, one)
    empty = truncated_svd(A[:0], 8)
    assert empty.U.shape == (0, 3, 40, 8)


def test_signs_are_fixed_by_the_largest_element_of_v() -> None:
    A, _, _, _ = draw(50, 40)
    many, _, _, _ = draw(160, 150)  # whose columns are turned into rows in parts
    for method in COLD:
        for matrix, rank in ((A, 10), (many, 140)):
            result = truncated_svd(matrix, rank, method=method)
            V = result.V
            assert bool((V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all())
            assert_sound(matrix, result)
        torch.testing.assert_close(
            truncated_svd(-A, 10, method=method, generator=generator_for(2)).V,
            truncated_svd(A, 10, method=method, generator=generator_for(2)).V,
            rtol=0,
            atol=1e-4,
        )


def test_randomness_comes_from_the_generator_alone() -> None:
    A, _, _, _ = draw(300, 300)
    before = torch.random.get_rng_state()
    one, two, three = (
        truncated_svd(A, 6, method="randomized", generator=generator_for(key)) for key in (1, 1, 2)
    )
    assert torch.equal(one.U, two.U)
    assert not torch.equal(one.U, three.U)
    assert torch.equal(before, torch.random.get_rng_state())
    generator = generator_for(3)
    state = generator.get_state()
    truncated_svd(A, 6, method="gram", generator=generator)
    assert torch.equal(state, generator.get_state())


# --- auto ---------------------------------------------------------------------------------


def test_auto_chooses_for_a_batch_together_and_for_a_list_one_by_one() -> None:
    """Of a batch small products cost less; a list gives what a loop gives."""
    As = [draw(192, 192, seed=seed)[0] for seed in range(8)]
    batch, listed = truncated_svd(torch.stack(As), 13), truncated_svd(As, 13)
    assert batch.method == "randomized"
    assert {one.method for one in listed} == {truncated_svd(As[0], 13).method} == {"gram"}
    for U, one in zip(batch.U, listed, strict=True):
        assert overlap(one.U.double(), U) > 0.999
    assert truncated_svd(torch.stack(As[:2]), 13).method == "gram"


def test_auto_goes_by_the_cpu_on_a_device_without_rows() -> None:
    known = {"warm": False, "deflatable": False, "batch": 1}
    for n, rank in itertools.product((64, 512, 4096), (1, 32, 64)):
        found = {auto.choose(n, n, rank, device=device, **known) for device in ("cpu", "xpu")}
        assert len(found) == 1


# --- stopping and memory -------------------------------------------------------------------


def test_a_tolerance_that_is_missed_names_the_matrix() -> None:
    easy, hard = draw(120, 120, "gap")[0], draw(120, 120, "flat")[0]
    with pytest.warns(RuntimeWarning, match=r"residuals above tol=1e-05: A\[1\] has") as record:
        results = truncated_svd([easy, hard], 30, method="randomized", niter=3, tol=1e-5)
    assert len(record) == 1
    assert "A[0]" not in str(record[0].message)
    assert record[0].filename == __file__
    assert bool(results[0].converged)
    assert not bool(results[1].converged)


@pytest.mark.parametrize("workspace", [None, 700_000], ids=["Krylov", "one block"])
def test_each_matrix_of_a_group_stops_where_it_would_alone(workspace: int | None) -> None:
    spectra = ("steep", "power law", "flat", "steep")[: 4 if workspace is None else 2]
    As = [draw(160, 160, spectrum, seed=i)[0] for i, spectrum in enumerate(spectra)]
    options = {"method": "randomized", "tol": 1e-4, "max_workspace_bytes": workspace}
    together = truncated_svd(As, 12, **options, generator=generator_for(5))
    for A, one in zip(As, together, strict=True):
        alone = truncated_svd(A, 12, **options, generator=generator_for(5))
        torch.testing.assert_close(one.S, alone.S, rtol=1e-5, atol=1e-6)
        assert float(one.residual) == pytest.approx(float(alone.residual), rel=0.2, abs=1e-6)


def test_a_small_workspace_gives_the_same_in_parts_with_one_warning() -> None:
    As = [draw(60, 60, seed=seed)[0] for seed in range(7)]
    options = {"method": "randomized", "generator": generator_for(1)}
    whole = truncated_svd(As, 6, **options)
    with pytest.raises(ValueError, match="at least") as refused:
        truncated_svd(As, 6, **options, max_workspace_bytes=1)
    each = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    options["generator"] = generator_for(1)
    with pytest.warns(RuntimeWarning, match=r"7 matrices of 60 × 60 .* 2 at a time") as record:
        parts = truncated_svd(As, 6, **options, max_workspace_bytes=2 * each)
    assert len(record) == 1
    assert record[0].filename == __file__
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.V, other.V, rtol=0, atol=1e-5)


def test_running_out_of_memory_takes_smaller_parts_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    As = [draw(60, 60, seed=seed)[0] for seed in range(7)]
    whole = truncated_svd(As, 6, method="gram")
    run, sizes = methods.run, []

    def cramped(method: str, group: Group, safe: bool) -> object:
        sizes.append(len(group.As))
        if len(group.As) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(method, group, safe)  # type: ignore[arg-type]

    monkeypatch.setattr(methods, "run", cramped)
    with pytest.warns(RuntimeWarning, match="at a time") as record:
        parts = truncated_svd(As, 6, method="gram")
    assert len(record) == 1
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.V, other.V, rtol=0, atol=1e-5)


def test_a_workspace_without_room_for_one_is_refused() -> None:
    A = draw(60, 60)[0]
    with pytest.raises(
        ValueError, match=r"max_workspace_bytes for A to be at least \d+ \(60 × 60, "
    ):
        truncated_svd(A, 6, max_workspace_bytes=1000)


def test_a_short_workspace_has_randomized_iterate_on_one_block() -> None:
    A, _, _, V = draw(400, 400, "steep")
    result = truncated_svd(A, 20, method="randomized", tol=1e-4, max_workspace_bytes=950_000)
    assert bool(result.converged)
    assert overlap(V, result.V) > 0.999
    assert_sound(A, result)


# --- bad input -----------------------------------------------------------------------------


def test_singular_values_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected A to be small enough .* scale it down"):
        truncated_svd(torch.full((9, 9), 3e38), 2)


def test_nan_and_inf_name_the_matrices_and_how_many() -> None:
    As = [draw(20, 30, seed=seed)[0] for seed in range(4)]
    As[1][3, 4] = float("nan")
    As[3][:, 0] = float("inf")
    with pytest.raises(ValueError, match=r"A\[1\] has 1 of 600, A\[3\] has 20 of 600"):
        truncated_svd(As, 5)


def test_no_solver_runs_before_all_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def solver(*_: object) -> None:
        raise AssertionError("a solver ran")

    monkeypatch.setattr(methods, "run", solver)
    good, bad = draw(20, 20)[0], torch.full((20, 20), torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        truncated_svd([good, bad], 5)
    with pytest.raises(ValueError, match="rank of A"):
        truncated_svd([good, good], [5, 21])


A = torch.zeros(6, 4)
BAD = {
    "rank above min(m, n)": ({"A": A, "rank": 5}, r"min\(m, n\) = 4 of a 6 × 4 matrix, got 5"),
    "negative rank": ({"A": A, "rank": -1}, "between 0 and"),
    "rank as a fraction above 1": ({"A": A, "rank": 1.5}, r"in \(0, 1\]"),
    "rank no number": ({"A": A, "rank": "3"}, "rank to be int or float, got str"),
    "boolean rank": ({"A": A, "rank": True}, "rank to be int or float, got bool"),
    "too few ranks": ({"A": [A, A], "rank": [1]}, "for each of 2 matrices, got 1"),
    "a vector": ({"A": A[0], "rank": 1}, "A to be a matrix"),
    "a batch in a list": ({"A": [A[None]], "rank": 1}, r"A\[0\] to be a matrix"),
    "no tensor": ({"A": [[1.0]], "rank": 1}, r"A\[0\] to be a tensor, got list"),
    "integers": ({"A": A.int(), "rank": 1}, "float32, bfloat16, float16 or float64"),
    "method": ({"A": A, "rank": 1, "method": "svd"}, 'one of "auto"'),
    "tol": ({"A": A, "rank": 1, "tol": 0.0}, "tol to be a positive number"),
    "niter": ({"A": A, "rank": 1, "niter": 0}, "niter to be at least 1"),
    "oversample": ({"A": A, "rank": 1, "oversample": 2.5}, "oversample to be an int"),
    "warm without a start": ({"A": A, "rank": 1, "method": "warm"}, "warm_start of A to be given"),
    "warm of rows": (
        {"A": A, "rank": 1, "warm_start": torch.zeros(2, 4)},
        "Vh.mT if it holds rows",
    ),
    "deflated without low bases": (
        {"A": A, "rank": 1, "method": "deflated", "warm_start": torch.zeros(4, 2)},
        "complement=True",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str) -> None:
    arguments, message = BAD[what]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        truncated_svd(**arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith("osf_kernels.truncated_svd: expected ")


@pytest.mark.gpu
def test_a_generator_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pass torch\.Generator"):
        truncated_svd(A.cuda(), 1, generator=torch.Generator())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lowered_matmul_precision_is_not_used(precision: str) -> None:
    A, _, _, _ = draw(150, 110)
    before = torch.get_float32_matmul_precision()
    samples = torch.randn(150, 20, generator=generator_for("samples"))
    torch.set_float32_matmul_precision(precision)
    try:
        for method in COLD:
            assert_sound(A, truncated_svd(A, 20, method=method, complement=True))
        for Q in (
            orthonormalize(A[:, :30]),
            polar(A[:, :30]),
            extend_basis(orthonormalize(A[:, :9]), samples, energy=0.9),
            merge_basis(orthonormalize(A[:, :9]), None, samples, energy=0.9).columns,
        ):
            assert orthonormality_ratio(Q) < 30
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_it_takes_no_part_in_autograd_and_writes_nothing() -> None:
    weight = torch.nn.Parameter(draw(30, 20)[0])
    kept = weight.detach().clone()
    result = truncated_svd(weight, 4)
    assert not result.U.requires_grad
    assert torch.equal(weight.detach(), kept)


def test_results_own_their_memory() -> None:
    results = truncated_svd([draw(64, 64, seed=seed)[0] for seed in range(4)], 8, complement=True)
    for result in results:
        for x in (result.U, result.S, result.V, result.U_low, result.V_low):
            assert x is not None
            assert x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    share=st.floats(0.01, 1),
    exponent=st.integers(-120, 120),
    zeroed=st.integers(0, 10),
    method=st.sampled_from(["auto", *COLD]),
    seed=st.integers(0, 10**6),
)
def test_any_matrix_comes_out_sound(
    m: int, n: int, share: float, exponent: int, zeroed: int, method: str, seed: int
) -> None:
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    A[:, : min(zeroed, n)] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = truncated_svd(A * 2.0**exponent, share, method=method, complement=True)
    scaled = result.S * 2.0**-exponent
    unscaled = TruncatedSVD(
        result.U,
        scaled,
        result.V,
        result.residual,
        result.captured,
        0,
        "",
        U_low=result.U_low,
        V_low=result.V_low,
    )
    assert_sound(A, unscaled)
