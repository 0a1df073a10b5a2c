"""A guard that is saved and taken up again, and one that goes on to the next task."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from osf_kernels import project
from osf_torch import Subspace, input_subspaces, protect, refresh
from tests.small_guard import adamw, drawn, train


def mlp(*key, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18), nn.Tanh())
    return drawn(model, "mlp", *key).to(dtype)


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
    guard = protect(
        model, {"0.weight": Subspace(U, None)}, optimizer=optimizer, leave_out="2.weight"
    )
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
        (changed(format=99), r"format=3, got 99"),
        ({}, r"format=3, got None"),
        (changed(weights=less), r"got none for 2\.weight"),
        (changed(weights=more), r"got 4\.weight too"),
        (with_weight(shape=(18, 31)), r"'2\.weight' with .*\(18, 30\).* got .*\(18, 31\)"),
        ({k: v for k, v in good.items() if k != "restore"}, r"got one without restore"),
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
    # A start in float32 is no start for float64 factors.
    double = guard.next_task(progress=False, compute_dtype=torch.float64, **as_before(kept))
    assert {entry.method for entry in double.values()} == {"gram"}
    second = guard.next_task(widen=0.3, progress=False)
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


def as_before(kept):
    return {key: value for key, value in kept.items() if key != "compute_dtype"}


def test_the_next_task_takes_other_ranks(caplog):
    model = mlp("ranks")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    train(model, optimizer, 3)
    assert {e.rank for e in guard.next_task(widen=0, progress=False).values()} == {7}
    assert "batches" not in caplog.text
    assert {e.rank for e in guard.next_task(progress=False).values()} == {7}, "as they were"
    assert "Guard.next_task: without batches the weights are decomposed as they are" in caplog.text
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


def leading(W, rank):
    squares = torch.linalg.svdvals(W).square()
    return float(squares[:rank].sum() / squares.sum())


@pytest.mark.parametrize("kept", [{}, {"keep": "all", "complement": True}], ids=str)
def test_what_the_next_task_lets_go_of_is_told(kept):
    model = mlp("released").double()
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False, **kept), optimizer=optimizer)
    with pytest.raises(RuntimeError, match=r"Guard\.released: expected next_task\(\) to have been"):
        guard.released()
    old = {name: (s.U, s.V) for name, s in guard.subspaces.items()}
    with torch.no_grad():  # learned where it may, and more than what was protected
        for name, (U, V) in old.items():
            p = model.get_parameter(name)
            p.add_(project(torch.randn(p.shape, dtype=p.dtype), U, V), alpha=3)
    train(model, optimizer, 2)
    found = guard.next_task(progress=False)
    for name, share in guard.released().items():
        W = model.get_parameter(name).detach()
        H = W - project(W, *old[name])
        wanted = project(H, found[name].U, found[name].V).norm() / H.norm()
        assert share == pytest.approx(float(wanted), rel=1e-9)
        assert share > 0.5
        assert found[name].captured == pytest.approx(leading(W, found[name].rank), rel=1e-6)
    guard.next_task(widen=1.0, progress=False)
    assert max(guard.released().values()) <= 1e-12, "all of it is protected"


def test_the_next_task_refuses_bases_that_triplets_would_replace():
    model = mlp("inputs")
    optimizer = adamw(model)
    x = torch.randn(40, 18)
    found = input_subspaces(
        model, [x], energy=0.8, previous=refresh(model, 0.3, progress=False), progress=False
    )
    guard = protect(model, found, optimizer=optimizer)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight; .* Pass batches="):
        guard.next_task(widen=0.1, progress=False)
    assert guard.subspaces is found
    again = input_subspaces(model, [x], previous=guard.subspaces, progress=False)
    guard = protect(model, again, optimizer=optimizer)
    train(model, optimizer, 2)
    guard.verify()


@pytest.mark.parametrize("ranks", [{"ranks": 0.6}, {"widen": 0.1}])
def test_the_next_task_takes_batched_weights(ranks):
    model = nn.ParameterDict({"w": torch.randn(3, 12, 8), "v": torch.randn(12, 8)})
    subspaces = dict(refresh(model, 0.4, filter="v", progress=False))
    U, S, Vh = torch.linalg.svd(model["w"].detach(), full_matrices=False)
    subspaces["w"] = Subspace(U[..., :3], Vh[:, :3].mT, S[:, :3])
    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer)
    found = guard.next_task(progress=False, **ranks)
    assert found["w"].shape == (3, 12, 8)
    assert found["w"].rank == (5 if "ranks" in ranks else 4)
    for p in model.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    guard.verify()
    assert set(guard.drift()) == {"w", "v"}


@pytest.mark.parametrize(
    ("widen", "error"),
    [
        (-10, ValueError),
        (2.5, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        ("a", TypeError),
        ([1], TypeError),
    ],
)
def test_the_next_task_refuses_to_widen_by(widen, error):
    model = mlp("widen")
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=adamw(model))
    with pytest.raises(
        error, match=r"Guard\.next_task: expected widen to be an int.*\[0, 1\], got"
    ):
        guard.next_task(widen=widen, progress=False)


@pytest.mark.parametrize("keep", ["smaller", "all"])
@pytest.mark.parametrize("ratio", [0.25, 0.7])
def test_a_resumed_run_goes_on_to_the_next_task_to_the_bit(ratio, keep):
    kept = {"keep": keep, "complement": True if keep == "all" else None, "progress": False}
    model = mlp("tasks")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, ratio, **kept), optimizer=optimizer)
    train(model, optimizer, 3, "first")
    guard.next_task(widen=0.1, **kept)
    train(model, optimizer, 3, "second")
    checkpoint = saved(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        | {"guard": guard.state_dict()}
    )
    resumed = mlp("another")
    other = adamw(resumed)
    fresh = protect(resumed, refresh(resumed, 0.5, progress=False), optimizer=other)
    resumed.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    fresh.load_state_dict(checkpoint["guard"])
    assert repr(fresh.subspaces) == repr(guard.subspaces)
    for s, item in zip(fresh.subspaces.values(), fresh._items.values(), strict=True):
        assert s.U.columns is item.held.U.columns, "one copy of what two places hold"
    wanted, found = (g.next_task(widen=0.1, **kept) for g in (guard, fresh))
    for name, entry in wanted.items():
        assert found[name].rank == entry.rank
        assert found[name].method == entry.method
        for part, factor in entry.factors().items():
            assert torch.equal(found[name].factors()[part], factor), (name, part)


def test_a_state_of_plain_subspaces_or_of_an_older_guard():
    model = mlp("plain")
    U, S, Vh = torch.linalg.svd(model[0].weight.detach())
    given = {"0.weight": Subspace(U[:, :4], Vh[:4].mT, S[:4])}
    optimizer = adamw(model)
    guard = protect(model, given, optimizer=optimizer)
    train(model, optimizer, 2)
    state = saved(guard.state_dict())
    older = {key: value for key, value in state.items() if key != "subspaces"}
    for taken in (state, older):
        guard = protect(model, {"0.weight": Subspace(U[:, :2], None)}, optimizer=optimizer)
        guard.load_state_dict(taken)
        assert torch.equal(guard.subspaces["0.weight"].U.columns, U[:, :4])
        assert guard.next_task(widen=2, progress=False)["0.weight"].rank == 6


# --- states of other runs, and guards made of a state alone ---


@pytest.mark.parametrize(("ratio", "when"), [(0.3, "step"), (0.7, "step"), (0.7, "backward")])
def test_a_guard_is_made_from_its_state_alone(ratio, when):
    """A resumed run has trained weights: what a refresh makes of them is another subspace."""
    model = mlp("alone")
    optimizer = adamw(model)
    guard = protect(
        model, refresh(model, ratio, progress=False), optimizer=optimizer, when=when, mode="core"
    )
    train(model, optimizer, 5, "first")
    checkpoint = saved([model.state_dict(), optimizer.state_dict(), guard.state_dict()])
    train(model, optimizer, 5, "second")

    resumed = mlp("another")
    other = adamw(resumed)
    resumed.load_state_dict(checkpoint[0])
    other.load_state_dict(checkpoint[1])
    fresh = protect(resumed, checkpoint[2], optimizer=other)
    assert (fresh.when, fresh.mode, fresh.restores) == (when, "core", True)
    assert repr(fresh.subspaces) == repr(guard.subspaces)
    train(resumed, other, 5, "second")
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fresh.drift() == guard.drift()
    fresh.verify()
    fresh.next_task(widen=0.1, progress=False)


@pytest.mark.parametrize("restore", [True, False])
def test_a_state_of_other_weights_is_refused_and_the_earlier_guard_stays(restore):
    model, other = mlp("mine"), mlp("theirs")
    optimizer = adamw(model)
    foreign = protect(
        other, refresh(other, 0.4, progress=False), optimizer=adamw(other), restore=restore
    ).state_dict()
    guard = protect(
        model, refresh(model, 0.4, progress=False), optimizer=optimizer, restore=restore
    )
    before = guard.state_dict()
    with pytest.raises(ValueError, match="a state of the weights that the model has, got one"):
        guard.load_state_dict(foreign)
    with pytest.raises(ValueError, match="a state of the weights that the model has, got one"):
        protect(model, foreign, optimizer=optimizer)
    after = guard.state_dict()
    for name, entry in before["weights"].items():
        for key, value in entry.items():
            assert after["weights"][name][key] is value or value == after["weights"][name][key]
    train(model, optimizer, 2)
    assert guard.projections == 2
    if restore:
        guard.verify()


def test_what_protect_refuses_of_a_state():
    model = mlp("states")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    state = guard.state_dict()
    for given, options, text in (
        (state | {"format": 9}, {"optimizer": optimizer}, r"protect: expected a state with format"),
        (state, {}, "optimizer to be given with restore=True"),
        ({k: v for k, v in state.items() if k != "mode"}, {"optimizer": optimizer}, "without mode"),
        (
            state,
            {"optimizer": optimizer, "mode": "core"},
            "mode to be left out with a guard's stat",
        ),
        (state, {"optimizer": optimizer, "restore": False}, "restore to be left out"),
    ):
        with pytest.raises(ValueError, match=text):
            protect(model, given, **options)
    with pytest.raises(TypeError, match=r"expected a Subspace .* pass all of Guard\.state_dict"):
        protect(model, state["subspaces"], optimizer=optimizer)
    train(model, optimizer, 1)
    assert guard.projections == 1
    guard.verify()


def test_a_state_of_the_first_format_is_taken():
    model = mlp("older")
    optimizer = adamw(model)
    guard = protect(model, refresh(model, 0.4, progress=False), optimizer=optimizer)
    state = saved(guard.state_dict())
    older = state | {
        "format": 1,
        "weights": {
            name: {k: v for k, v in entry.items() if k not in ("rest_A", "rest_B", "sketch")}
            | {"ranks": 1, "slice": None}
            for name, entry in state["weights"].items()
        },
    }
    guard.load_state_dict(older)
    train(model, optimizer, 2)
    guard.verify()


@pytest.mark.parametrize("way", ["without tables", "without init"])
def test_a_refused_protect_leaves_the_earlier_guard_on(way):
    class Wrapping(torch.optim.Optimizer):
        def __init__(self, base):
            self.base = base
            for name in ("param_groups", "defaults", "state"):
                setattr(self, name, getattr(base, name))
            if way == "without init":  # tables that nothing calls
                self._optimizer_step_pre_hooks = {}
                self._optimizer_step_post_hooks = {}

        def step(self, closure=None):
            return self.base.step(closure)

    model = mlp("refused again")
    optimizer = adamw(model)
    subspaces = refresh(model, 0.4, progress=False)
    guard = protect(model, subspaces, optimizer=optimizer)
    with pytest.raises(TypeError, match="an optimizer whose steps call hooks, got Wrapping"):
        protect(model, subspaces, optimizer=Wrapping(optimizer))
    U, S, Vh = torch.linalg.svd(torch.randn(30, 18), full_matrices=False)
    with pytest.raises(ValueError, match="singular triplets"):
        protect(model, {"0.weight": Subspace(U, Vh.mT, S)}, optimizer=optimizer)
    train(model, optimizer, 3)
    assert guard.projections == 3
    guard.verify()
