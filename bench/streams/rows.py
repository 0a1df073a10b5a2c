"""The rows of a stream's runs: a file that runs are taken from, by what they are made of."""

from __future__ import annotations

import ast
import csv
import fcntl
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

from bench import report
from bench.streams.training import After, Outcome

# What a run's figures depend on, of this repository: the operators, the API, and these modules with
# all of the benches' that they import. Docstrings and comments don't count.
CODE = ("osf_kernels", "python_api/osf_torch")
MODULES = (
    "bench.smollm",
    "bench.streams.data",
    "bench.streams.decoder",
    "bench.streams.encoder",
    "bench.streams.methods",
    "bench.streams.training",
)


@dataclass
class Row:
    """What was measured after one task of a run. Lists are accuracies in ten-thousandths."""

    model: str = ""
    stream: str = ""
    method: str = ""
    seed: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    batch: int = 0
    precision: str = ""
    data: str = ""  # fingerprint of the tasks
    code: str = ""  # fingerprint of what the run was trained by
    tasks: int = 0
    after: int = 0
    task: str = ""
    test: str = ""
    validation: str = ""
    course: str = ""
    moved: float | None = None
    free: float = 0.0
    general: float | None = None
    general_before: float | None = None  # the first task
    seconds: float = 0.0
    run_s: float = 0.0


KEY = (
    "model",
    "stream",
    "method",
    "seed",
    "learning_rate",
    "steps",
    "batch",
    "precision",
    "data",
)
Key = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One method, stream, seed and learning rate, with what came out."""

    model: str
    stream: str
    method: str
    seed: int
    learning_rate: float
    names: tuple[str, ...]
    outcome: Outcome
    code: str = ""
    commit: str = ""
    date: str = ""


def key(row: Row) -> Key:
    """As it reads back from the file."""
    return tuple(report.cell(getattr(row, name)) for name in KEY)


@cache
def code() -> str:
    """Twelve hex digits of the syntax trees of ``CODE`` and ``MODULES``."""
    trees = {file: _parsed(file) for place in CODE for file in (report.ROOT / place).rglob("*.py")}
    todo = [file for name in MODULES if (file := _file(name))]
    while todo:
        file = todo.pop()
        if file not in trees:
            trees[file] = _parsed(file)
            todo += _imported(trees[file])
    digest = hashlib.sha256()
    for file, tree in sorted(trees.items()):
        digest.update(f"{file.relative_to(report.ROOT)} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _file(name: str) -> Path | None:
    """Of a module of the benches; None of a name in one."""
    path = report.ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def _parsed(file: Path) -> ast.Module:
    """Without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            node.body = node.body[1:]  # type: ignore[attr-defined]
    return tree


def _imported(tree: ast.Module) -> list[Path]:
    """The benches' modules that one imports from."""
    names = [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bench"
        for name in (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
    ]
    return [file for name in names if (file := _file(name))]


def write(path: Path, run: Row, names: Sequence[str], outcome: Outcome) -> None:
    """Appends a finished run. Several processes may write to one file.

    Raises:
        ValueError: the file was written with other columns.
    """
    common = {f.name: getattr(run, f.name) for f in fields(Row)}
    rows = [
        Row(
            **common
            | {
                "tasks": len(names),
                "after": number,
                "task": names[number],
                "test": _packed(line.test),
                "validation": _packed(line.validation),
                "course": _packed(line.course),
                "moved": line.moved,
                "free": line.free,
                "general": line.general,
                "general_before": outcome.general,
                "seconds": line.seconds,
                "run_s": outcome.seconds,
            }
        )
        for number, line in enumerate(outcome.after)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # A write that was cut short has left a part of a line, which the next would be added to.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        report.append_csv(path, rows, report.environment(torch.device("cpu")), Row)


def read(path: Path) -> dict[Key, Run]:
    """The runs of a file that are there as a whole; one that is there twice counts as last.

    Raises:
        ValueError: the file was written with other columns.
    """
    if report.is_new(path, Row):
        return {}
    found: dict[Key, dict[int, Mapping[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None not in row.values():
                found.setdefault(tuple(row[name] for name in KEY), {})[int(row["after"])] = row
    runs = {}
    for run_key, lines in found.items():
        first = lines.get(0)
        if first is None or len(lines) != int(first["tasks"]):
            continue
        ordered = [lines[number] for number in range(len(lines))]
        runs[run_key] = Run(
            first["model"],
            first["stream"],
            first["method"],
            int(first["seed"]),
            float(first["learning_rate"]),
            tuple(line["task"] for line in ordered),
            Outcome(
                [_after(line) for line in ordered],
                float(first["run_s"]),
                _number(first["general_before"]),
            ),
            first["code"],
            first["commit"],
            first["date"],
        )
    return runs


def _after(row: Mapping[str, str]) -> After:
    return After(
        _unpacked(row["test"]),
        _unpacked(row["validation"]),
        _unpacked(row["course"]),
        _number(row["moved"]),
        float(row["free"]),
        _number(row["general"]),
        float(row["seconds"]),
    )


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _packed(values: Iterable[float]) -> str:
    return " ".join(str(round(10_000 * value)) for value in values)


def _unpacked(text: str) -> list[float]:
    return [int(part) / 10_000 for part in text.split()]


def provenance(taken: Sequence[Run], count: int, path: Path) -> str:
    """What of the runs asked for is read from a file instead of trained, and by which code."""
    if not taken:
        return ""
    now = code()
    origins = Counter((run.code, run.commit or "no commit", run.date) for run in taken)
    where = ", ".join(
        f"{found} by {'this code' if by == now else f'OTHER CODE {by}'} at {commit} ({date})"
        for (by, commit, date), found in sorted(origins.items())
    )
    return (
        f"NOT TRAINED NOW: {len(taken)} of {count} runs are taken from {path}: {where}. --anew "
        "trains them on this machine; their rows then count in the place of the older ones."
    )
