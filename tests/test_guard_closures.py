"""Gradients that optimizer.step(closure) makes, and those that an optimizer makes by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osf_kernels import project
from osf_torch import protect, refresh
from tests.helpers import generator_for
from tests.small_guard import drawn

LIMIT = 1e-12  # of float64 and a few steps, relative


def mlp(*key):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18)).double()
    return drawn(model, "closures", *key)


def loss_of(model, *key):
    x = torch.randn(16, 18, generator=generator_for("data", *key), dtype=torch.float64)
    return (model(x) - x.sin()).square().mean()


def held(model, subspaces, mode="complement"):
    """H(W) = W − P(W), by the reference operator alone."""
    weights = {name: model.get_parameter(name).detach() for name in subspaces}
    return {
        name: W - project(W, subspaces[name].U, subspaces[name].V, mode=mode)
        for name, W in weights.items()
    }


def off(model, subspaces, start, mode="complement"):
    now = held(model, subspaces, mode)
    return max(float((now[name] - H).norm() / H.norm()) for name, H in start.items())


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4),
    "lbfgs searching": lambda model: torch.optim.LBFGS(
        model.parameters(), max_iter=4, line_search_fn="strong_wolfe"
    ),
}
EXACT = ("sgd", "lbfgs", "lbfgs searching")  # linear in the gradients: nothing to restore
CASES = [(n, r) for n in OPTIMIZERS for r in (True, False, "deferred") if r or n in EXACT]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("zero", ["none", "zeros", "after"])
@pytest.mark.parametrize(("name", "restore"), CASES)
def test_what_a_closure_makes_is_projected_and_restored(name, restore, zero, by_name):
    model = mlp(name)
    optimizer = OPTIMIZERS[name](model)
    subspaces = refresh(model, 0.4, progress=False)
    guard = protect(model, subspaces, optimizer=optimizer, restore=restore)
    start, before = held(model, subspaces), loss_of(model, name).item()

    def closure():
        if zero != "after" or "lbfgs" in name:
            optimizer.zero_grad(set_to_none=zero != "zeros")
        loss = loss_of(model, name)
        loss.backward()
        return loss

    for _ in range(6):
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert isinstance(loss, torch.Tensor), "the closure's value passes through"
        if zero == "after":
            optimizer.zero_grad()
    if restore:
        guard.restore()
    assert off(model, subspaces, start) <= LIMIT
    assert guard.projections >= 6
    assert loss_of(model, name).item() < before
    guard.verify()


def test_a_closure_gives_the_same_weights_as_a_loop():
    runs = []
    for by_closure in (False, True):
        model = mlp("same")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
        for step in range(4):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        runs.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_closure_under_backward_hooks_is_restored():
    model = mlp("hooks")
    optimizer = OPTIMIZERS["adamw"](model)
    subspaces = refresh(model, 0.4, progress=False)
    guard = protect(model, subspaces, optimizer=optimizer, when="backward")
    start = held(model, subspaces)
    for step in range(4):
        optimizer.step(lambda step=step: loss_of(model, step).backward())
        optimizer.zero_grad()
    assert off(model, subspaces, start) <= LIMIT
    guard.verify()


class Selfish(torch.optim.Optimizer):
    """Makes its gradients within the step, where no hook sees them before they are used."""

    def __init__(self, model):
        super().__init__(model.parameters(), {})
        self.model = model

    @torch.no_grad()
    def step(self):
        self.zero_grad()
        with torch.enable_grad():
            loss_of(self.model, "selfish").backward()
        for p in self.model.parameters():
            p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("restore", [True, False])
def test_verify_notices_gradients_that_were_never_projected(restore, stale):
    model = mlp("selfish")
    optimizer = Selfish(model)
    subspaces = refresh(model, 0.4, progress=False)
    guard = protect(model, subspaces, optimizer=optimizer, restore=restore)
    start = held(model, subspaces)
    loss_of(model, "first").backward()
    guard.project_grads()
    if not stale:
        optimizer.zero_grad()
    optimizer.step()
    assert (off(model, subspaces, start) <= LIMIT) == restore, "pinned all the same"
    with pytest.raises(RuntimeError, match=r"expected every step to use projected gradients.*0\.w"):
        guard.verify()
    checkpoint = guard.state_dict()
    guard.load_state_dict(checkpoint)
    guard.verify()
