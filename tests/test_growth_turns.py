"""The whole turn between two tasks by inputs: ``next_task(batches=...)``, guarded and confined."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from osf_torch import Confined, Subspace, confine, input_subspaces, protect, refresh
from osf_torch.grown import Grown
from tests import small_confine, small_guard
from tests.helpers import generator_for, grown
from tests.small_experts import experts_model, ids
from tests.test_inputs import decaying, high, inputs_of, share

HOLDERS = ["guard", "confined"]
STARTS = ["refresh", "low", "inputs"]
NAMES = ["0.weight", "2.weight"]


def mlp(*key, dtype=torch.float64):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18), nn.Tanh())
    return small_guard.drawn(model, "turns", *key).to(dtype)


def task(number, dtype=torch.float64):
    return [decaying(40, 18, 0.8, ("turn", number), dtype)]


def begun(holder, start, model=None, **options):
    """A model that is protected one way or the other, and that."""
    model = mlp() if model is None else model
    dtype = next(model.parameters()).dtype
    made = {
        "refresh": lambda: refresh(model, 0.3, progress=False, compute_dtype=torch.float64),
        "low": lambda: refresh(model, 0.7, progress=False, compute_dtype=torch.float64),
        "inputs": lambda: input_subspaces(model, task(0, dtype), energy=0.7, progress=False),
    }
    subspaces = made[start]()
    if holder == "confined":
        return model, confine(model, subspaces, **options), subspaces
    return model, protect(model, subspaces, adamw(model), **options), subspaces


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def optimizer_of(model, holder):
    """The guard's, or a new one, as a confined model takes."""
    return holder._optimizer if hasattr(holder, "_optimizer") else adamw(model)


def weights_of(model):
    return {name: model.state_dict()[name].detach().clone() for name in NAMES}


# --- what it is ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_it_is_input_subspaces_of_what_is_held(holder, start, dtype):
    model, held, before = begun(holder, start, mlp(dtype=dtype))
    small_guard.train(model, optimizer_of(model, held), 5, "one")
    weights, twin = weights_of(model), mlp("twin", dtype=dtype)
    twin.load_state_dict(model.state_dict())
    wanted = input_subspaces(twin, task(1, dtype), energy=0.8, previous=before, progress=False)
    found = held.next_task(batches=task(1, dtype), energy=0.8, progress=False)
    assert type(found) is Grown
    assert list(found) == NAMES
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert found.released == pytest.approx(wanted.released, abs=tolerance)
    for name, theirs in wanted.items():
        V, W = grown(found[name]).double(), grown(theirs).double()
        assert V.shape == W.shape
        assert (V @ V.mT - W @ W.mT).abs().max() <= 10 * tolerance
        e, f = found[name].spectra["V"].energies, theirs.spectra["V"].energies
        assert (e - f).abs().max() <= tolerance
        assert (found[name].U is None) == (start == "inputs")
        if found[name].U is not None:
            U, earlier = high(found[name].U), high(before[name].U)
            assert (U @ U.mT - earlier @ earlier.mT).abs().max() <= tolerance
    for name, W in weights_of(model).items():
        assert (W - weights[name]).abs().max() <= tolerance, "the task ends with the weights it has"
    assert max(held.released().values()) <= 1e-4, "there was room for both"
    # Afterwards it holds still what the new bases protect.
    small_guard.train(model, optimizer_of(model, held), 10, "two")
    held.verify()
    X = inputs_of(mlp_as(weights, twin), task(1))
    for name, W in weights_of(model).items():
        change = W.double() - weights[name].double()
        size = float(torch.linalg.matrix_norm(change, 2))
        assert size > 1e-3
        bound = math.sqrt(0.2) * size * float(X[name].norm())
        assert float((change @ X[name]).norm()) <= bound * (1 + 1e-3)


def mlp_as(weights, twin):
    """The twin in float64 with these weights."""
    twin = copy.deepcopy(twin).double()
    with torch.no_grad():
        for name, W in weights.items():
            twin.get_parameter(name).copy_(W)
    return twin


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_stream_of_tasks_never_runs_out(holder, start):
    model, held, _ = begun(holder, start)
    lost, seen = 0.0, {name: [] for name in NAMES}
    for number in range(1, 13):
        small_guard.train(model, optimizer_of(model, held), 2, number)
        with torch.no_grad():
            plain = mlp_as(weights_of(model), mlp())
            for name in NAMES:
                plain.get_parameter(name.replace("weight", "bias")).copy_(
                    model.state_dict()[name.replace("weight", "bias")]
                )
        for name, X in inputs_of(plain, task(number)).items():
            seen[name].append(X)
        found = held.next_task(batches=task(number), energy=0.8, min_free=5, progress=False)
        lost += sum(found.released.values())
        for name in NAMES:
            V = grown(found[name])
            assert V.shape[1] <= V.shape[0] - 5
            if not lost:
                assert all(share(V, X) >= 0.8 - 1e-9 for X in seen[name])
                assert max(held.released().values()) <= 1e-6
    assert lost > 0
    assert max(held.released().values()) > 0
    before = weights_of(model)
    small_guard.train(model, optimizer_of(model, held), 5, "last")
    held.verify()
    for name, W in weights_of(model).items():
        assert (W - before[name]).abs().max() > 1e-4, "it still moves"


@pytest.mark.parametrize("restore", [True, False, "deferred"])
def test_the_guards_hooks_stay_where_they_are(restore):
    model, guard, _ = begun("guard", "inputs", restore=restore)
    optimizer = guard._optimizer
    small_guard.train(model, optimizer, 3)
    hooks = list(optimizer._optimizer_step_pre_hooks)
    found = guard.next_task(batches=task(1), progress=False)
    assert guard.subspaces is found
    assert list(optimizer._optimizer_step_pre_hooks) == hooks
    assert model.training
    count = guard.projections
    small_guard.train(model, optimizer, 3)
    assert guard.projections > count
    guard.verify()


@pytest.mark.parametrize("choice", ["keep", "project", "clear"])
def test_the_optimizers_state_is_treated_as_asked(choice):
    model, guard, _ = begun("guard", "inputs")
    optimizer = guard._optimizer
    small_guard.train(model, optimizer, 5)
    momenta = {
        name: optimizer.state[model.get_parameter(name)]["exp_avg"].clone() for name in NAMES
    }
    found = guard.next_task(batches=task(1), optimizer_state=choice, energy=0.9, progress=False)
    for name, before in momenta.items():
        state = optimizer.state[model.get_parameter(name)]
        V = grown(found[name])
        if choice == "clear":
            assert "exp_avg" not in state
            continue
        inside = (state["exp_avg"] @ V).norm()
        assert (inside <= 1e-10 * before.norm()) == (choice == "project")
        if choice == "keep":
            assert torch.equal(state["exp_avg"], before)


def test_a_copy_of_a_confined_model_takes_a_turn_of_its_own():
    model, confined, _ = begun("confined", "inputs")
    small_guard.train(model, adamw(model), 3)
    twin = copy.deepcopy(model)
    one, other = (
        Confined.of(held).next_task(batches=task(1), progress=False) for held in (model, twin)
    )
    for name in NAMES:
        assert torch.equal(grown(one[name]), grown(other[name]))
        assert torch.equal(one[name].spectra["V"].energies, other[name].spectra["V"].energies)
    assert confined.next_task(batches=task(2), progress=False).keys() == one.keys()


@pytest.mark.parametrize("holder", HOLDERS)
def test_convolutions_and_a_side_that_sums_over_rows(holder):
    model = small_confine.filled(
        nn.Sequential(nn.Conv2d(3, 8, 2), nn.Tanh(), nn.Flatten(), small_confine.Conv1D(5, 32))
    )
    before = refresh(model, 2, filter="*.weight", progress=False)
    generator = generator_for("images")
    x = [0.4 * torch.randn(6, 3, 3, 3, generator=generator)]
    if holder == "guard":
        held = protect(model, before, torch.optim.SGD(model.parameters(), lr=0.1))
    else:
        held = confine(model, before)
    for _ in range(2):
        optimizer = optimizer_of(model, held)
        optimizer.zero_grad()
        model(x[0]).square().mean().backward()
        optimizer.step()
        found = held.next_task(batches=x, energy=0.5, progress=False)
    assert list(found["0.weight"].spectra) == ["V"]
    assert list(found["3.weight"].spectra) == ["U"]
    assert found["3.weight"].V.columns.shape == (5, 2)
    held.verify()


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts(kind, holder):
    model = experts_model(kind, "grouped_mm", layers=1)
    left = {"leave_out": "*embed_tokens*"}
    before = refresh(model, 0.3, progress=False, **left)
    held = protect(model, before, adamw(model)) if holder == "guard" else confine(model, before)
    for number in range(2):
        optimizer = optimizer_of(model, held)
        batch = {"input_ids": ids("turn", number)}
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        found = held.next_task(batches=[batch], energy=0.6, progress=False)
    name = next(name for name in found if name.endswith("up_proj"))
    directions, energies = found[name].spectra["U" if kind == "gpt_oss" else "V"]
    assert directions.dim() == 3
    assert energies.shape == (len(directions), directions.shape[-1])
    held.verify()


# --- a run that is resumed ---


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_resumed_run_goes_on_to_the_next_task_to_the_bit(holder, start, dtype):
    model, held, _ = begun(holder, start, mlp(dtype=dtype))
    small_guard.train(model, optimizer_of(model, held), 3, "one")
    held.next_task(batches=task(1, dtype), energy=0.8, progress=False)
    small_guard.train(model, optimizer_of(model, held), 3, "two")
    saved = through_a_file({"model": model.state_dict(), "held": held.state_dict()})

    resumed = mlp("another", dtype=dtype)
    resumed.load_state_dict(saved["model"])
    if holder == "guard":
        fresh = protect(resumed, saved["held"], adamw(resumed))
    else:
        fresh = confine(resumed, saved["held"])
    wanted, found = (
        one.next_task(batches=task(2, dtype), energy=0.8, min_free=0.6, progress=False)
        for one in (held, fresh)
    )
    assert found.released == wanted.released
    assert max(wanted.released.values()) > 0
    for name in NAMES:
        for side in ("U", "V"):
            ours, theirs = getattr(found[name], side), getattr(wanted[name], side)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.spans == theirs.spans
                assert torch.equal(ours.columns, theirs.columns)
        pairs = zip(found[name].spectra["V"], wanted[name].spectra["V"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    fresh.verify()


# --- what was protected until then ---


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_no_batch_reaches_stays_protected_as_it_was(holder, start, caplog):
    """As an earlier task's head is, where each task has its own."""
    model, held, before = begun(holder, start)
    whole = weights_of(model)
    P = [complement(before["2.weight"], *whole["2.weight"].shape)]
    small_guard.train(model, optimizer_of(model, held), 3, "one")
    found = held.next_task(
        batches=task(1), forward=lambda model, batch: model[1](model[0](batch)), progress=False
    )
    assert "no batch reached 1 of 2 weights, of which what was protected" in caplog.text
    assert list(found) == NAMES
    P.append(complement(found["2.weight"], *whole["2.weight"].shape))
    probe = torch.randn(30 * 18, 4, dtype=torch.float64, generator=generator_for("probe"))
    assert torch.allclose(P[0] @ probe, P[1] @ probe, atol=1e-9)
    small_guard.train(model, optimizer_of(model, held), 3, "two")
    moved = weights_of(model)["2.weight"] - whole["2.weight"]
    assert moved.norm() > 1e-3
    assert (moved.flatten() - P[0] @ moved.flatten()).norm() <= 1e-6 * moved.norm()


def complement(subspace, m, n):
    """P of a matrix's rows after one another, (m·n, m·n)."""
    sides = []
    for side, size in ((subspace.U, m), (subspace.V, n)):
        columns = torch.zeros(size, 0).double() if side is None else high(side)
        sides.append(torch.eye(size).double() - columns @ columns.mT)
    return torch.kron(*sides)


def foreign_write(model):
    model[0].weight.data.add_(0.01)


def foreign_checkpoint(model):
    other = mlp("other").state_dict()
    state = {name: other.get(name, t) for name, t in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize("ways", [{"batches": task(1)}, {"widen": 0.1}], ids=["inputs", "weights"])
@pytest.mark.parametrize("write", [foreign_write, foreign_checkpoint])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_turn_takes_no_moved_part_for_what_is_to_be_kept(holder, write, ways):
    model, held, _ = begun(holder, "refresh")
    small_guard.train(model, optimizer_of(model, held), 2, "own")
    write(model)
    with pytest.raises(RuntimeError, match=r"(Guard|Confined)\.next_task: expected"):
        held.next_task(progress=False, **ways)
    with pytest.raises(RuntimeError):
        held.verify()
    with pytest.raises(RuntimeError, match="got none so far"):
        held.released()


def test_a_guard_without_hooks_has_no_turn():
    _, guard, _ = begun("guard", "inputs")
    guard.remove()
    with pytest.raises(RuntimeError, match=r"Guard\.next_task: expected hooks on the model"):
        guard.next_task(batches=task(1), progress=False)


def test_what_has_moved_is_told_when_a_model_is_released(caplog):
    for write in (None, foreign_write):
        caplog.clear()
        model, confined, _ = begun("confined", "inputs")
        small_guard.train(model, adamw(model), 2)
        if write is not None:
            write(model)
        confined.release()
        assert ("what was protected has moved, of 0.weight by" in caplog.text) == bool(write)
        assert ("load an earlier checkpoint" in caplog.text) == bool(write)
        assert "release()" not in caplog.text, "no remedy is what was just done"


# --- what is refused, and leaves everything as it was ---

NO_BATCHES = {"batches": []}
NAN = {"batches": [torch.full((3, 18), float("nan"), dtype=torch.float64)]}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"ranks": 3},
            ValueError,
            "ranks and widen to be left out with batches, got ranks; energy",
        ),
        ({"widen": 0.1}, ValueError, "left out with batches, got widen"),
        ({"ranks": 3, "widen": 1}, ValueError, "left out with batches, got ranks, widen"),
        ({"tol": 1e-3}, TypeError, "expected options of input_subspaces, energy.*got tol"),
        ({"previous": {}}, TypeError, "options of input_subspaces.*got previous"),
        ({"energy": 2.0}, ValueError, "energy in"),
        ({"min_free": -1}, ValueError, "min_free to be an int of at least 0"),
        ({"min_free": 18}, ValueError, "min_free to be below the 18 directions"),
        (
            {"forward": lambda model, batch: batch.sum()},
            ValueError,
            "none that reached 0.weight, 2.weight",
        ),
        (NO_BATCHES, ValueError, "at least one batch, got none"),
        (NAN, ValueError, "NaN or Inf first in '0.weight'"),
        ({"batches": ["text"]}, TypeError, "batches of tensors"),
    ],
)
@pytest.mark.parametrize("start", ["refresh", "inputs"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_refused_turn_leaves_everything_as_it_was(holder, start, options, error, match):
    model, held, _ = begun(holder, start)
    optimizer = optimizer_of(model, held)
    small_guard.train(model, optimizer, 3)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    state = copy.deepcopy(held.state_dict())
    with pytest.raises(error, match=match):
        held.next_task(**{"batches": task(1), "progress": False} | options)
    for name, p in model.named_parameters():
        assert (id(p), True) == (before[name][0], torch.equal(p, before[name][1]))
    assert alike(held.state_dict(), state)
    with pytest.raises(RuntimeError, match="got none so far"):
        held.released()
    small_guard.train(model, optimizer, 2)
    held.verify()


def alike(one, other):
    """Whether two states have the same values, in the same places."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one == other


def test_a_turn_that_would_leave_nothing_free_is_refused():
    model, confined, _ = begun("confined", "inputs")
    optimizer = adamw(model)
    small_guard.train(model, optimizer, 3)
    state = copy.deepcopy(confined.state_dict())
    with pytest.raises(ValueError, match="something free"):
        confined.next_task(batches=task(1), energy=1.0, min_free=0, progress=False)
    assert alike(confined.state_dict(), state)
    small_guard.train(model, optimizer, 2)
    confined.verify()
    found = confined.next_task(batches=task(1), energy=1.0, progress=False)
    assert grown(found["0.weight"]).shape == (18, 16)


def test_free_blocks_beside_their_weights_have_no_turn():
    _, confined, _ = begun("confined", "inputs", update="beside")
    with pytest.raises(RuntimeError, match='expected update="merge", got "beside"'):
        confined.next_task(batches=task(1))


@pytest.mark.parametrize("holder", HOLDERS)
def test_without_batches_the_refusal_says_that_there_are_batches(holder):
    _, held, _ = begun(holder, "inputs")
    with pytest.raises(ValueError, match=r"[Pp]ass batches=, which extends them by what the"):
        held.next_task(progress=False)


def test_an_embedding_that_is_protected_is_named():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    guard = protect(
        model,
        {"0.weight": Subspace(None, torch.eye(6, 2)), "1.weight": Subspace(None, torch.eye(6, 2))},
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    with pytest.raises(ValueError, match=r"'0\.weight' .*leave_out='0\.weight' and protect"):
        guard.next_task(batches=[torch.arange(4)], progress=False)
    x = [torch.arange(4)]
    rest = input_subspaces(model, x, filter="*", leave_out="0.weight", progress=False)
    guard = protect(model, rest, torch.optim.SGD(model.parameters(), lr=0.1))
    assert list(guard.next_task(batches=x, progress=False)) == ["1.weight"]
