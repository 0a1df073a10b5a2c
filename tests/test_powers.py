"""Spaces of one block or two of powers: what niter ≤ 2 takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from osf_kernels import truncated_svd
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import powers
from osf_kernels.linalg.svd.methods.krylov import KrylovSpace
from osf_kernels.testing import orthonormality_ratio
from tests.helpers import generator_for
from tests.triplets import SPECTRA, assert_sound, draw, measured_residual, overlap

FEW = {"method": "randomized", "oversample": 14}


def from_powers(A: Tensor, noise: Tensor, rank: int, *, steps: int) -> Factors:
    group = Group([A], [float(A.norm())], rank, generator=torch.Generator().manual_seed)
    return powers.run(group, noise, steps=steps)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """``ok`` of every call."""
    run, seen = powers.run, []

    def spied(*args: Any, **kwargs: Any) -> Factors:
        found = run(*args, **kwargs)
        seen.append(found.ok)
        return found

    monkeypatch.setattr(powers, "run", spied)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(150, 110), (110, 150)])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("niter", [1, 2])
def test_every_layout_and_dtype(
    taken: list[Tensor], dtype: torch.dtype, m: int, n: int, columns: bool, niter: int
) -> None:
    A, _, _, _ = draw(m, n, "power law", dtype)
    if columns:
        A = A.mT.contiguous().mT
    result = truncated_svd(A, 6, niter=niter, **FEW)
    assert [bool(ok) for ok in taken] == [True]
    assert result.iterations == niter
    assert_sound(A, result)
    assert float(result.residual) == pytest.approx(measured_residual(A, result), rel=1e-3)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("niter", [1, 2])
def test_the_stated_residual_is_that_of_the_result(spectrum: str, rank: int, niter: int) -> None:
    """Of every spectrum, whichever way it takes."""
    A, _, _, _ = draw(150, 110, spectrum)
    result = truncated_svd(A, rank, method="randomized", niter=niter, oversample=rank + 8)
    for basis in (result.U, result.V):
        assert orthonormality_ratio(basis) < 30
    rounding = 30 * torch.finfo(torch.float32).eps
    truth = measured_residual(A, result)
    assert float(result.residual) == pytest.approx(truth, rel=1e-3, abs=rounding)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_triplets_are_the_best_of_their_space(steps: int) -> None:
    """Against the same space by QR, and its Rayleigh–Ritz step, in float64."""
    A, _, _, _ = draw(120, 90)
    noise = torch.randn(1, 120, 12, generator=generator_for("powers"))
    found = from_powers(A, noise, 5, steps=steps)
    assert bool(found.ok)
    X, blocks = A.double(), []
    block = X @ (X.mT @ noise[0].double())
    for _ in range(steps):
        blocks.append(block)
        block = X @ (X.mT @ block)
    Q = torch.linalg.qr(torch.cat(blocks, -1))[0]
    U, S, Vh = torch.linalg.svd(Q.mT @ X, full_matrices=False)
    torch.testing.assert_close(found.S[0].double(), S[:5], rtol=1e-4, atol=0)
    assert 1 - overlap(Q @ U, found.U[0]) < 1e-6
    assert 1 - overlap(Vh.mT, found.V[0]) < 1e-6


def test_they_miss_less_than_an_orthonormal_basis_on_the_right() -> None:
    """Of as many columns: the step on the left is one product further."""
    A, U, _, V = draw(300, 260)
    noise = torch.randn(1, 300, 12, generator=generator_for("left"))
    found = from_powers(A, noise, 5, steps=2)
    space = KrylovSpace([A], (A.mT @ noise[0])[None], safe=False, generator=generator_for("unused"))
    space.grow(24)
    other = space.factors(5)

    def missing(factors: Factors) -> float:
        return 1 - min(overlap(U, factors.U[0]), overlap(V, factors.V[0]))

    assert missing(found) < 0.6 * missing(other)


def test_powers_that_depend_on_each_other_make_room_for_an_orthonormal_space(
    taken: list[Tensor],
) -> None:
    """A matrix of equal singular values, one of low rank and zero; the one among them that is none
    of these has the result that it has alone."""
    usual, _, _, _ = draw(150, 110)
    g = generator_for("dependent")
    equal = torch.linalg.qr(torch.randn(150, 110, generator=g))[0]
    low = torch.randn(150, 3, generator=g) @ torch.randn(3, 110, generator=g)
    As = [equal, usual, low, torch.zeros(150, 110)]

    def run(As: list[Tensor]) -> list[object]:
        return truncated_svd(As, 6, niter=2, generator=torch.Generator().manual_seed(1), **FEW)

    results = run(As)
    assert taken[0].tolist() == [False, True, False, False]
    for A, result in zip(As, results, strict=True):
        assert_sound(A, result)
    alone = run([usual])[0]
    torch.testing.assert_close(results[1].S, alone.S, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1].V, alone.V, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exponent", [-40, -20, 20, 40])
def test_powers_stay_in_range(taken: list[Tensor], exponent: int) -> None:
    """σ⁵ of a weight of 1e8 would be beyond float32."""
    A, _, _, _ = draw(150, 110)

    def run(A: Tensor) -> object:
        return truncated_svd(A, 6, niter=2, generator=torch.Generator().manual_seed(1), **FEW)

    plain, scaled = run(A), run(A * 2.0**exponent)
    assert [bool(ok) for ok in taken] == [True, True]
    torch.testing.assert_close(scaled.S * 2.0**-exponent, plain.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.V, plain.V, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"niter": 3},
        {"niter": 2, "tol": 0.5},
        {"niter": 2, "oversample": 104},
        {"niter": 2, "dtype": torch.float64},
        {},
    ],
    ids=["three blocks", "tol", "the whole space", "float64", "default"],
)
def test_what_may_not_end_with_them_never_starts_with_them(
    taken: list[Tensor], options: dict[str, Any]
) -> None:
    A, _, _, _ = draw(150, 110, dtype=options.pop("dtype", torch.float32))
    assert_sound(A, truncated_svd(A, 6, **{**FEW, **options}))
    assert not taken


def test_the_rounding_that_is_let_through_is_a_small_share_of_the_residual() -> None:
    """AᵀU = V Σ holds to it: a space with much rounding and little residual is not ok."""
    shares = []
    for decay in (0.999, 0.97, 0.95, 0.9, 0.8):
        q = torch.arange(90).double()
        g = generator_for("decay", decay)
        left = torch.linalg.qr(torch.randn(120, 90, generator=g).double())[0]
        right = torch.linalg.qr(torch.randn(90, 90, generator=g).double())[0]
        A = ((left * decay**q) @ right.mT).float()
        noise = torch.randn(1, 120, 16, generator=g)
        found = from_powers(A, noise, 8, steps=2)
        if not bool(found.ok):
            shares.append(None)
            continue
        U, S, V = (getattr(found, name)[0].double() for name in "USV")
        off = torch.linalg.matrix_norm(A.double().mT @ U - V * S, ord=2) / S[0]
        shares.append(float(off / found.residual[0]))
    believed = [share for share in shares if share is not None]
    assert 0 < len(believed) < len(shares)
    assert max(believed) < 5 * powers.ROUNDING_SHARE
