"""integrations.mini_trainer: what it decomposes a weight into, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from osf_kernels.testing import (
    assert_error_within,
    matrix_with_spectrum,
    orthonormality_ratio,
    svd_ratio,
)
from osf_torch.integrations import mini_trainer as osft
from osf_torch.integrations.mini_trainer import decomposition
from tests.helpers import generator_for
from tests.integrations.osft_factors import KEYS, SHAPES, gapped, spans


def factors_by_formula(W: Tensor, k: int) -> dict[str, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return {
        "U_high": U[:, :k],
        "S_high": S[:k],
        "V_high": Vh[:k],
        "U_low": U[:, k:],
        "S_low": S[k:],
        "V_low": Vh[k:],
    }


def rebuilt(d: dict[str, Tensor]) -> Tensor:
    high = (d["U_high"].double() * d["S_high"].double()) @ d["V_high"].double()
    return high + (d["U_low"].double() * d["S_low"].double()) @ d["V_low"].double()


def assert_factors(W: Tensor, d: dict[str, Tensor], k: int) -> None:
    """Shapes, order, orthonormality of both sides together, and a factorization of W."""
    m, n = W.shape
    size = min(m, n)
    assert list(d) == KEYS
    assert d["rank_high"] == k
    for name, width in (("high", k), ("low", size - k)):
        assert d[f"U_{name}"].shape == (m, width)
        assert d[f"S_{name}"].shape == (width,)
        assert d[f"V_{name}"].shape == (width, n)
        for letter in "USV":
            factor = d[f"{letter}_{name}"]
            assert factor.is_contiguous()
            assert isinstance(factor, nn.Parameter) == (name == "low")
            assert factor.requires_grad == (name == "low")
    U = torch.cat([d["U_high"], d["U_low"]], 1).detach()
    V = torch.cat([d["V_high"], d["V_low"]]).mT.detach()
    S = torch.cat([d["S_high"], d["S_low"]]).detach()
    assert orthonormality_ratio(U) < 30
    assert orthonormality_ratio(V) < 30
    assert svd_ratio(W.to(S.dtype), U, S, V) < 30
    eps = torch.finfo(S.dtype).eps
    assert (S >= 0).all()
    assert (S[1:] <= S[:-1] + 30 * eps * S[:1]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_factors_are_those_of_the_formula_to_rounding(shape):
    m, n, k = shape
    W = gapped(m, n, k)
    d = osft.create_svd_dict(W, k, upcast_dtype=torch.float64)
    expected = factors_by_formula(W, k)
    assert_factors(W, d, k)
    rounding = 20 * torch.finfo(torch.float64).eps * max(m, n)
    for name in ("S_high", "S_low"):
        assert (d[name] - expected[name]).abs().max() <= rounding * 2
    gap = 0.5  # σ_k − σ_{k+1}
    for ours, theirs in zip(spans(d), spans(expected), strict=True):
        assert (ours - theirs).norm() <= rounding * 2 / gap


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_factors_are_as_close_to_float64_as_torch_s_own(dtype, shape):
    m, n, k = shape
    W = gapped(m, n, k, dtype=dtype)
    d = osft.create_svd_dict(W, k)
    assert_factors(W, d, k)
    truth, single = factors_by_formula(W.double(), k), factors_by_formula(W.float(), k)
    pairs = [
        (d["S_high"], single["S_high"], truth["S_high"]),
        (d["S_low"], single["S_low"], truth["S_low"]),
        *zip(spans(d), spans(single), spans(truth), strict=True),
        (rebuilt(d), rebuilt(single), W.double()),
    ]
    for ours, theirs, exact in pairs:
        # float32 is what was computed in, whatever the sums of this test are in
        assert_error_within(ours.detach().float(), exact, theirs, scale=exact, factor=4)


@pytest.mark.parametrize("size", [40, 160])
def test_ranks_at_and_beyond_the_ends(size):
    W = gapped(size + 8, size, size // 2, dtype=torch.float32)
    for top_k in (0, 1, size - 1, size, size + 5):
        assert_factors(W, osft.create_svd_dict(W, top_k), min(top_k, size))


@pytest.fixture
def split(monkeypatch):
    """As on a GPU: high and low triplets apart. Yields what is decomposed by which method."""
    taken = []
    genuine = decomposition.truncated_svd

    def watched(A, rank, **options):
        taken.append((tuple(A.shape), options["method"]))
        return genuine(A, rank, **options)

    monkeypatch.setattr(decomposition, "truncated_svd", watched)
    monkeypatch.setattr(decomposition, "_splits", lambda W, dtype, k: 0 < k < min(W.shape))
    return taken


@pytest.mark.parametrize("shape", SHAPES)
def test_split_factors_are_as_exact(split, shape):
    """The low block alone, (N − k) × (M − k), is decomposed beside the Gram matrix."""
    m, n, k = shape
    test_float32_factors_are_as_close_to_float64_as_torch_s_own(torch.float32, shape)
    assert split == [((m, n), "gram"), ((m - k, n - k), "exact")]


@pytest.mark.parametrize("kind", ["steep", "crowded", "rank-deficient", "zero", "tiny", "huge"])
def test_hard_spectra_split(split, kind):
    test_hard_spectra(kind)
    assert split


def test_the_split_is_left_where_it_is_not_exact(split, monkeypatch):
    W = gapped(160, 160, 96, dtype=torch.float32)
    monkeypatch.setattr(decomposition, "RESIDUAL_LIMIT", 0.0)  # nothing is that exact
    assert_factors(W, osft.create_svd_dict(W, 96), 96)
    assert split == [((160, 160), "gram")]


def test_where_the_split_is_taken():
    W = torch.ones(8, 6)
    assert not decomposition._splits(W, torch.float32, 3)
    if torch.cuda.is_available():
        assert decomposition._splits(W.cuda(), torch.float32, 3)
        assert not decomposition._splits(W.cuda(), torch.float64, 3)
        assert not decomposition._splits(W.cuda(), torch.float32, 6)


@pytest.mark.parametrize("kind", ["steep", "crowded", "rank-deficient", "zero", "tiny", "huge"])
def test_hard_spectra(kind):
    values = {
        "steep": torch.logspace(0, -12, 160),
        "crowded": torch.ones(160),
        "rank-deficient": torch.cat([torch.linspace(2, 1, 50), torch.zeros(110)]),
        "zero": torch.zeros(160),
        "tiny": torch.linspace(2, 1, 160) * 1e-25,
        "huge": torch.linspace(2, 1, 160) * 1e25,
    }[kind]
    W, _, _ = matrix_with_spectrum(170, 160, values, generator=generator_for(kind))
    if kind in ("tiny", "huge"):  # the ratios' own squares leave float32's range
        d = osft.create_svd_dict(W, 100)
        A = W.double()
        theirs = rebuilt(factors_by_formula(W, 100))
        assert_error_within(rebuilt(d).detach().float(), A, theirs, scale=A, factor=4)
    else:
        assert_factors(W, osft.create_svd_dict(W, 100), 100)


@pytest.mark.parametrize("upcast", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("output", [None, torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(upcast, output):
    W = gapped(150, 140, 70, dtype=torch.bfloat16).requires_grad_()
    d = osft.create_svd_dict(W, 70, upcast_dtype=upcast, output_dtype=output)
    assert {d[key].dtype for key in KEYS[:-1]} == {output or upcast}
    eps = torch.finfo(output or upcast).eps + torch.finfo(upcast).eps
    error = (rebuilt(d) - W.double()).norm() / W.double().norm()
    assert error < 10 * eps
    assert W.grad is None


@pytest.mark.parametrize("use_meta", [True, False])
def test_factors_to_be_filled_later(use_meta):
    W = torch.full((12, 9), torch.nan)
    d = osft.create_svd_dict(
        W, 5, decompose_existing=False, use_meta=use_meta, output_dtype=torch.bfloat16
    )
    assert list(d) == KEYS
    assert [tuple(d[key].shape) for key in KEYS[:-1]] == [
        (12, 5),
        (5,),
        (5, 9),
        (12, 4),
        (4,),
        (4, 9),
    ]
    for key in KEYS[:-1]:
        assert d[key].dtype == torch.bfloat16
        assert d[key].is_meta == use_meta
        assert isinstance(d[key], nn.Parameter) == key.endswith("low")
        assert use_meta or not d[key].any()
    on_meta = osft.create_svd_dict(W.to("meta"), 5, decompose_existing=False)
    assert on_meta["U_low"].is_meta


def test_what_can_not_be_decomposed():
    with pytest.raises(ValueError, match=r"expected weight to be a matrix, got \(3, 4, 5\)"):
        osft.create_svd_dict(torch.ones(3, 4, 5), 2)
    with pytest.raises(ValueError, match="cannot decompose meta weights"):
        osft.create_svd_dict(torch.ones(4, 5, device="meta"), 2)
    with pytest.raises(ValueError, match="cannot decompose meta weights"):
        osft.create_svd_dict(torch.ones(4, 5), 2, use_meta=True)
    with pytest.raises(ValueError, match="expected top_k to be at least 0, got -1"):
        osft.create_svd_dict(torch.ones(4, 5), -1)
    W = torch.ones(160, 160)
    W[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        osft.create_svd_dict(W, 80)
