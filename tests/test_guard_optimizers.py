"""Optimizers other than the one that a guard names: what they may not step, what tells later."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from osf_torch import input_subspaces, protect, refresh
from tests.helpers import generator_for
from tests.small_guard import adamw, drawn, train

ANOTHER = "expected the optimizer that the weights were protected with, AdamW, to step them, got an"


def mlp(*key):
    return drawn(nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18)), "optimizers", *key)


def guarded(model, **options):
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer, **options)
    train(model, optimizer, 2)
    return guard, optimizer


@pytest.mark.parametrize(
    "options",
    [{}, {"restore": "deferred"}, {"restore": False}, {"restore": False, "when": "backward"}],
    ids=["restored", "deferred", "projected", "projected in backward"],
)
def test_an_optimizer_that_is_made_anew_is_refused_before_it_writes(options):
    """As for the next task. The guard is made anew for it too, and goes on."""
    model = mlp("anew")
    guard, _ = guarded(model, **options)
    before = copy.deepcopy(model.state_dict())
    optimizer = adamw(model)
    with pytest.raises(
        RuntimeError, match=rf"{ANOTHER}other one, AdamW, with 0\.weight, 2\.weight"
    ):
        train(model, optimizer, 1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    guard = protect(model, guard.state_dict(), optimizer=optimizer)
    train(model, optimizer, 3)
    guard.verify()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_an_optimizer_that_makes_gradients_in_its_step_is_refused():
    model = mlp("closure")
    guarded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=f"{ANOTHER}other one, SGD"):
        optimizer.step(lambda: model(torch.ones(2, 18)).square().mean())


def test_another_optimizer_may_step_what_is_not_guarded():
    """Even if it has guarded weights, where they have no gradients."""
    model = mlp("others")
    guard, optimizer = guarded(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    model(torch.ones(2, 18)).square().mean().backward()
    model[0].weight.grad = model[2].weight.grad = None
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    same = {name for name, t in model.state_dict().items() if torch.equal(t, before[name])}
    assert same == {"0.weight", "2.weight"}
    guard.verify()


class Within(torch.optim.Optimizer):
    """Steps other optimizers in its own step, as a lookahead or a set of optimizers does."""

    def __init__(self, parameters, inner, several=False):
        super().__init__(parameters, {})
        self.inner = [inner] if several else inner

    def step(self, closure=None):
        for one in self.inner if isinstance(self.inner, list) else [self.inner]:
            one.step()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("named", ["inner", "outer"])
def test_an_optimizer_may_step_within_the_guarded_one_or_around_it(named, several):
    model = mlp("within")
    inner = adamw(model)
    outer = Within(model.parameters(), inner, several)
    subspaces = refresh(model, 0.4, progress=False)
    guard = protect(model, subspaces, optimizer={"inner": inner, "outer": outer}[named])
    before = copy.deepcopy(model.state_dict())
    train(model, outer, 3)
    guard.verify()
    assert max(guard.drift().values()) <= 1e-6
    assert not torch.equal(model[0].weight, before["0.weight"])


def removed(model, guard, optimizer):
    guard.remove()
    return "Guard.remove"


def protected_again(model, guard, optimizer):
    protect(model, guard.subspaces, optimizer=optimizer)
    return "protect"


def grown_and_protected(model, guard, optimizer):
    x = torch.randn(40, 18, generator=generator_for("inputs"))
    subspaces = input_subspaces(model, [x], previous=guard.subspaces, progress=False)
    protect(model, subspaces, optimizer=optimizer)
    return "protect"


ENDS = [removed, protected_again, grown_and_protected]


@pytest.mark.parametrize("restore", [True, "deferred", False])
@pytest.mark.parametrize("end", ENDS)
def test_where_a_guard_ends_what_has_moved_is_told(end, restore, caplog):
    model = mlp("told")
    guard, optimizer = guarded(model, restore=restore)
    with torch.no_grad():
        model[2].weight.add_(0.01)
    operator = end(model, guard, optimizer)
    (line,) = [r for r in caplog.records if "until now isn't where its last step" in r.getMessage()]
    assert line.levelname == "WARNING"
    assert line.getMessage().startswith(f"osf_torch.{operator}: ")
    assert "of 2.weight: " in line.getMessage()


@pytest.mark.parametrize("restore", [True, "deferred"])
@pytest.mark.parametrize("end", ENDS)
def test_where_a_guard_ends_and_nothing_has_moved_nothing_is_told(end, restore, caplog):
    model = mlp("kept")
    guard, optimizer = guarded(model, restore=restore)
    end(model, guard, optimizer)
    assert "isn't where" not in caplog.text
