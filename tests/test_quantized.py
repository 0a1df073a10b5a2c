"""Quantized weights: decomposed as what they stand for, and trained beside."""

from __future__ import annotations

import io
import itertools
import logging

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn import functional as F

from osf_torch import (
    confine,
    input_subspaces,
    load_subspaces,
    protect,
    refresh,
    save_subspaces,
)
from osf_torch.batching import kind_of
from osf_torch.quantized import stored
from osf_torch.selection import select
from tests.helpers import generator_for
from tests.small_confine import adamw, batches, columns, relative, train
from tests.small_guard import one_rank
from tests.small_quantized import (
    PEERS,
    STAND_INS,
    Float8Linear,
    Scaled,
    ScaledLinear,
    exact_float8,
    peer,
    quantized_model,
    scaled,
)
from tests.small_refresh import Recorder, linear

BOTH = ["0.weight", "2.weight"]
MOVED = 1e-5  # what is protected, by a decomposition in float64
KERNEL = 3e-6  # all of them multiply in float32 on the CPU
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def named(make) -> str:
    return make.__name__


def refreshed(model: nn.Module, ranks=0.5, **options):
    return refresh(model, ranks, progress=False, compute_dtype=torch.float64, **options)


def protected(W, top):
    """What of W has the leading directions of ``top`` on a side."""
    (U, V), one = top, torch.eye
    free_rows, free_columns = one(len(U)) - U @ U.mT, one(len(V)) - V @ V.mT
    return W - free_rows.double() @ W @ free_columns.double()


def leading(W, r):
    U, _, Vh = torch.linalg.svd(W)
    return U[:, :r], Vh[:r].mT


@pytest.mark.parametrize("options", [{}, {"rank": 3}], ids=["whole", "rank"])
@pytest.mark.parametrize("make", [*STAND_INS, *PEERS], ids=named)
def test_training_beside_keeps_the_leading_part_of_what_it_stands_for(make, options):
    model, exact = quantized_model(make)
    assert list(refresh(model, 0.5, progress=False)) == BOTH, "what there is, where none trains"
    found = refreshed(model, filter="?.weight", leave_out="4.*", keep="all")
    assert list(found) == BOTH
    for name, W in exact.items():
        entry = found[name]
        U, S, V = entry.svd.U, entry.svd.S, entry.svd.V
        assert entry.shape == tuple(W.shape)
        assert relative(S, torch.linalg.svdvals(W)[: entry.rank]) <= 1e-6
        assert relative(W @ V.double(), U.double() * S.double()) <= 1e-6
    (x,) = batches(1, "quantized", width=64)
    model.train()
    stored_bytes = [
        [t.clone() for t in stored(model[i].weight, ()).tensors()] if make is scaled else []
        for i in (0, 2)
    ]
    before = model[0](x)
    confined = confine(model, found, update="beside", leave_out="4.*", **options)
    assert torch.equal(model[0](x), before)
    assert confined.drift().keys() == exact.keys()
    assert confined.coverage().covered == 2 * 64 * 32, "elements, not bytes"
    train(model, batches(20, "quantized", width=64), adamw(confined.parameters()))
    for place, index in zip(confined.places, (0, 2), strict=True):
        W = exact[place.name]
        U, V = columns(place.spec.left), columns(place.spec.right)
        change = U @ place.block.detach().double() @ V.mT
        assert relative(W + change, W) > 1e-3, "it has trained"
        top = leading(W, found[place.name].rank)
        kept = protected(W, top)
        assert relative(protected(W + change, top), kept) <= MOVED
        reads = x if index == 0 else batches(1, "second", width=32)[0]
        layer = model[index]
        bias = 0 if layer.bias is None else layer.bias.double()
        wanted = reads.double() @ (W + change).mT + bias
        assert relative(layer(reads), wanted) <= KERNEL
        if make is scaled:
            assert all(
                map(torch.equal, stored(layer.weight, ()).tensors(), stored_bytes[index // 2])
            )
    assert max(confined.drift().values()) <= MOVED
    assert set(confined.base_moved().values()) == {0.0}
    confined.verify()
    with pytest.raises(RuntimeError, match=r"can be written to, got quantized ones, 0\.weight"):
        confined.release()


def test_a_change_of_the_codes_is_seen_and_another_base_s_state_refused():
    model, _ = quantized_model(scaled)
    found = refreshed(model)
    confined = confine(model, found, update="beside")
    train(model, batches(5, "quantized", width=64), adamw(confined.parameters()))
    file = io.BytesIO()
    torch.save(confined.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, _ = quantized_model(scaled)
    resumed = confine(again, state)
    (x,) = batches(1, "quantized", width=64)
    assert torch.equal(again(x), model(x))
    assert resumed.drift() == confined.drift()
    resumed.load_state_dict(state)
    assert torch.equal(again(x), model(x)), "C beside the base, not taken from it"
    other, _ = quantized_model(scaled)
    other[2].weight.scale.mul_(1.01)
    with pytest.raises(ValueError, match=r"expected '2\.weight' to be the weight that was saved"):
        confine(other, state)
    model[2].weight.codes[0] += 1
    with pytest.raises(RuntimeError, match=r"protected of '2\.weight' .*something has written"):
        confined.verify()


@pytest.mark.parametrize("make", [*STAND_INS, *PEERS[:1], *PEERS[4:5]], ids=named)
def test_files_are_tied_to_what_the_weight_is_stored_in(make, tmp_path):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    model, _ = quantized_model(make)
    found = refreshed(model)
    save_subspaces(tmp_path / "s", found, model)
    loaded = load_subspaces(tmp_path / "s", quantized_model(make)[0])
    for name in BOTH:
        assert loaded[name].shape == found[name].shape
        assert all(
            torch.equal(t, loaded[name].factors()[part])
            for part, t in found[name].factors().items()
        )
    held = list(stored(model[2].weight, [(model[2], "weight")]).tensors())
    with torch.no_grad():
        held[1].mul_(1.5)  # the scales
    with pytest.raises(ValueError, match=r"parameter '2\.weight' to hold the values that it was"):
        load_subspaces(tmp_path / "s", model)
    assert list(load_subspaces(tmp_path / "s", model, require_same_weights=False)) == BOTH
    of_another_grid(model)
    with pytest.raises(TypeError, match=r"save_subspaces: .*'2\.weight' to be dequantized, got a"):
        save_subspaces(tmp_path / "t", found, model)


# --- which are taken ---


def test_the_default_takes_what_trains_and_tells_of_the_others(caplog):
    model, _ = quantized_model(scaled)
    model[4].weight.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "osf_torch"):
        assert list(refresh(model, 2, progress=False)) == ["4.weight"]
    (told,) = [r.getMessage() for r in caplog.records if "quantized" in r.getMessage()]
    assert "weren't taken: 0.weight, 2.weight; filter= takes them" in told
    caplog.clear()
    assert list(refresh(model, 2, filter="[02].*", progress=False)) == BOTH
    assert not [r for r in caplog.records if "weren't taken" in r.getMessage()]


def test_scales_and_embeddings_are_no_weights():
    model = nn.Sequential(nn.Embedding(8, 24), Float8Linear(linear(20, 24).weight, 8))
    model[0].weight = nn.Parameter(Scaled.of(model[0].weight), requires_grad=False)
    assert list(refresh(model, 2, progress=False)) == ["1.weight"]
    assert list(refresh(model, 2, filter="1.*", progress=False)) == ["1.weight"]
    assert list(refresh(model, 2, filter="*", progress=False)) == ["0.weight", "1.weight"]
    with pytest.raises(
        ValueError, match=r"no matrix in 1\.weight_scale_inv .*: 0\.weight \(8x24, "
    ):
        refresh(model, 2, filter=["1.weight", "1.weight_scale_inv"], progress=False)


def test_a_matrix_that_is_dequantized_is_counted():
    model, _ = quantized_model(scaled)
    for taken in select(model, 4, None, operator="refresh", quantized=True):
        assert kind_of(taken, None, None, None).copied_bytes == 64 * 32 * 4
        assert kind_of(taken, None, torch.float64, None).copied_bytes == 64 * 32 * (8 + 4)


class Experts(nn.Module):
    """A batch of quantized matrices."""

    def __init__(self, count: int, m: int, n: int) -> None:
        super().__init__()
        W = torch.stack([linear(m, n, i).weight.detach() for i in range(count)])
        self.up = nn.Parameter(Scaled.of(W), requires_grad=False)


def test_experts_are_read_one_at_a_time_within_the_bound(monkeypatch):
    model = Experts(5, 24, 16)
    exact = model.up.codes.double() * model.up.scale.double()
    (taken,) = select(model, 4, "up", operator="refresh", quantized=True)
    kind = kind_of(taken, None, torch.float64, None)
    assert kind.copied_bytes == 24 * 16 * (8 + 4), "as it is read, and as it is decomposed"
    reads = []
    read = Scaled.dequantize
    monkeypatch.setattr(Scaled, "dequantize", lambda W: reads.append(W.shape) or read(W))
    calls = Recorder(monkeypatch)
    bound = 1 << 20
    found = refreshed(model, 4, filter="up", max_workspace_bytes=bound)
    assert set(reads) == {(24, 16)}
    assert len(reads) == 10, "to look for NaN, and to decompose"
    assert [tuple(call["A"].shape) for call in calls.calls] == [(5, 24, 16)]
    assert relative(found["up"].S, torch.linalg.svdvals(exact)[:, :4]) <= 1e-6
    # As many at once as the bound allows, of what is copied too.
    small = kind.held_bytes * 2
    parts = list(itertools.chain(*_batches(taken, kind, small)))
    assert [part.count for part in parts] == [2, 2, 1]


def _batches(taken, kind, limit_bytes):
    from osf_torch.batching import shared_out
    from osf_torch.sharing import Ranks

    (share,) = shared_out([taken], [kind], limit_bytes, Ranks.of([], None))
    return [batch.parts for batch in share]


def test_experts_of_float8_with_a_scale_each():
    layers = [Float8Linear(linear(20, 24, i).weight, 8) for i in range(3)]
    model = nn.Module()
    model.block_size = (8, 8)
    model.up = nn.Parameter(
        torch.stack([layer.weight.detach().view(torch.int8) for layer in layers]).view(
            torch.float8_e4m3fn
        ),
        requires_grad=False,
    )
    scales = torch.stack([layer.weight_scale_inv.detach() for layer in layers])
    model.up_scale_inv = nn.Parameter(scales, requires_grad=False)
    found = refreshed(model, 4)
    exact = torch.stack([exact_float8(layer) for layer in layers])
    assert list(found) == ["up"]
    assert relative(found["up"].S, torch.linalg.svdvals(exact)[:, :4]) <= 1e-6
    with pytest.raises(TypeError, match=r"a linear layer around .*load it dequantized"):
        confine(model, found, update="beside")


def test_transformers_float8_layers_in_training(monkeypatch):
    """Its own class, its gradient by its own dequantisation; the kernel alone is written out."""
    peer("transformers")
    fp8 = peer("transformers.integrations.finegrained_fp8")

    def product(x, weight, scale, size, bias, *_):
        return F.linear(x, fp8._dequantize_fp8_weight(weight, scale, size, x.dtype), bias)

    monkeypatch.setattr(fp8, "fp8_linear", product)
    layers, exact = [], {}
    for i, (m, n) in enumerate(((20, 64), (24, 20))):
        layer = fp8.FP8Linear(n, m, block_size=(12, 12))
        like = Float8Linear(linear(m, n, i).weight, 12)
        layer.weight.data, layer.weight_scale_inv.data = (
            like.weight.data,
            like.weight_scale_inv.data,
        )
        layers.append(layer)
        exact[f"{i}.weight"] = exact_float8(like)
    model = nn.Sequential(*layers)
    found = refreshed(model)
    assert list(found) == ["0.weight", "1.weight"]
    confined = confine(model, found, update="beside")
    train(
        model,
        batches(8, "quantized", width=64),
        adamw(confined.parameters()),
        lambda one, x: one(x).sin().square().mean(),
    )
    for place in confined.places:
        W = exact[place.name]
        U, V = columns(place.spec.left), columns(place.spec.right)
        change, top = U @ place.block.detach().double() @ V.mT, leading(W, found[place.name].rank)
        assert relative(W + change, W) > 1e-3
        assert relative(protected(W + change, top), protected(W, top)) <= MOVED
    with pytest.raises(RuntimeError, match=r"0\.weight_scale_inv .* scale, .*freeze it"):
        confined.verify()
    for layer in model:
        layer.weight_scale_inv.requires_grad_(False)
    confined.verify()


@pytest.mark.parametrize("turned", [True, False])
def test_experts_of_mxfp4_as_transformers_reads_them(turned, monkeypatch):
    """Also those releases that return what is stored as it lies, of square matrices too."""
    mxfp4 = peer("transformers.integrations.mxfp4")
    if not turned:
        convert = mxfp4.convert_moe_packed_tensors
        monkeypatch.setattr(mxfp4, "convert_moe_packed_tensors", lambda *t: convert(*t).mT)
    generator = generator_for("mxfp4")
    model = nn.Module()
    blocks = torch.randint(0, 256, (2, 64, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 128, (2, 64, 2), dtype=torch.uint8, generator=generator)
    model.up_blocks = nn.Parameter(blocks, requires_grad=False)
    model.up_scales = nn.Parameter(scales, requires_grad=False)
    found = refreshed(model, 5)
    assert list(found) == ["up_blocks"]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat([table, -table])
    values = torch.stack([table[(blocks % 16).long()], table[(blocks // 16).long()]], -1).flatten(
        -2
    )
    exact = (values * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2).mT
    assert found["up_blocks"].shape == tuple(exact.shape) == (2, 64, 64)
    U, S, V = (found["up_blocks"].factors()[part].double() for part in "USV")
    assert relative(S, torch.linalg.svdvals(exact)[:, :5]) <= 1e-6
    assert relative(exact @ V, U * S[:, None]) <= 1e-6
    with pytest.raises(
        TypeError, match=r"'up_blocks': .*experts of MXFP4, .*Mxfp4Config\(dequantize=True\)"
    ):
        confine(model, found, update="beside")


# --- what is refused ---


def test_what_would_write_to_them_is_refused_by_name():
    model, _ = quantized_model(scaled)
    found = refreshed(model)
    remedy = r'confine\(model, subspaces, update="beside"\)'
    with pytest.raises(TypeError, match=rf"protect: .*'0\.weight'.*tests's Scaled, .*{remedy}"):
        protect(model, found, restore=False, when="backward")
    with pytest.raises(TypeError, match=r"'0\.weight': .*tests's Scaled; .*update=\"beside\""):
        confine(model, found)
    with pytest.raises(TypeError, match=r"'0\.weight' to be a plain tensor .*dequantize it"):
        input_subspaces(model, batches(1, width=64), filter="0.*", progress=False)


def nan(model):
    model[2].weight.scale[3] = torch.nan


def of_another_shape(model):
    model[2].weight.codes = model[2].weight.codes[:5]
    model[2].weight.scale = model[2].weight.scale[:5]


def of_another_grid(model):
    model[2] = Float8Linear(linear(32, 64).weight, 8)
    model[2].block_size = (16, 16)


def grouped(model):
    model[2] = Float8Linear(linear(32, 64).weight, 8)
    model[2].n_groups = 2


def unknown(model):
    model[2] = nn.Linear(4, 4)
    model[2].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def not_quantized(model):
    model[2] = peer("bitsandbytes").nn.Linear4bit(32, 64)


def in_half_precision(model):
    model[2] = peer("bitsandbytes").nn.Linear8bitLt(32, 64, bias=False)


def not_in_8_bits(model):
    model[2] = peer("bitsandbytes").nn.Linear8bitLt(32, 64, has_fp16_weights=False)


def packed_anew(model):
    layer = peer("bitsandbytes").nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    model[2] = layer


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (nan, ValueError, r"'2\.weight' has 32 such entries"),
        (
            of_another_shape,
            TypeError,
            r"'2\.weight' to be dequantized to shape \(64, 32\) by tests's",
        ),
        (of_another_grid, TypeError, r"'2\.weight' .* blocks of 16 by 16 take \(2, 4\)"),
        (grouped, TypeError, r"'2\.weight' .* a grouped layer"),
        (unknown, TypeError, r"'2\.weight' .*got torch\.int8; .*bitsandbytes' Params4bit"),
        (not_quantized, TypeError, r"'2\.weight' .*Params4bit that isn't quantized yet; move"),
        (not_in_8_bits, TypeError, r"'2\.weight' .*Int8Params that isn't quantized yet; move"),
        (packed_anew, TypeError, r"'2\.weight' .*Params4bit that was packed anew"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cant_be_read_is_refused_by_name_before_any_is_decomposed(
    change, kind, message, monkeypatch
):
    model, _ = quantized_model(scaled)
    change(model)
    calls = Recorder(monkeypatch)
    with pytest.raises(kind, match=message):
        refresh(model, 2, filter="[02].weight", progress=False)
    assert calls.calls == []


def test_what_trains_in_half_precision_to_be_quantized_as_it_runs_is_plain():
    model, _ = quantized_model(scaled)
    in_half_precision(model)
    assert list(refresh(model, 2, progress=False)) == ["2.weight"]
    assert stored(model[2].weight, [(model[2], "weight")]) is None


def test_what_a_library_raises_is_told_with_the_name(monkeypatch):
    model, _ = quantized_model(scaled)

    def fails(W):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(Scaled, "dequantize", fails)
    with pytest.raises(TypeError, match=r"'0\.weight' .*NotImplementedError: no kernel; leave it"):
        refresh(model, 2, progress=False)


def test_a_layer_that_says_another_shape_is_refused():
    model, _ = quantized_model(scaled)
    found = refreshed(model)
    model[0].in_features = 7
    assert isinstance(model[0], ScaledLinear)
    with pytest.raises(TypeError, match=r"'0\.weight': expected a weight of shape \(32, 7\)"):
        confine(model, found, update="beside")


def of_scaled():
    return quantized_model(scaled)[0][2]


def of_packed():
    options = {"quant_type": "nf4", "quant_storage": torch.bfloat16}
    return peer("bitsandbytes").nn.Linear4bit(32, 64, bias=False, **options).to("cpu")


@pytest.mark.parametrize("layer", [of_scaled, of_packed], ids=named)
def test_sharded_ones_are_refused_by_name(layer):
    model, _ = quantized_model(scaled)
    found, model[2] = refreshed(model), layer()
    with one_rank():
        mesh, weight = init_device_mesh("cpu", (1,)), model[2].weight
        held = weight.data.as_subclass(torch.Tensor) if layer is of_packed else weight.detach()
        sharded = DTensor.from_local(held, mesh, run_check=False)
        model[2].weight = nn.Parameter(sharded, requires_grad=False)
        refused = "got a quantized weight that is sharded; refresh and confine"
        with pytest.raises(TypeError, match=rf"'2\.weight' to be dequantized, {refused}"):
            refresh(model, 2, filter="[02].*", progress=False)
        with pytest.raises(TypeError, match=rf"'2\.weight' to be dequantized, {refused}"):
            confine(model, found, update="beside")


# --- a model in 4 bits ---


def test_what_bitsandbytes_packs_anew_on_the_cpu_is_told_of():
    """In eval mode it rounds the scales of the weight itself, and doesn't take that back."""
    layer = peer("bitsandbytes").nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights anew on CPUs with AVX512-BF16 alone")
    model = nn.Sequential(layer)
    confined = confine(model, refreshed(model), update="beside")
    x = torch.randn(4, 64)
    model(x)
    confined.verify()
    model.eval()
    with torch.no_grad():
        model(x)
    state = confined.state_dict()
    with pytest.raises(TypeError, match=r"'0\.weight' .*rounds its scales: .*load the model anew"):
        confined.verify()
    assert model.state_dict().keys() >= {"0.weight", "0.weight_free"}, "which unpacks them"
    with pytest.raises(
        RuntimeError, match=r"'0\.weight' .*quantized weight is stored in; load the"
    ):
        confined.verify()
    with pytest.raises(ValueError, match=r"expected '0\.weight' to be the weight that was saved"):
        confined.load_state_dict(state)


@pytest.mark.slow
def test_a_model_that_transformers_loads_in_4_bits(tmp_path):
    peer("bitsandbytes")
    transformers = peer("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    model.requires_grad_(False)
    found = refreshed(model, 0.8, filter="*proj*")
    assert len(found) == 7
    assert list(found) == list(refresh(model, 0.8, progress=False))
    functional = peer("bitsandbytes.functional")
    exact = {
        name: functional.dequantize_4bit(p.data, p.quant_state).double()
        for name, p in model.named_parameters()
        if name in found
    }
    confined = confine(model, found, update="beside")
    model.train()
    ids = torch.randint(0, 64, (2, 12))
    losses = train(
        model,
        [ids] * 6,
        adamw(confined.parameters()),
        lambda one, batch: one(input_ids=batch, labels=batch).loss,
    )
    assert losses[-1] < losses[0]
    confined.verify()
    for place in confined.places:
        W = exact[place.name]
        U, V = columns(place.spec.left), columns(place.spec.right)
        change = U @ place.block.detach().double() @ V.mT
        top = leading(W, found[place.name].rank)
        assert relative(protected(W + change, top), protected(W, top)) <= MOVED
        assert change.norm() > 1e-3 * W.norm()
