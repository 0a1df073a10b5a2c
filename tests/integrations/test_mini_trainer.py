"""integrations.mini_trainer: projections against their formulas in float64, caches, switching."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import inspect
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osf_kernels.testing import assert_error_within, orthonormality_ratio
from osf_torch.integrations import mini_trainer as osft
from osf_torch.integrations.mini_trainer import low_bases, projections, switching
from tests.integrations.osft_factors import (
    FUNCTIONS,
    KEYS,
    SHAPES,
    HeldShard,
    OSFTModel,
    by_formula,
    drawn,
    gapped,
    spans,
)


@pytest.fixture(autouse=True)
def no_low_bases() -> None:
    osft.drop_low_bases()


# --- projections ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("what", FUNCTIONS)
@pytest.mark.parametrize("held", [False, True])
def test_high_factors_may_be_wrappers_that_are_no_tensors(what, held):
    function, pick = FUNCTIONS[what]
    d = drawn(20, 16, 10, torch.float64)
    expected = by_formula(d, pick, torch.float64)
    wrapped = d | {name: HeldShard(d[name]) for name in ("U_high", "S_high", "V_high")}
    function(wrapped, cache_holder=nn.Module() if held else None)
    for name, exact in zip(("U_low", "V_low"), expected, strict=True):
        assert torch.allclose(pick(d[name]), exact, rtol=1e-12, atol=1e-13)


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
    assert len(low_bases._kept) == 2
    kept = low_bases._kept[d["U_high"]].basis
    assert kept.shape == (24, 6)
    assert orthonormality_ratio(torch.cat([d["U_high"], kept], 1)) < 30
    osft.project_gradient_to_orthogonal_space(d, cache_holder=holder)
    assert low_bases._kept[d["U_high"]].basis is kept
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
    assert len(low_bases._kept) == 0


def test_the_lists_of_a_model_are_made_once_and_go_with_it(made):
    shapes = [(24, 24, 18), (20, 16, 5)]
    model = OSFTModel([drawn(*shape, torch.float64, i) for i, shape in enumerate(shapes)])
    for _ in range(3):
        osft.project_gradients(model)
        osft.project_parameters(model)
    assert made == [4], "gradients and parameters are projected alike"
    model.layers[1].osft_params.U_low.grad = None
    osft.project_gradients(model)
    osft.project_gradients(model)
    osft.project_parameters(model)
    assert made == [4, 3]
    with torch.no_grad():
        model.layers[0].osft_U_high.copy_(torch.linalg.qr(model.layers[0].osft_U_high.flip(0)).Q)
    osft.project_parameters(model)
    assert made == [4, 3, 4], "the low basis is another"
    assert len(low_bases.lists_of(model)._kept) == 1, "the lists with the earlier one are gone"
    osft.drop_low_bases()
    osft.project_parameters(model)
    assert made == [4, 3, 4, 4]
    assert len(low_bases._lists) == 1
    del model
    gc.collect()
    assert len(low_bases._lists) == 0


def test_no_low_basis_without_a_holder_or_where_it_is_no_smaller():
    osft.project_gradient_to_orthogonal_space(drawn(24, 24, 18, torch.float64))
    d = drawn(24, 24, 12, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(low_bases._kept) == 0
    d = drawn(48, 24, 18, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(low_bases._kept) == 1  # of V alone: U's complement has 30 columns
    assert d["V_high"] in low_bases._kept


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

NAMES = [*switching._REPLACEMENTS, "create_osft_model_class"]


def imitated(function, **changes):
    """Another function of the same arguments, or of other defaults."""

    def theirs(*args, **kwargs):
        raise AssertionError

    signature = inspect.signature(function)
    theirs.__signature__ = signature.replace(
        parameters=[
            p.replace(default=changes.get(p.name, p.default)) for p in signature.parameters.values()
        ]
    )
    return theirs


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
    for name, ours in switching._REPLACEMENTS.items():
        setattr(modules[1], name, imitated(ours))
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
        for name, function in switching._REPLACEMENTS.items():
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
        assert len(low_bases._kept) == 0


def test_without_low_bases(imitation):
    d = drawn(24, 24, 18, torch.float64)
    osft.enable()
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(low_bases._kept) == 2
    osft.enable(low_bases=False)
    assert len(low_bases._kept) == 0
    expected = by_formula(d, lambda p: p.grad, torch.float64)
    osft.project_gradient_to_orthogonal_space(d, cache_holder=nn.Module())
    assert len(low_bases._kept) == 0
    assert torch.allclose(d["U_low"].grad, expected[0], rtol=1e-11, atol=1e-12)
    osft.enable()
    assert low_bases._keeps


@pytest.mark.parametrize("how", ["missing", "other arguments"])
@pytest.mark.parametrize("name", [*NAMES, *switching._METHODS])
def test_enable_replaces_all_or_nothing(imitation, monkeypatch, name, how):
    """As with a checkout of another commit, whose metadata are an installed release's."""
    _, utils, setup = imitation

    def create_osft_model_class(base_cls):
        def method(self):
            raise AssertionError

        methods = dict.fromkeys(switching._METHODS, method)
        if name in methods:
            del methods[name]
            if how == "other arguments":
                methods[name] = lambda self, more: None
        return type("WithOSFT", (base_cls,), methods)

    if name in switching._METHODS:
        monkeypatch.setattr(utils, "create_osft_model_class", create_osft_model_class)
    elif how == "missing":
        monkeypatch.delattr(utils, name)
    else:
        monkeypatch.setattr(utils, name, lambda whatever: None)
    before = dict(vars(utils)), dict(vars(setup))
    for _ in range(2):
        with pytest.raises(ImportError, match=rf"expected \S*{name} to take .* >=0\.9,<0\.10, got"):
            osft.enable(low_bases=False)
        assert (dict(vars(utils)), dict(vars(setup))) == before
        assert low_bases._keeps
    monkeypatch.undo()


def test_modules_that_import_ours_have_their_own_back(imitation, monkeypatch):
    """A module of the peer that is imported while ours are enabled."""
    utils = imitation[1]
    own = utils.create_osft_model_class
    osft.enable()
    late = types.ModuleType("mini_trainer.late")
    late.create_osft_model_class = utils.create_osft_model_class
    monkeypatch.setitem(sys.modules, "mini_trainer.late", late)
    kept = late.create_osft_model_class
    assert late.create_osft_model_class(OSFTModel)([]).project_gradients() is None
    osft.disable()
    assert late.create_osft_model_class is own
    assert kept(OSFTModel)([]).project_gradients() == "theirs"


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

    monkeypatch.setattr(projections, "low_basis", lambda high, dim: None)
    W = gapped(32, 32, 24, dtype=torch.float32)
    assert all(row.median_ms is not None for row in bench.project(W, 24, 1))
    monkeypatch.setattr(projections, "_project", lambda lows, holder: None)
    for row in bench.project(W, 24, 1):
        wrong = row.contender.startswith("osf-kernels")
        assert row.status.startswith("wrong") == wrong
        assert (row.median_ms is None) == wrong
