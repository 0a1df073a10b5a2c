"""integrations.lora: adapter files of confined models, against PEFT's own reading of them."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from osf_kernels.testing import random_basis
from osf_torch import Subspace, confine
from osf_torch.integrations import lora
from tests.helpers import generator_for, randn
from tests.small_guard import one_rank

M, N, RANK = 14, 18, 3
NAMES = ("encoder.0", "encoder.2", "head")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N))
        self.head = nn.Linear(N, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Net()
    gen = generator_for("net")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("weight"))
    return model.to(dtype)


def subspaces(model: nn.Module, names=NAMES) -> dict[str, Subspace]:
    found = {}
    for name in names:
        W = model.get_submodule(name).weight
        m, n = W.shape
        dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
        U = random_basis(m, 2, dtype=dtype, generator=generator_for(name, "U"))
        V = random_basis(n, n // 2, dtype=dtype, generator=generator_for(name, "V"))
        found[f"{name}.weight"] = Subspace(U, V)
    return found


def moved(model: nn.Module, **options):
    """The model, confined, with factors away from where they start."""
    confined = confine(model, subspaces(model), **({"rank": RANK} | options))
    with torch.no_grad():
        for i, t in enumerate(confined.parameters()):
            t.add_(0.3 * randn(*t.shape, dtype=t.dtype, generator=generator_for("moved", i)))
    return confined


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(8, N, dtype=dtype, generator=generator_for("data"))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().double().norm() / expected.detach().double().norm())


def saved(tmp_path, **config):
    """A moved model, its confined weights and the folder of its adapter, of another config."""
    model = net()
    confined = moved(model)
    lora.save_adapter(confined, tmp_path)
    edit(tmp_path, **config)
    return model, confined, tmp_path


def edit(folder, **config) -> None:
    path = folder / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / lora.TENSORS)
    change(tensors)
    save_file(tensors, folder / lora.TENSORS)


# --- the files ---


def test_an_adapter_holds_the_factors_in_the_weights_own_space(tmp_path):
    model = net()
    start = {n: t.clone() for n, t in model.state_dict().items()}
    confined = moved(model)
    lora.save_adapter(confined, tmp_path / "made" / "here", base_model="me/it", task_type="TASK")
    folder = tmp_path / "made" / "here"
    assert sorted(path.name for path in folder.iterdir()) == [lora.CONFIG, lora.TENSORS]
    config = json.loads((folder / lora.CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == RANK
    assert config["target_modules"] == list(NAMES)
    assert config["base_model_name_or_path"] == "me/it"
    assert config["task_type"] == "TASK"
    assert config["fan_in_fan_out"] is False
    tensors = load_file(folder / lora.TENSORS)
    assert len(tensors) == 2 * len(NAMES)
    state = model.state_dict()
    for name in NAMES:
        A = tensors[f"base_model.model.{name}.lora_A.weight"]
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        weight = f"{name}.weight"
        m, n = state[weight].shape
        assert A.shape == (RANK, n)
        assert B.shape == (m, RANK)
        assert off(start[weight] + B @ A, state[weight]) < 1e-6
        protected = subspaces(net())[weight]
        assert float((protected.U.columns.mT @ B).norm() / B.norm()) < 1e-6
        assert float((A @ protected.V.columns).norm() / A.norm()) < 1e-6


def test_an_adapter_comes_back_as_it_was(tmp_path):
    model, confined, folder = saved(tmp_path)
    other = net()
    again = confine(other, subspaces(other), rank=RANK)
    shares = lora.load_adapter(again, folder)
    assert set(shares) == {f"{name}.weight" for name in NAMES}
    assert max(shares.values()) < 1e-6
    for t, expected in zip(again.parameters(), confined.parameters(), strict=True):
        assert off(t, expected) < 1e-6
    assert off(other(data()), model(data())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_keep_their_dtype(tmp_path, dtype):
    model = net(dtype if dtype == torch.float64 else torch.float32)
    confined = moved(model, dtype=dtype)
    lora.save_adapter(confined, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / lora.TENSORS).values()} == {dtype}
    again = confine(net(), subspaces(net()), rank=RANK, dtype=dtype)
    shares = lora.load_adapter(again, tmp_path)
    assert max(shares.values()) < (1e-6 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("within", [RANK, RANK + 2])
def test_an_adapter_of_a_lower_rank_fills_the_first(tmp_path, within):
    model = net()
    lora.save_adapter(moved(model, rank=2), tmp_path)
    other = net()
    names = {f"{name}.weight" for name in NAMES[:2]}
    given = {n: s for n, s in subspaces(other).items() if n in names}
    if within > RANK:
        edit_tensors(tmp_path, lambda t: [t.pop(k) for k in list(t) if "head" in k])
    else:
        given = subspaces(other)
    again = confine(other, given, rank=within)
    drawn = [place.trained()[1].detach().clone() for place in again.places]
    lora.load_adapter(again, tmp_path)
    for place, A_drawn in zip(again.places, drawn, strict=True):
        B, A = place.trained()
        assert not B[:, 2:].any()
        assert torch.equal(A[2:], A_drawn[2:])
        W = model.state_dict()[place.name]
        assert off(other.state_dict()[place.name], W) < 1e-6


def test_a_weight_without_an_adapter_starts_at_zero_and_is_named(tmp_path, caplog):
    _, _, folder = saved(tmp_path)
    edit_tensors(folder, lambda t: [t.pop(k) for k in list(t) if "head" in k])
    other, start = net(), net()
    again = moved(other)
    with caplog.at_level(logging.INFO, "osf_torch"):
        shares = lora.load_adapter(again, folder)
    assert "nothing for head.weight" in caplog.text
    assert "head.weight" not in shares
    assert torch.equal(other.state_dict()["head.weight"], start.head.weight)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"alpha_pattern": {"encoder.0": 12}}, None),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"^encoder.*": 3, "head": 3}}, 2.0),
    ],
)
def test_scalings_are_those_of_the_config(tmp_path, config, scaling):
    model, _, folder = saved(tmp_path, **config)
    start, other = net(), net()
    lora.load_adapter(confine(other, subspaces(other), rank=RANK), folder)
    for name in NAMES:
        wanted = scaling or (4.0 if name == "encoder.0" else 1.0)
        W = start.get_submodule(name).weight
        weight = f"{name}.weight"
        delta = model.state_dict()[weight] - W
        assert off(other.state_dict()[weight] - W, wanted * delta) < 1e-5


# --- what lies outside ---


def outside(folder) -> dict[str, Tensor]:
    """Gives the adapter a part that isn't free, and returns the products that it has then."""

    def add(tensors: dict[str, Tensor]) -> None:
        for i, key in enumerate(sorted(tensors)):
            noise = randn(*tensors[key].shape, dtype=torch.float32, generator=generator_for(i))
            tensors[key] += 0.2 * noise

    edit_tensors(folder, add)
    tensors = load_file(folder / lora.TENSORS)
    return {
        name: tensors[f"base_model.model.{name}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{name}.lora_A.weight"].double()
        for name in NAMES
    }


def test_what_is_outside_is_an_error_and_nothing_is_changed(tmp_path):
    _, _, folder = saved(tmp_path)
    outside(folder)
    model = net()
    confined = moved(model)
    before = [t.detach().clone() for t in confined.parameters()]
    with pytest.raises(ValueError, match=r"outside of them 0\.\d+ of encoder.0.weight.*project=T"):
        lora.load_adapter(confined, folder)
    assert all(torch.equal(a, b) for a, b in zip(confined.parameters(), before, strict=True))


def test_what_is_outside_is_left_out_where_that_is_asked_for_and_told(tmp_path, caplog):
    _, _, folder = saved(tmp_path)
    products = outside(folder)
    model, start = net(), net()
    shares = lora.load_adapter(confine(model, subspaces(model), rank=RANK), folder, project=True)
    assert "left out what the adapter has outside" in caplog.text
    for name in NAMES:
        weight = f"{name}.weight"
        given = subspaces(start)[weight]
        U, V = (side.columns.double() for side in (given.U, given.V))
        D = products[name]
        free = D - U @ (U.mT @ D)
        free = free - free @ V @ V.mT
        assert shares[weight] == pytest.approx(float((D - free).norm() / D.norm()), rel=1e-5)
        assert off(model.state_dict()[weight], start.get_submodule(name).weight + free) < 1e-6


def test_parameters_trained_beside_are_named(tmp_path, caplog):
    model = net()
    model.head.bias.requires_grad_(True)
    lora.save_adapter(moved(model), tmp_path)
    assert "not head.bias, which are trained beside" in caplog.text


# --- what is refused ---


def test_all_of_C_has_no_factors(tmp_path):
    model = net()
    confined = confine(model, subspaces(model))
    for call in (lora.save_adapter, lora.load_adapter):
        with pytest.raises(ValueError, match=r"confined with a rank.*confine\(\.\.\., rank=s\)"):
            call(confined, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "OSF"}, "expected a LoRA adapter, got peft_type='OSF'"),
        ({"use_dora": True}, "expected a plain LoRA.* use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "of the model's own weights.*pissa_niter_4"),
        ({"r": 5}, "expected r to be the rank of lora_A"),
        ({"lora_alpha": None}, "lora_alpha a number"),
    ],
)
def test_other_adapters_are_refused(tmp_path, config, match):
    _, confined, folder = saved(tmp_path, **config)
    with pytest.raises(ValueError, match=match):
        lora.load_adapter(confined, folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head.lora_magnitude_vector": torch.ones(3)}, "of linear layers alone, got base_model"),
        ({"head.lora_A.weight": None}, "lora_B alone"),
        ({"head.lora_A.weight": torch.ones(RANK, 4)}, "another model's"),
        ({"head.lora_B.weight": torch.full((6, 3), torch.nan)}, "finite factors"),
        ({"head.lora_B.weight": torch.ones(6, 3, dtype=torch.int32)}, "floating factors"),
        (
            {"tail.lora_A.weight": torch.ones(3, 3), "tail.lora_B.weight": torch.ones(3, 3)},
            "confined weights alone, got tail.weight",
        ),
    ],
)
def test_other_tensors_are_refused(tmp_path, change, match):
    _, confined, folder = saved(tmp_path)

    def edited(tensors: dict[str, Tensor]) -> None:
        for name, t in change.items():
            tensors.pop(f"base_model.model.{name}", None)
            if t is not None:
                tensors[f"base_model.model.{name}"] = t

    edit_tensors(folder, edited)
    with pytest.raises(ValueError, match=match):
        lora.load_adapter(confined, folder)


def test_a_higher_rank_is_refused(tmp_path):
    _, _, folder = saved(tmp_path)
    confined = confine(net(), subspaces(net()), rank=2)
    with pytest.raises(ValueError, match=r"of rank 2 at most.*got 3; confine\(\.\.\., rank=3\)"):
        lora.load_adapter(confined, folder)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
    _, confined, folder = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match="got no adapter_config"):
        lora.load_adapter(confined, folder / "elsewhere")
    (folder / lora.TENSORS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="to be a safetensors file"):
        lora.load_adapter(confined, folder)
    (folder / lora.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="to be JSON"):
        lora.load_adapter(confined, folder)


def test_weights_that_peft_has_no_layer_for_are_refused(tmp_path):
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8))
    U, V = (random_basis(n, 3, generator=generator_for(n)) for n in (12, 8))
    confined = confine(model, {"0.weight": Subspace(U, V)}, rank=2)
    with pytest.raises(TypeError, match=r"got '0.weight' of Embedding"):
        lora.save_adapter(confined, tmp_path)


# --- PEFT's own reading ---


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


ENDS = {
    llama: ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    gpt2: ("c_attn", "c_proj", "c_fc"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's of theirs
@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_loads_what_was_saved(peft, tmp_path, make):
    base = make().eval()
    for p in base.parameters():
        p.requires_grad_(False)
    model = copy.deepcopy(base)
    names = [name for name, _ in model.named_modules() if name.endswith(ENDS[make])]
    confined = confine(model, subspaces(model, names), rank=RANK)
    optimizer = torch.optim.AdamW(confined.parameters(), lr=1e-2)
    tokens = torch.randint(32, (2, 12), generator=generator_for("tokens"))
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    lora.save_adapter(confined, tmp_path, task_type="CAUSAL_LM")
    expected = model(tokens).logits
    assert off(base(tokens).logits, expected) > 1e-3

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert type(theirs).__name__ == "PeftModelForCausalLM"
    assert off(theirs(tokens).logits, expected) < 1e-5
    layers = [n for n, m in theirs.get_base_model().named_modules() if hasattr(m, "lora_A")]
    assert layers == names

    theirs.save_pretrained(tmp_path / "theirs")
    other = copy.deepcopy(base)
    again = confine(other, subspaces(other, names), rank=RANK)
    lora.load_adapter(again, tmp_path / "theirs")
    assert off(other(tokens).logits, expected) < 1e-5
    confined.release()
    assert off(theirs.merge_and_unload()(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.slow
def test_peft_loads_an_adapter_whose_names_end_others(peft, tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(N, N)
            self.block = nn.ModuleDict({"proj": nn.Linear(N, N)})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["proj"](self.proj(x).tanh())

    model = Nested()
    base = copy.deepcopy(model)
    confined = confine(model, subspaces(model, ["proj"]), rank=RANK)
    with torch.no_grad():
        confined.parameters()[0].add_(0.1)
    lora.save_adapter(confined, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert off(theirs(data()), model(data())) < 1e-6
    assert not hasattr(theirs.get_base_model().block["proj"], "lora_A")


def test_sharded_factors_are_gathered(tmp_path):
    model, other = net(), net()
    confined, again = moved(model), confine(other, subspaces(other), rank=RANK)
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    with one_rank():
        for whole in (model, other):
            for name in NAMES:
                fully_shard(whole.get_submodule(name))
            fully_shard(whole)
        lora.save_adapter(confined, tmp_path)
        lora.load_adapter(again, tmp_path)
        for t, mine in zip(again.parameters(), confined.parameters(), strict=True):
            assert off(t.full_tensor(), mine.full_tensor()) < 1e-6
    plain = confine(net(), subspaces(net()), rank=RANK)
    lora.load_adapter(plain, tmp_path)
    for name, t in plain.model.state_dict().items():
        assert off(t, expected[name]) < 1e-6
