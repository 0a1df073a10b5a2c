"""Weights of half precision, of which a base is kept, and models that change their precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from osf_kernels import free_matrix
from osf_torch import confine
from tests.small_confine import (
    adamw,
    bases,
    batches,
    drawn,
    filled,
    loss_of,
    net,
    relative,
    train,
    weights_of,
    worst,
)

HALF = [torch.bfloat16, torch.float16]


def half_net(dtype, update="merge", **options):
    model = net("half").to(dtype)
    subspaces = bases(net("half"), 0.5)
    start = weights_of(model)
    return model, confine(model, subspaces, update=update, **options), subspaces, start


def rounded_sum(place, base):
    """round(W₀ + U_l C V_lᵀ), in C's precision."""
    C = place.get(place.spec.free).detach()
    return (base.to(C.dtype) + free_matrix(C, place.spec.left, place.spec.right)).to(base.dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_steps_below_the_rounding_add_up(update, dtype):
    """A thousand steps of which none alone would be seen; W is rounded from the sum, once."""
    model, confined, _, start = half_net(dtype, update)
    optimizer = torch.optim.SGD(confined.parameters(), lr=1e-5)
    for t in confined.parameters():
        t.grad = torch.randn_like(t)
    wanted = [-1000 * 1e-5 * t.grad for t in confined.parameters()]
    for _ in range(1000):
        optimizer.step()
    for place, block in zip(confined.places, wanted, strict=True):
        assert relative(place.get(place.spec.free), block) <= 1e-4
        now = model.state_dict()[place.name]
        assert now.dtype == dtype
        assert relative(now, start[place.name]) > 1e-4
        if update == "merge":
            assert torch.equal(now, rounded_sum(place, start[place.name]))
            assert torch.equal(place.weight, now)
        else:
            assert torch.equal(place.weight, start[place.name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_training_in_half_precision(update, dtype):
    """C, its gradient and its moments are of float32, and it descends as in float32."""
    model, confined, subspaces, start = half_net(dtype, update)
    whole = net("half")
    reference = confine(whole, subspaces)
    # The biases stay: in float16 AdamW's own moments of them would underflow.
    ours, theirs = adamw(confined.parameters()), adamw(reference.parameters())
    xs = batches(60, "half")
    losses = train(model, [x.to(dtype) for x in xs], ours)
    wanted = train(whole, xs, theirs)
    assert losses[-1] == pytest.approx(wanted[-1], rel=0.05)
    assert losses[-1] < 0.7 * losses[0]
    for t, other in zip(confined.parameters(), reference.parameters(), strict=True):
        assert t.dtype == t.grad.dtype == torch.float32
        assert ours.state[t]["exp_avg"].dtype == torch.float32
        assert relative(t, other) < 0.1
    drifts = confined.drift()
    eps = torch.finfo(dtype).eps
    assert worst(start, model, subspaces) <= eps
    assert max(drifts.values()) <= eps
    model._modules["second"]._parameters["weight"].data.mul_(0.9)
    assert confined.drift()["second.weight"] > 5 * eps


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_the_gradient_is_that_of_float64_within_the_rounding(update):
    model, confined, _, _ = half_net(torch.bfloat16, update)
    exact = net("half")
    exact.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    plain = copy.deepcopy(exact).bfloat16()
    exact = exact.double()
    (x,) = batches(1, "half")
    for one, dtype in ((model, torch.bfloat16), (plain, torch.bfloat16), (exact, torch.float64)):
        loss_of(one, x.to(dtype)).backward()
    for place in confined.places:
        wanted = exact.get_parameter(place.name).grad
        left, right = (b.to(dtype=torch.float64) for b in (place.spec.left, place.spec.right))
        block = right.reduce(left.reduce_rows(wanted))
        off = relative(place.get(place.spec.free).grad, block)
        theirs = plain.get_parameter(place.name).grad.double()
        assert off <= 2 * relative(right.reduce(left.reduce_rows(theirs)), block)


def test_one_block_of_half_precision_where_it_is_asked_for():
    """dtype=bfloat16: W of float32 has in it what C is, after many steps too."""
    model = net("asked")
    start = weights_of(model)
    confined = confine(model, bases(model), dtype=torch.bfloat16)
    train(model, batches(200, "asked"), adamw(model.parameters()))
    for place in confined.places:
        C = place.get(place.spec.free).detach()
        assert C.dtype == torch.bfloat16
        update = free_matrix(C.double(), *(b.to(dtype=torch.float64) for b in place_bases(place)))
        assert relative(place.weight, start[place.name].double() + update) <= 1e-5


def place_bases(place):
    return place.spec.left, place.spec.right


# --- a model that changes after it was confined ---


@pytest.mark.parametrize("update", ["merge", "beside"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_to_float64(update, dtype):
    model = net("to").to(dtype)
    subspaces, start = bases(net("to")), weights_of(model)
    confined = confine(model, subspaces, update=update)
    train(model, [x.to(dtype) for x in batches(3, "to")], adamw(model.parameters()))
    before = weights_of(model)
    model.to(dtype=torch.float64)
    assert relative(model.state_dict()["first.weight"], before["first.weight"]) <= (
        1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    )
    train(model, [x.double() for x in batches(5, "to")], adamw(model.parameters()))
    assert model.state_dict()["first.weight"].dtype == torch.float64
    limit = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert worst(start, model, subspaces) <= limit
    assert max(confined.drift().values()) <= limit


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_to_where_it_is_changes_nothing(update):
    model = net("where")
    subspaces, start = bases(model), weights_of(model)
    confined = confine(model, subspaces, update=update)
    optimizer = adamw(model.parameters())
    train(model, batches(3, "where"), optimizer)
    held = [id(p) for p in model.parameters()]
    model.to("cpu").float()
    assert held == [id(p) for p in model.parameters()]
    train(model, batches(3, "more"), optimizer)
    assert worst(start, model, subspaces) <= 3e-6
    assert max(confined.drift().values()) <= 3e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_a_model_that_is_halved_evaluates_and_is_refused_to_train(update, before, dtype):
    """C would be rounded each step: said before the step, which changes nothing."""
    model = net("halved").to(before)
    confine(model, bases(net("halved")), update=update)
    optimizer = adamw(model.parameters())
    train(model, [x.to(before) for x in batches(3, "halved")], optimizer)
    state = weights_of(model)
    model.to(dtype)
    (x,) = batches(1, "halved")
    x = x.to(dtype)
    plain = net("plain").to(dtype)
    plain.load_state_dict(state)
    with torch.no_grad():
        assert relative(model(x), plain(x)) <= 4 * torch.finfo(dtype).eps
    halved = weights_of(model)
    loss_of(model, x).backward()
    with pytest.raises(
        RuntimeError, match=r"'first\.weight' .*torch\.float32, got .*convert the model first"
    ):
        optimizer.step()
    assert all(torch.equal(t, halved[name]) for name, t in model.state_dict().items())


def test_tied_states_of_half_precision_round_trip():
    """What a bfloat16 model saves is what it runs with, and is loaded to the bit."""
    model, _, _, _ = half_net(torch.bfloat16)
    train(model, [x.bfloat16() for x in batches(5, "trip")], adamw(model.parameters()))
    state = weights_of(model)
    fresh = net("fresh").bfloat16()
    fresh.load_state_dict(state)
    (x,) = batches(1, "trip")
    assert torch.equal(fresh(x.bfloat16()), model(x.bfloat16()))


def test_mixed_precision_of_one_model():
    """Half precision beside single, an embedding of bfloat16 among them."""
    model = filled(nn.Sequential(nn.Embedding(15, 12), nn.Linear(12, 10)), "mixed")
    model[0].to(torch.bfloat16)
    model[0].register_forward_hook(lambda module, args, out: out.float())
    start = weights_of(model)
    subspaces = {
        "0.weight": drawn(15, 12, 0.5, "UV", "high"),
        "1.weight": drawn(10, 12, 0.5, "UV", "high"),
    }
    confined = confine(model, subspaces)
    tokens = torch.tensor([[1, 5, 5, 2], [14, 0, 2, 7]])
    train(model, [tokens] * 20, adamw(model.parameters()), lambda m, x: m(x).square().mean())
    assert relative(weights_of(model)["0.weight"], start["0.weight"]) > 0.01
    for place in confined.places:
        if place.spec.is_rounded:
            assert torch.equal(place.weight, rounded_sum(place, start[place.name]))
