"""The continual bench in a picture: each task's accuracy over the sequence, and what is lost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.continual_methods import METHODS
from bench.continual_rows import Run, Spread, summarise

# Okabe and Ito's colours, told apart by every kind of colour vision.
STYLES: dict[str, tuple[str, str, str]] = {  # method -> colour, marker, line
    "plain": ("#555555", "v", "-"),
    "everything": ("#999999", "x", "-"),
    "lora": ("#CC79A7", "D", "--"),
    "peft-osf": ("#D55E00", "s", "--"),
    "core": ("#E69F00", "^", "-"),
    "complement": ("#0072B2", "o", "-"),
    "no-restore": ("#56B4E9", "o", ":"),
    "adaptive": ("#009E73", "P", "-"),
    "inputs": ("#000000", "*", "-"),
    "confine": ("#0072B2", "X", ":"),
    "confine-inputs": ("#000000", "h", ":"),
}


def course(runs: Sequence[Run], task: int) -> list[float]:
    """Of one method: a task's accuracy after it and after each later one, mean over seeds."""
    count = len(runs[0].names)
    return [
        statistics.fmean(run.matrix[after][task] for run in runs) for after in range(task, count)
    ]


def forgotten_bars(axes: Any, lost: Mapping[str, Spread], colours: Sequence[str]) -> None:
    """A bar a method, by its title: what is forgotten in points, with its spread over seeds."""
    for place, (spread, colour) in enumerate(zip(lost.values(), colours, strict=True)):
        axes.barh(
            place,
            100 * spread.mean,
            xerr=None if spread.deviation is None else 100 * spread.deviation,
            color=colour,
            height=0.7,
            error_kw={"linewidth": 1.0, "capsize": 2},
        )
    axes.set_yticks(range(len(lost)), list(lost), fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=0.8)


def draw(runs: Mapping[str, Sequence[Run]], picture: Path) -> None:
    """A panel a task, and one of bars: mean forgetting with its spread over seeds.

    Raises ValueError where there are no runs.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if not any(runs.values()):
        raise ValueError("bench.continual: nothing to plot: no finished run")
    runs = {name: found for name, found in runs.items() if found}
    names = next(iter(runs.values()))[0].names
    columns = -(-(len(names) + 1) // 2)
    figure, grid = plt.subplots(
        2, columns, figsize=(1.0 + 3.0 * columns, 6.2), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for task, name in enumerate(names):
        axes = panels[task]
        for method, found in runs.items():
            colour, marker, line = STYLES.get(method, ("#888888", "x", "-"))
            axes.plot(
                range(task + 1, len(names) + 1),
                [100 * value for value in course(found, task)],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=5,
                linewidth=1.3,
                label=METHODS[method].title,
            )
        axes.set_title(f"task {task + 1}: {name}", fontsize=9)
        axes.set_xlim(0.7, len(names) + 0.3)
        axes.set_xticks(range(1, len(names) + 1))
        axes.set_xlabel("after task", fontsize=8)
        axes.set_ylabel("test accuracy, %", fontsize=8)
        axes.grid(True, color="#dddddd", linewidth=0.5)
    bars = panels[len(names)]
    forgotten_bars(
        bars,
        {METHODS[name].title: summarise(found).forgotten for name, found in runs.items()},
        [STYLES.get(name, ("#888888",))[0] for name in runs],
    )
    bars.set_title("forgetting: mean loss of accuracy, points", fontsize=9)
    for axes in panels:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) + 1 :]:
        axes.set_visible(False)
    seeds = max(len(found) for found in runs.values())
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(
        f"{len(names)} tasks one after the other, a head each: {over}",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
