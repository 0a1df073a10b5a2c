"""Runs over a stream: what each method does, and that a run cut short goes on as if it hadn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import osf_kernels
from bench.streams import peers, training
from bench.streams.bases import add, look, spectra, subspaces_of
from bench.streams.methods import METHODS
from bench.streams.ours import Ours, free_share
from bench.streams.sources import Memories
from bench.streams.training import Outcome, Setting
from osf_kernels import Basis
from tests.small_streams import CLASSES, small_subject, small_tokens

TASKS = 3
SETTING = Setting(steps=3, batch=4, precision="fp32")
RADIUS = 0.05
PEFT = ("lora", "olora", "peft-osf")


class Cut(Exception):
    """What ends a run early."""


def require_peer(name: str) -> None:
    if name in PEFT:
        pytest.importorskip("peft", reason="the method is peft's")


def trained(name: str, partial: Path | None = None, cut_after: int = 10**9) -> Outcome:
    steps = 0

    def on_step(number: int, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps > cut_after:
            raise Cut

    return training.run(
        lambda subject: METHODS[name].make(subject, lambda: [RADIUS] * TASKS),
        small_subject(TASKS),
        TASKS,
        SETTING,
        learning_rate=1e-2,
        seed=0,
        partial=partial,
        on_step=on_step,
    )


def figures(outcome: Outcome) -> list[tuple[object, ...]]:
    return [
        (line.test, line.validation, line.course, line.moved, line.free) for line in outcome.after
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_short_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    require_peer(name)
    whole = trained(name)
    partial = tmp_path / "state.pt"
    with pytest.raises(Cut):
        trained(name, partial, cut_after=SETTING.steps + 1)  # in the second task
    assert partial.exists()
    with pytest.raises(Cut):
        trained(name, partial, cut_after=SETTING.steps + 1)  # the third: the second isn't repeated
    resumed = trained(name, partial)
    assert figures(resumed) == figures(whole)
    assert trained(name, partial, cut_after=0) == resumed  # until whoever has kept it removes it
    assert list(tmp_path.iterdir()) == [partial]


def test_heads_alone_leave_the_model_as_it_was_and_forget_nothing() -> None:
    outcome = trained("heads")
    assert [line.moved for line in outcome.after] == [0.0] * TASKS
    assert training.forgetting(outcome) == 0.0


def test_what_is_measured_after_each_task() -> None:
    outcome = trained("plain")
    assert [len(line.test) for line in outcome.after] == [1, 1, 3]
    assert [len(line.validation) for line in outcome.after] == [1, 1, 3]
    assert all(line.moved > 0 for line in outcome.after)
    assert outcome.own() == [line.test[-1] for line in outcome.after]
    own, last = outcome.own(), outcome.last()
    wanted = ((own[0] - last[0]) + (own[1] - last[1])) / 2
    assert training.forgetting(outcome) == pytest.approx(wanted)
    assert training.average(outcome) == pytest.approx(sum(last) / 3)
    assert training.latest(outcome) == training.average(outcome)  # there are fewer than are shown


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    subject = small_subject(1)
    with torch.no_grad():
        next(iter(subject.weights(subject.model).values())).fill_(float("nan"))
    with pytest.raises(training.Diverged, match=r"task 1 is nan at learning rate 0\.01"):
        training.run(peers.Plain, subject, 1, SETTING, learning_rate=1e-2, seed=0)


def test_a_matched_run_moves_no_further_than_it_may() -> None:
    outcome = trained("matched")
    assert trained("plain").after[0].moved > 2 * RADIUS  # so that the bound is felt
    assert [line.moved for line in outcome.after] == pytest.approx([RADIUS] * TASKS, rel=1e-4)


def test_replay_keeps_a_hundredth_and_trains_on_it() -> None:
    subject = small_subject(2)
    method = peers.Replay(subject)
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        subject.open(number, generator)
    assert method.extra(0, generator) is None
    method.end(0, [torch.tensor([5, 3]), torch.tensor([5, 9])])
    assert method.kept == [[3]]  # a hundredth of 60, rounded up
    extra = method.extra(1, generator)
    assert extra is not None
    wanted = subject.loss(subject.model, 0, torch.tensor([3]))
    assert float(extra) == pytest.approx(float(wanted), rel=1e-5)


def test_heads_of_earlier_tasks_stay_as_they_are() -> None:
    subject = small_subject(2)
    states = []

    def on_step(number: int, loss: float) -> None:
        states.append(subject.heads[0].weight.detach().clone())

    training.run(peers.Replay, subject, 2, SETTING, learning_rate=1e-2, seed=0, on_step=on_step)
    assert not torch.equal(states[0], states[2])
    assert all(torch.equal(states[2], later) for later in states[3:])


@pytest.mark.parametrize("update", ["protect", "confine"])
def test_what_is_protected_of_the_inputs_does_not_move(update: str) -> None:
    subject = small_subject(2)
    method = Ours(subject, Memories("inputs", (0.5, 0.5)), update)  # type: ignore[arg-type]
    training.run(lambda _: method, subject, 1, SETTING, learning_rate=1e-2, seed=0)
    before = {n: w.detach().clone() for n, w in subject.weights(subject.model).items()}
    training._train(method, 1, 1.0, SETTING, 1e-2, torch.Generator().manual_seed(1), print)
    for name, weight in subject.weights(subject.model).items():
        V = method._held[name].V
        assert isinstance(V, Basis)
        moved = (weight - before[name]).double()
        leaked = moved - osf_kernels.project(moved, None, Basis(V.columns.double(), V.spans))
        assert float(leaked.norm()) < 1e-5 * float(moved.norm())


def test_bases_leave_the_free_share_that_is_asked_for() -> None:
    subject = small_subject(1)
    subject.open(0, torch.Generator().manual_seed(0))
    subject.model.requires_grad_(True)
    seen = look(subject, subject.model, 0, [torch.arange(10)])
    weights = subject.weights(subject.model)
    for kind in ("inputs", "outputs", "gradients", "both", "moment", "whitened"):
        sums: dict[str, dict[str, torch.Tensor]] = {}
        for name, weight in weights.items():
            add(sums, kind, name, weight, seen[name], torch.randn_like(weight))
        for free in (0.36, 0.1):
            subspaces = subspaces_of(spectra(sums), free)
            assert free_share(weights, subspaces) == pytest.approx(free, abs=0.03)
            for held in subspaces.values():
                for side in (held.U, held.V):
                    if side is not None:
                        columns = side.columns  # type: ignore[union-attr]
                        eye = torch.eye(columns.shape[1])
                        assert torch.allclose(columns.mT @ columns, eye, atol=1e-4)


def test_a_look_sees_real_tokens_and_gradients_of_the_outputs() -> None:
    subject = small_subject(1)
    subject.open(0, torch.Generator().manual_seed(0))
    subject.model.requires_grad_(True)
    index = torch.arange(6)
    name = next(iter(subject.weights(subject.model)))
    rows: list[torch.Tensor] = []
    module = subject.model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    seen = look(subject, subject.model, 0, [index])[name]
    hook.remove()
    mask = subject.inputs(0, index)["attention_mask"].bool()
    X = rows[0][mask]
    assert torch.allclose(seen.inputs, X.mT @ X, rtol=1e-4)
    assert seen.gradients.trace() > 0
    assert all(weight.grad is None for weight in subject.weights(subject.model).values())


def test_tasks_that_share_texts_are_judged_by_their_own_heads() -> None:
    tokens = small_tokens(1)
    subject = small_subject(2)
    subject.tasks = [tokens[0], tokens[0]]
    for number in range(2):
        subject.open(number, torch.Generator().manual_seed(number))
    together = subject.accuracies(subject.model, [0, 1], "test")
    apart = [subject.accuracies(subject.model, [number], "test")[0] for number in range(2)]
    assert together == apart
    few = subject.accuracies(subject.model, [0], "test", CLASSES)
    assert few[0] in (0.0, 1 / 3, 2 / 3, 1.0)
