"""Experts that are quantized: trained beside, by the forward pass of their own module."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from osf_torch import Confined, confine, load_subspaces, refresh, save_subspaces
from osf_torch.free import formed
from tests.helpers import generator_for
from tests.small_confine import adamw, columns, gradients_by, relative, train
from tests.small_experts import WAYS, ids
from tests.small_quantized import Scaled, exact_int8, float8_experts, peer
from tests.small_refresh import linear

MOVED = 1e-5  # what is protected, by a decomposition in float64
KERNEL = 2e-6  # products of float32 through two layers
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def refreshed(model, ranks=0.5, **options):
    return refresh(model, ranks, progress=False, compute_dtype=torch.float64, **options)


def confined_experts(way="eager", rank=None, **options):
    """A model with its experts confined, the plain one of float64, and what is protected."""
    model, plain, exact = float8_experts(way)
    found = refreshed(model, **options)
    return model, plain, exact, found, confine(model, found, update="beside", rank=rank)


def codes_of(model) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().view(torch.uint8).clone()
        for name, p in model.named_parameters()
        if p.element_size() == 1
    }


def change_of(place) -> torch.Tensor:
    """U_l C V_lᵀ in float64."""
    U, V = columns(place.spec.left), columns(place.spec.right)
    return U @ place.block.detach().double() @ V.mT


def current(confined, exact) -> dict[str, torch.Tensor]:
    return {p.name: exact[p.name] + change_of(p) for p in confined.places}


def loss_of(model, batch):
    return model(batch).logits.sin().square().mean()


def moved(confined, scale=0.3):
    """C as after some training."""
    generator = generator_for("moved")
    with torch.no_grad():
        for t in confined.parameters():
            t.add_(scale * torch.randn(t.shape, generator=generator))


def set_plain(plain, weights):
    for name, W in weights.items():
        plain.get_parameter(name).data.copy_(W)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_experts_of_float8_train_beside_what_they_stand_for(way, rank):
    model, plain, exact, found, confined = confined_experts(way, rank)
    assert list(found) == list(exact), "gate and up, and down, of both layers"
    batch, codes = ids("float8", way), codes_of(model)
    assert relative(model(batch).logits, plain(batch).logits) <= KERNEL
    losses = train(model, [batch] * 12, adamw(confined.parameters()), loss_of)
    assert losses[-1] < losses[0]
    weights = current(confined, exact)
    set_plain(plain, weights)
    assert relative(model(batch).logits, plain(batch).logits) <= KERNEL
    for place in confined.places:
        W, r = exact[place.name], found[place.name].rank
        U, _, Vh = torch.linalg.svd(W)
        left = torch.eye(U.shape[-1]) - U[..., :r] @ U[..., :r].mT
        right = torch.eye(Vh.shape[-1]) - Vh[:, :r].mT @ Vh[:, :r]
        change = weights[place.name] - W
        assert relative(weights[place.name], W) > 1e-2, "it has trained"
        assert (change - left @ change @ right).norm() <= MOVED * W.norm()
    assert all(torch.equal(t, codes[name]) for name, t in codes_of(model).items())
    assert max(confined.drift().values()) <= MOVED
    assert set(confined.base_moved().values()) == {0.0}
    confined.verify()
    assert confined.coverage().share == 1.0
    assert confined.coverage().covered == sum(W.numel() for W in exact.values())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_weight_in_the_free_block(way, rank):
    model, plain, exact, _, confined = confined_experts(way, rank)
    moved(confined)
    set_plain(plain, current(confined, exact))
    batch = ids("gradient", way)
    loss_of(model, batch).backward()
    weights = {place.name: plain.get_parameter(place.name) for place in confined.places}
    for p in weights.values():
        p.requires_grad_(True)
    loss_of(plain, batch).backward()
    for place in confined.places:
        wanted = gradients_by(place, weights[place.name].grad)
        for t, g in zip(place.trained(), wanted, strict=True):
            assert relative(t.grad, g) <= 2e-5, place.name
    assert all(p.grad is None for n, p in model.named_parameters() if "_free" not in n)


@pytest.mark.parametrize("way", WAYS)
def test_experts_that_are_confined_in_part_read_the_others_as_what_they_stand_for(way):
    model, plain, exact, found, confined = confined_experts(way, filter="*.1.*down_proj")
    assert list(found) == ["model.layers.1.mlp.experts.down_proj"]
    moved(confined)
    set_plain(plain, current(confined, exact))
    inner = torch.randn(8, 16, generator=generator_for("inner"))
    experts = "model.layers.1.mlp.experts"
    chosen = torch.randint(0, 4, (8, 2), generator=generator_for("chosen"))
    weights = torch.rand(8, 2, generator=generator_for("weights"))
    wanted = plain.get_submodule(experts)(inner.double(), chosen, weights.double())
    module = model.get_submodule(experts)
    y = module(inner, chosen, weights)
    assert relative(y, wanted) <= KERNEL
    assert module.gate_up_proj.dtype == torch.float8_e4m3fn, "outside of a call it is as stored"
    read = module.down_proj
    assert relative(read, current(confined, exact)[f"{experts}.down_proj"]) <= 1e-6
    read.sum().backward()
    (C,) = confined.parameters()
    U, V = columns(confined.places[0].spec.left), columns(confined.places[0].spec.right)
    assert relative(C.grad, (U.sum(-2)[..., :, None] * V.sum(-2)[..., None, :])) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", ["eager", "batched_mm"])
def test_half_precision_multiplies_by_the_sum_rounded_once(way, autocast, monkeypatch):
    model, plain, exact, _, confined = confined_experts(way)
    moved(confined)
    set_plain(plain, current(confined, exact))
    if not autocast:
        for name, p in model.named_parameters():
            if p.dtype == torch.float32 and "_free" not in name and "scale" not in name:
                p.data = p.data.bfloat16()
    dtypes, read = [], formed.read
    monkeypatch.setattr(formed, "read", lambda place: dtypes.append(read(place)) or dtypes[-1])
    batch = ids("half", way)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, batch)
    loss.backward()
    assert {t.dtype for t in dtypes} == {torch.bfloat16}
    first = confined.places[0]
    assert torch.equal(dtypes[0], current(confined, exact)[first.name].float().bfloat16())
    assert relative(loss, loss_of(plain, batch)) <= 0.05
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in confined.parameters())


# --- what a backward pass keeps ---


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_no_weight_outlives_the_forward_pass_of_its_module(way, monkeypatch):
    model, _, _, _, _ = confined_experts(way)
    made, asked = [], []
    matrices = formed._Source.matrices

    def counted(source, first, count):
        found = matrices(source, first, count)
        made.append(weakref.ref(found.untyped_storage()))
        asked.append((source.name.split(".", 2)[2], first, count))
        return found

    monkeypatch.setattr(formed._Source, "matrices", counted)
    loss = loss_of(model, ids("kept", way))
    gc.collect()
    ways = {f"{i}.mlp.experts.{p}_proj" for i in (0, 1) for p in ("gate_up", "down")}
    assert sorted(asked) == sorted((name, 0, 4) for name in ways), "each once"
    assert not [one for one in made if one() is not None]
    made.clear(), asked.clear()
    loss.backward()
    first = "0.mlp.experts.gate_up_proj"  # whose inputs need no gradient: nothing asks for it
    assert {name for name, _, _ in asked} == ways - {first}
    counts = {count for _, _, count in asked}
    assert counts == ({1} if way == "eager" else {4}), "one expert after the other, or all"
    gc.collect()
    assert not [one for one in made if one() is not None]


def test_a_step_between_forward_and_backward_is_refused():
    model, _, _, _, confined = confined_experts()
    loss = loss_of(model, ids("between"))
    moved(confined)
    with pytest.raises(RuntimeError, match=r"free block of 'model\.layers\.1.* that was written"):
        loss.backward()


class PlainExperts(nn.Module):
    """Experts whose weight is a tensor subclass, with one product for all of them."""

    def __init__(self, packed=Scaled.of, m: int = 20, n: int = 24) -> None:
        super().__init__()
        W = torch.stack([linear(m, n, i).weight.detach() for i in range(3)])
        self.up = nn.Parameter(packed(W), requires_grad=False)

    def forward(self, x):
        return torch.einsum("td,emd->tem", x, self.up).sigmoid()


def subclass_experts():
    model = nn.Sequential(PlainExperts())
    up = model[0].up
    return model, exact_int8(up.codes, up.scale)


def torchao_experts(kind):
    """In formats that torchao has tensors of a batch for, and what its own operators read."""
    quantization = peer("torchao.quantization")
    mx = peer("torchao.prototype.mx_formats.mx_tensor").MXTensor
    packed = {
        "mxfp4": lambda W: mx.to_mx(W, torch.float4_e2m1fn_x2, 32),
        "mxfp8": lambda W: mx.to_mx(W, torch.float8_e4m3fn, 32),
        "float8": lambda W: quantization.Float8Tensor.from_hp(W.bfloat16()),
        "int8": lambda W: quantization.Int8Tensor.from_hp(W, quantization.PerRow()),
    }
    model = nn.Sequential(PlainExperts(packed[kind], 64, 32))
    return model, model[0].up.dequantize().double()


def test_what_autograd_keeps_may_not_be_written_to():
    model, _ = subclass_experts()
    confine(model, refreshed(model), update="beside")
    y = model(torch.randn(5, 24, generator=generator_for("x")))
    y.mul_(2)
    with pytest.raises(RuntimeError, match=r"shape \(5, 3, 20\) that was written to in place"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_checkpoints_keep_nothing_and_find_the_same_gradient(way, reentrant):
    model, _, _, _, confined = confined_experts(way)
    moved(confined)
    batch = ids("checkpoint", way)
    loss_of(model, batch).backward()
    wanted = [t.grad.clone() for t in confined.parameters()]
    confined.parameters()[0].grad.zero_()
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(model, batch).backward()
    for t, g in zip(confined.parameters(), wanted, strict=True):
        assert relative(t.grad, g) <= 1e-6


def test_a_checkpoint_within_is_left_to_itself():
    model, _ = subclass_experts()
    confined = confine(model, refreshed(model), update="beside")
    moved(confined)
    x = torch.randn(5, 24, generator=generator_for("x"))
    model(x).square().sum().backward()
    (C,) = confined.parameters()
    wanted = C.grad.clone()
    C.grad = None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert relative(C.grad, wanted) <= 1e-6


# --- other ways to call it ---


@pytest.mark.parametrize("kind", ["stand-in", "mxfp4", "mxfp8", "float8", "int8"])
def test_tensor_subclasses_are_read_as_what_they_stand_for(kind):
    model, W = subclass_experts() if kind == "stand-in" else torchao_experts(kind)
    found = refreshed(model)
    assert list(found) == ["0.up"]
    confined = confine(model, found, update="beside")
    moved(confined)
    (place,) = confined.places
    exact = (W + change_of(place)).requires_grad_()
    x = torch.randn(5, W.shape[-1], generator=generator_for("x"))
    y, wanted = model(x), torch.einsum("td,emd->tem", x.double(), exact).sigmoid()
    assert relative(y, wanted) <= 1e-6
    y.square().sum().backward()
    wanted.square().sum().backward()
    U, V = columns(place.spec.left), columns(place.spec.right)
    assert relative(place.trained()[0].grad, U.mT @ exact.grad @ V) <= 1e-6
    confined.verify()


def test_derivatives_of_derivatives_by_functional_call_and_refused_without():
    model, _, _, _, confined = confined_experts()
    moved(confined)
    batch = ids("twice")
    names = [n for n, _ in model.named_parameters() if "_free" in n]
    held = {n: p.detach() * 1 for n, p in model.named_parameters() if n in names}

    def of(blocks):
        return functional_call(model, blocks, (batch,)).logits.sin().square().mean()

    found = torch.func.grad(of)(held)
    loss_of(model, batch).backward()
    for name, p in model.named_parameters():
        if name in names:
            assert relative(found[name], p.grad) <= 1e-5
    C = confined.parameters()[0]
    (g,) = torch.autograd.grad(loss_of(model, batch), C, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative through a confined layer"):
        g.square().sum().backward()


# Of dynamo, where a graph is broken.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_copies_compiled_models_and_other_threads():
    model, _, _, _, confined = confined_experts()
    moved(confined)
    batch = ids("copies")
    wanted = model(batch).logits.detach()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(batch).logits, wanted)
    moved(Confined.of(copied))
    assert not torch.equal(copied(batch).logits, wanted)
    assert torch.equal(model(batch).logits, wanted), "C of the copy is its own"
    found = []

    def reads():
        with torch.no_grad():
            found.append(model(batch).logits)

    threads = [threading.Thread(target=reads) for _ in range(2)]
    for thread in threads:
        thread.start()
    loss_of(model, batch).backward()
    for thread in threads:
        thread.join()
    assert all(relative(y, wanted) <= KERNEL for y in found)
    assert len(found) == 2
    compiled = torch.compile(model, backend="eager")
    assert relative(compiled(batch).logits, wanted) <= KERNEL


# --- states ---


def test_states_are_resumed_beside_the_same_codes_and_refused_beside_others(tmp_path):
    model, _, exact, found, confined = confined_experts()
    batch = ids("states")
    optimizer = adamw(confined.parameters())
    train(model, [batch] * 4, optimizer, loss_of)
    file = io.BytesIO()
    torch.save([confined.state_dict(), optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    state, moments, weights = torch.load(file, weights_only=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert weights[name].dtype == torch.float8_e4m3fn
    assert {f"{name}_free", f"{name}_scale_inv"} <= weights.keys()
    again, _, _ = float8_experts("eager")
    resumed = confine(again, state)
    assert torch.equal(again(batch).logits, model(batch).logits)
    assert resumed.drift() == confined.drift()
    second = adamw(resumed.parameters())
    second.load_state_dict(moments)
    assert train(again, [batch] * 3, second, loss_of) == train(
        model, [batch] * 3, optimizer, loss_of
    )
    resumed.load_state_dict(state)
    again.load_state_dict(weights)
    resumed.verify()
    save_subspaces(tmp_path / "s", found, float8_experts("eager")[0])
    loaded = load_subspaces(tmp_path / "s", float8_experts("eager")[0])
    assert list(loaded) == list(exact)
    other, _, _ = float8_experts("eager")
    other.get_parameter(f"{name}_scale_inv").data.mul_(1.01)
    with pytest.raises(ValueError, match=rf"expected '{name}' to be the weight that was saved"):
        confine(other, state)
    with pytest.raises(RuntimeError, match=r"that can be written to, got quantized ones"):
        confined.release()
    with pytest.raises(RuntimeError, match=r'next_task: expected update="merge", got "beside"'):
        confined.next_task()
    codes = dict(model.named_parameters())[name].data.view(torch.uint8)
    codes[0] ^= 64
    with pytest.raises(RuntimeError, match=rf"protected of '{name}' .*something has written"):
        confined.verify()


# --- what is refused ---


class OwnExperts(nn.Module):
    """Float8 with scales beside it, in a module that multiplies by both in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, 16, 16).to(torch.float8_e4m3fn), requires_grad=False)
        self.up_scale_inv = nn.Parameter(torch.ones(2, 1, 1), requires_grad=False)


def test_experts_that_dont_run_with_plain_weights_are_refused_with_the_remedy():
    model = OwnExperts()
    with pytest.raises(
        TypeError,
        match=r"'up': expected a linear layer .*, or experts .* FineGrainedFP8Config\(deq",
    ):
        confine(model, refreshed(model, 2), update="beside")


def test_weights_that_gpt_oss_holds_in_no_parameter_are_told_of_with_the_remedy(caplog):
    """As transformers leaves Mxfp4GptOssExperts after loading, packed for its kernels."""
    experts = peer("transformers.integrations.mxfp4").Mxfp4GptOssExperts
    config = peer("transformers").GptOssConfig(
        hidden_size=32, intermediate_size=32, num_local_experts=2
    )
    model = nn.Module()
    model.experts, model.head = experts(config), nn.Linear(12, 8)
    for name in ("gate_up_proj", "down_proj"):
        del model.experts._parameters[name]
        setattr(model.experts, name, object())
    found = refreshed(model)
    assert list(found) == ["head.weight"]
    told = [r.getMessage() for r in caplog.records if "Mxfp4GptOssExperts" in r.getMessage()]
    assert len(told) == 1
    assert "experts.gate_up_proj, experts.down_proj" in told[0]
    assert "Mxfp4Config(dequantize=True)" in told[0]
    with pytest.raises(ValueError, match=r"'experts\.down_proj'; .*Mxfp4Config\(dequantize=True\)"):
        confine(model, {"experts.down_proj": found["head.weight"]})
