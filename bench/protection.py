"""``python -m bench protect``: what protecting a training step of MiniLM costs, and what it holds.

A step is forward, backward and AdamW with weight decay on sentence pairs of one batch; each
contender trains a copy of the model of its own. The linear weights are protected at ρ: by
``protect`` with restoring and without, by ``confine`` merged and beside the weight, by PEFT's OSF
and mini_trainer's OSFT as their users run them, and by the formula as written in post-accumulate
hooks, as users of plain PyTorch attach it. Drift is what a long run of AdamW does to the protected
part. With ``--sweep`` it is bytes and times over ρ, in a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import osf_torch
from bench import contenders, report
from bench.protection_rows import Row, missed, table
from bench.protection_trainers import (
    COMPARED,
    CONFINED,
    FACTORED,
    PEFT_OSF,
    PROJECTED,
    RESTORED,
    UNPROTECTED,
    Trainer,
    trainer,
    without_package,
)
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from bench.training import Batch, batches, minilm_and_pairs

RHOS, BATCHES, ROUNDS, DRIFT_STEPS = (0.5, 0.8), (16, 64), 9, 1000
DRIFTING = (RESTORED, PROJECTED, CONFINED)
SWEPT = (UNPROTECTED, CONFINED, RESTORED, PEFT_OSF, FACTORED)
SWEEP_RHOS, SWEEP_BATCHES, SWEEP_ROUNDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (64,), 5

Say = Callable[[str], object]


def step_rows(
    model: nn.Module,
    subspaces: osf_torch.Subspaces,
    batch: Batch,
    case: str,
    rho: float,
    rounds: int,
    say: Say,
    names: Sequence[str] = COMPARED,
) -> list[Row]:
    """Times of single steps, interleaved, and what each contender holds and allocates."""
    trainers = {name: trainer(name, model, subspaces) for name in names}

    def run(which: Trainer) -> Callable[[], None]:
        return lambda: which.step(batch)

    times = interleave(
        {name: Timed(run(one)) for name, one in trainers.items()},
        rounds,
        Clock(torch.device("cpu")),
        warm_up=2,
        on_round=lambda index: say(f"{case}: steps, round {index + 1} of {rounds}"),
    )
    summaries = {name: Summary.of(values) for name, values in times.items()}
    bare = summaries[UNPROTECTED].median_ms
    tokens = sum(ids.numel() for ids, _ in batch)
    rows = []
    for name, summary in summaries.items():
        one = trainers[name]
        memory = one.memory()
        one.optimizer.zero_grad()  # a step begins without gradients, and allocates them
        extra = peak_extra_bytes(run(one), torch.device("cpu"))
        rows.append(
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
                memory.parameters,
                memory.state,
                memory.held,
                extra,
                memory.parameters + memory.state + memory.held + extra,
                memory.trained,
            )
        )
    return rows


def drift_rows(
    model: nn.Module,
    subspaces: osf_torch.Subspaces,
    todo: list[Batch],
    case: str,
    rho: float,
    say: Say,
) -> Iterator[Row]:
    """The worst weight's drift after as many steps of AdamW as there are batches."""
    for contender in DRIFTING:
        one = trainer(contender, model, subspaces)
        for index, batch in enumerate(todo):
            one.step(batch)
            say(f"{case}: drift, {contender}: step {index + 1} of {len(todo)}")
        drift = max(drifts(model, one.model, subspaces).values())
        yield Row(case, contender, rho, len(subspaces), steps=len(todo), drift=drift)


def drifts(before: nn.Module, after: nn.Module, subspaces: osf_torch.Subspaces) -> dict[str, float]:
    """‖H(W') − H(W)‖ / ‖H(W)‖ with H(W) = W − P(W) from the triplets, in float64."""
    states = before.state_dict(), after.state_dict()  # of a confined model the plain one's
    found = {}
    for name, entry in subspaces.items():
        assert entry.svd is not None
        U, V = entry.svd.U.double(), entry.svd.V.double()
        old, new = (weights[name].double() for weights in states)
        parts = [W - contenders.naive(W, U, V) for W in (new - old, old)]
        found[name] = float(parts[0].norm() / parts[1].norm())
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print the table; where a figure isn't reached it is named, and the exit status is 1.

    The drift is of the first ρ, and ``--sweep`` leaves it out.
    """
    sweep = arguments.sweep
    rhos = arguments.rho or (SWEEP_RHOS if sweep else RHOS)
    sizes = arguments.batch or (SWEEP_BATCHES if sweep else BATCHES)
    rounds = (SWEEP_ROUNDS if sweep else ROUNDS) if arguments.rounds is None else arguments.rounds
    steps = DRIFT_STEPS if arguments.drift_steps is None else arguments.drift_steps
    if not all(0.0 < rho < 1.0 for rho in rhos) or min(*sizes, rounds) < 1:
        raise ValueError("bench: expected 0 < --rho < 1, --batch and --rounds of at least 1")
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
    say = report.progress()
    torch.manual_seed(0)
    model, encoded = minilm_and_pairs()
    asked = SWEPT if sweep else COMPARED
    absent = without_package(asked)
    names = [name for name in asked if name not in absent]
    rows: list[Row] = []

    def keep(fresh: Sequence[Row]) -> None:
        rows.extend(fresh)
        if arguments.csv is not None:  # as they come: drift takes many minutes
            report.append_csv(arguments.csv, fresh, report.environment(torch.device("cpu")), Row)

    for number, rho in enumerate(rhos):
        case = f"MiniLM rho={rho:g}"
        say(f"{case}: refreshing")
        subspaces = osf_torch.refresh(
            model, rho, keep="all", compute_dtype=torch.float64, progress=False
        )
        generator = torch.Generator().manual_seed(0)
        for size in sizes:
            (batch,) = batches(encoded, size, 1, generator)
            keep(step_rows(model, subspaces, batch, case, rho, rounds, say, names))
        if number or sweep:
            continue
        todo = batches(encoded, arguments.drift_batch, steps, generator)
        for row in drift_rows(model, subspaces, todo, case, rho, say) if todo else ():
            keep([row])
    say("")
    print(
        f"one AdamW step of MiniLM, {rows[0].matrices} weights protected, "
        f"{torch.get_num_threads()} threads, median of {rounds} interleaved rounds; bytes in MiB"
    )
    print(table(rows))
    for name, reason in absent.items():
        print(f"LEFT OUT: {name!r}, whose package is missing: {reason}")
    over = missed(rows)
    for text in over:
        print(f"MISSED: {text}")
    if sweep and (arguments.picture or arguments.csv):
        draw(rows, arguments.picture or arguments.csv.with_suffix(".png"))
    return 1 if over else 0


def draw(rows: Sequence[Row], picture: Path) -> None:
    """Says where the picture is, or why there is none."""
    from bench import protection_plot

    where = report.environment(torch.device("cpu"))
    cells = [{name: report.cell(value) for name, value in vars(row).items()} for row in rows]
    try:
        protection_plot.draw([row | where for row in cells], picture)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        print(f"picture in {picture}")
