"""A confined model goes where plain autograd takes C in W₀ + U_l C V_lᵀ, of float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from osf_torch import Subspace, confine
from tests.small_confine import (
    Conv1D,
    Explicit,
    adamw,
    batches,
    columns,
    drawn,
    filled,
    loss_of,
    net,
    relative,
)

MODES = {
    "merge": {},
    "merge from zero": {"decay_to": "zero"},
    "beside": {"update": "beside"},
    "rank": {"rank": 3},
}
SINGLE = 2e-5  # of float32 over a few steps, where nothing is ill-conditioned
DOUBLE = 1e-11


def subspaces_of(model, sides="UV", spans="high", rho=0.5):
    names = ("first.weight", "second.weight", "head.weight")
    return {n: drawn(*model.get_parameter(n).shape, rho, sides, spans) for n in names}


def made(name, dtype, **options):
    """A confined model and the same training written out, both of bases of float32."""
    model = net(name).to(dtype)
    plain = copy.deepcopy(model)
    confined = confine(model, subspaces_of(model, **options), **MODES[name])
    return model, confined, Explicit(plain, confined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODES)
def test_outputs_gradients_and_steps(name, dtype):
    """With weight decay, momentum and what isn't confined trained beside it."""
    model, confined, explicit = made(name, dtype)
    limit = SINGLE if dtype == torch.float32 else DOUBLE
    ours, theirs = adamw(model.parameters(), lr=3e-3), adamw(explicit.parameters(), lr=3e-3)
    for x in batches(20, name):
        x = x.to(dtype).requires_grad_()
        y = x.detach().double().requires_grad_()
        ours.zero_grad()
        theirs.zero_grad()
        out, wanted = model(x), explicit(y)
        assert relative(out, wanted) <= limit
        (out - 1).square().mean().backward()
        (wanted - 1).square().mean().backward()
        for t, reference in zip(confined.parameters(), explicit.trained(), strict=True):
            if reference.grad.any():  # of A at first it is zero, as B is
                assert relative(t.grad, reference.grad) <= 30 * limit
        assert relative(x.grad, y.grad) <= 30 * limit
        assert relative(model.first.bias.grad, explicit.plain.first.bias.grad) <= 30 * limit
        ours.step()
        theirs.step()
    for name_, place in zip(explicit.places, confined.places, strict=True):
        assert relative(place.module.weight, explicit.weight(name_)) <= 10 * limit
        assert relative(model.state_dict()[name_], explicit.weight(name_)) <= 10 * limit
    for t, reference in zip(confined.parameters(), explicit.trained(), strict=True):
        assert relative(t, reference) <= 1e3 * limit  # Adam's, of tiny gradients


@pytest.mark.parametrize("name", ["merge", "beside"])
@pytest.mark.parametrize("spans", ["high", "low"])
@pytest.mark.parametrize("sides", ["U", "V", "UV"])
def test_the_gradient_of_c_is_the_free_block_of_the_dense_one(name, sides, spans):
    model = net(sides, spans).double()
    plain = copy.deepcopy(model)
    confined = confine(model, subspaces_of(model, sides, spans), **MODES[name])
    (x,) = batches(1, sides, spans)
    loss_of(model, x.double()).backward()
    loss_of(plain, x.double()).backward()
    for place in confined.places:
        dense = plain.get_parameter(place.name).grad
        U, V = columns(place.spec.left), columns(place.spec.right)
        assert relative(place.get(place.spec.free).grad, U.mT @ dense @ V) <= DOUBLE
        assert place.weight.grad is None


def side_of(size, free, key):
    """Nothing protected where all is free."""
    return None if free == size else drawn(size, size, 1 - free / size, "U", "high", key).U


# By the planner's own costs: shapes, free directions and tokens at which each order is cheapest.
ORDERS = {
    "dense": ((24, 20), (20, 17), 400),
    "right": ((24, 40), (24, 8), 30),
    "left": ((40, 24), (8, 24), 30),
    "both": ((40, 40), (6, 6), 4),
}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_every_order_of_the_planner(update, order, kind):
    (m, n), (p, q), tokens = ORDERS[order]
    layer = nn.Linear(n, m) if kind is nn.Linear else Conv1D(n, m)
    model = filled(nn.Sequential(layer), order)
    subspace = Subspace(side_of(m, p, "left"), side_of(n, q, "right"))
    plain = copy.deepcopy(model)
    confined = confine(model, {"0.weight": subspace}, update=update)
    (place,) = confined.places
    assert place.spec.plan(tokens).order == order
    assert f"{m}×{n}" in confined.plan(tokens)
    explicit = Explicit(plain, confined)
    width = n if kind is nn.Linear else m
    for x in batches(3, order, size=tokens, width=width):
        y = x.double().requires_grad_()
        x.requires_grad_()
        out, wanted = model(x), explicit(y)
        assert relative(out, wanted) <= 1e-6
        out.sin().sum().backward()
        wanted.sin().sum().backward()
        assert relative(x.grad, y.grad) <= SINGLE
        with torch.no_grad():
            (ours,), (theirs,) = confined.parameters(), explicit.trained()
            assert relative(ours.grad, theirs.grad) <= SINGLE
            ours -= 1e-2 * ours.grad
            theirs -= 1e-2 * theirs.grad
            ours.grad = theirs.grad = None


def test_the_orders_differ_and_inputs_of_three_dimensions_are_tokens():
    assert len({(shape, tokens) for shape, _, tokens in ORDERS.values()}) == len(ORDERS)
    model = net("three")
    confined = confine(model, subspaces_of(model))
    (x,) = batches(1, "three", size=24)
    grads = []
    for shape in ((24, 20), (2, 3, 4, 20), (24, 1, 20)):
        model.zero_grad()
        out = model(x.view(shape))
        assert out.shape == (*shape[:-1], 6)
        out.view(24, 6).sin().sum().backward()
        grads.append([t.grad.clone() for t in confined.parameters()])
    for one, other in itertools.pairwise(grads):
        for a, b in zip(one, other, strict=True):
            assert relative(a, b) <= 1e-6
    single, twin = model(x[0]), model(x[:1])
    assert single.shape == (6,)
    assert relative(single, twin[0]) <= 1e-6
    assert model(x[:0]).shape == (0, 6)
    model(x[:0]).sum().backward()
    assert all(t.grad.isfinite().all() for t in confined.parameters())


def test_zero_is_the_weight_without_its_free_part():
    """Decay alone takes W to H(W); from the start it takes C to zero and W to W₀."""
    for decay_to in ("zero", "start"):
        model = net("decay").double()
        start = copy.deepcopy(model)
        subspaces = subspaces_of(model)
        confined = confine(model, subspaces, decay_to=decay_to)
        optimizer = torch.optim.SGD(confined.parameters(), lr=1.0, weight_decay=0.5)
        for t in confined.parameters():
            t.grad = torch.zeros_like(t)
        for _ in range(60):
            optimizer.step()
        for place in confined.places:
            W = start.get_parameter(place.name).detach()
            U, V = columns(place.spec.left), columns(place.spec.right)
            wanted = W - U @ (U.mT @ W @ V) @ V.mT if decay_to == "zero" else W
            assert relative(place.weight, wanted) <= 1e-6


def test_a_rank_that_is_whole_reaches_what_a_block_does():
    """B A of all min(p, q) ranks starts at W₀ and descends as C does."""
    finals = []
    for options in ({}, {"rank": 3}):
        model = filled(nn.Sequential(nn.Linear(20, 6)), "whole")
        confined = confine(model, {"0.weight": drawn(6, 20, 0.5, "UV", "high")}, **options)
        optimizer = torch.optim.Adam(confined.parameters(), lr=2e-2)
        for _ in range(400):
            optimizer.zero_grad()
            (x,) = batches(1, "whole")
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
        finals.append(loss.item())
    assert finals[1] == pytest.approx(finals[0], rel=1e-2)
