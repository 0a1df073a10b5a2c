"""Whoever writes to a weight or a gradient: what is pinned, what is refused, what verify tells."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from osf_kernels import project
from osf_torch import protect, refresh
from tests.small_guard import adamw, drawn, train

LIMIT = 1e-12  # of float64 and a few steps, relative


def mlp(*key):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18)).double()
    return drawn(model, "writes", *key)


def bases(model, ratio=0.4):
    return refresh(model, ratio, progress=False)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


class Moved:
    """How far the protected parts of a model are from where they were, by the operator alone."""

    def __init__(self, model, subspaces):
        self.model, self.subspaces = model, subspaces
        self.start = self._held()

    def _held(self):
        weights = {n: self.model.get_parameter(n).detach() for n in self.subspaces}
        return {
            n: W - project(W, self.subspaces[n].U, self.subspaces[n].V) for n, W in weights.items()
        }

    def __call__(self):
        now = self._held()
        return max(float((now[n] - H).norm() / H.norm()) for n, H in self.start.items())


# --- weights: steps that need no gradient ---


class Zeroth(torch.optim.Optimizer):
    """Two evaluations at random offsets, as MeZO: no gradient at all."""

    def __init__(self, params, lr=1e-4, through_data=False):
        super().__init__(params, {"lr": lr})
        self.through_data = through_data

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        noise = [torch.randn_like(p) for p in params]

        def add(scale):
            for p, z in zip(params, noise, strict=True):
                (p.data if self.through_data else p).add_(z, alpha=scale)

        add(1e-3)
        above = closure()
        add(-2e-3)
        below = closure()
        add(1e-3 - self.defaults["lr"] * float(above - below) / 2e-3)
        return above


class Decaying(torch.optim.Optimizer):
    """Decays every weight, also one whose gradient is None."""

    def __init__(self, params, through_data=False):
        super().__init__(params, {})
        self.through_data = through_data

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                (p.data if self.through_data else p).mul_(0.99)
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize("restore", [True, "deferred"])
@pytest.mark.parametrize("through_data", [False, True])
def test_a_step_without_gradients_is_pinned(through_data, restore):
    model = mlp("zeroth")
    optimizer = Zeroth(model.parameters(), through_data=through_data)
    subspaces = bases(model)
    guard = protect(model, subspaces, optimizer=optimizer, restore=restore)
    moved, first = Moved(model, subspaces), model[0].weight.detach().clone()
    for _ in range(5):
        optimizer.step(lambda: model(torch.ones(4, 18).double()).square().mean().detach())
    assert moved() <= LIMIT
    assert not torch.equal(first, model[0].weight), "it did train"
    assert (guard.projections, guard.restorations) == (0, 5)
    guard.verify()


@pytest.mark.parametrize("through_data", [False, True])
def test_decay_without_a_gradient_is_pinned_and_what_stands_still_stays(through_data):
    model = mlp("decaying")
    subspaces = bases(model)
    optimizer = Decaying(model.parameters(), through_data)
    guard = protect(model, subspaces, optimizer=optimizer)
    moved = Moved(model, subspaces)
    for _ in range(5):
        optimizer.zero_grad()
        model[2](torch.ones(4, 30).double()).square().mean().backward()  # the first is not used
        optimizer.step()
    assert moved() <= LIMIT
    guard.verify()
    other = sgd(model)
    guard = protect(model, subspaces, optimizer=other)
    other.zero_grad()
    still = model[0].weight.detach().clone()
    model[2](torch.ones(4, 30).double()).square().mean().backward()
    other.step()
    assert torch.equal(still, model[0].weight), "a weight that nothing wrote to isn't touched"


# --- weights: writes between steps ---

LOADS = {
    "copied": lambda p, q: p.copy_(q),
    "data copied": lambda p, q: p.data.copy_(q),
    "data assigned": lambda p, q: setattr(p, "data", q.clone()),
    "data averaged": lambda p, q: p.data.lerp_(q, 0.01),
    "set": lambda p, q: p.set_(q.clone()),
}


@pytest.mark.parametrize("ratio", [0.4, 0.7])
@pytest.mark.parametrize("name", LOADS)
def test_a_step_refuses_weights_that_something_else_replaced(name, ratio):
    model, other = mlp("mine"), mlp("other")
    optimizer = adamw(model)
    guard = protect(model, bases(model, ratio), optimizer=optimizer)
    train(model, optimizer, 2)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            LOADS[name](p, q.detach())
    loaded = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="to be where the last step left it"):
        train(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(loaded, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="expected the protected part of"):
        guard.verify()


def test_a_vector_that_is_written_to_parameters_is_seen_and_the_same_one_is_no_error():
    model, other = mlp("vector"), mlp("other vector")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 2)
    own = parameters_to_vector(model.parameters()).detach().clone()
    vector_to_parameters(parameters_to_vector(other.parameters()).detach(), model.parameters())
    with pytest.raises(RuntimeError, match="protect the model again"):
        train(model, optimizer, 1)
    vector_to_parameters(own, model.parameters())
    train(model, optimizer, 1)
    guard.verify()


def test_restore_pins_what_an_optimizer_exchanged_outside_of_its_step():
    """As schedule-free optimizers do for evaluation, from a state that is never pinned."""
    model = mlp("exchanged")
    optimizer = adamw(model)
    subspaces = bases(model)
    guard = protect(model, subspaces, optimizer=optimizer)
    moved = Moved(model, subspaces)
    train(model, optimizer, 3)
    for write in (lambda p: p.add_(0.01 * torch.randn_like(p)), lambda p: p.data.mul_(0.999)):
        with torch.no_grad():
            for p in model.parameters():
                write(p)
        assert moved() > 1e-4
        with pytest.raises(RuntimeError, match=r"call Guard\.restore\(\) after it"):
            guard.verify()
        guard.restore()
        assert moved() <= LIMIT
        guard.verify()
        train(model, optimizer, 1)
    assert moved() <= LIMIT


def test_restore_refuses_weights_of_another_model():
    model = mlp("own")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    train(model, optimizer, 1)
    model.load_state_dict(mlp("foreign").state_dict())
    with pytest.raises(RuntimeError, match="something else wrote to the weight since"):
        guard.restore()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), mlp("foreign").parameters(), strict=True)
    )


# --- gradients: written to after they were projected ---

NOISES = {
    "in place": lambda p: p.grad.add_(torch.randn_like(p)),
    "through data": lambda p: p.grad.data.add_(torch.randn_like(p)),
    "small": lambda p: p.grad.data.add_(torch.randn_like(p), alpha=1e-2 * float(p.grad.norm())),
    "another one": lambda p: setattr(p, "grad", torch.randn_like(p)),
    "signs": lambda p: p.grad.data[::2].neg_(),
    "places": lambda p: p.grad.data.copy_(p.grad.roll(1, 0)),
}


def later_hook(optimizer, model, noise):
    optimizer.register_step_pre_hook(lambda *_: [noise(p) for p in model.parameters()] and None)


@pytest.mark.parametrize("ratio", [0.4, 0.7])
@pytest.mark.parametrize("place", ["after clipping", "by a later hook", "after backward"])
@pytest.mark.parametrize("name", NOISES)
def test_a_gradient_that_was_written_to_is_projected_again_or_told(name, place, ratio):
    model = mlp("noise", name)
    subspaces = bases(model, ratio)
    optimizer = sgd(model)
    when = "backward" if place == "after backward" else "step"
    guard = protect(model, subspaces, optimizer=optimizer, restore=False, when=when, record=True)
    moved = Moved(model, subspaces)
    if place == "by a later hook":
        later_hook(optimizer, model, NOISES[name])
    model(torch.ones(4, 18).double()).square().mean().backward()
    if place != "by a later hook":
        if place == "after clipping":
            guard.clip_grad_norm_(1.0)
        for p in model.parameters():
            NOISES[name](p)
    optimizer.step()
    if moved() <= LIMIT:
        guard.verify()
        return
    assert max(leak.applied for leak in guard.leak().values()) > 1e-3, "what the step has used"
    with pytest.raises(RuntimeError, match="expected every step to use projected gradients"):
        guard.verify()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("ratio", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("when", ["step", "backward"])
def test_scaling_and_clipping_are_no_writes(when, ratio, mode, dtype):
    """Also of gradients that lie nearly all in the protected span, of which rounding is left."""
    model = mlp("scaled").to(dtype)
    subspaces = bases(model, ratio)
    optimizer = sgd(model, momentum=0.9)
    guard = protect(model, subspaces, optimizer=optimizer, restore=False, when=when, mode=mode)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None
    )
    for step in range(4):
        optimizer.zero_grad()
        for name, s in subspaces.items():
            p = model.get_parameter(name)
            inside = p.detach() - project(p.detach(), s.U, s.V, mode=mode)
            p.grad = None
            (p * (inside + 10.0 ** (-2 * step) * torch.randn_like(p))).sum().backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.mul_(2.0**-10)
        optimizer.step()
    guard.verify()


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("first", ["optimizer", "guard"])
def test_an_optimizer_in_the_backward_pass_uses_projected_gradients(first, set_to_none):
    model = mlp("in backward")
    subspaces = bases(model)
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none=set_to_none)

    def hook():
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)

    if first == "optimizer":
        hook()
    guard = protect(model, subspaces, restore=False)
    if first == "guard":
        hook()
    moved = Moved(model, subspaces)
    for _ in range(5):
        model(torch.ones(4, 18).double()).square().mean().backward()
    assert moved() <= LIMIT
    assert guard.projections == 10
    guard.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_verify_is_content_with_rounding_and_with_no_more(ratio, dtype):
    model = mlp("rounding", ratio).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    guard = protect(model, bases(model, ratio), optimizer=optimizer)
    train(model, optimizer, 60)
    guard.verify()
    beyond = {torch.bfloat16: 0.02, torch.float16: 3e-3, torch.float32: 1e-4}[dtype]
    with torch.no_grad():
        model[0].weight.mul_(1 - beyond)
    with pytest.raises(RuntimeError, match=r"protected part of '0\.weight' to be where it was"):
        guard.verify()


def test_weights_that_are_put_back_are_no_error_where_nothing_is_pinned():
    model = mlp("put back")
    optimizer = sgd(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=False)
    train(model, optimizer, 1)
    for _ in range(2):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        model.load_state_dict(kept)
        guard.verify()
        train(model, optimizer, 1)
    guard.verify()
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"something else since the last one in 0\.weight;"):
        guard.verify()


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("then", ["step", "verify", "load"])
def test_bases_that_something_writes_to_are_refused(then, restore):
    """They are the caller's tensors, and a distributed checkpoint loads into those of a state."""
    model = mlp("bases")
    optimizer = sgd(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=restore)
    train(model, optimizer, 1)
    state = guard.state_dict()
    U = state["weights"]["0.weight"]["U"]
    good = U.clone()
    U.copy_(torch.linalg.qr(torch.randn_like(U))[0])
    weights = [p.detach().clone() for p in model.parameters()]
    if then == "load" and restore:  # without a part that was pinned there is little to compare with
        with pytest.raises(ValueError, match="a state of the weights that the model has"):
            guard.load_state_dict(state)
    call = guard.verify if then == "verify" else optimizer.step
    with pytest.raises(RuntimeError, match=r"to be as they were given, got ones .* of 0\.weight"):
        call()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    U.copy_(good)
    guard.load_state_dict(state)
    train(model, optimizer, 1)
    guard.verify()


def test_protecting_and_judging_within_autocast():
    model = mlp("autocast").float()
    optimizer = sgd(model)
    with torch.autocast("cpu", torch.bfloat16):
        guard = protect(model, bases(model), optimizer=optimizer, restore=False)
        optimizer.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None
        )
        train(model, optimizer, 2)
        guard.verify(tol=1e-5)
        guard.next_task(progress=False)
        train(model, optimizer, 1)
    guard.verify(tol=1e-5)


def test_what_restore_false_leaves_is_logged_and_refused_by_tol(caplog):
    model = mlp("unrestored")
    subspaces = bases(model)
    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer, restore=False)
    moved = Moved(model, subspaces)
    train(model, optimizer, 10)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "osf_torch"):
        guard.verify()
    assert "protected part of 2 of 2 weights has moved since protect()" in caplog.text
    assert max(guard.drift().values()) == pytest.approx(moved(), rel=0.5)
    with pytest.raises(RuntimeError, match="expected the protected part of"):
        guard.verify(tol=1e-4)
    guard.verify(tol=1.0)
    plain = sgd(model)
    guard = protect(model, subspaces, optimizer=plain, restore=False)
    train(model, plain, 10)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "osf_torch"):
        guard.verify(tol=1e-9)
        guard.verify()
    assert "has moved" not in caplog.text
