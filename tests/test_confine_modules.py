"""Modules that read a weight in other ways than a linear layer's call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from osf_torch import confine
from tests.small_confine import (
    Explicit,
    adamw,
    batches,
    drawn,
    filled,
    moved,
    relative,
    train,
    weights_of,
)

LIMIT = 3e-6
UPDATES = ["merge", "beside"]


def confined_like(model, names, update, spans="high", rho=0.5):
    """The model confined, its plain copy, and what is protected; matrices by (rows, all others)."""
    subspaces = {}
    for name in names:
        W = model.get_parameter(name)
        flat = W.flatten(1) if W.dim() > 3 or min(W.shape[1:]) == 1 else W
        subspaces[name] = drawn(*flat.shape[-2:], rho, "UV", spans)
    plain = copy.deepcopy(model)
    return confine(model, subspaces, update=update), plain, subspaces


def follows(model, plain, confined, subspaces, inputs, loss=None, steps=4):
    """Trains both, one of float64 written out; outputs and weights agree, and W stays protected."""
    loss = loss or (lambda one, x: one(x).sin().square().mean())
    explicit = Explicit(plain, confined)
    start = {name: t.double() for name, t in weights_of(plain).items()}
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    theirs = torch.optim.SGD([p for p in explicit.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        losses = train(model, [inputs], ours, loss), train(explicit, [inputs], theirs, loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    now = weights_of(model)
    for name, subspace in subspaces.items():
        assert relative(now[name], explicit.weight(name)) <= 1e-10
        assert moved(start[name], now[name], subspace) <= LIMIT
        assert relative(now[name], start[name]) > 1e-4, "it did train"
    plain.load_state_dict(now)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert loss(model.eval(), inputs).item() == pytest.approx(
                loss(plain.eval(), inputs).item(), rel=1e-12
            )


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kdim", [None, 10])
def test_attention(update, kdim):
    """in_proj_weight or the three projections, and out_proj, which attention reads itself."""
    model = filled(nn.MultiheadAttention(16, 4, kdim=kdim, vdim=kdim, batch_first=True), kdim)
    names = ["in_proj_weight"] if kdim is None else ["q_proj_weight", "k_proj_weight"]
    confined, plain, subspaces = confined_like(model.double(), [*names, "out_proj.weight"], update)
    x, y = batches(2, "attention", size=24, width=16)
    y = x if kdim is None else y[:, :kdim]

    def loss(one, x):
        memory = x if kdim is None else y.double().view(4, 6, kdim)
        return one(x, memory, memory, need_weights=False)[0].sin().square().mean()

    follows(model, plain, confined, subspaces, x.double().view(4, 6, 16), loss)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("layers", [0, 2])
def test_a_transformer_encoder_in_training_and_by_its_fast_path(update, layers):
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, layers) if layers else layer
    filled(model.double(), layers)
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    confined, plain, subspaces = confined_like(model, names, update)
    (x,) = batches(1, "encoder", size=24, width=16)
    x = x.double().view(4, 6, 16)
    follows(model, plain, confined, subspaces, x)
    # As evaluation has it: the same fast kernel is called, with weights that are current.
    calls = []
    fused = torch._transformer_encoder_layer_fwd

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    for t in confined.parameters():
        t.data.add_(0.02)
    plain.load_state_dict(model.state_dict())
    torch._transformer_encoder_layer_fwd = counted
    try:
        with torch.inference_mode():
            out, wanted = model(x), plain(x)
    finally:
        torch._transformer_encoder_layer_fwd = fused
    assert len(calls) == 2 * max(1, layers), "both take the fast path"
    assert relative(out, wanted) <= 1e-12


class Experts(nn.Module):
    """Weights of three dimensions, of which a batched product and a loop read."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 12, 10))
        self.down = nn.Parameter(torch.zeros(3, 10, 12))

    def forward(self, x):
        hidden = torch.tanh(torch.bmm(x.expand(3, *x.shape), self.up.mT))
        return sum(h @ self.down[i].mT for i, h in enumerate(hidden))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("batched", [False, True])
def test_experts(update, batched):
    """One basis for all of them, or one for each."""
    model = filled(Experts().double(), "experts")
    confined, plain, subspaces = confined_like(model, ["up", "down"], update)
    if batched:
        confined.release()
        each = [[drawn(12, 10, 0.5, "UV", "high", i) for i in range(3)] for _ in range(2)]
        several = {}
        for name, found in zip(("up", "down"), each, strict=True):
            U, V = (torch.stack([getattr(s, side).columns for s in found]) for side in "UV")
            several[name] = type(found[0])(U, V) if name == "up" else type(found[0])(V, U)
        subspaces = several
        confined = confine(model, subspaces, update=update)
    assert confined.parameters()[0].shape[0] == 3
    (x,) = batches(1, "experts", size=7, width=10)
    follows(model, plain, confined, subspaces, x.double())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding(update, padding):
    model = filled(nn.Sequential(nn.Embedding(15, 12, padding_idx=padding)), "embedding")
    confined, plain, subspaces = confined_like(model.double(), ["0.weight"], update)
    tokens = torch.tensor([[1, 5, 5, 2], [14, 0, 2, 7]])
    follows(model, plain, confined, subspaces, tokens)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", ["plain", "grouped", "transposed"])
def test_convolutions(update, format, kind):
    """By (O, I·kh·kw), whichever way the channels lie, before or after they are turned."""
    layer = {
        "plain": lambda: nn.Conv2d(6, 9, 3, padding=1),
        "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
        "transposed": lambda: nn.ConvTranspose2d(6, 9, 3),
    }[kind]()
    model = filled(nn.Sequential(layer).double(), kind)
    before = format == torch.channels_last and kind == "plain"
    if before:
        model.to(memory_format=format)
    confined, plain, subspaces = confined_like(model, ["0.weight"], update)
    if not before:
        model.to(memory_format=format)
    held = dict(model.named_parameters())["0.weight"]
    assert held.is_contiguous(memory_format=format)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64).to(memory_format=format)
    follows(model, plain, confined, subspaces, x)
    assert held.is_contiguous(memory_format=format)


def test_a_convolution_over_one_dimension():
    model = filled(nn.Sequential(nn.Conv1d(1, 8, 5)).double(), "conv1d")
    confined, plain, subspaces = confined_like(model, ["0.weight"], "merge")
    follows(model, plain, confined, subspaces, torch.randn(3, 1, 9, dtype=torch.float64))


class Again(nn.Module):
    """One layer called twice, and read by F.linear, turned and by itself."""

    def __init__(self):
        super().__init__()
        self.proj, self.cell = nn.Linear(12, 12), nn.GRUCell(12, 12)

    def forward(self, x):
        x = torch.tanh(self.proj(torch.tanh(self.proj(x))))
        x = F.linear(x, self.proj.weight, self.proj.bias)
        state = self.cell(x, x)
        return state @ self.proj.weight + self.proj.weight.square().mean()


@pytest.mark.parametrize("update", UPDATES)
def test_one_layer_in_many_ways(update):
    model = filled(Again().double(), "again")
    names = ["proj.weight", "cell.weight_ih", "cell.weight_hh"]
    confined, plain, subspaces = confined_like(model, names, update)
    (x,) = batches(1, "again", width=12)
    follows(model, plain, confined, subspaces, x.double())


@pytest.mark.parametrize("update", UPDATES)
def test_one_module_at_two_places(update):
    """A layer that two parents have is confined once, and goes by its first name."""
    layer = nn.Linear(12, 12)
    model = filled(nn.Sequential(layer, nn.Tanh(), layer).double(), "places")
    confined, plain, subspaces = confined_like(model, ["0.weight"], update)
    (x,) = batches(1, "places", width=12)
    follows(model, plain, confined, subspaces, x.double())
    state = model.state_dict()
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(state["0.weight"], state["2.weight"])


class Scaled(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return F.linear(2 * x, self.weight, self.bias)


@pytest.mark.parametrize("update", UPDATES)
def test_a_subclass_and_a_wrapped_forward(update):
    """Forward passes that were overridden, by class or by instance, go on as they do."""
    model = filled(nn.Sequential(Scaled(12, 10), nn.Linear(10, 8)).double(), "subclass")
    plain = copy.deepcopy(model)
    for one in (model, plain):
        inner = one[1].forward
        one[1].forward = lambda x, inner=inner: 3 * inner(x)
    # deepcopy of what was wrapped would call the original's forward: the reference is made first.
    names = ("0.weight", "1.weight")
    shapes = [tuple(model.get_parameter(name).shape) for name in names]
    subspaces = {n: drawn(*s, 0.5, "UV", "high") for n, s in zip(names, shapes, strict=True)}
    confined = confine(model, subspaces, update=update)
    (x,) = batches(1, "subclass", width=12)
    optimizer = adamw(confined.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(x.double()).sin().sum().backward()
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        wanted = plain(x.double())
        assert relative(model(x.double()), wanted) <= 1e-12
        wanted.sin().sum().backward()
        for place in confined.places:
            U = place.spec.left.reduce_rows(plain.get_parameter(place.name).grad)
            assert relative(place.get(place.spec.free).grad, place.spec.right.reduce(U)) <= 1e-11
        optimizer.step()


def test_hooks_on_a_layer_see_its_calls():
    model = filled(nn.Sequential(nn.Linear(12, 10)), "hooks")
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    confine(model, {"0.weight": drawn(10, 12, 0.5, "UV", "high")})
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    (x,) = batches(1, "hooks", width=12)
    assert relative(model(x), F.linear(2 * x, model[0].weight, model[0].bias)) <= LIMIT
    assert seen == [x.shape]
