"""The rows of the continual bench: a file that a run can resume from, and what it amounts to."""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import report
from bench.continual_run import Matrix, average_accuracy, forgetting, learned, mean_forgetting


@dataclass
class Row:
    """One accuracy: of a task (``on``), after training on another (``after``) or on itself."""

    method: str = ""
    seed: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    batch: int = 0
    first_rank: float = 0.0
    last_rank: float = 0.0
    model: str = ""
    text: str = ""  # fingerprint of the examples
    split: str = ""
    tasks: int = 0
    after: int = 0
    on: int = 0
    task: str = ""  # the name of the one it is measured on
    accuracy: float = 0.0
    run_s: float = 0.0  # of the whole sequence


RUN_FIELDS = (
    "method",
    "seed",
    "learning_rate",
    "steps",
    "batch",
    "first_rank",
    "last_rank",
    "model",
    "text",
    "split",
)
Key = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    learning_rate: float
    matrix: Matrix
    names: tuple[str, ...]
    commit: str = ""
    date: str = ""


def key_of(row: Mapping[str, str]) -> Key:
    return tuple(row[name] for name in RUN_FIELDS)


def key(row: Row) -> Key:
    """As it reads back from the file."""
    return tuple(report.cell(getattr(row, name)) for name in RUN_FIELDS)


def rows_of(run: Row, matrix: Matrix, names: Sequence[str], seconds: float) -> list[Row]:
    """The rows of a finished sequence; ``run`` says which one it was."""
    common = {name: getattr(run, name) for name in RUN_FIELDS}
    return [
        Row(**common, tasks=len(names), after=i, on=j, task=names[j], accuracy=a, run_s=seconds)
        for i, line in enumerate(matrix)
        for j, a in enumerate(line)
    ]


def read(path: Path) -> dict[Key, Run]:
    """The runs of a file that are there as a whole; what an interrupted write left is passed over.

    A run that was written twice counts as it was last.
    """
    if not path.exists():
        return {}
    found: dict[Key, dict[tuple[int, int], Mapping[str, str]]] = {}
    for row in report.read_csv(path):
        if all(row.get(name) for name in ("tasks", "after", "on", "accuracy")):
            found.setdefault(key_of(row), {})[int(row["after"]), int(row["on"])] = row
    runs = {}
    for run_key, cells in found.items():
        first = next(iter(cells.values()))
        count = int(first["tasks"])
        wanted = [[(i, j) for j in range(i + 1)] for i in range(count)]
        if all(place in cells for line in wanted for place in line):
            runs[run_key] = Run(
                first["method"],
                int(first["seed"]),
                float(first["learning_rate"]),
                [[float(cells[place]["accuracy"]) for place in line] for line in wanted],
                tuple(cells[count - 1, j]["task"] for j in range(count)),
                first["commit"],
                first["date"],
            )
    return runs


def write(path: Path, run: Row, rows: Iterable[Row], where: Mapping[str, str]) -> None:
    """Puts a finished sequence into the file, in place of what it has of that run.

    The file is replaced at once, without what an interrupted write left of a line.

    Raises:
        ValueError: the file was written with other columns.
    """
    kept = [] if report.is_new(path, Row) else report.read_csv(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, report.columns(Row), lineterminator="\n")
        writer.writeheader()
        for row in kept:
            if None not in row and None not in row.values() and key_of(row) != key(run):
                writer.writerow(row)
    report.append_csv(fresh, rows, where, Row)
    fresh.replace(path)


def provenance(taken: Sequence[Run], asked: int, path: Path) -> str:
    """What of the runs asked for is read from a file instead of trained, and how to train it."""
    origins = Counter((run.commit or "no commit", run.date) for run in taken)
    where = ", ".join(
        f"{count} of {commit} ({date})" for (commit, date), count in sorted(origins.items())
    )
    return (
        f"NOT TRAINED NOW: {len(taken)} of {asked} runs are taken from {path}, by commit: {where}. "
        "--anew trains them on this machine and replaces their rows."
    )


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; None of a single one."""

    mean: float
    deviation: float | None

    @classmethod
    def over(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)

    def __str__(self) -> str:
        mean = f"{100 * self.mean:.1f}"
        return mean if self.deviation is None else f"{mean} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Summary:
    """A method over its seeds."""

    method: str
    learning_rate: float
    seeds: int
    average: Spread
    learned: Spread
    forgotten: Spread
    by_task: tuple[Spread, ...]  # forgetting of every task but the last


def summarise(runs: Sequence[Run]) -> Summary:
    """Of one method's runs."""
    matrices = [run.matrix for run in runs]
    return Summary(
        runs[0].method,
        runs[0].learning_rate,
        len(runs),
        Spread.over(map(average_accuracy, matrices)),
        Spread.over(map(learned, matrices)),
        Spread.over(map(mean_forgetting, matrices)),
        tuple(Spread.over(values) for values in zip(*map(forgetting, matrices), strict=True)),
    )


def counterpart(summaries: Mapping[str, Summary], one: str, other: str, title: str) -> str:
    """One sentence on a method beside the one that has the same bases: no worse, or not."""
    if one not in summaries or other not in summaries:
        return f"No verdict on {title} beside its counterpart: {one} or {other} did not run."
    own, base = summaries[one], summaries[other]
    held = own.average.mean >= base.average.mean, own.forgotten.mean <= base.forgotten.mean
    average, forgotten = ("yes" if each else "NO" for each in held)
    return (
        f"{title!r} beside {other!r}, which has the same bases: average accuracy "
        f"{100 * own.average.mean:.1f} against {100 * base.average.mean:.1f}: no lower, {average}; "
        f"it forgets {100 * own.forgotten.mean:.1f} points against "
        f"{100 * base.forgotten.mean:.1f}: no more, {forgotten}."
    )


def verdict(summaries: Mapping[str, Summary], ours: str, title: str) -> str:
    """One sentence on a method of ours: what was hoped for, and whether each part came out."""
    missing = [name for name in (ours, "plain", "peft-osf") if name not in summaries]
    if missing:
        return f"No verdict on {title}: {', '.join(missing)} did not run."
    own, plain, osf = (summaries[name] for name in (ours, "plain", "peft-osf"))

    def says(held: bool) -> str:
        return "yes" if held else "NO"

    less = own.forgotten.mean < plain.forgotten.mean / 3
    no_lower = own.average.mean >= plain.average.mean
    at_least = own.average.mean >= osf.average.mean
    seeds = min(own.seeds, plain.seeds, osf.seeds)
    return (
        f"Over {seeds} seed{'s' if seeds > 1 else ''}, {title!r} forgets "
        f"{100 * own.forgotten.mean:.1f} points where plain fine-tuning forgets "
        f"{100 * plain.forgotten.mean:.1f}: under a third, {says(less)}; its average accuracy is "
        f"{100 * own.average.mean:.1f} against plain's {100 * plain.average.mean:.1f}: no lower, "
        f"{says(no_lower)}; against {100 * osf.average.mean:.1f} of PEFT's OSF: no lower, "
        f"{says(at_least)}."
    )
