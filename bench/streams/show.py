"""What the streams bench shows on a terminal: a table a stream, and what was asked of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from bench.continual_rows import Spread
from bench.continual_show import console_of, say, tuning_table
from bench.streams import data
from bench.streams.methods import DEFAULT, METHODS
from bench.streams.rows import Run
from bench.streams.training import (
    SHOWN,
    Outcome,
    average,
    forgetting,
    general_rise,
    kept,
    latest,
    learned,
)

__all__ = ["console_of", "figures_table", "say", "tuning_table", "verdict"]

QUARTER = 0.25  # of what plain fine-tuning forgets, at most
NEAR_REPLAY = 0.015  # of accuracy
NEAR_PLAIN = 0.01  # of the last tasks' accuracy, over the long stream
STILL_HELD = 0.95  # of the first tasks' accuracy, over the long stream

Figure = Callable[[Outcome], float]


def over(runs: Sequence[Run], figure: Figure) -> Spread:
    """A figure over the seeds."""
    return Spread.over(figure(run.outcome) for run in runs)


def figures_table(runs: Mapping[str, Sequence[Run]], stream: str) -> Table:
    """A line a method, the means and standard deviations over its seeds."""
    count = max(len(found[0].names) for found in runs.values())
    shown = min(SHOWN, count)
    several = any(len(found) > 1 for found in runs.values())
    over_seeds = "mean and standard deviation over the seeds" if several else "one seed"
    has_general = any(found[0].outcome.general is not None for found in runs.values())
    legend = (
        " general: how much the loss on text of no task has grown over the stream, in hundredths "
        "of nats."
    )
    table = Table(
        title=f"stream {stream}: {count} tasks, accuracy on test examples in %, {over_seeds}",
        caption="average: all tasks, after the last one. learned: each right after it was trained. "
        "forgotten: what of that is gone after the last task, in points. first kept: what the "
        f"first {shown} tasks have at the end, of what they had. last: the last {shown} tasks at "
        "the end. free: share of the matrices' numbers that an update can take, in the second "
        "task and in the last. s: seconds of training of a run, with what the method does before "
        f"and after a task.{legend if has_general else ''}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for header in (
        "seeds",
        "lr",
        "average",
        "learned",
        "forgotten",
        "first kept",
        "last",
        "free",
        "s",
        *["general"] * has_general,
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for name, found in runs.items():
        lines = found[0].outcome.after
        table.add_row(
            METHODS[name].title,
            str(len(found)),
            f"{found[0].learning_rate:g}" if METHODS[name].fixed is None else "-",
            *(str(over(found, figure)) for figure in (average, learned, forgetting, kept, latest)),
            f"{lines[min(1, len(lines) - 1)].free:.2f} to {lines[-1].free:.2f}",
            f"{over(found, _seconds).mean:.0f}",
            *([str(over(found, general_rise))] if has_general else []),
        )
    return table


def _seconds(outcome: Outcome) -> float:
    return sum(line.seconds for line in outcome.after)


def verdict(runs: Mapping[str, Sequence[Run]], stream: str) -> str:
    """One sentence on ours: what was hoped for, and whether each part came out."""
    rivals = ("plain", "lora", "peft-osf", "replay")
    missing = [name for name in (DEFAULT, *rivals) if name not in runs]
    if missing:
        return f"No verdict on stream {stream}: {', '.join(missing)} did not run."

    def mean(name: str, figure: Figure) -> float:
        return over(runs[name], figure).mean

    def says(held: bool) -> str:
        return "yes" if held else "NO"

    own, lost = mean(DEFAULT, average), mean(DEFAULT, forgetting)
    losses = {name: mean(name, forgetting) for name in rivals}
    best = max((name for name in runs if name not in (DEFAULT, "replay")), key=_averages(runs))
    seeds = min(len(runs[name]) for name in (DEFAULT, *rivals))
    text = (
        f"Stream {stream}, {seeds} seed{'s' if seeds > 1 else ''}: {METHODS[DEFAULT].title!r} "
        f"forgets {100 * lost:.1f} points where plain fine-tuning forgets "
        f"{100 * losses['plain']:.1f}: at most a quarter, {says(lost <= QUARTER * losses['plain'])}"
        f"; OSF of peft {100 * losses['peft-osf']:.1f}: less, {says(lost < losses['peft-osf'])}; "
        f"LoRA {100 * losses['lora']:.1f}: less, {says(lost < losses['lora'])}. Its average "
        f"accuracy is {100 * own:.1f}, the best other one {100 * mean(best, average):.1f} "
        f"({METHODS[best].title}): above it, {says(own > mean(best, average))}; replay reaches "
        f"{100 * mean('replay', average):.1f}: within 1.5 points, "
        f"{says(own >= mean('replay', average) - NEAR_REPLAY)}."
    )
    if stream == data.LONG:
        late, plain = mean(DEFAULT, latest), mean("plain", latest)
        text += (
            f" Its last {SHOWN} tasks reach {100 * late:.1f} where plain fine-tuning's reach "
            f"{100 * plain:.1f}: at most a point lower, {says(late >= plain - NEAR_PLAIN)}; its "
            f"first {SHOWN} keep {mean(DEFAULT, kept):.1%} of what they had: at least 95 %, "
            f"{says(mean(DEFAULT, kept) >= STILL_HELD)}."
        )
    return text


def _averages(runs: Mapping[str, Sequence[Run]]) -> Callable[[str], float]:
    return lambda name: over(runs[name], average).mean
