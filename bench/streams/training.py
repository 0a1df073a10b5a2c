"""One method over one stream: the training loop, what it is judged by, and how it is resumed."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.continual_run import HEAD_LEARNING_RATE, order_of, slope
from bench.streams.peers import Plain, norm_of
from bench.streams.subject import Subject

JUDGED = 250  # test examples a task, as many of each label as there are; where it has more
COURSE = 64  # of them after other tasks, for the picture alone
COURSE_EVERY = 3  # tasks
SHOWN = 5  # of the last tasks, and of the first; all of a stream that has fewer

Step = Callable[[int, float], object]
Build = Callable[[Subject], Plain]


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Attributes:
        steps: of a task; where it comes in parts, as many in all.
    """

    steps: int
    batch: int
    precision: str = "bf16"

    def of(self, parts: int) -> Setting:
        """The setting of a task's part."""
        return replace(self, steps=max(1, self.steps // parts))


@dataclass
class After:
    """What was measured after a task.

    Attributes:
        test, validation: accuracies of the tasks so far after the last one; of the task itself
            after any other.
        course: of all tasks so far on fewer examples, where they were looked at.
        moved: ‖ΔW‖_F over the trained matrices; None of adapters that aren't merged.
        free: as of ``Plain``.
        general: the loss on text of no task.
        seconds: of the task's training, with what the method does before and after it.
    """

    test: list[float]
    validation: list[float]
    course: list[float]
    moved: float | None
    free: float
    general: float | None
    seconds: float


@dataclass
class Outcome:
    """A run, finished or cut short: a line a task.

    Attributes:
        after: in the order of the tasks.
        seconds: of the whole run, with what it was judged by.
        general: the loss on text of no task before the first one; None where the model has none.
    """

    after: list[After] = field(default_factory=list)
    seconds: float = 0.0
    general: float | None = None

    def own(self, split: str = "test") -> list[float]:
        """The accuracy of each task right after it."""
        found: list[list[float]] = [getattr(line, split) for line in self.after]
        return [values[-1] for values in found]

    def last(self, split: str = "test") -> list[float]:
        """The accuracy of each task after the last."""
        found: list[float] = getattr(self.after[-1], split)
        return found


class Diverged(FloatingPointError):
    """A loss that isn't finite."""


class Damaged(ValueError):
    """A state between two tasks that can't be read."""


def run(
    build: Build,
    subject: Subject,
    tasks: int,
    setting: Setting,
    *,
    learning_rate: float,
    seed: int,
    partial: Path | None = None,
    on_step: Step = lambda _, __: None,
) -> Outcome:
    """Trains ``subject`` on one task after the other.

    Args:
        partial: where the state between two tasks is kept: a run that was cut short goes on from
            there, and trains no finished task again. Whoever has kept the outcome removes it.
        on_step: called with the task's number and the loss after each step.

    Raises:
        Diverged: a loss that isn't finite.
        Damaged: a state that can't be read.

    Draws heads, the order of examples and what a method draws from ``seed`` and the task's number,
    the same for every method and whether or not the run was cut short.
    """
    torch.manual_seed(seed)
    method = build(subject)
    outcome = Outcome()
    if partial is not None and partial.exists():
        outcome, of_subject, of_method = _saved(partial)
        subject.load(of_subject)
        method.load(of_method)
    if not outcome.after:
        outcome.general = subject.general(method.model)
    for number in range(len(outcome.after), tasks):
        started = time.perf_counter()
        torch.manual_seed(1_000_000 + 1000 * seed + number)
        generator = torch.Generator().manual_seed(1000 * seed + number)
        place = number / max(1, tasks - 1)
        moved = _train(method, number, place, setting, learning_rate, generator, on_step)
        seconds = time.perf_counter() - started
        outcome.after.append(judged(method, number, tasks, moved, seconds))
        outcome.seconds += time.perf_counter() - started
        if partial is not None:
            _save(partial, outcome, subject, method)
    return outcome


def _train(
    method: Plain,
    number: int,
    place: float,
    setting: Setting,
    learning_rate: float,
    generator: torch.Generator,
    on_step: Step,
) -> float | None:
    """One task. Returns ‖ΔW‖_F where the model has the weights themselves before and after it."""
    subject = method.subject
    before = {name: w.detach().clone() for name, w in subject.weights(method.model).items()}
    count = subject.count(number)
    todo = order_of(count, setting.steps * setting.batch, generator).split(setting.batch)
    head = subject.open(number, generator)
    method.begin(number, place)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": trained, "lr": learning_rate, "weight_decay": method.decay}
    ]
    if head:
        groups.append({"params": head, "lr": HEAD_LEARNING_RATE, "weight_decay": 0.01})
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: slope(done, setting.steps))
    method.attach(optimizer)
    for index in todo:
        optimizer.zero_grad()
        loss = subject.loss(method.model, number, index)
        extra = method.extra(number, generator)
        whole = loss if extra is None else loss + extra
        whole.backward()
        value = float(whole.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"bench streams: the loss of task {number + 1} is {value} at learning rate "
                f"{learning_rate:g}; take a smaller one"
            )
        optimizer.step()
        method.stepped()
        schedule.step()
        on_step(number, value)
    method.end(number, todo)
    method.model.requires_grad_(False)
    weights = subject.weights(method.model)
    return norm_of(weights, before) if weights.keys() == before.keys() else None


def judged(method: Plain, number: int, tasks: int, moved: float | None, seconds: float) -> After:
    subject, is_last = method.subject, number == tasks - 1
    asked: Sequence[int] = range(tasks) if is_last else [number]
    course: list[float] = []
    if not is_last and (number + 1) % COURSE_EVERY == 0:
        course = subject.accuracies(method.model, range(number + 1), "test", COURSE)
    return After(
        subject.accuracies(method.model, asked, "test", JUDGED),
        subject.accuracies(method.model, asked, "validation"),
        course,
        moved,
        method.free,
        subject.general(method.model),
        seconds,
    )


def _save(partial: Path, outcome: Outcome, subject: Subject, method: Plain) -> None:
    """Replaces the file at once, so that a run cut short here leaves the one before."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    fresh = partial.with_suffix(f".{os.getpid()}")
    try:
        state = {"outcome": outcome, "subject": subject.state(), "method": method.state()}
        torch.save(state, fresh)
        fresh.replace(partial)
    finally:
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()


def _saved(partial: Path) -> tuple[Outcome, dict[str, Any], dict[str, Any]]:
    """The outcome so far, the subject's state and the method's."""
    with partial.open("rb") as file:
        try:
            saved = torch.load(file, weights_only=False)
            return saved["outcome"], saved["subject"], saved["method"]
        except Exception as error:  # bytes that aren't what was written can raise anything
            raise Damaged(
                f"bench streams: expected {partial} to be the state of a run between two tasks, "
                f"got {type(error).__name__}: {str(error).partition(chr(10))[0]}; delete it, and "
                "the same command trains the run from its first task"
            ) from None


# Figures of a run.


def average(outcome: Outcome, split: str = "test") -> float:
    """Mean accuracy of all tasks after the last."""
    found = outcome.last(split)
    return sum(found) / len(found)


def learned(outcome: Outcome, split: str = "test") -> float:
    """Mean accuracy of each task right after it."""
    found = outcome.own(split)
    return sum(found) / len(found)


def forgetting(outcome: Outcome, split: str = "test") -> float:
    """What is gone of that after the last task, mean over all tasks but the last: −BWT."""
    own, last = outcome.own(split)[:-1], outcome.last(split)[:-1]
    return sum(a - b for a, b in zip(own, last, strict=True)) / max(1, len(own))


def kept(outcome: Outcome, split: str = "test") -> float:
    """What the first tasks have after the last one, of what they had right after themselves."""
    return sum(outcome.last(split)[:SHOWN]) / sum(outcome.own(split)[:SHOWN])


def general_rise(outcome: Outcome) -> float:
    """How much the loss on text of no task has grown over the stream, in nats; NaN without one."""
    before, after = outcome.general, outcome.after[-1].general
    return math.nan if before is None or after is None else after - before


def latest(outcome: Outcome, split: str = "test") -> float:
    """Mean accuracy of the last tasks at the end."""
    found = outcome.last(split)[-SHOWN:]
    return sum(found) / len(found)
