"""``python -m bench optimizer-state``: what becomes of momentum where the next task begins.

The network of ``bench.optimizers`` learns one network for half of the steps and then another one,
under one optimizer and one guard: in between ``Guard.next_task(optimizer_state=...)`` protects the
leading directions of the weights as they are then. Every choice of a seed takes the same steps on
the same inputs.

* "learned soon" and "learned" are the shares of the second task's first loss that are gone after a
  tenth of its steps and after all, on inputs that no step has seen.
* "forgotten" is the first task's loss after the second over that before it, less 1.
* "leak" is ‖ΔW − P(ΔW)‖ / ‖ΔW‖ of the second task's steps by the new bases.

Each row is the mean over the seeds, and ± the standard error of what differs from "keep" in pairs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

import torch
from torch import Tensor, nn

import osf_torch
from bench import report
from bench.optimizers import (
    CPU,
    HELD_OUT,
    OPTIMIZERS,
    WIDTH,
    Named,
    Outcome,
    loss_of,
    missing,
    network,
    subspaces_of,
    take_steps,
)

Choice = Literal["keep", "project", "clear"]
CHOICES: tuple[Choice, ...] = ("keep", "project", "clear")
NAMES = ("AdamW", "Lion", "Muon", "SGD with momentum")
SOON = 10  # a tenth of the second task's steps


@dataclass
class Row:
    """One optimizer, with or without restoring, and one choice. None was not measured."""

    optimizer: str
    settings: str
    restore: str
    state: str
    steps: int  # of each task
    seeds: int
    learned_soon: float | None = None
    learned_soon_error: float | None = None
    learned: float | None = None
    learned_error: float | None = None
    forgotten: float | None = None
    forgotten_error: float | None = None
    leak: float | None = None
    status: str = "ok"


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    learned_soon: float
    learned: float
    forgotten: float
    leak: float


def run_twice(named: Named, choice: Choice, restore: bool, steps: int, seed: int) -> Figures:
    """Two tasks of ``steps`` steps each."""
    model = network(seed)
    first, second = network(seed + 1000), network(seed + 2000)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.randn(HELD_OUT, WIDTH, generator=generator)
    optimizer = named.make(list(model.parameters()))
    guard = osf_torch.protect(model, subspaces_of(model), optimizer, restore=restore)
    take_steps(model, first, optimizer, steps, generator)
    found = guard.next_task(
        widen=0, compute_dtype=torch.float64, progress=False, optimizer_state=choice
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = [measured(model, teacher, held_out) for teacher in (first, second)]
    soon = max(1, steps // SOON)
    take_steps(model, second, optimizer, soon, generator)
    after_few = measured(model, second, held_out)
    take_steps(model, second, optimizer, steps - soon, generator)
    end = [measured(model, teacher, held_out) for teacher in (first, second)]
    return Figures(
        1 - after_few / start[1],
        1 - end[1] / start[1],
        end[0] / start[0] - 1,
        Outcome(model, before, found, optimizer, guard).share(),
    )


@torch.no_grad()
def measured(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    return float(loss_of(model, teacher, x))


def measure(
    name: str, steps: int, seeds: int, say: Callable[[str], object] = lambda _: None
) -> list[Row]:
    """The rows of one optimizer."""
    named, rows = OPTIMIZERS[name], []
    for restore in (True, False):
        kept: list[Figures] = []
        for choice in CHOICES:
            row = Row(name, named.settings, "yes" if restore else "no", choice, steps, seeds)
            rows.append(row)
            reason = missing(named)
            if reason is not None:
                row.status = reason
                continue
            each = []
            for seed in range(seeds):
                say(f"{name}, restore={restore}, {choice}: seed {seed + 1} of {seeds}")
                each.append(run_twice(named, choice, restore, steps, seed))
            kept = each if choice == "keep" else kept
            for figure in ("learned_soon", "learned", "forgotten"):
                values = [getattr(one, figure) for one in each]
                setattr(row, figure, mean(values))
                if choice != "keep":
                    pairs = zip(values, (getattr(one, figure) for one in kept), strict=True)
                    setattr(row, f"{figure}_error", standard_error([a - b for a, b in pairs]))
            row.leak = mean(one.leak for one in each)
    return rows


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def run(arguments: argparse.Namespace) -> int:
    """Print a table, and write the rows where a file is named."""
    for argument, value, least in (("steps", arguments.steps, 2), ("seeds", arguments.seeds, 1)):
        if value < least:
            raise ValueError(f"bench: expected --{argument} of at least {least}, got {value}")
    say = report.progress()
    rows = [row for name in NAMES for row in measure(name, arguments.steps, arguments.seeds, say)]
    say("")
    print(table(rows))
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
        report.append_csv(arguments.csv, rows, report.environment(CPU), Row)
    return 0


def table(rows: list[Row]) -> str:
    first = rows[0]
    text = (
        f"two tasks of {first.steps} steps, means of {first.seeds} seeds, ± the standard error of "
        "what differs from keep\n"
    )
    header = (
        "optimizer",
        "restore",
        "optimizer_state",
        "learned soon",
        "learned",
        "forgotten",
        "leak",
    )
    lines = [
        (
            row.optimizer,
            row.restore,
            row.state,
            _with_error(row.learned_soon, row.learned_soon_error),
            _with_error(row.learned, row.learned_error),
            _with_error(row.forgotten, row.forgotten_error),
            report.shown(row.leak, ".1e"),
        )
        for row in rows
    ]
    notes = {f"{row.optimizer}: {row.status}" for row in rows if row.status != "ok"}
    return "\n".join([text + report.table(header, lines), *sorted(notes)])


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")
