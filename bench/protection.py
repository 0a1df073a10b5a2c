"""``python -m bench protect``: what protecting a training step of MiniLM costs, and what it holds.

A step is forward, backward and AdamW with weight decay on sentence pairs of one batch; each
contender trains a copy of the model of its own. The linear weights are protected at ρ. The
formula as written runs in post-accumulate hooks, as users of plain PyTorch attach it. Drift is
what a long run of AdamW does to the protected part, with restoring and without.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import osf_torch
from bench import contenders, corpus, minilm, report
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from bench.training import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Batch,
    batches,
    contrastive_loss,
)

UNPROTECTED = "unprotected"
RESTORED = "protect"
PROJECTED = "protect, no restore"
EAGER = "formula as written, in hooks"
OVERHEAD_TARGET = 0.15
DRIFT_TARGET = 1e-5


@dataclass
class Row:
    """One contender's training step, or (``steps``) one long run's drift."""

    case: str
    contender: str
    rho: float
    matrices: int
    tokens: int | None = None  # of a step, padding included
    rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    overhead: float | None = None  # of the unprotected step, from medians
    extra_bytes: int | None = None  # most that a step allocates beyond what it begins with
    held_bytes: int | None = None  # bases and protected parts
    steps: int | None = None
    drift: float | None = None


@dataclass
class Trainer:
    """A model of its own, its optimizer, and what protects it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: osf_torch.Guard | None = None
    held: tuple[Tensor, ...] = ()

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        contrastive_loss(self.model, batch).backward()
        self.optimizer.step()

    @property
    def held_bytes(self) -> int:
        tensors: list[Tensor] = list(self.held)
        if self.guard is not None:
            for entry in self.guard.state_dict()["weights"].values():
                tensors += [t for t in entry.values() if isinstance(t, Tensor)]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def trainer(contender: str, model: nn.Module, subspaces: osf_torch.Subspaces) -> Trainer:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    if contender == UNPROTECTED:
        return Trainer(model, optimizer)
    if contender in (RESTORED, PROJECTED):
        restore = contender == RESTORED
        guard = osf_torch.protect(model, subspaces, optimizer=optimizer, restore=restore)
        return Trainer(model, optimizer, guard)
    held: list[Tensor] = []
    for name, entry in subspaces.items():
        assert entry.svd is not None
        held += [entry.svd.U, entry.svd.V]
        model.get_parameter(name).register_post_accumulate_grad_hook(
            _as_written(entry.svd.U, entry.svd.V)
        )
    return Trainer(model, optimizer, held=tuple(held))


def _as_written(U: Tensor, V: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = contenders.naive(parameter.grad, U, V)

    return hook


def step_rows(
    model: nn.Module,
    subspaces: osf_torch.Subspaces,
    batch: Batch,
    case: str,
    rho: float,
    rounds: int,
    say: Callable[[str], object],
) -> list[Row]:
    """Times of single steps, interleaved."""
    names = (UNPROTECTED, RESTORED, PROJECTED, EAGER)
    trainers = {name: trainer(name, model, subspaces) for name in names}

    def run(which: Trainer) -> Callable[[], None]:
        return lambda: which.step(batch)

    times = interleave(
        {name: Timed(run(one)) for name, one in trainers.items()},
        rounds,
        Clock(torch.device("cpu")),
        warm_up=2,
        on_round=lambda index: say(f"steps, round {index + 1} of {rounds}"),
    )
    summaries = {name: Summary.of(values) for name, values in times.items()}
    bare = summaries[UNPROTECTED].median_ms
    tokens = sum(ids.numel() for ids, _ in batch)
    return [
        Row(
            case,
            name,
            rho,
            len(subspaces),
            tokens,
            rounds,
            summary.median_ms,
            summary.p20_ms,
            summary.p80_ms,
            summary.median_ms / bare - 1.0,
            peak_extra_bytes(run(trainers[name]), torch.device("cpu")),
            trainers[name].held_bytes,
        )
        for name, summary in summaries.items()
    ]


def drift_rows(
    model: nn.Module,
    subspaces: osf_torch.Subspaces,
    todo: list[Batch],
    case: str,
    rho: float,
    say: Callable[[str], object],
) -> Iterator[Row]:
    """The worst weight's drift after as many steps of AdamW as there are batches."""
    for contender in (RESTORED, PROJECTED):
        one = trainer(contender, model, subspaces)
        assert one.guard is not None
        for index, batch in enumerate(todo):
            one.step(batch)
            say(f"drift, {contender}: step {index + 1} of {len(todo)}")
        drift = max(drifts(model, one.model, subspaces).values())
        yield Row(case, contender, rho, len(subspaces), steps=len(todo), drift=drift)


def drifts(before: nn.Module, after: nn.Module, subspaces: osf_torch.Subspaces) -> dict[str, float]:
    """‖H(W') − H(W)‖ / ‖H(W)‖ with H(W) = W − P(W) from the triplets, in float64."""
    found = {}
    for name, entry in subspaces.items():
        assert entry.svd is not None
        U, V = entry.svd.U.double(), entry.svd.V.double()
        old, new = (m.get_parameter(name).detach().double() for m in (before, after))
        parts = [W - contenders.naive(W, U, V) for W in (new - old, old)]
        found[name] = float(parts[0].norm() / parts[1].norm())
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print two tables; where a figure isn't reached it is named, and the exit status is 1."""
    if not 0.0 < arguments.rho < 1.0 or min(*arguments.batch, arguments.rounds) < 1:
        raise ValueError("bench: expected 0 < --rho < 1, --batch and --rounds of at least 1")
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
    say = report.progress()
    torch.manual_seed(0)
    directory = minilm.model_directory()
    model = minilm.load(directory)
    pairs = corpus.sentence_pairs(corpus.topics())
    tokens = minilm.encode([s for pair in pairs for s in pair], directory)
    encoded = list(zip(tokens[::2], tokens[1::2], strict=True))
    say("refreshing")
    subspaces = osf_torch.refresh(
        model, arguments.rho, keep="all", compute_dtype=torch.float64, progress=False
    )
    generator = torch.Generator().manual_seed(0)
    case = f"MiniLM rho={arguments.rho:g}"
    rows: list[Row] = []

    def keep(fresh: Sequence[Row]) -> None:
        rows.extend(fresh)
        if arguments.csv is not None:  # as they come: drift takes many minutes
            report.append_csv(arguments.csv, fresh, report.environment(torch.device("cpu")), Row)

    for size in arguments.batch:
        (batch,) = batches(encoded, size, 1, generator)
        keep(step_rows(model, subspaces, batch, case, arguments.rho, arguments.rounds, say))
    todo = batches(encoded, arguments.drift_batch, arguments.drift_steps, generator)
    if todo:
        for row in drift_rows(model, subspaces, todo, case, arguments.rho, say):
            keep([row])
    say("")
    print(_tables(rows, arguments))
    over = missed(rows)
    for text in over:
        print(f"MISSED: {text}")
    return 1 if over else 0


def missed(rows: Sequence[Row]) -> list[str]:
    """Which of the largest batch's overhead and the drift are above what they are to be."""
    ours = [row for row in rows if row.contender == RESTORED]
    last = [row for row in ours if row.overhead is not None][-1:]
    found = [
        f"overhead of {RESTORED!r} at {row.tokens} tokens a step is {row.overhead:.1%}, to be at "
        f"most {OVERHEAD_TARGET:.0%}"
        for row in last
        if row.overhead is not None and not row.overhead <= OVERHEAD_TARGET
    ]
    return found + [
        f"drift of {RESTORED!r} after {row.steps} steps is {row.drift:.1e}, to be at most "
        f"{DRIFT_TARGET:.0e}"
        for row in ours
        if row.drift is not None and not row.drift <= DRIFT_TARGET
    ]


def _tables(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    lines = [
        (
            str(row.tokens),
            row.contender,
            report.shown(row.median_ms, ".0f"),
            report.shown(row.p20_ms, ".0f"),
            report.shown(row.p80_ms, ".0f"),
            report.shown(row.overhead, ".1%"),
            report.shown((row.extra_bytes or 0) / 2**20, ".0f"),
            report.shown((row.held_bytes or 0) / 2**20, ".0f"),
        )
        for row in rows
        if row.steps is None
    ]
    text = (
        f"one AdamW step of MiniLM, {rows[0].matrices} weights protected at rho={arguments.rho:g}, "
        f"{torch.get_num_threads()} threads, median of {arguments.rounds} interleaved rounds\n"
    )
    header = ("tokens", "step", "ms", "p20", "p80", "overhead", "peak MiB", "held MiB")
    text += report.table(header, lines)
    for row in rows:
        if row.steps is not None:
            text += f"\ndrift after {row.steps} steps, {row.contender}: {row.drift:.1e}"
    return text
