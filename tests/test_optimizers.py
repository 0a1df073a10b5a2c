"""Each optimizer by name under ``protect`` and ``confine``: what it leaks, and what stays."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from unittest import mock

import pytest
import torch

from bench import __main__ as cli
from bench import optimizer_state, optimizers, report
from bench.optimizers import OPTIMIZERS, train
from osf_torch import protect
from tests.small_confine import worst

LIMIT = 1e-6  # of what is protected, of float32 weights and a few steps
STEPS = 15
# torchao's modules are made of what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def named(name):
    """The optimizer, where it runs here."""
    reason = optimizers.missing(OPTIMIZERS[name])
    if reason is not None:
        pytest.skip(reason)
    return OPTIMIZERS[name]


def is_of_8_bits(state):
    return "OptimState8bit" in type(state).__name__ or state.dtype == torch.uint8


@pytest.mark.parametrize("name", [n for n, o in OPTIMIZERS.items() if not o.accelerator])
def test_what_is_protected_stays_where_it_was(name):
    optimizer = named(name)
    for how in ("restored", "confined"):
        outcome = train(optimizer, how, STEPS)
        assert worst(outcome.before, outcome.model, outcome.subspaces) <= LIMIT
        assert outcome.learned > 0.01, "it did train"
        if outcome.guard is not None:
            outcome.guard.verify()
        if "8 bits" in name:
            states = [s for state in outcome.optimizer.state.values() for s in state.values()]
            small = [s for s in states if isinstance(s, torch.Tensor) and is_of_8_bits(s)]
            assert len(small) == 4, "of two weights two moments each"


def test_what_leaks_where_nothing_is_restored():
    """Projected gradients make projected steps where the optimizer is linear, and where it takes a
    polynomial of the matrix; elementwise steps and weight decay reach what is protected."""
    leaks = {
        name: train(named(name), "projected").share()
        for name in OPTIMIZERS
        if OPTIMIZERS[name].package == "torch"
    }
    assert leaks["SGD with momentum"] <= 1e-5
    # Muon's polynomial is computed in bfloat16, whose rounding is all of its leak: in float32 it
    # is 4e-6.
    assert 1e-4 < leaks["Muon"] < 0.03
    for name in ("AdamW", "AdamW, fused", "Adafactor", "Muon with decay"):
        assert leaks[name] > 0.1, name
    assert optimizers.restoring(leaks["SGD with momentum"]) == "not needed"
    assert optimizers.restoring(leaks["Muon"]) == "hardly needed"
    assert optimizers.restoring(leaks["AdamW"]) == "needed"


def test_muon_computes_the_same_projected_and_confined():
    """A polynomial of U_l C V_lᵀ is U_l times that of C times V_lᵀ, to the rounding of bfloat16."""
    ours = [train(named("Muon"), how, STEPS) for how in ("restored", "confined")]
    first, second = (o.model.state_dict() for o in ours)
    for name, start in ours[0].before.items():
        assert (first[name] - second[name]).norm() <= 0.05 * (first[name] - start).norm()


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, optimizers.WIDTH)).square().mean().backward()
    optimizer.step()


def test_schedule_free_weights_are_restored_after_each_exchange():
    """What ``eval()`` computes of a state that nothing pins is refused until it is restored."""
    made = named("AdamW, schedule-free")
    outcome = train(made, "restored", STEPS)
    model, optimizer, guard = outcome.model, outcome.optimizer, outcome.guard
    assert outcome.moved_by_exchange > 1e-4
    optimizer.train()
    assert worst(outcome.before, model, outcome.subspaces) > 1e-4
    with pytest.raises(RuntimeError, match=r"call Guard\.restore\(\)"):
        guard.verify()
    with pytest.raises(RuntimeError, match=r"call Guard\.restore\(\)"):
        step(model, optimizer)
    guard.restore()
    step(model, optimizer)
    assert worst(outcome.before, model, outcome.subspaces) <= LIMIT
    guard.verify()


# --- an optimizer that steps copies of weights on the host ---


class Stream:
    """A GPU's stream on a CPU, where everything is done when it is asked for."""

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


@contextlib.contextmanager
def streams_of_a_cpu():
    """Has torchao's optimizer run without a GPU; its transfers are copies then."""
    module = pytest.importorskip("torchao.optim.cpu_offload")
    empty_like = torch.empty_like

    def unpinned(*args, pin_memory=False, **options):
        return empty_like(*args, **options)

    with (
        mock.patch.object(module, "get_available_devices", return_value=["cpu", "cuda"]),
        mock.patch.object(torch, "empty_like", unpinned),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "current_stream", Stream),
        mock.patch.object(torch.cuda, "stream", contextlib.nullcontext),
    ):
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the test below runs")
def test_offloaded_steps_hold_what_is_confined_and_are_refused_by_protect():
    with streams_of_a_cpu():
        offloaded_steps(torch.device("cpu"))


def test_offloaded_steps_take_gradients_that_were_projected_in_the_backward_pass():
    """A guard's hook runs before the one that copies the gradient to the host."""
    made = OPTIMIZERS["AdamW, offloaded (torchao)"]
    options = {"optimizer_class": torch.optim.SGD, "lr": 0.1}
    with streams_of_a_cpu():
        model = optimizers.network(0)
        subspaces = optimizers.subspaces_of(model)
        before = copy.deepcopy(model.state_dict())
        optimizer = dataclasses.replace(made, options=options).make(list(model.parameters()))
        guard = protect(model, subspaces, restore=False)
        for _ in range(5):
            step(model, optimizer)
        guard.verify()
    assert optimizers.Outcome(model, before, subspaces, optimizer, guard).share() <= 1e-4
    assert (model[0].weight - before["0.weight"]).norm() > 1e-3


@pytest.mark.gpu
def test_offloaded_steps_on_a_gpu():
    named("AdamW, offloaded (torchao)")
    offloaded_steps(torch.device("cuda"))


def offloaded_steps(device):
    made = OPTIMIZERS["AdamW, offloaded (torchao)"]
    outcome = train(made, "confined", STEPS, device)
    assert len(outcome.optimizer.optim_dict) == 2, "both blocks are stepped on the host"
    assert worst(outcome.before, outcome.model, outcome.subspaces) <= LIMIT
    assert outcome.learned > 0.01
    with pytest.raises(TypeError, match="expected an optimizer whose steps call hooks, got CPUOff"):
        train(made, "restored", 1, device)


# --- the bench ---


def test_the_bench_has_a_row_for_each_and_says_what_it_lacks(monkeypatch, tmp_path, capsys):
    chosen = {
        "AdamW": OPTIMIZERS["AdamW"],
        "absent": optimizers.Named("absent", "osf_absent", "Absent", {"lr": 0.1}),
    }
    monkeypatch.setattr(optimizers, "OPTIMIZERS", chosen)
    path = tmp_path / "rows.csv"
    assert cli.main(["optimizers", "--steps", "3", "--csv", str(path)]) == 0
    first, second = report.read_csv(path)
    assert float(first["leak"]) > 0.05
    assert float(first["drift_unrestored"]) > 100 * float(first["drift_restored"])
    assert first["restoring"] == "needed"
    assert (second["leak"], second["status"]) == ("", "not measured: absent isn't installed")
    assert "absent: not measured" in capsys.readouterr().out
    assert cli.main(["optimizers", "--steps", "0"]) == 2
    assert "expected --steps of at least 1" in capsys.readouterr().err


def test_the_bench_of_states_tells_what_each_choice_does(monkeypatch, tmp_path, capsys):
    absent = optimizers.Named("absent", "osf_absent", "Absent", {"lr": 0.1})
    monkeypatch.setattr(optimizer_state, "NAMES", ("Muon", "absent"))
    monkeypatch.setattr(
        optimizer_state, "OPTIMIZERS", {"Muon": OPTIMIZERS["Muon"], "absent": absent}
    )
    path = tmp_path / "rows.csv"
    command = ["optimizer-state", "--steps", "20", "--seeds", "2", "--csv", str(path)]
    assert cli.main(command) == 0
    rows = report.read_csv(path)
    assert [(row["optimizer"], row["restore"], row["state"]) for row in rows] == [
        (name, restore, state)
        for name in ("Muon", "absent")
        for restore in ("yes", "no")
        for state in ("keep", "project", "clear")
    ]
    leaks = {(r["restore"], r["state"]): float(r["leak"]) for r in rows if r["leak"]}
    assert leaks["no", "keep"] > 5 * leaks["no", "project"] > 100 * leaks["yes", "keep"]
    kept, cleared = rows[0], rows[2]
    assert kept["learned_error"] == ""
    assert float(cleared["learned_error"]) >= 0
    assert {row["status"] for row in rows[6:]} == {"not measured: absent isn't installed"}
    said = capsys.readouterr().out
    assert "absent: not measured" in said
    assert "means of 2 seeds" in said
    for argument in ("--steps", "--seeds"):
        assert cli.main(["optimizer-state", argument, "0"]) == 2
        assert f"expected {argument} of at least" in capsys.readouterr().err
