"""restore="deferred": sharded weights are pinned at the next step, and nothing adds up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from osf_kernels import project
from osf_torch import protect, refresh
from tests.helpers import generator_for
from tests.small_guard import adamw, drawn, local, one_rank, sharded

DEFERRED = "deferred"


@pytest.fixture(autouse=True, scope="module")
def process_group():
    with one_rank():
        yield


def plain(*key):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18)).double()
    return drawn(model, "deferred", *key)


def mlp(*key):
    return sharded(plain(*key))


def bases(model, ratio=0.4, **options):
    return refresh(model, ratio, progress=False, **options)


def batches(count, *key):
    gen = generator_for("batches", *key)
    return [torch.randn(16, 18, generator=gen, dtype=torch.float64) for _ in range(count)]


def backward(model, optimizer, x):
    optimizer.zero_grad()
    (model(x) - x.sin()).square().mean().backward()


def copies(model):
    return [local(p).clone() for p in model.parameters()]


def same(model, copied):
    return all(torch.equal(a, local(p)) for a, p in zip(copied, model.parameters(), strict=True))


def train(model, optimizer, xs):
    for x in xs:
        backward(model, optimizer, x)
        optimizer.step()


def held(p, subspace, mode):
    return p - project(p, subspace.U, subspace.V, mode=mode)


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_it_is_the_formula_pinned_before_each_step(mode, ratio):
    model, wanted = mlp(mode, ratio), plain(mode, ratio)
    subspaces = bases(model, ratio)
    xs = batches(5, mode, ratio)
    guard = protect(model, subspaces, optimizer=adamw(model), restore=DEFERRED, mode=mode)
    train(model, guard._optimizer, xs)
    guard.restore()

    optimizer = adamw(wanted)
    named = {name: p for name, p in wanted.named_parameters() if name in subspaces}
    start = {name: held(p.detach(), subspaces[name], mode) for name, p in named.items()}

    @torch.no_grad()
    def pin():
        for name, p in named.items():
            p.add_(start[name] - held(p, subspaces[name], mode))

    for x in xs:
        backward(wanted, optimizer, x)
        pin()
        for name, p in named.items():
            p.grad.sub_(held(p.grad, subspaces[name], mode))
        optimizer.step()
    pin()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert (local(a) - b).norm() <= 1e-12 * b.norm()


def test_between_steps_the_drift_is_one_steps_and_restoring_ends_it():
    model = mlp("drift")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    between = []
    for x in batches(200, "drift"):
        train(model, optimizer, [x])
        between.append(max(guard.drift().values()))
    assert max(between) <= 3 * between[0], "it doesn't add up"
    assert min(between) >= 1e-4, "AdamW did move it"
    guard.restore()
    assert max(guard.drift().values()) <= 1e-12
    still = copies(model)
    guard.restore()
    assert same(model, still)


@pytest.mark.parametrize("end", ["verify", "next_task", "remove"])
def test_what_looks_at_weights_pins_them_first(end):
    model = mlp(end)
    optimizer = adamw(model)
    subspaces = bases(model)
    guard = protect(model, subspaces, optimizer=optimizer, restore=DEFERRED)
    start = {n: held(p, subspaces[n], "complement") for n, p in named(model, subspaces)}
    train(model, optimizer, batches(3, end))
    getattr(guard, end)(**({"progress": False} if end == "next_task" else {}))
    for name, p in named(model, subspaces):
        moved = held(p, subspaces[name], "complement") - start[name]
        assert moved.norm() <= 1e-12 * start[name].norm(), name
    if end == "next_task":
        train(model, optimizer, batches(3, "more"))
        guard.verify()


def named(model, subspaces):
    return [(name, local(p)) for name, p in model.named_parameters() if name in subspaces]


def test_a_run_resumes_to_the_bit_with_weights_still_to_pin():
    model = mlp("resume")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    train(model, optimizer, batches(3, "first"))
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict(), guard.state_dict()))
    assert checkpoint[2]["moved"] == ["0.weight", "2.weight"]
    train(model, optimizer, batches(3, "second"))

    resumed = mlp("other")
    other = adamw(resumed)
    fresh = protect(resumed, bases(resumed), optimizer=other, restore=DEFERRED)
    resumed.load_state_dict(checkpoint[0])
    other.load_state_dict(checkpoint[1])
    fresh.load_state_dict(checkpoint[2])
    train(resumed, other, batches(3, "second"))
    assert same(model, copies(resumed))


def test_a_skipped_step_changes_nothing_and_the_next_one_pins():
    model = mlp("skipped")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    first, second = batches(2, "skipped")
    train(model, optimizer, [first])
    before = copies(model)
    optimizer.found_inf = torch.ones(())  # as GradScaler tells a fused optimizer
    guard._steps.before(optimizer)
    guard._steps.after(optimizer)
    assert same(model, before)
    del optimizer.found_inf
    guard.restore()
    guard.verify(tol=1e-12)
    train(model, optimizer, [second])
    guard.verify(tol=1e-12)


def test_clipping_pins_with_the_projection():
    model = mlp("clipped")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    first, second = batches(2, "clipped")
    train(model, optimizer, [first])
    backward(model, optimizer, second)
    guard.clip_grad_norm_(1.0)
    assert max(guard.drift().values()) <= 1e-12
    weights = copies(model)
    guard._steps.before(optimizer)
    assert same(model, weights)


def test_protecting_again_keeps_the_weights_as_they_are_found():
    """The new subspaces were computed from the weights as they stand."""
    model = mlp("again")
    optimizer = adamw(model)
    old = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    train(model, optimizer, batches(2, "again"))
    found = copies(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    assert same(model, found)
    train(model, optimizer, batches(2, "more"))
    guard.verify()
    old.remove()
    guard.verify()


def test_what_it_says_and_refuses():
    model = mlp("refused")
    optimizer = adamw(model)
    subspaces = bases(model)
    for options, message in [
        ({"restore": "later"}, r'restore to be True, False or "deferred", got \'later\''),
        (
            {"restore": DEFERRED, "when": "backward"},
            r'expected when="step" with restore="deferred"',
        ),
        ({"restore": DEFERRED, "optimizer": None}, "optimizer to be given with restore='deferred'"),
    ]:
        with pytest.raises(ValueError, match=message):
            protect(model, subspaces, **{"optimizer": optimizer} | options)
    assert not optimizer._optimizer_step_pre_hooks
    guard = protect(model, subspaces, optimizer=optimizer, restore=DEFERRED)
    assert (guard.when, guard.restores) == ("step", DEFERRED)
    assert "restored at the next step where sharded" in repr(guard)
    unpinned = protect(model, subspaces, optimizer=optimizer, restore=False)
    with pytest.raises(RuntimeError, match="restore=True or 'deferred'"):
        unpinned.restore()


def test_weights_that_take_no_collective_are_pinned_at_once():
    """An average that is taken after each step collects no drift."""
    model = plain("at once")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    for x in batches(3, "at once"):
        train(model, optimizer, [x])
        assert max(guard.drift().values()) <= 1e-12
    assert guard.state_dict()["moved"] == []
    guard.verify()


def test_deferred_weights_are_refused_by_whatever_would_pin_them():
    model = mlp("deferred")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    train(model, optimizer, batches(2, "deferred"))
    other = mlp("other")
    model.load_state_dict(other.state_dict())
    for call in (guard.restore, guard.project_grads, guard.verify, guard.next_task, guard.remove):
        with pytest.raises(RuntimeError, match="before exchanging weights"):
            call()
        assert same(model, copies(other)), call
    assert not optimizer._optimizer_step_pre_hooks, "remove has taken the hooks off"


def test_a_refused_step_still_knows_what_is_to_be_pinned():
    model = plain("refused")
    fully_shard(model[0])
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, restore=DEFERRED)
    train(model, optimizer, batches(2, "refused"))
    model[2].weight.grad = torch.eye(18, 30, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match=r"dense gradient of parameter '2\.weight'"):
        optimizer.step()
    assert guard.drift()["0.weight"] > 1e-6
    guard.restore()
    assert max(guard.drift().values()) <= 1e-12
