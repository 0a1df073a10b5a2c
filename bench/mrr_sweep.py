"""``python -m bench mrr``: adaptive ranks by their minimum retention ratio, at a fixed target.

A short run of the continual bench's sequence for each mrr. At mrr = trr every layer keeps the same
share; the smaller mrr is, the more the layers' importance counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import report
from bench.continual import Sequences, opened, setting_of
from bench.continual_methods import OursAdaptive
from bench.continual_rows import Run, summarise
from bench.continual_run import Setting


def name_of(mrr: float) -> str:
    return f"adaptive mrr={mrr:g}"


def sweep(
    sequences: Sequences, mrrs: Sequence[float], seeds: int, rate: float, csv: Path
) -> dict[float, list[Run]]:
    """The runs of each mrr; those in the file already are not redone."""
    return {
        mrr: [
            sequences.run(csv, name_of(mrr), seed, rate, build=partial(OursAdaptive, mrr=mrr))
            for seed in range(seeds)
        ]
        for mrr in mrrs
    }


def table(found: dict[float, list[Run]]) -> str:
    header = ("mrr", "average", "learned", "forgotten")
    lines = []
    for mrr, runs in found.items():
        summary = summarise(runs)
        lines.append(
            (f"{mrr:g}", str(summary.average), str(summary.learned), str(summary.forgotten))
        )
    return report.table(header, lines)


def run(arguments: argparse.Namespace) -> int:
    from bench.bar import bar_on
    from bench.continual_show import console_of, describe, say

    mrrs, trr = arguments.mrr, arguments.trr
    if not mrrs or not all(0 <= mrr <= trr <= 1 for mrr in mrrs):
        raise ValueError(f"bench mrr: expected 0 <= mrr <= trr <= 1, got {mrrs} and {trr}")
    if arguments.tasks < 1:
        raise ValueError(f"bench mrr: expected --tasks to be at least 1, got {arguments.tasks}")
    plain = setting_of(arguments)
    setting = Setting(plain.steps, plain.batch, (trr, trr))
    console = console_of()
    with bar_on(console) as progress:
        bar = progress.add_task("reading", total=None)
        sequences, tasks = opened(setting, lambda text: progress.update(bar, description=text))
        sequences.tasks = sequences.tasks[: arguments.tasks]
        sequences.text += f" {len(sequences.tasks)} tasks"
        describe(console, tasks[: arguments.tasks], setting, sequences.model)
        steps = setting.steps * len(sequences.tasks) * len(mrrs) * arguments.seeds
        progress.update(bar, total=steps)
        sequences.anew = arguments.anew
        rate, csv = arguments.lr, arguments.csv
        wanted = [(name_of(mrr), seed, rate) for mrr in mrrs for seed in range(arguments.seeds)]
        say(console, sequences.taken(csv, wanted))
        sequences.say = lambda text: progress.update(bar, description=text, advance=1)
        found = sweep(sequences, mrrs, arguments.seeds, rate, csv)
    console.print(f"adaptive ranks at trr = {trr:g}; accuracy on test documents in %:")
    console.print(table(found), markup=False, highlight=False)
    console.print(f"rows in {csv}", soft_wrap=True)
    return 0
