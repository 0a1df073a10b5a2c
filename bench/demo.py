"""``python -m bench.demo``: the projection at work on a trained sentence encoder.

Real weights (all-MiniLM-L6-v2), their bases from ``osf_torch.refresh``, real text (the Python
language reference that CPython ships), real gradients (a contrastive loss over consecutive
sentences), AdamW with weight decay. Prints one table and one sentence; exits with status 1 where
what the sentence claims didn't hold.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import osf_kernels
from bench import contenders, corpus, minilm, report
from bench.bar import bar_on
from bench.check import UNIT_ROUNDOFF
from bench.contenders import COMPILED, HAND, NAIVE, OURS
from bench.timing import Clock, Timed, interleave, percentile
from bench.training import (
    Refreshed,
    Run,
    Triplets,
    batches,
    leak,
    matrices,
    raw_gradients,
    refreshed,
    share,
    squares,
    train,
)

KINDS = (
    "embeddings",
    "attention q",
    "attention k",
    "attention v",
    "attention o",
    "ffn up",
    "ffn down",
)
EVERYTHING = "all, one call"
LEAK_LIMIT = 1e-6  # float32
RESIDUAL_LIMIT = 1e-5  # relative to the largest singular value
DRIFT_LIMIT = 16.0  # in roundings of the weight: an update can't be placed more finely


@dataclass
class Line:
    """One row of the table."""

    kind: str
    count: int
    raw_share: float  # of the gradient's norm that lies in the protected span
    projected_share: float
    leak: float
    drift: float  # of the update's norm that lies in the protected span, without restoring
    restored_drift: float
    rounding: float  # unit roundoff of float32 times ‖W‖ / ‖ΔW‖, of the restored run
    times_ms: dict[str, float | None]


def badness(value: float) -> float:
    return math.inf if math.isnan(value) else value


def verdict(lines: Sequence[Line], losses: Sequence[float], bases: Refreshed) -> tuple[bool, str]:
    """Whether what the demo is to show held, and the one sentence that says so, from the figures.

    ``lines`` ends with the line over all matrices; ``losses`` are the restored run's.
    """
    total = lines[-1]
    # NaN counts as worst; max() alone would pass over it.
    worst_leak = max((line.leak for line in lines), key=badness)
    worst = max(lines, key=lambda line: badness(line.restored_drift / line.rounding))
    quarter = max(1, len(losses) // 4)
    first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
    times = total.times_ms
    ours, as_written, by_hand = times[OURS], times[NAIVE], times[HAND]
    assert ours is not None
    assert as_written is not None
    assert by_hand is not None
    failures = []
    if not worst_leak <= LEAK_LIMIT:
        failures.append(f"the leak is {worst_leak:.1e}, above {LEAK_LIMIT:.0e}")
    if not worst.restored_drift <= DRIFT_LIMIT * worst.rounding:
        failures.append(
            f"restoring left {worst.restored_drift:.1e} of the update of {worst.kind} in the span, "
            f"above {DRIFT_LIMIT:g} roundings of the weight ({DRIFT_LIMIT * worst.rounding:.1e})"
        )
    if not total.drift > 10 * total.restored_drift:
        failures.append("restoring did not lessen the drift tenfold")
    if not last < first:
        failures.append(f"the loss did not fall ({first:.3f} to {last:.3f})")
    if not ours < as_written:
        failures.append(f"project_many_ ({ours:.0f} ms) was no faster than the formula as written")
    if not bases.residual <= RESIDUAL_LIMIT:
        failures.append(f"the residual is {bases.residual:.1e}, above {RESIDUAL_LIMIT:.0e}")
    if failures:
        return False, "Not shown: " + "; ".join(failures) + "."
    return True, (
        f"Shown on {total.count} trained matrices: refresh took {bases.seconds:.1f} s where "
        f"torch.linalg.svd in a loop took {bases.loop_seconds:.1f} s (residual "
        f"{bases.residual:.0e}), projecting took the protected share of the "
        f"gradient from {total.raw_share:.2f} to {total.projected_share:.0e} (worst leak "
        f"{worst_leak:.0e}), restoring after each AdamW step took the share of the update that "
        f"drifts into the protected span from {total.drift:.1%} to {total.restored_drift:.0e} "
        f"while the loss fell from {first:.3f} to {last:.3f}, and one project_many_ call took "
        f"{ours:.0f} ms, {as_written / ours:.2f} times as fast as the formula as written and "
        f"{by_hand / ours:.2f} times as fast as it ordered by hand."
    )


def times_by_kind(
    gradients: Mapping[str, Tensor],
    bases: Mapping[str, Triplets],
    rounds: int,
    say: Callable[[str], object],
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Median ms of each contender on each kind and on everything, and why any is missing."""
    groups = {kind: [n for n in gradients if minilm.kind_of(n) == kind] for kind in KINDS}
    groups[EVERYTHING] = list(gradients)
    work = {name: g.clone() for name, g in gradients.items()}
    runs: dict[str, Callable[..., object]] = {
        OURS: osf_kernels.project_many_,
        HAND: contenders.loop(contenders.hand_ordered_),
        NAIVE: contenders.loop(contenders.naive),
    }
    compiled = contenders.loop(contenders.compiled())
    why = ""
    say("compiling the formula with torch.compile")
    try:
        compiled(*lists(COMPILED, list(gradients), work, bases))
        runs[COMPILED] = compiled
    except Exception as error:
        why = f"{COMPILED} did not run here: {contenders.first_line(error)}"

    timed = {}
    for kind, names in groups.items():

        def prepare(names: list[str] = names) -> None:
            for name in names:
                work[name].copy_(gradients[name])

        for contender, run in runs.items():
            call = partial(run, *lists(contender, names, work, bases))
            timed[f"{kind}/{contender}"] = Timed(call, prepare)
    times = interleave(
        timed,
        rounds,
        Clock(torch.device("cpu")),
        on_round=lambda index: say(f"timing, round {index + 1} of {rounds}"),
    )
    medians: dict[str, dict[str, float | None]] = {
        kind: {
            contender: percentile(times[f"{kind}/{contender}"], 50.0) if contender in runs else None
            for contender in (OURS, HAND, NAIVE, COMPILED)
        }
        for kind in groups
    }
    return medians, why


def lists(
    contender: str,
    names: Sequence[str],
    grads: Mapping[str, Tensor],
    bases: Mapping[str, Triplets],
) -> tuple[list[Any], ...]:
    """A contender's arguments: ours takes the smaller basis of each side, which its peers lack."""
    held = [bases[n] for n in names]
    if contender == OURS:
        sides = [t.smaller_U for t in held], [t.smaller_V for t in held]
    else:
        sides = [t.U for t in held], [t.V for t in held]
    return [grads[n] for n in names], *sides


def lines_of(
    raw: Mapping[str, Tensor],
    bases: Mapping[str, Triplets],
    without: Run,
    restored: Run,
    weights: Mapping[str, Tensor],
    times: Mapping[str, dict[str, float | None]],
) -> list[Line]:
    """The table's rows: one a layer kind, and one over everything."""

    found = {
        what: {name: squares(x, bases[name]) for name, x in matrices_of.items()}
        for what, matrices_of in {
            "raw": raw,
            "projected": restored.projected,
            "drift": without.change,
            "restored": restored.change,
        }.items()
    }

    def line(kind: str, names: Sequence[str]) -> Line:
        raw_share, projected_share, drift, restored_drift = (
            share([parts[n] for n in names]) for parts in found.values()
        )
        worst = max(leak(found["raw"][n], found["projected"][n]) for n in names)
        weight = math.sqrt(sum(float(weights[n].double().square().sum()) for n in names))
        update = math.sqrt(sum(found["restored"][n].whole for n in names))
        rounding = UNIT_ROUNDOFF[torch.float32] * weight / update
        return Line(
            kind,
            len(names),
            raw_share,
            projected_share,
            worst,
            drift,
            restored_drift,
            rounding,
            times[kind],
        )

    lines = [line(kind, [n for n in raw if minilm.kind_of(n) == kind]) for kind in KINDS]
    return [*lines, line(EVERYTHING, list(raw))]


def draw_table(lines: Sequence[Line], rho: float, steps: int) -> Table:
    table = Table(
        title=f"all-MiniLM-L6-v2, rho = {rho:g}, {steps} AdamW steps, float32 on the CPU",
        caption="gradient, drift: share of the gradient's / the update's norm inside the protected "
        "span. leak: worst of |U'g'|/|U'g| and |g'V|/|gV|. Times: medians of interleaved rounds; "
        "project_many_ holds the smaller basis of each side, the others the protected one.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer kind", no_wrap=True)
    for header in (
        "matrices",
        "gradient\nraw",
        "\nprojected",
        "\nleak",
        "drift\nno restore",
        "\nrestored",
        "project_many_\nms",
        "by hand\nms",
        "as written\nms",
        "torch.compile\nms",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for line in lines:
        if line.kind == EVERYTHING:
            table.add_section()
        times = [line.times_ms[name] for name in (OURS, HAND, NAIVE, COMPILED)]
        table.add_row(
            line.kind,
            str(line.count),
            f"{line.raw_share:.2f}",
            f"{line.projected_share:.0e}",
            f"{line.leak:.0e}",
            f"{line.drift:.1%}",
            f"{line.restored_drift:.0e}",
            *("see below" if t is None else f"{t:.1f}" for t in times),
        )
    return table


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    top.add_argument("--steps", type=int, default=24, help="AdamW steps of each of the two runs")
    top.add_argument("--rho", type=float, default=0.5, help="protected share of the shorter side")
    top.add_argument("--rounds", type=int, default=5, help="timing rounds")
    top.add_argument("--batch", type=int, default=12, help="sentence pairs a step")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if not 0.0 < arguments.rho < 1.0 or min(arguments.steps, arguments.rounds) < 1:
        print("bench.demo: expected 0 < rho < 1, steps >= 1, rounds >= 1", file=sys.stderr)
        return 2
    started = time.perf_counter()
    torch.manual_seed(0)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a log has no width of its own; keep the table's rows whole
    try:
        directory = minilm.model_directory()
        model = minilm.load(directory)
        pairs = corpus.sentence_pairs(corpus.topics())
    except (FileNotFoundError, ImportError) as error:
        print(f"bench.demo: {error}", file=sys.stderr)
        return 2
    weights = matrices(model)
    console.print(
        f"model: {directory} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights)\n"
        f"text:  {corpus.SOURCE} ({len(pairs)} pairs of consecutive sentences)\n"
        f"on:    {report.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    with bar_on(console) as progress:
        total = 2 + 2 * arguments.steps + arguments.rounds + 2
        task = progress.add_task("reading sentences", total=total)

        def say(text: str) -> None:
            progress.update(task, description=text, advance=1)

        tokens = minilm.encode([s for pair in pairs for s in pair], directory)
        encoded = list(zip(tokens[::2], tokens[1::2], strict=True))
        generator = torch.Generator().manual_seed(0)
        todo = batches(encoded, arguments.batch, arguments.steps, generator)
        found = refreshed(model, arguments.rho, say)
        bases = found.triplets
        trained_from = {name: weight.detach() for name, weight in weights.items()}
        say("one raw gradient")
        raw = raw_gradients(model, todo[0])
        without, restored = (
            train(
                copy.deepcopy(model),
                found.subspaces,
                todo,
                restore=restore,
                on_step=partial(say, f"AdamW {'with' if restore else 'without'} restore"),
            )
            for restore in (False, True)
        )
        times, why = times_by_kind(raw, bases, arguments.rounds, say)
    lines = lines_of(raw, bases, without, restored, trained_from, times)
    console.print(draw_table(lines, arguments.rho, arguments.steps))
    if why:
        console.print(why, markup=False)
    console.print(
        f"osf_torch.refresh: {len(weights)} weights in {found.seconds:.2f} s ({found.methods}; "
        f"worst residual {found.residual:.0e}); torch.linalg.svd in a loop: "
        f"{found.loop_seconds:.2f} s",
        markup=False,
        highlight=False,
    )
    held, sentence = verdict(lines, restored.losses, found)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
