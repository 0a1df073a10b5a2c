"""Weights that C stands beside and that no linear layer has: the sum is made once a call, and what
a backward pass needs of it is made again."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from osf_torch import confine, refresh
from osf_torch.free import formed
from tests.helpers import generator_for
from tests.small_confine import adamw, columns, drawn, gradients_by, relative, train
from tests.small_experts import KINDS, WAYS, experts_model, ids

KERNEL = 5e-6  # of products of float32 through two layers and back


def refreshed(model):
    return refresh(model, 0.5, filter="*experts*_proj", progress=False)


def moved(confined):
    generator = generator_for("formed")
    with torch.no_grad():
        for t in confined.parameters():
            t.add_(0.2 * torch.randn(t.shape, generator=generator))


def loss_of(model, batch):
    return model(batch).logits.sin().square().mean()


def confined_experts(kind, way, rank=None):
    model = experts_model(kind, way).requires_grad_(False)
    plain = copy.deepcopy(model).double().set_experts_implementation
    double = plain.__self__
    plain("eager")
    found = refreshed(model)
    return model, double, confine(model, found, update="beside", rank=rank)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_experts_are_formed_once_a_call_and_kept_by_no_graph(kind, way, rank, monkeypatch):
    model, plain, confined = confined_experts(kind, way, rank)
    moved(confined)
    made, current = [], formed.current

    def counted(place):
        W = current(place)
        made.append(weakref.ref(W.untyped_storage()))
        return W

    monkeypatch.setattr(formed, "current", counted)
    batch = ids("formed", kind, way)
    loss = loss_of(model, batch)
    gc.collect()
    assert len(made) == 4, "gate and up, and down, of two layers"
    assert not [one for one in made if one() is not None]
    loss.backward()
    weights = {}
    for place in confined.places:
        U, V = columns(place.spec.left), columns(place.spec.right)
        p = plain.get_parameter(place.name)
        p.data += U @ place.block.detach().double() @ V.mT
        weights[place.name] = p.requires_grad_(True)
    wanted = loss_of(plain, batch)
    assert relative(loss, wanted) <= KERNEL
    wanted.backward()
    for place in confined.places:
        gradients = gradients_by(place, weights[place.name].grad)
        for t, g in zip(place.trained(), gradients, strict=True):
            assert relative(t.grad, g) <= 4 * KERNEL
    losses = train(model, [batch] * 4, adamw(confined.parameters()), loss_of)
    assert losses[-1] < losses[0]
    confined.verify()


class OneExperts(nn.Module):
    """A batch of ``lead`` matrices, multiplied by in one product."""

    def __init__(self, *lead: int) -> None:
        super().__init__()
        weight = torch.randn(*lead, 10, 8, generator=generator_for("one", lead))
        self.up = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return (x @ self.up.mT).sigmoid()


class Pictures(nn.Conv2d):
    """A convolution whose weight lies by channels last."""

    def __init__(self) -> None:
        super().__init__(6, 10, 3)
        self.to(memory_format=torch.channels_last).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "shape", "read"),
    [
        (lambda: OneExperts(1), (10, 8), (5, 8)),
        (lambda: OneExperts(3), (10, 8), (5, 8)),
        (lambda: OneExperts(2, 3), (10, 8), (5, 8)),
        (Pictures, (10, 54), (2, 6, 7, 7)),
        (lambda: nn.Conv1d(6, 10, 3).requires_grad_(False), (10, 18), (2, 6, 7)),
    ],
    ids=["one", "three", "two by three", "channels last", "of three dimensions"],
)
def test_whatever_the_weight_s_shape_and_strides_gradients_are_those_of_the_sum(make, shape, read):
    model = nn.Sequential(make().double())
    (name,) = (n for n, p in model.named_parameters() if p.dim() > 1)
    confined = confine(model, {name: drawn(*shape, 0.4, "UV", "high")}, update="beside")
    moved(confined)
    x = torch.randn(read, dtype=torch.float64, generator=generator_for("read", read))
    x.requires_grad_(True)
    (place,) = confined.places
    (C,) = confined.parameters()
    W = place.weight.detach()

    def plain(x, C):
        U, V = columns(place.spec.left), columns(place.spec.right)
        weight = W + (U @ C @ V.mT).reshape(W.shape)
        twin = copy.deepcopy(model[0])
        own = type(twin).__mro__[1]
        held = {n: p for n, p in model[0].named_parameters() if n == "bias"}
        bare = object.__new__(own)
        bare.__dict__ = {k: v for k, v in twin.__dict__.items() if not k.startswith("_osf")}
        parameters = {name.rpartition(".")[2]: weight, **held}
        return torch.func.functional_call(bare, parameters, (x,))

    ours = torch.autograd.grad(model(x).sin().sum(), (x, C), create_graph=True)
    theirs = torch.autograd.grad(plain(x, C).sin().sum(), (x, C), create_graph=True)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert relative(mine, wanted) <= 1e-12
    twice = torch.autograd.grad(sum(g.square().sum() for g in ours), (x, C))
    wanted = torch.autograd.grad(sum(g.square().sum() for g in theirs), (x, C))
    for mine, want in zip(twice, wanted, strict=True):
        assert relative(mine, want) <= 1e-11, "a sum may be differentiated twice"
