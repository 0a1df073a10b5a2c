"""Copies, averages and other parameters in a confined model's place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from osf_torch import confine
from tests.small_confine import (
    Explicit,
    adamw,
    bases,
    batches,
    loss_of,
    net,
    relative,
    train,
    weights_of,
    worst,
)

LIMIT = 3e-6
UPDATES = {"merge": {}, "beside": {"update": "beside"}, "rank": {"rank": 3}}


def confined_net(update, key, dtype=torch.float32):
    model = net(key).to(dtype)
    subspaces, start = bases(model), weights_of(model)
    confined = confine(model, subspaces, **UPDATES[update])
    return model, confined, subspaces, start


def plain_with(state, dtype=torch.float32):
    model = net("plain").to(dtype)
    model.load_state_dict(state)
    return model


def average(decay, states):
    """The moving average of effective weights, which starts at the first."""
    found = {name: t.double() for name, t in states[0].items()}
    for state in states[1:]:
        found = {n: decay * t + (1 - decay) * state[n].double() for n, t in found.items()}
    return found


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_a_moving_average_is_that_of_the_effective_weights(update, multi):
    """``AveragedModel`` of a confined model runs, and saves, as the plain model that has the
    averaged weights; what is protected is the same in it."""
    model, _, subspaces, start = confined_net(update, "ema")
    how = (
        {"multi_avg_fn": get_ema_multi_avg_fn(0.8)}
        if multi
        else {"avg_fn": lambda mean, new, _: 0.8 * mean + (1 - 0.8) * new}
    )
    averaged = AveragedModel(model, **how)
    optimizer = adamw(model.parameters())
    states = []
    xs = batches(6, "ema")
    for x in xs:
        train(model, [x], optimizer)
        averaged.update_parameters(model)
        states.append(weights_of(model))
    wanted = average(0.8, states)
    found = averaged.module.state_dict()
    assert set(found) == set(wanted)
    for name, t in wanted.items():
        assert relative(found[name], t) <= LIMIT
    out = averaged(xs[0])
    assert relative(out, plain_with(wanted)(xs[0])) <= LIMIT
    assert relative(out, model(xs[0])) > 1e-3
    assert worst(start, averaged.module, subspaces) <= LIMIT
    # Back into the model, as an evaluation with the average does it.
    with torch.no_grad():
        for p, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
            p.copy_(mean)
    assert relative(model(xs[0]), out) <= LIMIT
    train(model, xs, adamw(model.parameters()))
    assert worst(start, model, subspaces) <= LIMIT


@pytest.mark.parametrize("update", UPDATES)
def test_what_trains_alone_may_be_copied_and_swapped(update):
    """An average of the trained parameters, swapped in and out around an evaluation."""
    model, confined, subspaces, start = confined_net(update, "swap")
    trained = [p for p in model.parameters() if p.requires_grad]
    shadow = [p.detach().clone() for p in trained]
    (x,) = batches(1, "swap")
    before = model(x)
    train(model, batches(5, "swap"), adamw(model.parameters()))
    after = model(x)
    assert relative(after, before) > 1e-3

    def swap():
        with torch.no_grad():
            for p, other in zip(trained, shadow, strict=True):
                kept = p.clone()
                p.copy_(other)
                other.copy_(kept)

    swap()
    assert relative(model(x), before) <= LIMIT
    swap()
    assert relative(model(x), after) <= LIMIT
    assert worst(start, model, subspaces) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT


@pytest.mark.parametrize("update", UPDATES)
def test_a_deepcopy_trains_by_itself(update):
    model, confined, subspaces, start = confined_net(update, "deepcopy", torch.float64)
    xs = [x.double() for x in batches(10, "deepcopy")]
    train(model, xs[:3], adamw(model.parameters()))
    twin = copy.deepcopy(model)
    kept = weights_of(twin)
    train(model, xs[3:], adamw(model.parameters()))
    now = weights_of(twin)
    assert all(torch.equal(kept[name], t) for name, t in now.items()), "the copy stayed"
    left = weights_of(model)
    train(twin, xs[3:], adamw(twin.parameters()))
    assert all(torch.equal(left[name], t) for name, t in model.state_dict().items())
    for name, t in twin.state_dict().items():
        assert relative(t, left[name]) <= 1e-12, "it trained as the model did"
    assert worst(start, twin, subspaces) <= LIMIT
    confined.release()
    assert relative(twin(xs[0]), model(xs[0])) <= 1e-12, "released alone"
    train(twin, xs[:2], adamw(twin.parameters()))
    assert worst(start, twin, subspaces) <= LIMIT


@pytest.mark.parametrize("update", UPDATES)
def test_functional_calls(update):
    """Other values of C in place of the model's: outputs, gradients, and the model as it was."""
    model, confined, _, _ = confined_net(update, "functional", torch.float64)
    plain = net("functional").double()
    train(model, [x.double() for x in batches(2, "functional")], adamw(confined.parameters()))
    plain.load_state_dict(model.state_dict())
    explicit = Explicit(plain, confined)
    (x,) = batches(1, "functional")
    x = x.double()
    before, kept = model(x).detach(), weights_of(model)
    model.zero_grad()
    names = {id(p): name for name, p in model.named_parameters()}
    others = {names[id(p)]: (p.detach() + 0.1).requires_grad_() for p in confined.parameters()}
    with torch.no_grad():
        for t in explicit.trained():
            t += 0.1
    out, wanted = functional_call(model, others, (x,)), explicit(x)
    assert relative(out, wanted) <= 1e-12
    out.square().mean().backward()
    wanted.square().mean().backward()
    for ours, theirs in zip(others.values(), explicit.trained(), strict=True):
        assert relative(ours.grad, theirs.grad) <= 1e-11
    assert all(p.grad is None for p in confined.parameters())
    assert relative(model(x), before) <= 1e-12
    for name, t in model.state_dict().items():
        assert relative(t, kept[name]) <= 1e-12
    everything = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert relative(functional_call(model, everything, (x,)), before) <= 1e-12


@pytest.mark.parametrize("update", UPDATES)
def test_a_functional_call_leaves_other_graphs_as_they_are(update):
    """A lookahead step, and MAML's second derivatives through it."""
    model, confined, _, _ = confined_net(update, "lookahead", torch.float64)
    plain = net("lookahead").double()
    train(model, [x.double() for x in batches(2, "lookahead")], adamw(confined.parameters()))
    plain.load_state_dict(model.state_dict())
    explicit = Explicit(plain, confined)
    x, y = (x.double() for x in batches(2, "lookahead"))
    first = loss_of(model, x)
    kept = torch.autograd.grad(first, confined.parameters(), retain_graph=True)
    outer = []
    for one, trained in ((model, confined.parameters()), (explicit, explicit.trained())):
        names = {id(p): name for name, p in one.named_parameters()}
        values = [t.detach().clone().requires_grad_() for t in trained]
        held = {names[id(p)]: t for p, t in zip(trained, values, strict=True)}

        def loss(inputs, held, one=one):
            return (functional_call(one, held, (inputs,)) - inputs[:, :6]).square().mean()

        grads = torch.autograd.grad(loss(x, held), values, create_graph=True)
        ahead = {n: t - 0.1 * g for (n, t), g in zip(held.items(), grads, strict=True)}
        outer.append(torch.autograd.grad(loss(y, ahead), values))
    for ours, theirs in zip(*outer, strict=True):
        assert relative(ours, theirs) <= 1e-11
    again = torch.autograd.grad(first, confined.parameters())
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # jvp's own
@pytest.mark.parametrize("update", UPDATES)
def test_transforms_of_a_functional_call(update):
    """Gradients of every example by vmap of grad, and a Jacobian's product forward."""
    model, confined, _, _ = confined_net(update, "transforms", torch.float64)
    train(model, [x.double() for x in batches(2, "transforms")], adamw(confined.parameters()))
    (x,) = batches(1, "transforms", size=5)
    x = x.double()
    names = {id(p): name for name, p in model.named_parameters()}
    held = {names[id(p)]: p.detach() for p in confined.parameters()}

    def loss(held, one):
        return functional_call(model, held, (one,)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(held, x)
    for i, one in enumerate(x):
        model.zero_grad()
        model(one).square().mean().backward()
        for p in confined.parameters():
            assert relative(each[names[id(p)]][i], p.grad) <= 1e-11
    direction = {name: torch.ones_like(t) for name, t in held.items()}
    _, slope = torch.func.jvp(lambda held: loss(held, x[0]), (held,), (direction,))
    wanted = sum(each[name][0].sum() for name in held)
    assert slope.item() == pytest.approx(wanted.item(), rel=1e-10)


def test_a_weight_that_is_read_only_for_its_facts():
    model, confined, _, _ = confined_net("merge", "facts")
    weight = model.first.weight
    assert weight.shape == (28, 20)
    assert weight.requires_grad
    assert weight.dtype == torch.float32
    with torch.no_grad():
        assert not model.first.weight.requires_grad
    assert [n for n, _ in model.first.named_parameters()] == [
        "weight",
        "bias",
        "weight_free",
        "weight_merged",
    ]
    assert isinstance(model.first, nn.Linear)
    assert "in_features=20" in repr(model.first)
    assert len(confined.parameters()) == 3
