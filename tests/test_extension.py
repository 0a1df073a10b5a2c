"""extend_basis against its definition in float64: the fewest directions that hold the energy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import osf_kernels
from osf_kernels import Basis, extend_basis
from osf_kernels.testing import hard_matrices, orthonormality_ratio, random_basis
from tests.helpers import DTYPES, generator_for


def held_energy(B: Tensor, X: Tensor) -> float:
    """‖BBᵀX‖² / ‖X‖² in float64, of the true projector of the columns."""
    Q, X = torch.linalg.qr(B.double())[0], X.double()
    return float((Q.mT @ X).square().sum() / X.square().sum())


def fewest(B: Tensor, X: Tensor, energy: float) -> int:
    """How many residual directions the rule takes, from an SVD in float64."""
    B, X = torch.linalg.qr(B.double())[0] if B.shape[-1] else B.double(), X.double()
    residual = X - B @ (B.mT @ X)
    total = X.square().sum()
    reached = (total - residual.square().sum()).item()
    for k, sigma in enumerate(torch.linalg.svdvals(residual).tolist()):
        if reached >= energy * total:
            return k
        reached += sigma**2
    return min(residual.shape)


def draw(m: int, r: int, s: int, dtype: torch.dtype, *key: object) -> tuple[Tensor, Tensor]:
    generator = generator_for(m, r, s, dtype, *key)
    B = random_basis(m, r, dtype=dtype, generator=generator).columns
    decay = torch.arange(1, s + 1, dtype=torch.float64) ** -0.7
    X = torch.randn(m, s, dtype=torch.float64, generator=generator) * decay
    return B, X.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(40, 10, 15), (40, 10, 80), (30, 0, 20), (7, 3, 1)])
def test_grows_by_the_fewest_directions(
    shape: tuple[int, int, int], energy: float, dtype: torch.dtype
) -> None:
    m, r, s = shape
    B, X = draw(m, r, s, dtype, energy)
    grown = extend_basis(B, X, energy=energy)
    k = fewest(B, X, energy)
    assert grown.shape == (m, r + k)
    if k == 0:
        assert grown is B
        return
    assert grown.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(grown[:, :r], B.to(grown.dtype))
    N = grown[:, r:].double()
    eps = torch.finfo(grown.dtype).eps
    assert orthonormality_ratio(grown[:, r:]) < 3
    assert float((torch.linalg.qr(B.double())[0].mT @ N).norm()) < 4 * eps * max(k, 1)
    assert held_energy(grown, X) >= energy - 4 * eps
    assert held_energy(grown[:, :-1], X) < energy


def test_leading_directions_are_the_residuals_singular_vectors() -> None:
    B, X = draw(50, 8, 30, torch.float64)
    grown = extend_basis(B, X, energy=0.8)
    residual = X - B @ (B.mT @ X)
    U = torch.linalg.svd(residual)[0][:, : grown.shape[1] - 8]
    cosines = (U * grown[:, 8:]).sum(0).abs()
    assert float((1 - cosines).max()) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 24),
    r=st.integers(0, 24),
    s=st.integers(1, 30),
    energy=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
)
def test_energy_is_held_and_a_second_call_changes_nothing(
    m: int, r: int, s: int, energy: float, seed: int
) -> None:
    B, X = draw(m, min(r, m), s, torch.float32, seed)
    grown = extend_basis(B, X, energy=energy)
    assert held_energy(grown, X) >= energy * (1 - 1e-6) if grown.shape[1] else True
    assert orthonormality_ratio(grown) < 30
    assert torch.equal(grown[:, : B.shape[1]], B)
    assert extend_basis(grown, X, energy=energy * (1 - 1e-6)) is grown


@pytest.mark.parametrize("power", [-100, -3, 5, 100])
def test_the_scale_of_samples_does_not_matter(power: int) -> None:
    B, X = draw(32, 4, 12, torch.float32)
    assert torch.equal(extend_basis(B, X, energy=0.9), extend_basis(B, X * 2.0**power, energy=0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_energy_ends_at_the_range_of_the_samples(dtype: torch.dtype) -> None:
    generator = generator_for("range", dtype)
    left = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    X = (left @ torch.randn(5, 40, dtype=torch.float64, generator=generator)).to(dtype)
    B = extend_basis(None, X, energy=1.0)
    assert B.shape == (60, 5)
    again = extend_basis(B, 3 * X.flip(-1), energy=1.0)
    assert again is B


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(48, 20), (12, 30), (1, 1)])
def test_hard_samples(size: tuple[int, int], dtype: torch.dtype) -> None:
    m, s = size
    B = random_basis(m, m // 4, dtype=dtype, generator=generator_for(size, dtype)).columns
    for name, X in hard_matrices(m, s, dtype=dtype, generator=generator_for(size)):
        grown = extend_basis(B, X, energy=0.95)
        assert orthonormality_ratio(grown) < 30, name
        assert torch.equal(grown[:, : m // 4], B), name
        scaled = X.double() / X.double().abs().max().clamp_min(1e-320)
        if X.any():
            assert held_energy(grown, scaled) >= 0.95 * (1 - 1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_basis_gives_away_what_a_high_one_takes(dtype: torch.dtype) -> None:
    generator = generator_for("low", dtype)
    Q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=generator))[0].to(dtype)
    X = draw(40, 0, 25, dtype)[1]
    high = extend_basis(Basis(Q[:, :12]), X, energy=0.9)
    low = extend_basis(Basis(Q[:, 12:], "low"), X, energy=0.9)
    assert (high.spans, low.spans) == ("high", "low")
    assert high.columns.shape[1] + low.columns.shape[1] == 40
    eps = torch.finfo(dtype).eps
    assert float((high.columns.mT @ low.columns).norm()) < 200 * eps
    assert orthonormality_ratio(low.columns) < 30
    assert extend_basis(low, X, energy=0.8) is low


def test_a_list_grows_each_as_a_call_of_its_own_does() -> None:
    shapes = [(30, 4, 10), (20, 0, 40), (30, 4, 10), (30, 4, 10)]
    pairs = [draw(*shape, torch.float32, i) for i, shape in enumerate(shapes)]
    pairs[3] = (pairs[3][0], pairs[3][0] @ torch.ones(4, 10))  # already held
    bases: list[Tensor | Basis | None] = [B for B, _ in pairs]
    bases[1] = None
    bases[2] = Basis(pairs[2][0])
    samples = [X for _, X in pairs]
    grown = extend_basis(bases, samples, energy=0.9)
    assert grown[3] is bases[3]
    widths = set()
    for i, (one, basis, X) in enumerate(zip(grown, bases, samples, strict=True)):
        alone = extend_basis(basis, X, energy=0.9)  # type: ignore[call-overload]
        assert type(one) is type(alone), i
        a = one.columns if isinstance(one, Basis) else one
        b = alone.columns if isinstance(alone, Basis) else alone
        assert a.shape == b.shape
        assert float((a - b).norm()) < 1e-5
        widths.add(a.shape[1])
    assert len(widths) > 1


def test_a_batch_takes_the_largest_growth_and_stays_orthonormal() -> None:
    B, X = draw(30, 4, 10, torch.float32)
    held = B @ torch.randn(4, 10)  # nothing new in it
    one_new = torch.outer(torch.randn(30), torch.randn(10))
    bases, samples = B.expand(3, 30, 4), torch.stack([X, held, one_new])
    grown = extend_basis(bases, samples, energy=0.95)
    most = extend_basis(B, X, energy=0.95)
    assert grown.shape == (3, *most.shape)
    assert float((grown[0] - most).norm()) < 1e-5
    for one, x in zip(grown, samples, strict=True):
        assert torch.equal(one[:, :4], B)
        assert orthonormality_ratio(one) < 3
        assert held_energy(one, x) >= 0.95
    single = extend_basis(B, one_new, energy=0.95)
    assert single.shape == (30, 5)
    assert float((grown[2][:, :5] - single).norm()) < 1e-5
    low = Basis(torch.linalg.qr(B, mode="complete")[0][:, 4:].expand(3, 30, 26), "low")
    assert extend_basis(low, samples, energy=0.95).columns.shape[-1] == 30 - most.shape[1]


def test_permuted_batch() -> None:
    pairs = [draw(24, 3, 9, torch.float32, i) for i in range(4)]
    B, X = (torch.stack(t) for t in zip(*pairs, strict=True))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(
        extend_basis(B, X, energy=0.9)[order], extend_basis(B[order], X[order], energy=0.9)
    )


@pytest.mark.parametrize("shape", [(5, 0, 0), (0, 0, 3), (5, 5, 3), (5, 2, 0), (1, 0, 1)])
def test_edges(shape: tuple[int, int, int]) -> None:
    m, r, s = shape
    B, X = torch.eye(m)[:, :r], torch.ones(m, s)
    grown = extend_basis(B, X, energy=1.0)
    assert grown.shape == (m, r + (1 if shape == (1, 0, 1) else 0))
    assert extend_basis(B.expand(0, m, r), X.expand(0, m, s), energy=0.5).shape == (0, m, r)


def test_nothing_given_is_written_and_gradients_do_not_leak() -> None:
    B, X = draw(20, 3, 6, torch.float32)
    before = B.clone(), X.clone()
    extend_basis(B, X, energy=0.9)
    assert torch.equal(B, before[0])
    assert torch.equal(X, before[1])
    with pytest.raises(ValueError, match=r"samples to be a tensor without gradient.*detach"):
        extend_basis(B, X.requires_grad_(), energy=0.9)
    with torch.no_grad():
        assert not extend_basis(B, X, energy=0.9).requires_grad


def test_samples_that_are_no_tensor_are_what_is_named() -> None:
    B, X = draw(20, 3, 6, torch.float32)
    for basis in (B, Basis(B, "low"), None):
        with pytest.raises(TypeError, match="expected samples to be a tensor, got NoneType"):
            extend_basis(basis, None, energy=0.9)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="expected samples to be a list or a tuple, got NoneType"):
        extend_basis([B], None, energy=0.9)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"samples to be a dense tensor.*to_dense"):
        extend_basis(B, X.to_sparse(), energy=0.9)
    with pytest.raises(TypeError, match=r"expected basis\[0\] to be a dense tensor"):
        extend_basis([B.to_sparse()], [X], energy=0.9)


@pytest.mark.parametrize("where", ["basis", "samples"])
def test_nan_and_inf_are_counted_by_matrix(where: str) -> None:
    pairs = [draw(10, 2, 5, torch.float32, i) for i in range(3)]
    bases, samples = [B for B, _ in pairs], [X for _, X in pairs]
    bad = bases if where == "basis" else samples
    bad[1][3, 1], bad[1][0, 0] = float("inf"), float("nan")
    message = rf"osf_kernels\.extend_basis: expected {where}\[1\] to be finite, got 2 of"
    with pytest.raises(ValueError, match=message):
        extend_basis(bases, samples, energy=0.9)
    with pytest.raises(ValueError, match=message):
        extend_basis(torch.stack(bases), torch.stack(samples), energy=0.9)


@pytest.mark.parametrize(
    ("basis", "samples", "energy", "error", "match"),
    [
        (torch.eye(4, 2), torch.ones(4, 3), 0.0, ValueError, r"energy to be in \(0, 1\], got 0"),
        (torch.eye(4, 2), torch.ones(4, 3), 1.5, ValueError, "got 1.5"),
        (torch.eye(5, 2), torch.ones(4, 3), 0.9, ValueError, r"basis to be \(4,\).*\(5, 2\)"),
        (torch.ones(4, 5), torch.ones(4, 3), 0.9, ValueError, "no wider than its side"),
        (torch.eye(4, 2).double(), torch.ones(4, 3), 0.9, TypeError, "float64 together"),
        (torch.eye(4, 2).int(), torch.ones(4, 3), 0.9, TypeError, "basis to be float32"),
        (torch.eye(4, 2), torch.ones(4, 3).int(), 0.9, TypeError, "samples to be float32"),
        (torch.eye(4, 2), torch.ones(4), 0.9, ValueError, r"samples to be \(..., m, s\)"),
        (torch.eye(4, 2), [1.0], 0.9, TypeError, "basis to be a list"),
        ([torch.eye(4, 2)], torch.ones(4, 3), 0.9, TypeError, "samples to be a list"),
        ([torch.eye(4, 2)], [], 0.9, ValueError, "as long as"),
        ([None], [torch.ones(2, 4, 3)], 0.9, ValueError, r"samples\[0\] to be \(m, s\)"),
        ("basis", torch.ones(4, 3), 0.9, TypeError, "basis to be a tensor, a Basis or None"),
    ],
)
def test_refusals(
    basis: object, samples: object, energy: float, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        osf_kernels.extend_basis(basis, samples, energy=energy)  # type: ignore[call-overload]


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("spans", ["high", "low"])
def test_a_matrix_of_a_batch_without_samples_stays_orthonormal(r, spans):
    """It is filled up to the width of the others, whatever it held."""
    B = torch.stack([random_basis(16, r or 8, generator=generator_for(i)).columns for i in (0, 1)])
    B = B if r or spans == "low" else B[..., :0]
    X = torch.randn(2, 16, 6)
    X[1] = 0
    grown = extend_basis(Basis(B, spans), X, energy=0.9).columns
    assert grown.shape[-1] != B.shape[-1]
    for Q in grown:
        torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[-1]), atol=1e-5, rtol=0)
