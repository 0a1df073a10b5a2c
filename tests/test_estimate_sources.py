"""estimate: of quantized configs, of configs that nothing is built of, of checkpoints alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from osf_torch import confine, estimate, refresh
from osf_torch.__main__ import main
from osf_torch.headers import Checkpoint
from tests.small_experts import EXPERTS, experts_model
from tests.small_quantized import float8_experts, peer

TOKENS = 32
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def bytes_of(tensors):
    return sum(t.nbytes for t in tensors)


def llama(**options):
    transformers = peer("transformers")
    return transformers.LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "dtype": "float32",
        }
        | options
    )


# --- quantized configs ---


@pytest.mark.parametrize(
    ("said", "bytes_a_weight"),
    [
        # By hand, of 64 x 64: half a byte, 64 scales of a byte, one of float32 and an offset for
        # these, two tables; or a scale of float32 a row.
        (NF4, 2048 + 64 + 4 + 4 + 4 * (16 + 256)),
        (NF4 | {"bnb_4bit_use_double_quant": False}, 2048 + 4 * 64 + 4 * 16),
        (INT8, 4096 + 4 * 64),
    ],
)
def test_a_quantized_config_counts_what_is_held_and_trains_c_beside_it(said, bytes_a_weight):
    config = llama(quantization_config=said)
    found = estimate(config, 0.5, tokens=TOKENS)
    plain = estimate(llama(), 0.5, tokens=TOKENS)
    assert list(found.methods) == ["plain", "beside"]
    square = estimate(config, 0.5, tokens=TOKENS, filter="*.q_proj.weight")
    assert square.methods["beside"].weights == 2 * bytes_a_weight, "of two layers"
    beside, merged = found.methods["beside"], plain.methods["confine"]
    names = {tuple(w["shape"]) for w in found.weights}
    assert names == {(64, 64), (32, 64), (96, 64), (64, 96)}, "and not the head"
    assert beside.block == beside.gradient == merged.block - head_block(plain)
    assert found.methods["plain"].gradient == found.methods["plain"].state == 0
    assert found.others.gradient == 0
    assert "load" in found.notes[0]
    assert "C beside the weights is what trains" in str(found)
    assert "of the frozen model's bytes: beside" in str(found)
    dequantized = estimate(config, 0.5, tokens=TOKENS, weights=torch.float32)
    assert dequantized.methods == plain.methods
    named = estimate(config, 0.5, tokens=TOKENS, filter=["*.q_proj.weight", "lm_head.weight"])
    assert "protect" in named.methods, "of the head, which isn't quantized"
    assert any("quantized weights" in note for note in named.notes)


def head_block(found) -> int:
    """Bytes of C of the head, which isn't quantized."""
    (head,) = (w for w in found.weights if w["shape"] == [128, 64])
    return head["free"][0] * head["free"][1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_a_model_that_bitsandbytes_holds(bits, tmp_path):
    peer("bitsandbytes")
    transformers = peer("transformers")
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path)
    said = (
        transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        if bits == 4
        else transformers.BitsAndBytesConfig(load_in_8bit=True)
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=said, device_map={"": "cpu"}, dtype=torch.float32
    ).requires_grad_(False)
    there = estimate(model, 0.5, tokens=TOKENS)
    config = llama(quantization_config=NF4 if bits == 4 else INT8)
    before = estimate(config, 0.5, tokens=TOKENS)
    assert before.bases == there.bases
    for name in ("plain", "beside"):
        ours, theirs = before.methods[name], there.methods[name]
        assert ours.weights == theirs.weights
        assert (ours.block, ours.bases, ours.references) == (
            theirs.block,
            theirs.bases,
            theirs.references,
        )
    found = refresh(model, 0.5, progress=False)
    places = confine(model, found, update="beside").places
    trained = [t for place in places for t in place.trained()]
    assert before.methods["beside"].block == bytes_of(trained)
    assert before.bases == found.nbytes


def test_experts_of_float8_are_counted_as_they_are_held():
    model, plain, exact = float8_experts("eager")
    config = plain.config
    config.quantization_config = {
        "quant_method": "fp8",
        "weight_block_size": [8, 8],
        "modules_to_not_convert": [".*self_attn", "lm_head"],
    }
    config.dtype = torch.float32
    found = estimate(config, 0.5, tokens=TOKENS)
    there = estimate(model, 0.5, tokens=TOKENS, filter="*experts*_proj")
    subspaces = refresh(model, 0.5, progress=False)
    held = [
        p
        for name, p in model.named_parameters()
        if name in exact or name.removesuffix("_scale_inv") in exact
    ]
    places = confine(model, subspaces, update="beside").places
    for one in (found, there):
        beside = one.methods["beside"]
        assert beside.weights == bytes_of(held)
        assert beside.block == bytes_of(t for place in places for t in place.trained())
        assert one.bases == subspaces.nbytes
        bases = [t for p in places for side in (p.spec.left, p.spec.right) for t in side.tensors]
        assert beside.bases == bytes_of(bases)
    assert {w["quantized"] for w in found.weights} == {"float8 with scales"}
    model, _, _ = float8_experts("eager")
    empty = {"filter": "*experts*_proj", "tokens": TOKENS}
    with pytest.raises(ValueError, match=r"gate_up_proj' of torch\.float8_e4m3fn on meta; pass"):
        estimate(model.to("meta"), 0.5, **empty)
    estimate(model, 0.5, weights=torch.bfloat16, **empty)


def test_experts_of_mxfp4_are_held_packed_and_refused_with_the_remedy():
    config = experts_model("gpt_oss").config
    config.quantization_config = {"quant_method": "mxfp4"}
    found = estimate(config, 0.5, tokens=TOKENS)
    config.quantization_config = None
    plain = estimate(config, 0.5, tokens=TOKENS, filter="*self_attn*")
    experts = 2 * EXPERTS * 16 * 24 * 3
    assert found.methods == estimate(config, 0.5, tokens=TOKENS, filter=NOT_EXPERTS).methods
    saved = 4 * experts - (experts // 2 + experts // 32)
    assert plain.others.weights - found.others.weights >= saved
    config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(ValueError, match=r"gate_up_proj' of experts of MXFP4, .*by weights="):
        estimate(config, 0.5, tokens=TOKENS, filter="*gate_up_proj")
    whole = estimate(config, 0.5, tokens=TOKENS, weights=torch.bfloat16)
    assert [EXPERTS, 16, 48] in [w["shape"] for w in whole.weights]


def NOT_EXPERTS(name: str, parameter: nn.Parameter) -> bool:
    matrices = ("self_attn", "router", "lm_head")
    return parameter.dim() == 2 and name.endswith("weight") and any(m in name for m in matrices)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_unknown_quantization_is_refused(method):
    config = llama(quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=rf"got quant_method='{method}'; pass weights= "):
        estimate(config, 0.5, tokens=TOKENS)
    assert estimate(config, 0.5, tokens=TOKENS, weights=torch.bfloat16).methods["protect"]


# --- configs of which nothing is built ---


def test_a_config_that_transformers_fails_on_says_so_and_what_to_pass(tmp_path, capsys):
    transformers = peer("transformers")
    config = transformers.LlamaConfig()
    config.hidden_act = "no such activation"
    with pytest.raises(
        ValueError,
        match=r"transformers [\d.]+ builds a model of .*, got a LlamaConfig of which it says "
        r"KeyError: .*; pass the checkpoint instead",
    ):
        estimate(config, 0.5, tokens=TOKENS)
    config.save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path), "--rho", ".5", "--tokens", "4"]) == 2
    assert "pass the checkpoint instead" in capsys.readouterr().err


# --- checkpoints alone ---


@pytest.fixture
def saved(tmp_path):
    """Two layers in several files, without a config."""
    pytest.importorskip("safetensors", reason="transformers saves by it")
    transformers = peer("transformers")
    model = transformers.LlamaForCausalLM(llama())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "config.json").unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_a_checkpoint_alone_is_a_model(saved, capsys):
    whole = estimate(llama(), 0.5, tokens=TOKENS, rank=4)
    index = next(saved.glob("*.index.json"))
    for given in (saved, str(index)):
        found = estimate(given, 0.5, tokens=TOKENS, rank=4)
        assert found.model == Checkpoint.__name__
        assert found.methods == whole.methods
        assert (found.bases, found.others) == (whole.bases, whole.others)
        assert any("told by names and shapes" in note for note in found.notes)
    assert main(["estimate", str(index), "--rho", ".5", "--tokens", "32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["methods"]["confine"]["bytes"] == whole.as_dict()["methods"]["confine"]["bytes"]


def write(path, tensors):
    """A file of safetensors by hand: a length, a header, and bytes that nobody reads."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_one_file_says_what_its_parameters_are(tmp_path):
    file = write(
        tmp_path / "model.safetensors",
        {
            "wte.weight": ("BF16", [40, 16]),
            "h.0.proj.bias": ("BF16", [24]),
            "h.0.proj.weight": ("BF16", [24, 16]),
            "h.0.conv.weight": ("BF16", [16, 1, 4]),
            "h.0.mlp.experts.gate_up_proj": ("BF16", [3, 16, 32]),
            "h.0.mlp.experts.gate_up_proj_bias": ("BF16", [3, 32]),
            "h.0.norm.weight": ("F32", [16]),
            "position_ids": ("I64", [1, 8]),
        },
    )
    found = estimate(file, 0.5, tokens=TOKENS)
    assert [w["shape"] for w in found.weights] == [[24, 16], [3, 16, 32]]
    others = 2 * (40 * 16 + 24 + 16 * 4 + 3 * 32) + 4 * 16
    assert found.others.gradient == others
    assert found.others.weights == others + 8 * 8


def test_a_checkpoint_of_float8_is_counted_as_it_is_and_dequantized(tmp_path):
    file = write(
        tmp_path / "model.safetensors",
        {
            "a.weight": ("F8_E4M3", [32, 16]),
            "a.weight_scale_inv": ("F32", [4, 2]),
            "experts.up_blocks": ("U8", [2, 48, 1, 16]),
            "experts.up_scales": ("U8", [2, 48, 1]),
        },
    )
    found = estimate(file, 0.5, tokens=TOKENS)
    assert [w["shape"] for w in found.weights] == [[32, 16]]
    assert found.methods["beside"].weights == 32 * 16 + 4 * 8
    with pytest.raises(ValueError, match=r"'experts\.up_blocks' of experts of MXFP4"):
        estimate(file, 0.5, tokens=TOKENS, filter="*_blocks")
    whole = estimate(file, 0.5, tokens=TOKENS, weights=torch.bfloat16)
    assert [w["shape"] for w in whole.weights] == [[32, 16], [2, 32, 48]]
    assert whole.methods["plain"].weights == 2 * (32 * 16 + 2 * 32 * 48)
    assert whole.others.weights == 0


def truncated(path):
    file = write(path / "model.safetensors", {"a.weight": ("F32", [8, 8])})
    file.write_bytes(file.read_bytes()[:30])
    return file


def no_header(path):
    file = path / "model.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{not json at all" + b"12")
    return file


def unknown_dtype(path):
    return write(path / "model.safetensors", {"a.weight": ("F4", [8, 8])})


def codes(path):
    return write(path / "model.safetensors", {"a.weight": ("U8", [32, 1])})


def adapter(path):
    (path / "adapter_config.json").write_text("{}")
    write(path / "adapter_model.safetensors", {"a.lora_A.weight": ("F32", [8, 8])})
    return path


def index_of_nothing(path):
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "one.safetensors"}}))
    return index


def index_of_another(path):
    write(path / "one.safetensors", {"b.weight": ("F32", [8, 8])})
    return index_of_nothing(path)


def no_index(path):
    index = path / "model.safetensors.index.json"
    index.write_text("[]")
    return index


def nested(path):
    tensors = {"a.b": ("F32", [8, 8]), "a.b.weight": ("F32", [8, 8])}
    return write(path / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, "ends within its header; load the file anew"),
        (no_header, "to be a file of safetensors, got JSONDecodeError"),
        (unknown_dtype, "got tensors of F4, which isn't known"),
        (codes, r"got 'a\.weight' of torch\.uint8 .*pass the folder with its config\.json"),
        (adapter, "an adapter's folder; pass the folder of the model that it adapts"),
        (index_of_nothing, r"one\.safetensors' to be a file of safetensors, got FileNotFound"),
        (index_of_another, r"'one\.safetensors' to hold 'a\.weight'"),
        (no_index, "to be an index of safetensors, got TypeError"),
        (nested, r"a tensor 'a\.b' and 'a\.b\.weight' under that name"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_checkpoint_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^osf_torch\.estimate: .*{message}"):
        estimate(make(tmp_path), 0.5, tokens=TOKENS)


def test_a_folder_of_neither_says_what_to_pass(tmp_path):
    peer("transformers")
    with pytest.raises(ValueError, match="a folder without one; pass a folder with config"):
        estimate(tmp_path, 0.5, tokens=TOKENS)
