"""What ``Guard.next_task`` does to the optimizer's state of the weights that it guards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench import optimizers
from bench.optimizers import OPTIMIZERS
from osf_torch import protect, refresh
from tests.small_confine import protected_part, worst
from tests.small_guard import adamw, drawn, local, one_rank, sharded, train

ROUNDING = 2e-6
WEIGHTS = ("0.weight", "2.weight")


def mlp(*key):
    return drawn(nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18)), "mlp", *key)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


def guarded(model, optimizer, **options):
    guard = protect(model, refresh(model, 0.3, progress=False), optimizer=optimizer, **options)
    train(model, optimizer, 10, "first")
    return guard


def copied(optimizer, model):
    """The state of each parameter, by name."""
    return {
        name: {k: local(t).clone() for k, t in optimizer.state.get(p, {}).items()}
        for name, p in model.named_parameters()
    }


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(t, second[key]) for key, t in first.items())


@pytest.mark.parametrize(
    ("choice", "least", "most"),
    [("keep", 1e-2, 1), ("project", 0, 1e-5), ("clear", 0, 1e-5)],
)
def test_momentum_from_before_moves_what_is_protected_only_now(choice, least, most):
    """A linear optimizer without decay, of which nothing is restored."""
    model = mlp("momentum")
    optimizer = sgd(model)
    guard = guarded(model, optimizer, restore=False)
    found = guard.next_task(widen=0.3, optimizer_state=choice, progress=False)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 5, "second")
    for name in WEIGHTS:
        moved = model.state_dict()[name] - before[name]
        share = float(protected_part(moved, found[name]).norm() / moved.norm())
        assert least <= share <= most


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("make", [adamw, sgd, "sharded"])
def test_averages_of_gradients_are_projected_and_all_else_stays(make, mode):
    if make == "sharded":
        with one_rank():
            projected_by_the_new_bases(sharded(mlp("projected")), adamw, mode)
    else:
        projected_by_the_new_bases(mlp("projected"), make, mode)


def projected_by_the_new_bases(model, make, mode):
    optimizer = make(model)
    guard = guarded(model, optimizer, mode=mode)
    before = copied(optimizer, model)
    # Some of what was protected is let go of, and something else is protected instead.
    found = guard.next_task(0.5, optimizer_state="project", progress=False)
    after = copied(optimizer, model)
    changed = set()
    for name, states in after.items():
        for key, now in states.items():
            then = before[name][key]
            if torch.equal(now, then):
                continue
            changed.add((name, key))
            U, V = (dense(basis) for basis in (found[name].U, found[name].V))
            x = then.double()
            rows, columns = x - U @ (U.mT @ x), (x @ V) @ V.mT
            if mode == "complement":
                wanted = rows - (rows @ V) @ V.mT
            else:
                wanted = x - U @ (U.mT @ columns)
            assert (now - wanted).norm() <= ROUNDING * x.norm()
            assert (now - x).norm() > 1e-2 * x.norm()
    momentum = "exp_avg" if make is adamw else "momentum_buffer"
    assert changed == {(name, momentum) for name in WEIGHTS}
    train(model, optimizer, 3, "second")
    guard.verify()


def dense(basis):
    """The columns that span what is protected, of a basis that is held high."""
    assert basis.spans == "high"
    return local(basis.columns).double()


def test_a_state_that_is_cleared_begins_as_a_new_optimizers():
    model = mlp("cleared")
    for layer in (model[0], model[2]):
        layer.bias.requires_grad_(False)
    optimizer = adamw(model)
    guard = guarded(model, optimizer)
    twin = copy.deepcopy(model)
    found = guard.next_task(widen=0.3, optimizer_state="clear", progress=False)
    assert not any(copied(optimizer, model).values())
    new = adamw(twin)
    protect(twin, found, optimizer=new)
    for one, its in ((model, optimizer), (twin, new)):
        train(one, its, 3, "second")
    assert same(model.state_dict(), twin.state_dict())
    guard.verify()


def test_a_state_is_kept_unless_something_else_is_asked_for():
    model = mlp("kept")
    optimizer = adamw(model)
    guard = guarded(model, optimizer)
    before = copied(optimizer, model)
    guard.next_task(widen=0.3, progress=False)
    after = copied(optimizer, model)
    assert all(same(states, before[name]) for name, states in after.items())


def test_muon_scales_up_what_is_left_of_the_momentum():
    """Its polynomial makes a full step of a direction however little momentum it has."""
    shares = {}
    for choice in ("keep", "project", "clear"):
        model = mlp("muon")
        optimizer = torch.optim.Muon([model[0].weight, model[2].weight], lr=0.01, weight_decay=0)
        guard = guarded(model, optimizer, restore=False)
        found = guard.next_task(widen=0.3, optimizer_state=choice, progress=False)
        before = model[0].weight.detach().clone()
        train(model, optimizer, 40, "second")
        moved = model[0].weight.detach() - before
        part = protected_part(moved, found["0.weight"])
        shares[choice] = float(part.norm() / moved.norm())
    assert shares["keep"] > 0.4  # of momentum that is down to .95 ** 40 of itself
    assert max(shares["project"], shares["clear"]) < 0.1


UNKNOWN = ("AdamW, schedule-free", "AdamW, 8 bits (torchao)", "AdamW, 8 bits (bitsandbytes)")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [n for n, o in OPTIMIZERS.items() if not o.accelerator])
def test_states_of_optimizers_by_name(name):
    """A state is projected or refused, and begins anew where it is cleared."""
    reason = optimizers.missing(OPTIMIZERS[name])
    if reason is not None:
        pytest.skip(reason)
    outcome = optimizers.train(OPTIMIZERS[name], "restored", 3)
    model, optimizer, guard = outcome.model, outcome.optimizer, outcome.guard
    options = {"widen": 8, "progress": False}
    if name in UNKNOWN:
        before = guard.subspaces
        with pytest.raises(ValueError, match=r'isn\'t known; pass "clear"'):
            guard.next_task(**options, optimizer_state="project")
        assert guard.subspaces is before
    else:
        guard.next_task(**options, optimizer_state="project")
    guard.next_task(**options, optimizer_state="clear")
    assert not any(optimizer.state.get(p) for p in model.parameters())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers.exchange(optimizer, "train", guard)
    with optimizers.eagerly():
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, optimizers.WIDTH)).square().mean().backward()
            optimizer.step()
    guard.verify()
    assert worst(start, model, guard.subspaces) <= ROUNDING
    assert any((p - start[n]).norm() > 1e-4 for n, p in model.named_parameters())


class Keeping(torch.optim.Optimizer):
    """An optimizer with an entry of its own in its state."""

    def __init__(self, parameters, entry):
        super().__init__(parameters, {})
        self.entry = entry

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p] |= self.entry(p)


STRANGE = {
    "z": lambda p: {"z": p.clone()},  # the weights of schedule-free optimizers
    "state1": lambda p: {"step": 1, "state1": torch.zeros(p.shape, dtype=torch.uint8)},
    "exp_avg": lambda p: {"exp_avg": torch.zeros(3)},
    "old_dirs": lambda p: {"old_dirs": [p.clone()]},
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_state_that_is_not_known_is_not_projected(name):
    model = mlp("strange")
    optimizer = Keeping(model.parameters(), STRANGE[name])
    guard = guarded(model, optimizer)
    subspaces = guard.subspaces
    with pytest.raises(ValueError, match=rf"got '{name}' of 0\.weight.* of Keeping.*\"clear\""):
        guard.next_task(widen=0.3, optimizer_state="project", progress=False)
    assert guard.subspaces is subspaces
    assert name in optimizer.state[model[0].weight]
    guard.next_task(widen=0.3, optimizer_state="clear", progress=False)
    assert model[0].weight not in optimizer.state
    assert model[0].bias in optimizer.state


@pytest.mark.parametrize("choice", ["project", "clear"])
def test_choices_that_an_optimizer_does_not_allow(choice):
    model = mlp("refused")
    guard = protect(model, refresh(model, 0.3, progress=False), restore=False)
    subspaces = guard.subspaces
    with pytest.raises(ValueError, match=r"expected protect\(..., optimizer=\) with optimizer_st"):
        guard.next_task(widen=0.3, optimizer_state=choice, progress=False)
    lbfgs = torch.optim.LBFGS(model.parameters())
    guard = protect(model, subspaces, optimizer=lbfgs)
    with pytest.raises(ValueError, match="got LBFGS, which has one for all"):
        guard.next_task(widen=0.3, optimizer_state=choice, progress=False)
    with pytest.raises(ValueError, match="expected optimizer_state to be"):
        guard.next_task(widen=0.3, optimizer_state=choice.upper(), progress=False)
    assert guard.subspaces is subspaces
