"""What is written to sharded gradients and weights between projections and steps, and resuming."""

from __future__ import annotations

import copy
import itertools
from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from osf_kernels import project
from osf_torch import protect, refresh
from tests.distributed.ranks import run_ranks
from tests.helpers import generator_for

pytestmark = pytest.mark.slow

LIMIT = 1e-12  # of float64 and a few steps of SGD, which is linear in its gradients
KINDS = ("tensor parallel", "fsdp")


def mlp():
    model = nn.Sequential(nn.Linear(14, 26), nn.Tanh(), nn.Linear(26, 14)).double()
    gen = generator_for("writes")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model


def start(kind, ranks, optimizer, ratio=0.4, **options):
    model = mlp()
    subspaces = refresh(model, ratio, progress=False)
    mesh = init_device_mesh("cpu", (ranks,))
    if kind == "fsdp":
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    made = optimizer(model.parameters(), lr=0.05)
    return model, made, protect(model, subspaces, optimizer=made, **options)


def whole(model, names):
    weights = {name: model.get_parameter(name).detach() for name in names}
    return {n: W.full_tensor() if isinstance(W, DTensor) else W for n, W in weights.items()}


def backward(model, step):
    x = torch.randn(6, 14, generator=generator_for("x", step), dtype=torch.float64)
    (model(x) - x.sin()).square().mean().backward()


def gradients(model):
    return [p.grad for p in model.parameters()]


def add_after_clipping(model, guard):
    guard.clip_grad_norm_(1.0)
    for g in gradients(model):
        g.add_(torch.ones_like(g), alpha=0.01)


def clip_values_after_projecting(model, guard):
    guard.project_grads()
    nn.utils.clip_grad_value_(list(model.parameters()), 1e-3)


def copy_after_projecting(model, guard):
    kept = [g.clone() for g in gradients(model)]
    guard.project_grads()
    for g, unprojected in zip(gradients(model), kept, strict=True):
        g.copy_(unprojected)


def add_to_what_is_held_here(model, guard):
    guard.project_grads()
    for g in gradients(model):
        (g.to_local() if isinstance(g, DTensor) else g).add_(0.01)


WRITES = {
    "zeroed in place": {"set_to_none": False},
    "accumulated": {"set_to_none": False, "backwards": 3},
    "accumulated under hooks": {"backwards": 3, "when": "backward"},
    "added to": {"write": add_after_clipping},
    "clipped by value": {"write": clip_values_after_projecting},
    "copied to": {"write": copy_after_projecting},
    "added to here": {"write": add_to_what_is_held_here},
}


def written_run(ranks, kind, backwards=1, set_to_none=True, write=None, **options):
    model, optimizer, guard = start(kind, ranks, torch.optim.SGD, restore=False, **options)
    names = list(guard.subspaces)
    before = whole(model, names)
    for step in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        for part in range(backwards):
            backward(model, (step, part))
        if write is not None:
            write(model, guard)
        optimizer.step()
    guard.verify()
    moved = {}
    for name, W in whole(model, names).items():
        U, V = guard.subspaces[name].U, guard.subspaces[name].V
        step = W - before[name]
        moved[name] = float((step - project(step, U, V)).norm() / step.norm())
    return moved


def written_runs(rank, ranks):
    return {
        (kind, name): written_run(ranks, kind, **options)
        for kind in KINDS
        for name, options in WRITES.items()
    }


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_was_written_to_is_projected_again(kind, name):
    for runs in results("written"):
        assert max(runs[kind, name].values()) <= LIMIT


def loaded_run(ranks, kind):
    model, optimizer, guard = start(kind, ranks, torch.optim.AdamW)
    backward(model, 0)
    optimizer.step()
    own = copy.deepcopy(model.state_dict())
    other = {name: value * 1.5 for name, value in own.items()}
    model.load_state_dict(other)
    backward(model, 1)
    refusal = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        refusal = str(error)
    names = list(guard.subspaces)
    untouched = all(
        torch.equal(W, other[name].full_tensor()) for name, W in whole(model, names).items()
    )
    model.load_state_dict(own)
    optimizer.step()
    guard.verify()
    return untouched, refusal


def loaded_runs(rank, ranks):
    return [loaded_run(ranks, kind) for kind in KINDS]


def test_a_checkpoint_that_was_loaded_without_the_guards_state_is_refused():
    for runs in results("loaded"):
        for untouched, refusal in runs:
            assert "the protected part of '0.weight' to be where the last step left it" in refusal
            assert untouched


def next_task_run(ranks, kind, ratio):
    model, optimizer, guard = start(kind, ranks, torch.optim.AdamW, ratio)
    backward(model, 0)
    optimizer.step()
    guard.next_task(widen=0.1, progress=False)
    state = copy.deepcopy((model.state_dict(), guard.state_dict()))
    again, _, fresh = start(kind, ranks, torch.optim.AdamW, 0.5)
    again.load_state_dict(state[0])
    fresh.load_state_dict(state[1])
    wanted, found = (g.next_task(widen=0.1, progress=False) for g in (guard, fresh))
    return max(fresh.released().values()), all(
        torch.equal(found[name].factors()[part], factor)
        for name, entry in wanted.items()
        for part, factor in entry.factors().items()
    )


def next_task_runs(rank, ranks):
    return [next_task_run(ranks, kind, ratio) for kind in KINDS for ratio in (0.3, 0.7)]


def test_a_resumed_sharded_run_goes_on_to_the_next_task_to_the_bit():
    for runs in results("next task"):
        for released, equal in runs:
            assert equal
            assert released <= 1e-6


RUNS = {"written": written_runs, "loaded": loaded_runs, "next task": next_task_runs}


def refused_run(ranks, kind):
    """One rank's own trouble: what each of them says."""
    model, optimizer, guard = start(kind, ranks, torch.optim.AdamW, restore=False)
    backward(model, 0)
    with torch.no_grad():
        optimizer.register_step_pre_hook(lambda *_: write_on_the_last_rank(model, ranks))
    optimizer.step()
    try:
        guard.verify()
    except RuntimeError as error:
        return str(error)
    return ""


def write_on_the_last_rank(model, ranks):
    if torch.distributed.get_rank() == ranks - 1:
        model[0].weight.grad.to_local().add_(1)


def refused_runs(rank, ranks):
    return {kind: refused_run(ranks, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_refuse_what_one_of_them_finds(kind):
    """None waits for the others in a collective."""
    first, last = (found[kind] for found in all_refusals())
    assert "gradients of 0.weight that were written to after they were projected" in last
    assert "got a refusal on another rank, whose own message says why" in first


@lru_cache(maxsize=1)
def all_refusals():
    return run_ranks(2, refused_runs, 2)


TROUBLES = {
    "NaN": lambda weight: weight[0].fill_(float("nan")),
    "moved": lambda weight: weight.mul_(1.5),
    "tol": None,
}


def mixed_runs(rank, ranks):
    """What each rank says of trouble that the last one alone has, with a weight that is whole."""
    said = {}
    for restore, name in itertools.product((True, False), TROUBLES):
        model = mlp()
        subspaces = refresh(model, 0.4, progress=False)
        fully_shard(model[0], mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        guard = protect(model, subspaces, optimizer=optimizer, restore=restore)
        backward(model, 0)
        optimizer.step()
        guard.verify()
        tol, write = None, TROUBLES[name]
        if rank == ranks - 1:
            tol = "none" if write is None else None
            if write is not None:
                with torch.no_grad():
                    write(model[2].weight)
        try:
            guard.verify(tol=tol)
        except (RuntimeError, TypeError) as error:
            said[restore, name] = str(error)
        guard.remove()
    return said


def test_all_ranks_refuse_a_whole_weight_of_one_of_them():
    first, last = run_ranks(2, mixed_runs, 2)
    expected = {"NaN": "2.weight", "moved": "2.weight", "tol": "expected tol to be a number"}
    for (_, name), said in last.items():
        assert expected[name] in said
    assert set(first) == set(last) == set(itertools.product((True, False), TROUBLES))
    for said in first.values():
        assert "got a refusal on another rank" in said


def whole_side_run(ranks, kind):
    """What a weight moves of which a whole side is protected, and nothing is restored."""
    model = nn.Sequential(nn.Linear(8, 20, bias=False), nn.Linear(20, 8, bias=False))
    gen = generator_for("whole side")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    subspaces = refresh(model, 1.0, progress=False)
    mesh = init_device_mesh("cpu", (ranks,))
    if kind == "fsdp":
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    guard = protect(model, subspaces, optimizer=optimizer, restore=False)
    names = ("0.weight", "1.weight")
    before = {n: W.clone() for n, W in whole(model, names).items()}
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(6, 8, generator=generator_for("x", step))
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
    guard.verify()
    after = whole(model, names)
    return {n: float((after[n] - before[n]).abs().max()) for n in names}


def whole_side_runs(rank, ranks):
    return {kind: whole_side_run(ranks, kind) for kind in KINDS}


def test_a_weight_of_which_a_whole_side_is_protected_stays():
    """Exactly, however it is sharded: AdamW makes full steps of rounding."""
    for found in run_ranks(2, whole_side_runs, 2):
        for kind in KINDS:
            assert found[kind] == {"0.weight": 0.0, "1.weight": 0.0}, kind


def everything(rank, ranks):
    return {name: run(rank, ranks) for name, run in RUNS.items()}


@lru_cache
def all_results():
    return run_ranks(2, everything, 2)


def results(name):
    return [found[name] for found in all_results()]
