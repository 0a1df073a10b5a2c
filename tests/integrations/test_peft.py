"""integrations.peft: layers and training against PEFT's own OSF tuner and formulas in float64."""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.metadata
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osf_kernels.testing import assert_error_within, matrix_with_spectrum
from osf_torch.integrations import peft as osf_peft
from osf_torch.integrations.peft import switching
from osf_torch.integrations.peft.factors import forward
from tests.helpers import generator_for, randn
from tests.integrations.peft_layers import (
    SIDES,
    TARGETS,
    inputs,
    layers,
    loss_of,
    optimizer_of,
    plain,
    protected,
    share,
    shares,
    wrapped,
)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rows: int = 8
) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs(step, rows))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("rows", [8, 64])  # S on the activations, and on a factor
def test_training_goes_as_with_peft(peft, kind, rows):
    theirs = wrapped(peft)
    expected = train(theirs, optimizer_of(theirs, kind), 25, rows)
    osf_peft.enable()
    ours = wrapped(peft)
    found = train(ours, optimizer_of(ours, kind), 25, rows)
    assert expected[-1] < 0.8 * expected[0], "it did train"
    for a, b in zip(found, expected, strict=True):
        assert abs(a - b) < 1e-4 * b


@pytest.mark.slow
@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("rows", [8, 64])
def test_a_step_is_as_exact_as_peft(peft, init_weights, rows):
    """Outputs and gradients of one step, in float32, against PEFT's in float64."""

    def step(dtype: torch.dtype, made: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        model = (made or wrapped(peft, init_weights=init_weights)).to(dtype)
        for i, layer in enumerate(layers(model)):
            for side in ("U_low", "S_low", "V_low"):  # away from where the delta is zero
                parameter = layer.osf_svd_params["default"][side]
                gen = generator_for("away", i, side)
                parameter.data += 0.1 * randn(*parameter.shape, dtype=dtype, generator=gen)
        x = inputs(0, rows, dtype)
        y = model(x)
        (y - x[:, :16]).square().mean().backward()
        return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    made = wrapped(peft, init_weights=init_weights)
    twin = copy.deepcopy(made)
    osf_peft.attach(made)  # hooks of ours in float64 too: PEFT's don't survive the copy
    truth_y, truth = step(torch.float64, made)
    peer_model = copy.deepcopy(twin)
    osf_peft.attach(peer_model)
    peer_y, peer = step(torch.float32, peer_model)
    osf_peft.enable()
    our_model = copy.deepcopy(twin)
    osf_peft.attach(our_model)
    y, grads = step(torch.float32, our_model)
    assert_error_within(y, truth_y, peer_y, scale=truth_y)
    assert list(grads) == list(truth)
    for name, g in grads.items():
        assert_error_within(g, truth[name], peer[name], scale=truth[name], factor=2.5)


@pytest.mark.slow
@pytest.mark.parametrize("effective_rank", [0.25, 0.5, 0.9])
def test_gradients_stay_out_of_the_protected_span(peft, effective_rank):
    osf_peft.enable()
    model = wrapped(peft, effective_rank=effective_rank)
    osf_peft.verify(model)
    loss_of(model, inputs(0)).backward()
    assert max(shares(model, "grad")) < 1e-6
    for layer in layers(model):
        for handle in layer.hook_handles:
            handle.remove()
    model.zero_grad()
    loss_of(model, inputs(0)).backward()
    assert min(shares(model, "grad")) > 0.1, "without hooks they don't"


@pytest.mark.slow
def test_accumulated_gradients_are_the_projection_of_the_sum(peft):
    osf_peft.enable()
    model, bare = wrapped(peft), wrapped(peft)
    for layer in layers(bare):
        layer._detach_hooks()
    for m in (model, bare):
        for step in range(3):
            loss_of(m, inputs(step)).backward()
    for ours, raw in zip(layers(model), layers(bare), strict=True):
        for side in SIDES:
            g = raw.osf_svd_params["default"][side].grad.double()
            H = protected(ours, side)
            expected = g - (H @ g if side == "U_low" else g @ H)
            found = ours.osf_svd_params["default"][side].grad
            assert (found - expected).norm() < 2e-6 * g.norm()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["enable", "restore_after"])
def test_restored_factors_hold_the_protected_part(peft, how):
    def trained(restored: bool) -> tuple[float, float]:
        osf_peft.enable(restore=restored and how == "enable")
        model = wrapped(peft)
        optimizer = optimizer_of(model)
        if restored and how == "restore_after":
            osf_peft.restore_after(model, optimizer)
        weights = [layer.get_base_layer().weight.detach().double() for layer in layers(model)]
        train(model, optimizer, 300)
        drift = 0.0
        merged = [layer.get_base_layer() for layer in layers(model)]
        worst = max(shares(model, "parameter"))
        model.merge_adapter()
        for W, layer in zip(weights, merged, strict=True):
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            k = len(S) // 2
            moved = U[:, :k].mT @ layer.weight.double() - S[:k, None] * Vh[:k]
            drift = max(drift, float(moved.norm() / S[:k].norm()))
        return worst, drift

    leak, drift = trained(restored=True)
    assert leak < 2e-6
    assert drift < 1e-5
    leak, drift = trained(restored=False)
    assert leak > 1e-2, "projected gradients alone don't"
    assert drift > 1e-2


@pytest.mark.parametrize("how", ["enable", "restore_after"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_scaler_skips_changes_nothing(peft, how, fused):
    """A fused optimizer is called for it, and so are the hooks on its step."""
    osf_peft.enable(restore=how == "enable")
    model = wrapped(peft)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    if how == "restore_after":
        osf_peft.restore_after(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, factor in enumerate((torch.inf, 1.0)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, inputs(step)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert len(moved) == (0 if step == 0 else 3 * len(TARGETS))
    assert max(shares(model, "parameter")) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_a_thousand_times_scales_nothing(peft, dtype):
    """B Bᵀ of bfloat16 columns is no projector: applied 1,000 times it would."""
    osf_peft.enable()
    model = wrapped(peft, dtype, autocast_adapter_dtype=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    osf_peft.restore_after(model, optimizer)
    loss_of(model, inputs(0, dtype=dtype)).backward()
    optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "_low" in n}
    for _ in range(1000):
        optimizer.step()
    for name, p in before.items():
        moved = (model.get_parameter(name).double() - p.double()).norm() / p.double().norm()
        assert moved < (1e-4 if dtype == torch.float32 else 5e-3), name


@pytest.mark.slow
def test_restoring_stops(peft):
    osf_peft.enable()
    model = wrapped(peft)
    optimizer = optimizer_of(model)
    handle = osf_peft.restore_after(model, optimizer)
    train(model, optimizer, 3)
    assert max(shares(model, "parameter")) < 2e-6
    handle.remove()
    train(model, optimizer, 3)
    assert max(shares(model, "parameter")) > 1e-3
    osf_peft.enable(restore=True)
    train(model, optimizer, 1)
    assert max(shares(model, "parameter")) < 2e-6
    osf_peft.enable(restore=False)
    train(model, optimizer, 3)
    assert max(shares(model, "parameter")) > 1e-3


@pytest.mark.slow
def test_a_bfloat16_model_is_projected(peft):
    """PEFT casts its adapter to float32 last, to parameters without hooks."""

    def leak() -> float:
        model = wrapped(peft, torch.bfloat16)
        assert layers(model)[0].osf_svd_params["default"]["U_low"].dtype == torch.float32
        loss_of(model, inputs(0, dtype=torch.bfloat16)).backward()
        return max(shares(model, "grad"))

    assert leak() > 0.1
    osf_peft.enable()
    assert leak() < 1e-2


@pytest.mark.slow
def test_switching_leaves_no_trace(peft):
    parts = [importlib.import_module(f"peft.tuners.osf.{name}") for name in switching._MODULES]
    owners = [*parts, parts[0].OSFLayer, parts[0].Linear, parts[1].OSFModel]
    before = [dict(vars(owner)) for owner in owners]
    osf_peft.enable()
    osf_peft.enable()
    changed = sum(vars(owner) != held for owner, held in zip(owners, before, strict=True))
    assert changed == 4
    model = wrapped(peft)
    osf_peft.disable()
    osf_peft.disable()
    for owner, held in zip(owners, before, strict=True):
        assert dict(vars(owner)) == held
    osf_peft.verify(model)
    loss_of(model, inputs(0)).backward()
    assert max(shares(model, "grad")) < 1e-6, "layers made meanwhile go on projecting"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "other arguments"])
@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [
        ("utils", None, "project_gradient_to_orthogonal_space"),
        ("layer", "OSFLayer", "_attach_hooks"),
        ("layer", "Linear", "forward"),
        ("model", "BaseTuner", "_cast_adapter_dtype"),  # inherited by OSFModel
    ],
)
def test_enable_replaces_all_or_nothing(peft, monkeypatch, part, owner, name, how):
    optimizer_module = importlib.import_module("torch.optim.optimizer")
    parts = {n: importlib.import_module(f"peft.tuners.osf.{n}") for n in switching._MODULES}
    owners = [*parts.values(), parts["layer"].OSFLayer, parts["layer"].Linear]
    holder = getattr(parts[part], owner) if owner else parts[part]
    if how == "missing":
        monkeypatch.delattr(holder, name)  # nn.Module has a forward, of other arguments
    else:
        monkeypatch.setattr(holder, name, lambda self, whatever, *, more: None)
    before = [dict(vars(owner)) for owner in owners]
    hooks = dict(optimizer_module._global_optimizer_post_hooks)
    for _ in range(2):
        with pytest.raises(
            ImportError, match=rf"{name} to take \(.*peft >=0\.21,<0\.22, got .* in"
        ):
            osf_peft.enable(restore=True)
        assert [dict(vars(owner)) for owner in owners] == before
        assert dict(optimizer_module._global_optimizer_post_hooks) == hooks
    monkeypatch.undo()
    osf_peft.enable()
    assert parts["layer"].Linear.forward is forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
        (torch.float64, False),
    ],
)
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_an_untouched_adapter_adds_nothing(peft, dtype, autocast, cast, compiled):
    osf_peft.enable()
    base = plain(dtype)
    model = wrapped(peft, dtype, autocast_adapter_dtype=cast)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for rows in (1, 7, 64, 300):
            x = inputs(0, rows, dtype)
            assert torch.equal(call(x), base(x))
            assert torch.equal(call(x[None]), base(x[None]))


@pytest.mark.slow
def test_an_adapter_rounded_beside_what_it_began_from_adds_nothing(peft):
    """As FSDP2's mixed precision has it: parameters in bfloat16, buffers in float32."""
    osf_peft.enable()
    model, base = wrapped(peft), plain()
    for layer in layers(model):
        layer.osf_svd_params.to(torch.bfloat16)
    x = inputs(0, 64)
    assert torch.equal(model(x), base(x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_are_not_lost_in_half_precision(peft, dtype):
    """What training moved, of the output in half precision, against float64."""

    def moved(of: torch.dtype, autocast: bool) -> Tensor:
        model, base = wrapped(peft).to(of), plain().to(of)
        for i, layer in enumerate(layers(model)):
            for side in ("U_low", "S_low", "V_low"):
                p = layer.osf_svd_params["default"][side]
                gen = generator_for("small", i, side)
                p.data += 1e-3 * randn(*p.shape, dtype=torch.float64, generator=gen).to(of)
        x = inputs(0, 64, of)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            layer = layers(model)[0]
            return (layer(x) - base[0](x)).double()

    theirs, truth = moved(torch.float32, True), moved(torch.float64, False)
    osf_peft.enable()
    ours = moved(torch.float32, True)
    assert (ours - truth).norm() < 0.6 * (theirs - truth).norm()


@pytest.mark.slow
def test_layers_made_before_are_attached_once(peft):
    model = wrapped(peft)
    with pytest.raises(RuntimeError, match=r"verify: .* no hook on U_low of 'default' in 'base_m"):
        osf_peft.verify(model)
    assert osf_peft.attach(model) == osf_peft.attach(model) == 6
    osf_peft.verify(model)
    for layer in layers(model):
        assert len(layer.hook_handles) == 2
        for side in SIDES:
            parameter = layer.osf_svd_params["default"][side]
            assert not parameter._backward_hooks, "PEFT's own is off"
            assert len(parameter._post_accumulate_grad_hooks) == 1
    layers(model)[0]._detach_hooks()
    with pytest.raises(RuntimeError, match="no hook on U_low"):
        osf_peft.verify(model)


@pytest.mark.slow
def test_copies_go_on_projecting(peft):
    osf_peft.enable()
    model = wrapped(peft)
    twin = copy.deepcopy(model)
    osf_peft.verify(twin)
    for layer in layers(model):
        layer._detach_hooks()
    osf_peft.verify(twin)
    loss_of(twin, inputs(0)).backward()
    assert max(shares(twin, "grad")) < 1e-6
    pickled = pickle.loads(pickle.dumps(twin))
    with pytest.raises(RuntimeError, match="no hook"):
        osf_peft.verify(pickled)
    assert osf_peft.attach(pickled) == 6
    osf_peft.verify(pickled)


@pytest.mark.slow
def test_assigned_parameters_are_noticed(peft):
    osf_peft.enable()
    model = wrapped(peft)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"call attach\(model\)"):
        osf_peft.verify(model)
    osf_peft.attach(model)
    loss_of(model, inputs(0)).backward()
    assert max(shares(model, "grad")) < 1e-6


@pytest.mark.slow
def test_nothing_keeps_a_model_alive(peft):
    osf_peft.enable(restore=True)
    model = wrapped(peft)
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    alive = weakref.ref(layers(model)[0].osf_svd_params["default"]["U_low"])
    del model, optimizer
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_lists_are_made_once_and_anew_for_other_bases(peft, made):
    osf_peft.enable(restore=True)
    model = wrapped(peft)
    train(model, optimizer_of(model), 3)
    assert sorted(made) == [1] * 6 + [6], "a gradient as it comes, and all that a step has moved"
    made.clear()
    model.double()
    x = inputs(0, dtype=torch.float64)
    for _ in range(2):
        loss_of(model, x).backward()
    assert made == [1] * 6
    assert max(shares(model, "grad")) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter second was active:UserWarning")
def test_adapters_take_turns(peft):
    osf_peft.enable()
    model = wrapped(peft)
    model.add_adapter("second", peft.OSFConfig(target_modules=TARGETS, effective_rank=0.75))
    assert osf_peft.attach(model) == 12
    model.set_adapter("second")
    osf_peft.verify(model)
    loss_of(model, inputs(0)).backward()
    for layer in layers(model):
        for side in SIDES:
            assert layer.osf_svd_params["default"][side].grad is None
            g = layer.osf_svd_params["second"][side].grad
            assert share(layer, side, g, "second") < 1e-6
    model.delete_adapter("second")
    model.set_adapter("default")
    assert osf_peft.attach(model) == 6
    loss_of(model, inputs(0)).backward()
    assert max(shares(model, "grad")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("switched", ["ours to ours", "ours to PEFT's", "PEFT's to ours"])
def test_a_saved_adapter_loads(peft, tmp_path, switched):
    first, second = switched.split(" to ")
    if first == "ours":
        osf_peft.enable()
    model = wrapped(peft)
    train(model, optimizer_of(model), 5)
    model.save_pretrained(tmp_path)
    osf_peft.disable()
    if second == "ours":
        osf_peft.enable()
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path, is_trainable=True)
    x = inputs(9)
    with torch.no_grad():
        assert (loaded(x) - model(x)).norm() < 1e-5 * model(x).norm()
    if second == "ours":
        osf_peft.verify(loaded)
        low = peft.PeftModel.from_pretrained(
            plain(), tmp_path, is_trainable=True, low_cpu_mem_usage=True
        )
        osf_peft.verify(low)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equal", "slow"])
@pytest.mark.parametrize(
    ("shape", "dtype", "ours_first"),
    [
        *itertools.product([(96, 160), (160, 96)], DTYPES, [True, False]),
        ((1024, 1024), torch.float32, True),
    ],
)
def test_an_adapter_means_the_same_to_both(peft, tmp_path, shape, kind, dtype, ours_first):
    """By as much as training moved, of weights whose leading triplets are hard to tell."""
    m, n = shape
    sigma = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** (0 if kind == "equal" else -0.7)
    W, _, _ = matrix_with_spectrum(m, n, sigma, generator=generator_for(m, n, kind))

    def base() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(n, m, bias=False))
        model[0].weight.data.copy_(W)
        return model.to(dtype)

    first, second = [osf_peft.enable, osf_peft.disable][:: 1 if ours_first else -1]
    first()
    config = peft.OSFConfig(target_modules=["0"], effective_rank=0.5)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = randn(16, n, dtype=dtype, generator=generator_for("means", n))
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained, moved = model(x), (model(x) - base()(x)).double().norm()
    model.save_pretrained(tmp_path)
    second()
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    with torch.no_grad():
        off = (loaded(x) - trained).double().norm() / moved
    assert moved > 0
    assert off < {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float64: 1e-10}[dtype]


@pytest.mark.slow
def test_merged_weights_compute_the_same(peft):
    osf_peft.enable()
    model = wrapped(peft)
    train(model, optimizer_of(model), 5)
    x = inputs(9)
    with torch.no_grad():
        expected = model(x)
        with model.disable_adapter():
            assert torch.allclose(model(x), plain()(x), atol=1e-6)
        merged = model.merge_and_unload()
        assert not layers(merged)
        assert (merged(x) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_autocast_is_as_exact_as_peft(peft):
    def output(dtype: torch.dtype, autocast: bool) -> Tensor:
        model = wrapped(peft, init_weights=False).to(dtype)
        for i, layer in enumerate(layers(model)):
            for side in ("U_low", "S_low", "V_low"):
                p = layer.osf_svd_params["default"][side]
                gen = generator_for("autocast", i, side)
                p.data.copy_(randn(*p.shape, dtype=torch.float32, generator=gen) / 4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(inputs(0, 64, dtype))

    truth, peer = output(torch.float64, False), output(torch.float32, True)
    osf_peft.enable()
    ours = output(torch.float32, True)
    assert ours.dtype == peer.dtype
    scale = truth.double()
    assert (ours.double() - scale).norm() < 1.5 * (peer.double() - scale).norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_language_model_trains_as_with_peft(peft):
    """A Llama of two tiny layers, made from its configuration."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tokens = torch.randint(64, (4, 12), generator=generator_for("tokens"))

    def losses() -> tuple[list[float], Any]:
        torch.manual_seed(5)
        model = peft.get_peft_model(
            transformers.LlamaForCausalLM(config), peft.OSFConfig(target_modules="all-linear")
        )
        optimizer = optimizer_of(model)
        found = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found, model

    expected, _ = losses()
    osf_peft.enable()
    found, model = losses()
    assert max(shares(model, "grad")) < 1e-6
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_bad_input(peft):
    osf_peft.enable()
    for function in (osf_peft.attach, osf_peft.verify):
        with pytest.raises(ValueError, match=r"expected model to have OSF layers, got none; make"):
            function(plain())
    model, other = wrapped(peft), wrapped(peft)
    with pytest.raises(ValueError, match=r"expected optimizer to own U_low and V_low of the model"):
        osf_peft.restore_after(model, optimizer_of(other))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_is_hpu_available.*")
def test_a_compiled_model_is_projected(peft):
    osf_peft.enable()
    model, twin = wrapped(peft), wrapped(peft)
    loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), inputs(0)).backward()
    loss_of(twin, inputs(0)).backward()
    assert max(shares(model, "grad")) < 1e-6
    for name, p in twin.named_parameters():
        if p.grad is not None:
            assert torch.allclose(model.get_parameter(name).grad, p.grad, atol=1e-6)


@pytest.mark.slow
def test_the_bench_compares_what_trains_alike(peft, monkeypatch, tmp_path, capsys):
    bench = importlib.import_module("bench.integrations_peft")
    make = lambda: nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))  # noqa: E731
    monkeypatch.setattr(bench, "CASES", {"tiny": (make, 16)})
    assert bench.main(["--rounds", "2", "--csv", str(tmp_path / "rows.csv")]) == 0
    assert "osf-kernels, restored" in capsys.readouterr().out
    rows = bench.report.read_csv(tmp_path / "rows.csv")
    assert [(row["task"], row["status"]) for row in rows] == [("wrap", "ok")] * 2 + [
        ("step", "ok")
    ] * 3
    monkeypatch.setattr(bench, "LEAK", 0.0)
    assert bench.main(["--rounds", "1"]) == 1
    assert "of a gradient is in the protected span" in capsys.readouterr().out
