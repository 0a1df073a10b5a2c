"""What the continual bench shows on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from bench import continual_tasks, report
from bench.continual_cost import Cost
from bench.continual_methods import METHODS
from bench.continual_rows import Summary
from bench.continual_run import Setting


def draw_table(
    summaries: Mapping[str, Summary], costs: Mapping[str, Cost], names: Sequence[str]
) -> Table:
    table = Table(
        title="Accuracy on test documents in %, mean and standard deviation over the seeds",
        caption="average: all tasks, after the last one. learned: each right after it was "
        "trained. forgotten: what of that is gone after the last task (negative backward "
        "transfer), in points. Step times are medians of rounds that interleave the methods. "
        "memory: peak of a task's start and steps above the loaded encoder.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for header in ("lr", "average", "learned", "forgotten", *names[:-1]):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("step\nms", "\nx plain", "memory\n+ MiB"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        cost = costs.get(name)
        table.add_row(
            METHODS[name].title,
            f"{summary.learning_rate:g}",
            str(summary.average),
            str(summary.learned),
            str(summary.forgotten),
            *(f"{100 * lost.mean:.1f}" for lost in summary.by_task),
            "-" if cost is None else f"{cost.median_step_ms:.0f}",
            "-" if cost is None else report.shown(cost.times_plain, ".2f"),
            "-" if cost is None else report.shown(cost.added_mib, ".0f"),
        )
    return table


def tuning_table(found: Mapping[str, Mapping[float, float]], grid: Sequence[float]) -> str:
    """What each method reached by learning rate; - where the search didn't go."""
    header = ("method", *(f"{rate:g}" for rate in grid), "best")
    lines = [
        (
            name,
            *(f"{100 * scores[rate]:.1f}" if rate in scores else "-" for rate in grid),
            f"{max(scores, key=lambda rate: (scores[rate], -rate)):g}",
        )
        for name, scores in found.items()
    ]
    return report.table(header, lines)


def console_of() -> Console:
    console = Console()
    # A log has no width of its own; keep the table's rows whole.
    return console if console.is_terminal else Console(width=170)


def say(console: Console, text: str) -> None:
    """A sentence as it is, unless it is empty."""
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(
    console: Console, tasks: Sequence[continual_tasks.Task], setting: Setting, model: str
) -> None:
    console.print(
        f"model: {model}\n"
        f"text:  {continual_tasks.sources()}\n"
        f"on:    {report.cpu_name()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\n"
        f"train: {setting.steps} AdamW steps a task, {setting.batch} examples a step; ours and OSF "
        f"keep {setting.ranks[0]:.0%} of the directions in the first task to "
        f"{setting.ranks[1]:.0%} in the last",
        markup=False,
        highlight=False,
    )
    for number, task in enumerate(tasks, 1):
        counts = ", ".join(f"{len(found)} {split}" for split, found in task.examples.items())
        console.print(
            f"task {number}, {task.name}: {continual_tasks.QUESTIONS[task.name]} "
            f"({len(task.classes)} classes; {counts})",
            markup=False,
            highlight=False,
        )
