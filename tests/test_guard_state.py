"""A guard that is saved and taken up again, and one that goes on to the next task."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from osf_kernels import project
from osf_torch import Subspace, protect, refresh
from tests.helpers import generator_for


def mlp(*key, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18), nn.Tanh())
    gen = generator_for("mlp", *key)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model.to(dtype)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model, optimizer, steps, *key):
    gen = generator_for("data", *key)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 18, generator=gen).to(dtype)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()


def saved(state):
    """Through a file, as a checkpoint goes, by the loader that runs no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("ratio", "when"), [(0.3, "step"), (0.7, "step"), (0.7, "backward")])
def test_a_run_resumes_to_the_bit(dtype, ratio, when):
    model = mlp("resume", dtype=dtype)
    subspaces = refresh(model, ratio, progress=False)
    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer, when=when)
    train(model, optimizer, 5, "first")
    checkpoint = saved(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        | {"guard": guard.state_dict()}
    )
    train(model, optimizer, 5, "second")

    resumed = mlp("another", dtype=dtype)
    other = adamw(resumed)
    fresh = protect(resumed, refresh(resumed, 0.5, progress=False), optimizer=other, when=when)
    resumed.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    fresh.load_state_dict(checkpoint["guard"])
    train(resumed, other, 5, "second")
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fresh.projections == guard.projections
    assert fresh.drift() == guard.drift()
    fresh.verify()


def test_a_state_of_one_sided_and_dense_subspaces():
    model = mlp("sides")
    W = model[0].weight.detach()
    U = torch.linalg.qr(W[:, :4])[0]
    optimizer = adamw(model)
    guard = protect(model, {"0.weight": Subspace(U, None)}, optimizer=optimizer)
    train(model, optimizer, 2)
    state = saved(guard.state_dict())
    assert state["weights"]["0.weight"]["V"] is None
    guard.load_state_dict(state)
    train(model, optimizer, 2)
    guard.verify()


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes():
    model = mlp("refused")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    before = guard.state_dict()
    good = saved(before)

    def changed(**items):
        return good | items

    def with_weight(**items):
        weights = copy.deepcopy(good["weights"])
        weights["2.weight"] |= items
        return good | {"weights": weights}

    less = {"0.weight": good["weights"]["0.weight"]}
    more = good["weights"] | {"4.weight": good["weights"]["0.weight"]}
    for state, text in (
        (changed(mode="core"), r"a state with mode='complement', got 'core'"),
        (changed(when="backward"), r"a state with when='step', got 'backward'"),
        (changed(restore=False), r"a state with restore=True, got False"),
        (changed(format=99), r"format=1, got 99"),
        ({}, r"format=1, got None"),
        (changed(weights=less), r"got none for 2\.weight"),
        (changed(weights=more), r"got 4\.weight too"),
        (with_weight(shape=(18, 31)), r"'2\.weight' with .*\(18, 30\).* got .*\(18, 31\)"),
        (with_weight(ranks=4), r"a state of 1 ranks for '2\.weight', got one of 4; resume on as"),
    ):
        with pytest.raises(ValueError, match=rf"Guard\.load_state_dict: expected .*{text}"):
            guard.load_state_dict(state)
    after = guard.state_dict()
    for name, entry in before["weights"].items():
        assert all(
            after["weights"][name][key] is value for key, value in entry.items() if key in "UV"
        )


# --- next_task ---


def test_the_next_task_protects_what_was_learned_too():
    model = mlp("next")
    kept = {"keep": "all", "complement": True, "compute_dtype": torch.float64}
    first = refresh(model, 0.4, progress=False, **kept)
    optimizer = adamw(model)
    guard = protect(model, first, optimizer=optimizer)
    train(model, optimizer, 20, "one")
    learned = copy.deepcopy(model)
    second = guard.next_task(widen=0.3, progress=False, compute_dtype=torch.float64)
    assert guard.subspaces is second
    for name, entry in second.items():
        short = min(entry.shape)
        assert first[name].rank == round(0.4 * short)
        assert entry.rank == first[name].rank + round(0.3 * short)
        assert entry.method == "deflated"
        assert entry.residual <= 1e-5
    train(model, optimizer, 20, "two")
    guard.verify()
    for name, entry in second.items():
        moved = model.get_parameter(name) - learned.get_parameter(name)
        assert moved.norm() > 1e-2
        for basis in (entry.svd.U.mT @ moved, moved @ entry.svd.V):
            assert basis.norm() <= 1e-5 * moved.norm()


def test_the_next_task_takes_other_ranks():
    model = mlp("ranks")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    train(model, optimizer, 3)
    assert {e.rank for e in guard.next_task(progress=False).values()} == {7}, "as they were"
    found = guard.next_task({"0.weight": 3, "2.weight": 0.9}, progress=False)
    assert [entry.rank for entry in found.values()] == [3, 16]
    assert {e.rank for e in guard.next_task(widen=100, progress=False).values()} == {18}
    train(model, optimizer, 3)
    with pytest.raises(ValueError, match=r"Guard\.next_task: expected ranks or widen, got both"):
        guard.next_task(0.3, widen=2)


@pytest.mark.parametrize(("mode", "restore"), [("core", True), ("complement", False)])
def test_triplets_that_may_have_moved_are_computed_anew(mode, restore):
    model = mlp("moved")
    first = refresh(model, 0.4, progress=False, keep="all", complement=True)
    optimizer = adamw(model)
    guard = protect(model, first, optimizer=optimizer, mode=mode, restore=restore)
    train(model, optimizer, 20)
    second = guard.next_task(progress=False)
    for name, entry in second.items():
        assert entry.method != "deflated"
        W = model.get_parameter(name).detach()
        assert (W - project(W, entry.U, entry.V)).norm() > 0.3 * W.norm()
        assert entry.residual <= 1e-5


def test_a_refused_next_task_leaves_the_protection_as_it_was():
    model = mlp("kept")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    train(model, optimizer, 2)
    before = guard.subspaces
    for ranks, text in ((19, "from 1 to min"), ({"0.weight": 3}, "none for 2.weight")):
        with pytest.raises(ValueError, match=text):
            guard.next_task(ranks, progress=False)
    assert guard.subspaces is before
    train(model, optimizer, 2)
    guard.verify()
