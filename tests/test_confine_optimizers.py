"""Every optimizer that a confined model may meet, torch's and others."""

from __future__ import annotations

import copy

import pytest
import torch

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

LIMIT = 3e-6  # of the protected part, of float32 bases and a few steps


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def muon(parameters, **options):
    """Of matrices alone; vectors stay where they are."""
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=1e-2, **options)


OPTIMIZERS = {
    "adamw": adamw,
    "adamw foreach": lambda ps: adamw(ps, foreach=True),
    "adamw fused": lambda ps: adamw(ps, fused=True),
    "adamw capturable": lambda ps: adamw(ps, capturable=True),
    "adamw maximize": lambda ps: adamw(ps, maximize=True, lr=1e-3),
    "adam amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-2, amsgrad=True, weight_decay=0.01),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, centered=True),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "muon": muon,
}


@pytest.mark.parametrize("update", ["merge", "beside"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name, update):
    """Given all of ``model.parameters()``, the frozen weights among them, it trains C as the same
    optimizer does that has C of a model that is written out, and what is protected stays."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    if name == "adamw capturable" and not torch.cuda.is_available():
        pytest.skip("capturable optimizers take parameters of a GPU alone")
    model = net(name).double()
    plain, subspaces = copy.deepcopy(model), bases(model)
    start = weights_of(model)
    confined = confine(model, subspaces, update=update)
    explicit = Explicit(plain, confined)
    make = OPTIMIZERS[name]
    # Every optimizer of the right is asked for what trains; the left has the frozen ones too.
    ours, theirs = make(list(model.parameters())), make(trained(explicit))
    xs = [x.double() for x in batches(25, name)]
    losses, wanted = train(model, xs, ours), train(explicit, xs, theirs)
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert worst(start, model, subspaces) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT
    # Adafactor's steps are shares of what C is, or of 1e-3 while it is less.
    least = 1e-4 if name == "adafactor" else 1e-3
    for place in confined.places:
        assert relative(place.module.weight, start[place.name]) > least, "it did train"
        assert torch.equal(place.weight, start[place.name]) == (update == "beside")


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_lbfgs_evaluates_its_closure_within_the_step(update, line_search):
    model = net("lbfgs").double()
    plain, subspaces = copy.deepcopy(model), bases(model)
    start = weights_of(model)
    confined = confine(model, subspaces, update=update)
    explicit = Explicit(plain, confined)
    (x,) = batches(1, "lbfgs")
    x = x.double()
    finals = []
    # The weights themselves may be among what it moves: their gradients are none.
    for one, parameters in ((model, list(model.parameters())), (explicit, trained(explicit))):
        optimizer = torch.optim.LBFGS(
            parameters, lr=0.1 if line_search is None else 1.0, line_search_fn=line_search
        )

        def closure(one=one, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(one, x)
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(2):
            optimizer.step(closure)
        finals.append(loss_of(one, x).item())
        assert finals[-1] < 0.5 * first
    assert finals[0] == pytest.approx(finals[1], rel=1e-5)
    assert worst(start, model, subspaces) <= LIMIT


class ThroughData:
    """Sign descent that is no torch optimizer and writes where torch counts no writes."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def step(self):
        for p in self.parameters:
            p.data.add_(p.grad.sign(), alpha=-1e-2)


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_a_step_that_is_no_torch_optimizers_is_seen_by_whatever_looks_next(update):
    model = net("by hand").double()
    plain, subspaces = copy.deepcopy(model), bases(model)
    start = weights_of(model)
    confined = confine(model, subspaces, update=update)
    explicit = Explicit(plain, confined)
    xs = [x.double() for x in batches(10, "by hand")]
    losses = train(model, xs, ThroughData(trained(model)))
    wanted = train(explicit, xs, ThroughData(trained(explicit)))
    assert losses == pytest.approx(wanted, rel=1e-9)
    # The last step is followed by no forward pass: each of these brings up to date by itself.
    names = ("state_dict", "weight", "merge", "eval", "drift")
    for name in names:
        with torch.no_grad():
            for ours, theirs in zip(confined.parameters(), explicit.trained(), strict=True):
                ours.data.add_(0.01)
                theirs.add_(0.01)
        target = explicit.weight("second.weight")
        if name == "state_dict":
            assert relative(model.state_dict()["second.weight"], target) <= 1e-12
        elif name == "weight":
            assert relative(model.second.weight, target) <= 1e-12
        elif name == "merge":
            confined.merge()
            held = dict(model.named_parameters())["second.weight"]
            assert update == "beside" or relative(held, target) <= 1e-12
        elif name == "eval":
            with torch.inference_mode():
                assert relative(model.eval()(xs[0]), explicit(xs[0])) <= 1e-12
        else:
            assert max(confined.drift().values()) <= LIMIT
    assert worst(start, model, subspaces) <= LIMIT


def test_an_optimizer_with_a_step_of_its_own_is_hooked_by_its_class():
    """What subclasses torch's Optimizer is followed by a merge at once, before any forward."""

    class Lion(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.sign(), alpha=-1e-2)

    model = net("lion")
    confined = confine(model, bases(model))
    train(model, batches(3, "lion"), Lion(model.parameters()))
    for place in confined.places:
        held = place.get(place.spec.merged)
        assert torch.equal(held, place.get(place.spec.free))
        assert held.any()


def test_parameter_groups_and_two_optimizers():
    """Decay for C alone, and an optimizer that steps no free block leaves them as they are."""
    model = net("groups")
    start, subspaces = weights_of(model), bases(model)
    confined = confine(model, subspaces)
    chosen = {id(t) for t in confined.parameters()}
    others = [p for p in trained(model) if id(p) not in chosen]
    blocks = torch.optim.AdamW(
        [
            {"params": confined.parameters()[:1], "weight_decay": 0.3},
            {"params": confined.parameters()[1:], "lr": 0.0},
        ],
        lr=1e-2,
    )
    rest = torch.optim.SGD(others, lr=1e-2)
    for x in batches(5, "groups"):
        model.zero_grad()
        loss_of(model, x).backward()
        rest.step()
        blocks.step()
    now = weights_of(model)
    assert relative(now["first.weight"], start["first.weight"]) > 1e-3
    assert torch.equal(now["second.weight"], start["second.weight"])
    assert relative(now["second.bias"], start["second.bias"]) > 1e-4
    assert worst(start, model, subspaces) <= LIMIT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where torchao compiles
@pytest.mark.parametrize("package", ["schedulefree", "bitsandbytes", "torchao"])
def test_optimizers_of_others(package):
    module = pytest.importorskip(package)
    model = net(package)
    start, subspaces = weights_of(model), bases(model)
    confined = confine(model, subspaces)
    if package == "schedulefree":
        optimizer = module.AdamWScheduleFree(trained(model), lr=1e-2)
        optimizer.train()
    elif package == "bitsandbytes":
        optimizer = module.optim.AdamW8bit(trained(model), lr=1e-2)
    else:
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(trained(model), lr=1e-2)
    losses = train(model, batches(25, package), optimizer)
    if package == "schedulefree":
        optimizer.eval()
    assert losses[-1] < losses[0]
    assert worst(start, model, subspaces) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT
