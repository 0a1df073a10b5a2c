"""A stream in a picture: what is known over its course, what is lost, what is left to learn by."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.continual_plot import forgotten_bars
from bench.streams.methods import DEFAULT, HEADS, METHODS
from bench.streams.rows import Run
from bench.streams.show import over
from bench.streams.training import COURSE, JUDGED, After, forgetting

# Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = {
    HEADS: "#BBBBBB",
    "plain": "#555555",
    "matched": "#999999",
    "lora": "#CC79A7",
    "olora": "#E69F00",
    "peft-osf": "#D55E00",
    "replay": "#009E73",
    DEFAULT: "#0072B2",
}
OTHERS = ("#56B4E9", "#000000", "#F0E442", "#882255", "#44AA99")
DASHED = {"replay", "matched", HEADS}
ACROSS = 7
DOTS = {"marker": "o", "markersize": 4, "linestyle": ":", "linewidth": 0.8}


def draw(runs: Mapping[str, Sequence[Run]], stream: str, picture: Path) -> None:
    """Above: mean accuracy of the tasks so far, what is forgotten, and the share of the matrices
    that can't move. Below: a panel a task, its accuracy over the stream.

    Raises ValueError where there are no runs.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        raise ValueError("bench streams: nothing to plot: no finished run")
    names = next(iter(runs.values()))[0].names
    different = list(dict.fromkeys(names))
    rows = -(-len(different) // ACROSS)
    figure = plt.figure(figsize=(15, 4.2 + 2.3 * rows), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.6, 2.3 * rows))
    has_general = any(found[0].outcome.general is not None for found in runs.values())
    widths = (2, 1.3, 1.3, 1.3) if has_general else (2, 1.3, 1.3)
    course, lost, used, *others = halves[0].subplots(1, len(widths), width_ratios=widths)
    spare = iter(OTHERS * len(runs))
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": COLOURS.get(name) or next(spare),
            "linestyle": "--" if name in DASHED else "-",
            "linewidth": 2.2 if name == DEFAULT else 1.2,
        }
        for name in runs
    }
    for name, found in runs.items():
        looked, end = so_far(found)
        course.plot(*looked, label=METHODS[name].title, **styles[name])
        course.plot(*end, **styles[name] | DOTS)
        lines = zip(*(run.outcome.after for run in found), strict=True)
        free = [statistics.fmean(line.free for line in seeds) for seeds in lines]
        used.plot(range(1, len(free) + 1), [100 * (1 - share) for share in free], **styles[name])
    for axes in others:  # of a model that has a loss on text of no task
        for name, found in runs.items():
            axes.plot(*general(found), **styles[name])
        axes.set_title("loss on text of no task, nats", fontsize=9)
    course.set_title("mean accuracy of the tasks so far, %", fontsize=9)
    used.set_title("share of the matrices that can't move, %", fontsize=9)
    for axes in (course, used, *others):
        axes.set_xlabel("after task", fontsize=8)
    forgotten_bars(
        lost,
        {METHODS[name].title: over(found, forgetting) for name, found in runs.items()},
        [styles[name]["color"] for name in runs],
    )
    lost.set_title("forgotten at the end, points", fontsize=9)
    panels = list(halves[1].subplots(rows, ACROSS, squeeze=False, sharex=True).flat)
    for axes, task in zip(panels, different, strict=False):
        for name, found in runs.items():
            looked, ends = of_task(found, names.index(task))
            axes.plot(*looked, **styles[name])
            axes.plot(*ends, **styles[name] | DOTS)
        axes.set_title(f"{names.index(task) + 1}: {task}", fontsize=9)
    for axes in panels[len(different) :]:
        axes.set_visible(False)
    for axes in (course, used, *others, *panels):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (course, lost, used, *others, *panels):
        axes.tick_params(labelsize=7)
        axes.grid(True, color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    # Beside the panels, since the lines leave no corner of them free.
    halves[0].legend(
        *course.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(runs),
        fontsize=8,
        frameon=False,
    )
    halves[1].supxlabel(
        f"after task; lines: {COURSE} test examples; dots: {JUDGED}, right after the task and at "
        "the end",
        fontsize=8,
    )
    fewest, most = min(map(len, runs.values())), max(map(len, runs.values()))
    count = str(most) if fewest == most else f"{fewest} to {most}"
    over_seeds = f"mean of {count} seeds" if most > 1 else "one seed"
    figure.suptitle(
        f"stream {stream}: {len(names)} tasks one after the other, {over_seeds}; below, the "
        "accuracy of each task, %",
        fontsize=10,
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def general(runs: Sequence[Run]) -> tuple[list[int], list[float]]:
    """The mean loss on text of no task before the first task and after each."""
    losses = [[run.outcome.general, *(line.general for line in run.outcome.after)] for run in runs]
    found = [
        statistics.fmean(loss for loss in seeds if loss is not None)
        for seeds in zip(*losses, strict=True)
    ]
    return list(range(len(found))), found


Points = tuple[list[int], list[float]]  # after which task, and accuracy in %


def so_far(runs: Sequence[Run]) -> tuple[Points, Points]:
    """The mean accuracy of all tasks so far: over the stream on a few examples, and at its end."""
    lines = [run.outcome.after for run in runs]
    last = len(lines[0]) - 1

    def mean(of: Callable[[After], list[float]], i: int) -> float:
        return 100 * statistics.fmean(statistics.fmean(of(run[i])) for run in lines)

    looked = [i for i, line in enumerate(lines[0]) if line.course]
    course = [mean(lambda line: line.course, i) for i in looked]
    end = [mean(lambda line: line.test, last)]
    return ([i + 1 for i in looked], course), ([last + 1], end)


def of_task(runs: Sequence[Run], task: int) -> tuple[Points, Points]:
    """A task's accuracy: over the stream on a few examples, and right after it and at the end."""
    lines = [run.outcome.after for run in runs]
    last = len(lines[0]) - 1

    def mean(of: Callable[[Sequence[After]], float]) -> float:
        return 100 * statistics.fmean(of(run) for run in lines)

    looked = [i for i, line in enumerate(lines[0]) if len(line.course) > task]
    course = [mean(lambda run, i=i: run[i].course[task]) for i in looked]  # type: ignore[misc]
    ends = [mean(lambda run: run[task].test[-1]), mean(lambda run: run[last].test[task])]
    return ([i + 1 for i in looked], course), ([task + 1, last + 1], ends)
