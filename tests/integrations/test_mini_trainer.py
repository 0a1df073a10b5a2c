"""integrations.mini_trainer: the factors and projections against their formulas in float64."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from osf_kernels.testing import (
    assert_error_within,
    matrix_with_spectrum,
    orthonormality_ratio,
    random_basis,
    svd_ratio,
)
from osf_torch.integrations import mini_trainer as osft
from tests.helpers import generator_for, randn

KEYS = ["U_high", "S_high", "V_high", "U_low", "S_low", "V_low", "rank_high"]
SHAPES = [(160, 160, 96), (200, 144, 72), (144, 200, 120), (300, 130, 65), (130, 300, 65)]


@pytest.fixture(autouse=True)
def no_low_bases() -> None:
    osft.drop_low_bases()


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


def spans(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    U, V = d["U_high"].double(), d["V_high"].double()
    return U @ U.mT, V.mT @ V


def gapped(m: int, n: int, k: int, *key: object, dtype: torch.dtype = torch.float64) -> Tensor:
    """σ from 2 to 1, then from .5 to .01: the leading k directions are well defined."""
    lead = torch.linspace(2, 1, k, dtype=torch.float64)
    tail = torch.logspace(-0.3, -2, min(m, n) - k, dtype=torch.float64)
    A, _, _ = matrix_with_spectrum(
        m, n, torch.cat([lead, tail]), dtype=dtype, generator=generator_for(m, n, k, *key)
    )
    return A


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


# --- create_svd_dict --------------------------------------------------------------------------


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
    genuine = osft.truncated_svd

    def watched(A, rank, **options):
        taken.append((tuple(A.shape), options["method"]))
        return genuine(A, rank, **options)

    monkeypatch.setattr(osft, "truncated_svd", watched)
    monkeypatch.setattr(osft, "_splits", lambda W, dtype, k: 0 < k < min(W.shape))
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
    monkeypatch.setattr(osft, "RESIDUAL_LIMIT", 0.0)  # nothing is that exact
    assert_factors(W, osft.create_svd_dict(W, 96), 96)
    assert split == [((160, 160), "gram")]


def test_where_the_split_is_taken():
    W = torch.ones(8, 6)
    assert not osft._splits(W, torch.float32, 3)
    if torch.cuda.is_available():
        assert osft._splits(W.cuda(), torch.float32, 3)
        assert not osft._splits(W.cuda(), torch.float64, 3)
        assert not osft._splits(W.cuda(), torch.float32, 6)


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


# --- projections ------------------------------------------------------------------------------


def drawn(m: int, n: int, k: int, dtype: torch.dtype, *key: object) -> dict[str, Tensor]:
    """Random factors with gradients that are mostly in the protected spans, on every factor."""
    gen = generator_for(m, n, k, *key)
    p = min(m, n) - k
    U = random_basis(m, k, dtype=dtype, generator=gen).columns
    V = random_basis(n, k, dtype=dtype, generator=gen).columns.mT.contiguous()
    d = {"U_high": U, "S_high": randn(k, dtype=dtype, generator=gen), "V_high": V}
    for name, shape in (("U_low", (m, p)), ("S_low", (p,)), ("V_low", (p, n))):
        d[name] = nn.Parameter(randn(*shape, dtype=dtype, generator=gen))
        d[name].grad = randn(*shape, dtype=dtype, generator=gen)
    return d | {"rank_high": k}


def by_formula(d: dict[str, Tensor], pick, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    U, V = d["U_high"].to(dtype), d["V_high"].to(dtype)
    dU, dV = pick(d["U_low"]).to(dtype), pick(d["V_low"]).to(dtype)
    return dU - U @ (U.mT @ dU), dV - (dV @ V.mT) @ V


FUNCTIONS = {
    "gradient": (osft.project_gradient_to_orthogonal_space, lambda p: p.grad),
    "parameter": (osft.project_parameter_to_orthogonal_space, lambda p: p.data),
}


@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 40, 10), (40, 40, 30), (56, 24, 18), (24, 56, 18)])
@pytest.mark.parametrize("held", [False, True])
def test_projections_are_the_formula(what, dtype, shape, held):
    function, pick = FUNCTIONS[what]
    d = drawn(*shape, dtype, what)
    truth = by_formula(d, pick, torch.float64)
    same = by_formula(d, pick, dtype)
    rest = {  # what isn't to be written
        name: [t.clone() for t in (value.detach(), value.grad) if t is not None]
        for name, value in d.items()
        if name != "rank_high"
    }
    written = 1 if what == "gradient" else 0
    scales = [rest[name].pop(written) for name in ("U_low", "V_low")]
    results = [pick(d[name]) for name in ("U_low", "V_low")]
    addresses = [x.data_ptr() for x in results]
    assert function(d, cache_holder=nn.Module() if held else None) is None
    assert [pick(d[name]).data_ptr() for name in ("U_low", "V_low")] == addresses
    for result, torch_s, exact, scale in zip(results, same, truth, scales, strict=True):
        assert result.dtype == dtype
        # The complement of a bfloat16 basis is that of its span, and itself rounded once.
        assert_error_within(result, exact, torch_s, scale=scale, factor=4)
    for name, before in rest.items():
        now = [t for t in (d[name].detach(), d[name].grad) if t is not None]
        if name in ("U_low", "V_low"):
            now.pop(written)
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def test_float64_gradients_agree_with_the_formula_to_float64_rounding():
    d = drawn(64, 48, 36, torch.float64)
    truth = by_formula(d, lambda p: p.grad, torch.float64)
    osft.project_gradient_to_orthogonal_space(d)
    for name, exact in zip(("U_low", "V_low"), truth, strict=True):
        assert (d[name].grad - exact).norm() < 100 * torch.finfo(torch.float64).eps * exact.norm()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_projected_gradients_have_no_protected_part_and_stay(data):
    m, n = data.draw(st.integers(2, 24)), data.draw(st.integers(2, 24))
    k = data.draw(st.integers(0, min(m, n)))
    holder = nn.Module() if data.draw(st.booleans()) else None
    d = drawn(m, n, k, torch.float64, data.draw(st.integers(0, 99)))
    osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
    for grad, leak in (
        (d["U_low"].grad, d["U_high"].mT @ d["U_low"].grad),
        (d["V_low"].grad, d["V_low"].grad @ d["V_high"].mT),
    ):
        assert leak.norm() <= 1e-12 * max(1.0, float(grad.norm()))
    once = [d[name].grad.clone() for name in ("U_low", "V_low")]
    osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
    for before, name in zip(once, ("U_low", "V_low"), strict=True):
        assert (d[name].grad - before).norm() <= 1e-12 * max(1.0, float(before.norm()))


@pytest.mark.parametrize("what", FUNCTIONS)
def test_skip_u(what):
    function, pick = FUNCTIONS[what]
    d = drawn(20, 16, 10, torch.float64)
    before, (_, expected) = pick(d["U_low"]).clone(), by_formula(d, pick, torch.float64)
    function(d, skip_u=True)
    assert torch.equal(pick(d["U_low"]), before)
    assert torch.allclose(pick(d["V_low"]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("missing", ["U_low", "V_low", "both"])
def test_absent_gradients_are_left_out(missing):
    d = drawn(20, 16, 10, torch.float64)
    expected = dict(
        zip(("U_low", "V_low"), by_formula(d, lambda p: p.grad, torch.float64), strict=True)
    )
    for name in expected:
        if missing in (name, "both"):
            d[name].grad = None
    osft.project_gradient_to_orthogonal_space(d)
    for name, value in expected.items():
        if missing in (name, "both"):
            assert d[name].grad is None
        else:
            assert torch.allclose(d[name].grad, value, rtol=1e-12, atol=1e-13)


@pytest.mark.timing
def test_no_gram_matrix_of_v():
    from bench.timing import peak_extra_bytes

    d = drawn(16, 1024, 8, torch.float32)
    extra = peak_extra_bytes(
        lambda: osft.project_gradient_to_orthogonal_space(d), torch.device("cpu")
    )
    assert extra < 1024 * 1024 * 4 / 10


def test_a_shard_without_other_ranks_is_refused():
    d = drawn(20, 16, 10, torch.float64)
    d["V_high"] = d["V_high"][:5]
    before = d["U_low"].grad.clone()
    with pytest.raises(ValueError, match="expected V_high to have rank_high=10 rows, got 5"):
        osft.project_gradient_to_orthogonal_space(d)
    assert torch.equal(d["U_low"].grad, before)


@pytest.mark.timing
def test_a_decomposition_holds_one_factor_twice_at_most():
    """Beside U, S, V in two copies, as slices of the whole that are kept until the end would be."""
    from bench.timing import peak_extra_bytes

    W = gapped(256, 256, 128, dtype=torch.float32)
    extra = peak_extra_bytes(lambda: osft.create_svd_dict(W, 128), torch.device("cpu"))
    assert extra < 3.2 * W.numel() * W.element_size()


# --- caches -----------------------------------------------------------------------------------


def test_the_low_basis_is_kept_renewed_and_dropped_with_its_high_basis():
    holder, d = nn.Module(), drawn(24, 24, 18, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
    assert len(osft._low_bases) == 2
    kept = osft._low_bases[d["U_high"]].basis
    assert kept.shape == (24, 6)
    assert orthonormality_ratio(torch.cat([d["U_high"], kept], 1)) < 30
    osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
    assert osft._low_bases[d["U_high"]].basis is kept
    assert not holder.state_dict()
    fresh = drawn(24, 24, 18, torch.float64, "another")
    with torch.no_grad():
        for name in ("U_high", "V_high"):
            d[name].copy_(fresh[name])
    expected = by_formula(d, lambda p: p.grad, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
    for name, value in zip(("U_low", "V_low"), expected, strict=True):
        assert torch.allclose(d[name].grad, value, rtol=1e-11, atol=1e-12)
    del d, kept
    gc.collect()
    assert len(osft._low_bases) == 0


def test_no_low_basis_without_a_holder_or_where_it_is_no_smaller():
    osft.project_gradient_to_orthogonal_space(drawn(24, 24, 18, torch.float64))
    d = drawn(24, 24, 12, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(osft._low_bases) == 0
    d = drawn(48, 24, 18, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(osft._low_bases) == 1  # of V alone: U's complement has 30 columns
    assert d["V_high"] in osft._low_bases


@pytest.mark.parametrize("what", FUNCTIONS)
def test_the_cache_of_v(what, monkeypatch):
    monkeypatch.setenv("OSFT_CACHE_V", "1")
    function, pick = FUNCTIONS[what]
    holder, d = nn.Module(), drawn(24, 24, 18, torch.float64)
    expected = by_formula(d, pick, torch.float64)[1]
    function(d, cache_holder=holder)
    cached = holder._osft_v_high_full
    assert torch.equal(cached, d["V_high"])
    assert not isinstance(cached, nn.Parameter)
    assert not holder.state_dict()
    assert torch.allclose(pick(d["V_low"]), expected, rtol=1e-12, atol=1e-13)
    other = drawn(24, 24, 18, torch.float64, "other")  # what is cached is what is used
    holder._osft_v_high_full = other["V_high"]
    with torch.no_grad():
        pick(d["V_low"]).copy_(pick(other["V_low"]))
    function(d, cache_holder=holder)
    expected = by_formula(other, pick, torch.float64)[1]
    assert torch.allclose(pick(d["V_low"]), expected, rtol=1e-12, atol=1e-13)
    function(d, cache_holder=None)


# --- switching --------------------------------------------------------------------------------

NAMES = [*osft._REPLACEMENTS, "create_osft_model_class"]


class OSFTLinear(nn.Module):
    """A module laid out as mini_trainer lays out a decomposed linear layer."""

    def __init__(self, d: dict[str, Tensor]) -> None:
        super().__init__()
        for letter in "USV":
            high = nn.Parameter(d[f"{letter}_high"], requires_grad=False)
            self.register_parameter(f"osft_{letter}_high", high)
        self.osft_params = nn.Module()
        for letter in "USV":
            self.osft_params.register_parameter(f"{letter}_low", d[f"{letter}_low"])


class OSFTModel(nn.Module):
    def __init__(self, dicts: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OSFTLinear(d) for d in dicts)
        self.head = nn.Linear(3, 3)

    def get_svd_dict_for_module(self, module: nn.Module) -> dict[str, Tensor]:
        high = {f"{c}_high": getattr(module, f"osft_{c}_high") for c in "USV"}
        low = {f"{c}_low": getattr(module.osft_params, f"{c}_low") for c in "USV"}
        return high | low | {"rank_high": module.osft_S_high.shape[0]}


@pytest.fixture
def imitation(monkeypatch):
    """Modules that look their functions up as mini_trainer's do."""

    def create_osft_model_class(base_cls):
        class WithOSFT(base_cls):
            def project_gradients(self):
                return "theirs"

            def project_parameters(self):
                return "theirs"

        return WithOSFT

    names = ("mini_trainer", "mini_trainer.osft_utils", "mini_trainer.setup_model_for_training")
    modules = [types.ModuleType(name) for name in names]
    for name in NAMES:
        setattr(modules[1], name, lambda *_, name=name: name)
    modules[1].create_osft_model_class = create_osft_model_class
    modules[2].create_osft_model_class = create_osft_model_class
    modules[0].osft_utils = modules[1]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9.0")
    yield modules
    osft.disable()


def test_enable_and_disable(imitation):
    _, utils, setup = imitation
    before = {name: getattr(utils, name) for name in NAMES}
    osft.disable()  # nothing to take back
    for _ in range(2):
        osft.enable()
        osft.enable()
        for name, function in osft._REPLACEMENTS.items():
            assert getattr(utils, name) is function
        assert setup.create_osft_model_class is utils.create_osft_model_class
        cls = setup.create_osft_model_class(OSFTModel)
        dicts = [drawn(20, 16, 10, torch.float64, i) for i in range(3)]
        expected = [by_formula(d, lambda p: p.grad, torch.float64) for d in dicts]
        model = cls(dicts)
        assert model.project_gradients() is None
        for d, (dU, dV) in zip(dicts, expected, strict=True):
            assert torch.allclose(d["U_low"].grad, dU, rtol=1e-11, atol=1e-12)
            assert torch.allclose(d["V_low"].grad, dV, rtol=1e-11, atol=1e-12)
        expected = [by_formula(d, lambda p: p.data, torch.float64) for d in dicts]
        model.project_parameters()
        for d, (U, V) in zip(dicts, expected, strict=True):
            assert torch.allclose(d["U_low"], U, rtol=1e-11, atol=1e-12)
            assert torch.allclose(d["V_low"], V, rtol=1e-11, atol=1e-12)
        osft.disable()
        osft.disable()
        assert {name: getattr(utils, name) for name in NAMES} == before
        assert setup.create_osft_model_class is before["create_osft_model_class"]
        assert model.project_gradients() == "theirs"
        assert len(osft._low_bases) == 0


def test_without_low_bases(imitation):
    d = drawn(24, 24, 18, torch.float64)
    osft.enable()
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(osft._low_bases) == 2
    osft.enable(low_bases=False)
    assert len(osft._low_bases) == 0
    expected = by_formula(d, lambda p: p.grad, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(osft._low_bases) == 0
    assert torch.allclose(d["U_low"].grad, expected[0], rtol=1e-11, atol=1e-12)
    osft.enable()
    assert osft._use_low_bases


@pytest.mark.parametrize("version", ["0.8.3", "0.10.0", None])
def test_an_unsupported_peer_is_refused(imitation, monkeypatch, version):
    def found(_):
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    before = dict(vars(imitation[1]))
    with pytest.raises(ImportError, match=r"rhai-innovation-mini-trainer >=0\.9,<0\.10"):
        osft.enable()
    assert vars(imitation[1]) == before


# --- against the peer itself ------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    try:
        yield importlib.import_module("mini_trainer.osft_utils")
    except ImportError as error:
        pytest.skip(f"mini_trainer does not import: {error}")
    osft.disable()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_the_peer_trains_alike(peer):
    """Two AdamW steps of a small Llama, float64: the peer's own results with ours switched in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        torch_dtype=torch.float64,
    )
    torch.manual_seed(1)
    weights = LlamaForCausalLM(config).double().state_dict()
    results = []
    for switch in (osft.disable, osft.enable):
        switch()
        model = peer.create_osft_model_class(LlamaForCausalLM)(
            config,
            initialize_osft=False,
            upcast_dtype=torch.float64,
            output_dtype=torch.float64,
        ).double()
        model.load_state_dict(weights)
        model.osft_config = peer.auto_generate_target_osft_config(
            model, target_patterns=["q_proj", "down_proj"], rank_ratio=0.7
        )
        model.reinitialize_osft(decompose_existing_weights=True)
        optimizer = peer.optim_wrapper(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
        tokens = torch.arange(24).view(2, 12) % 40
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        results.append({name: model._reconstruct_weight(name) for name in model.osft_config})
    osft.disable()
    theirs, ours = results
    assert theirs
    for name, weight in theirs.items():
        moved = (weight - weights[name]).norm()
        assert moved > 1e-3
        # Factors may differ in the sign of a triplet, for which AdamW's steps are odd.
        assert (ours[name] - weight).norm() < 1e-6 * moved


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_peer_s_own_functions(peer):
    osft.disable()
    for shape in SHAPES[:3]:
        m, n, k = shape
        W = gapped(m, n, k)
        theirs = peer.create_svd_dict(W, k, upcast_dtype=torch.float64)
        ours = osft.create_svd_dict(W, k, upcast_dtype=torch.float64)
        assert list(theirs) == list(ours)
        for a, b in zip(spans(ours), spans(theirs), strict=True):
            assert (a - b).norm() < 1e-12
        for name in KEYS[:-1]:
            assert type(ours[name]) is type(theirs[name])
            assert ours[name].stride() == theirs[name].stride()
        for what in FUNCTIONS:
            function, pick = FUNCTIONS[what]
            mine, others = drawn(*shape, torch.float64), drawn(*shape, torch.float64)
            function(mine)
            getattr(peer, function.__name__)(others) if what == "gradient" else torch.no_grad()(
                getattr(peer, function.__name__)
            )(others)
            for name in ("U_low", "V_low"):
                expected = pick(others[name])
                assert (pick(mine[name]) - expected).norm() < 1e-13 * expected.norm() * max(m, n)


# --- in several processes ---------------------------------------------------------------------

SHARDED_SHAPES = [(20, 16, 10), (9, 24, 5), (13, 13, 9)]  # even; uneven; low bases, uneven
LAYOUTS = ("fsdp", "replicated", "hsdp", "columns")


def distributed(d: dict[str, Tensor], layout: str, rank: int) -> dict[str, Tensor]:
    """The same factors and gradients as DTensors."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if layout == "hsdp":
        mesh, placements = init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)]
    elif layout == "subgroup":  # two of three ranks, and one alone
        meshes = [DeviceMesh("cpu", members) for members in ([0, 1], [2])]  # by all ranks
        mesh, placements = meshes[rank // 2], [Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (2,))
        placements = [{"fsdp": Shard(0), "replicated": Replicate(), "columns": Shard(1)}[layout]]

    def placed(t: Tensor) -> Tensor:
        at = placements
        if t.dim() == 1:
            at = [Replicate() if p == Shard(1) else p for p in at]
        return distribute_tensor(t, mesh, at, src_data_rank=None)

    result = {}
    for name, value in d.items():
        if name == "rank_high":
            result[name] = value
            continue
        result[name] = placed(value.detach())
        if name.endswith("low"):
            result[name] = nn.Parameter(result[name])
            result[name].grad = placed(value.grad)
    return result


def counts(run) -> dict[str, int]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        run()
    return {str(op).rpartition(".")[2]: n for op, n in mode.get_comm_counts().items() if n}


def project_sharded(rank: int, layouts: tuple[str, ...]) -> list[object]:
    found = []
    for layout in layouts:
        for i, shape in enumerate(SHARDED_SHAPES):
            for what, (function, pick) in FUNCTIONS.items():
                plain = drawn(*shape, torch.float64, i)
                expected = by_formula(plain, pick, torch.float64)
                d, holder = distributed(plain, layout, rank), nn.Module()
                comm = counts(lambda f=function, d=d: f(d))
                errors = []
                for attempt in range(2):  # without a holder, then with one: idempotent
                    if attempt:
                        function(d, cache_holder=holder)
                    for name, e in zip(("U_low", "V_low"), expected, strict=True):
                        errors.append(float((pick(d[name]).full_tensor() - e).norm() / e.norm()))
                found.append((layout, what, shape, comm, max(errors)))
    return found


def sent(comm: dict[str, int]) -> tuple[int, int]:
    """(sums, gathers), and nothing else."""
    sums = sum(n for op, n in comm.items() if "reduce" in op and "scatter" not in op)
    gathers = sum(n for op, n in comm.items() if "gather" in op)
    assert sums + gathers == sum(comm.values()), comm
    return sums, gathers


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_are_projected_as_the_whole(ranks):
    from tests.distributed.ranks import run_ranks

    layouts = LAYOUTS if ranks == 2 else ("subgroup",)
    for rank, found in enumerate(run_ranks(ranks, project_sharded, layouts)):
        assert len(found) == 2 * len(SHARDED_SHAPES) * len(layouts)
        for layout, what, shape, comm, error in found:
            assert error < 1e-13, (layout, what, shape)
            alone = layout == "replicated" or (layout == "subgroup" and rank == 2)
            # U's coefficients and V_high; in columns V's and U_high
            assert sent(comm) == ((0, 0) if alone else (1, 1)), (layout, what, shape)


def project_plain(rank: int) -> list[float]:
    """Every rank holds the whole, as under DDP; also what a sum over the default group gives."""
    import torch.distributed as dist

    d = drawn(20, 16, 10, torch.float64)
    expected = by_formula(d, lambda p: p.grad, torch.float64)
    raw, U = d["U_low"].grad.clone(), d["U_high"]
    coefficient = U.mT @ raw
    dist.all_reduce(coefficient)
    summed = raw - U @ coefficient
    comm = counts(lambda: osft.project_gradient_to_orthogonal_space(d))
    errors = [
        float((d[n].grad - e).norm() / e.norm())
        for n, e in zip(("U_low", "V_low"), expected, strict=True)
    ]
    return [sum(comm.values()), max(errors), float((summed - expected[0]).norm())]


def project_shards_of_no_mesh(rank: int) -> list[float]:
    """Rows as torch.chunk cuts them, in plain tensors: V_high's missing rows tell."""
    found = []
    for shape in SHARDED_SHAPES:
        for what, (function, pick) in FUNCTIONS.items():
            whole = drawn(*shape, torch.float64, what)
            expected = by_formula(whole, pick, torch.float64)
            d: dict[str, Tensor] = {"rank_high": whole["rank_high"]}
            for name in KEYS[:-1]:
                d[name] = whole[name].detach().chunk(2)[rank].clone()
                if name.endswith("low"):
                    d[name] = nn.Parameter(d[name])
                    d[name].grad = whole[name].grad.chunk(2)[rank].clone()
            function(d)
            for name, value in zip(("U_low", "V_low"), expected, strict=True):
                mine = value.chunk(2)[rank]
                found.append(float((pick(d[name]) - mine).norm() / mine.norm()))
    return found


def project_fsdp_model(rank: int) -> dict[str, object]:
    """Four modules under FSDP2: gradients of its own backward, one sum for all coefficients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Network(OSFTModel):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def forward(self: OSFTLinear, x: Tensor) -> Tensor:
        low = self.osft_params
        high = (x @ self.osft_V_high.mT * self.osft_S_high) @ self.osft_U_high.mT
        return torch.tanh(high + (x @ low.V_low.mT * low.S_low) @ low.U_low.mT)

    OSFTLinear.forward = forward
    shapes = [(13, 13, 9), (20, 13, 7), (16, 20, 12), (16, 16, 8)]
    models = [Network([drawn(*s, torch.float64, i) for i, s in enumerate(shapes)]) for _ in "ab"]
    for model in models:
        model.zero_grad()
    single, sharded = models
    sharded.head = None
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found: dict[str, object] = {"errors": [], "comm": []}
    x = torch.randn(8, 13, dtype=torch.float64, generator=generator_for("x"))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        osft.project_gradients(single)
        found["comm"].append(counts(lambda: osft.project_gradients(sharded)))
        for a, b in zip(single.layers, sharded.layers, strict=True):
            for name in ("U_low", "V_low"):
                mine = getattr(b.osft_params, name).grad.full_tensor()
                whole = getattr(a.osft_params, name).grad
                found["errors"].append(float((mine - whole).norm() / whole.norm()))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            osft.project_parameters(model)
    leaks = []
    for layer in sharded.layers:
        U, V = layer.osft_U_high.full_tensor(), layer.osft_V_high.full_tensor()
        leaks.append(float((U.mT @ layer.osft_params.U_low.full_tensor()).norm()))
        leaks.append(float((layer.osft_params.V_low.full_tensor() @ V.mT).norm()))
    return found | {"leaks": leaks, "modules": len(shapes)}


@pytest.mark.slow
def test_a_model_under_fsdp2():
    from tests.distributed.ranks import run_ranks

    for found in run_ranks(2, project_fsdp_model):
        assert max(found["errors"]) < 1e-9
        assert max(found["leaks"]) < 1e-13
        for comm in found["comm"][1:]:  # low bases were computed in the first step
            assert sent(comm) == (1, found["modules"])


def refuse_a_partial_sum(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    d = distributed(drawn(20, 16, 10, torch.float64), "fsdp", rank)
    local = torch.ones(6, 16, dtype=torch.float64)
    partial = DTensor.from_local(local, init_device_mesh("cpu", (2,)), [Partial()])
    d["V_low"] = nn.Parameter(partial)
    with pytest.raises(ValueError, match="expected V_low and its gradient to be replicated") as e:
        osft.project_parameter_to_orthogonal_space(d, skip_u=True)
    return str(e.value)


def project_other_tensors(rank: int) -> tuple[list[float], list[float], str]:
    return project_plain(rank), project_shards_of_no_mesh(rank), refuse_a_partial_sum(rank)


@pytest.mark.slow
def test_tensors_that_are_no_shards_of_a_mesh():
    """Replicated ones are not reduced; shards in plain tensors are; a partial sum is refused."""
    from tests.distributed.ranks import run_ranks

    for (collectives, error, of_summing), errors, message in run_ranks(2, project_other_tensors):
        assert collectives == 0
        assert error < 1e-13
        assert of_summing > 1  # the fault this is there for shows
        assert max(errors) < 1e-13
        assert "redistribute it first" in message


# --- the bench --------------------------------------------------------------------------------


def test_bench_rows(monkeypatch, tmp_path, capsys):
    from bench import integrations_mini_trainer as bench

    monkeypatch.setattr(bench, "SHAPES", ((48, 48),))
    monkeypatch.setattr(bench, "RATIOS", (0.75,))
    path = tmp_path / "rows.csv"
    assert bench.main(["--rounds", "1", "--csv", str(path)]) == 0
    rows = path.read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 + 4
    assert "osf-kernels, high bases" in capsys.readouterr().out


def test_a_wrong_projection_gets_no_time(monkeypatch):
    from bench import integrations_mini_trainer as bench

    monkeypatch.setattr(osft, "_low_basis", lambda high, dim: None)
    W = gapped(32, 32, 24, dtype=torch.float32)
    assert all(row.median_ms is not None for row in bench.project(W, 24, 1))
    monkeypatch.setattr(osft, "_project", lambda sides: None)
    for row in bench.project(W, 24, 1):
        wrong = row.contender.startswith("osf-kernels")
        assert row.status.startswith("wrong") == wrong
        assert (row.median_ms is None) == wrong
