"""The benchmark's tasks, read from a folder that the user names; no text of it is kept elsewhere.

One file a task, ``<task>.jsonl``, of JSON lines {"split", "label", "text"}. The orders are those of
O-LoRA's long sequences (Wang et al. 2023, arXiv 2310.14152, orders 4 and 5) without Yahoo.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from bench.continual_tasks import SPLITS, Example, Split, Task

SENTIMENTS = ("very negative", "negative", "neutral", "positive", "very positive")
DBPEDIA = (
    "Company",
    "Educational Institution",
    "Artist",
    "Athlete",
    "Office Holder",
    "Mean of Transportation",
    "Building",
    "Natural Place",
    "Village",
    "Animal",
    "Plant",
    "Album",
    "Film",
    "Written Work",
)
LABELS: dict[str, tuple[str, ...]] = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "cb": ("entailment", "neutral", "contradiction"),
    "wic": ("False", "True"),
    "copa": ("A", "B"),
    "qqp": ("False", "True"),
    "boolqa": ("False", "True"),
    "rte": ("entailment", "contradiction"),
    "imdb": ("Bad", "Good"),
    "yelp": SENTIMENTS,
    "amazon": SENTIMENTS,
    "sst-2": ("Bad", "Good"),
    "dbpedia": DBPEDIA,
    "agnews": ("World", "Sports", "Business", "Science or Technology"),
    "multirc": ("False", "True"),
}
PURPOSES: dict[Split, str] = {
    "train": "of every label for training",
    "validation": "for validation",
    "test": "for testing",
}
WITHOUT_LABEL = {"mnli": "-"}  # of a pair on which its annotators didn't agree: passed over
ORDERS: dict[str, tuple[str, ...]] = {
    "4": tuple(LABELS),
    "5": (
        "multirc",
        "boolqa",
        "wic",
        "mnli",
        "cb",
        "copa",
        "qqp",
        "rte",
        "imdb",
        "sst-2",
        "dbpedia",
        "agnews",
        "yelp",
        "amazon",
    ),
}
# One task of each kind that models learn something of within tens of steps: of the first tasks of
# the orders, inference and word sense, a small decoder learns next to nothing at any rate.
SHORT = "short"
SHORT_ORDER = ("qqp", "yelp", "sst-2", "agnews")
THIRDS = 3
LONG = "4x3"  # the first order three times, a third of each task's training data each time
STREAMS = (*ORDERS, LONG, SHORT)
SHOWN = 40  # characters of a value that is no string
HELP = "DATA= names a folder with one JSON-lines file a task, mnli.jsonl and so on"


class DataError(ValueError):
    """A file of the folder that isn't what a task's file should be; says which, and which line."""


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned.

    Attributes:
        name: of ``STREAMS``.
        tasks: each time a task comes it is one of these, with the training examples of that time.
    """

    name: str
    tasks: tuple[Task, ...]

    @property
    def parts(self) -> int:
        """How many disjoint parts the training data of a task come in."""
        return THIRDS if self.name == LONG else 1


def read(folder: Path, names: Sequence[str] = tuple(LABELS)) -> dict[str, Task]:
    """The tasks by name.

    Raises:
        FileNotFoundError: the folder or a task's file isn't there.
        DataError: a line that is no JSON object of split, label and text in UTF-8, or has a label
            that the task doesn't have; a split without an example, a label without one in training.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"bench streams: expected a folder of tasks, got {folder}; {HELP}")
    missing = [name for name in names if not (folder / f"{name}.jsonl").is_file()]
    if missing:
        raise FileNotFoundError(
            f"bench streams: expected the tasks' files in {folder}, got none for "
            f"{', '.join(missing)}; {HELP}"
        )
    return {name: _task(folder / f"{name}.jsonl", name) for name in names}


def _task(path: Path, name: str) -> Task:
    classes = LABELS[name]
    examples: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    with path.open("rb") as file:  # decoded by line, so that a bad byte is named by its line
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            split, label, text = _fields(where, line)
            if label == WITHOUT_LABEL.get(name):
                continue
            if label not in classes:
                raise DataError(
                    f"bench streams: {where}: expected label to be one of {', '.join(classes)}, "
                    f"got {label!r}"
                )
            examples[split].append(Example(text, classes.index(label), where))
    for split, found in examples.items():
        counts = Counter(example.label for example in found)
        lacking = [label for i, label in enumerate(classes) if not counts[i]]
        if not found or (split == "train" and lacking):
            raise DataError(
                f"bench streams: {path}: expected examples {PURPOSES[split]}, got none"
                f"{' of ' + ', '.join(lacking) if found else ''}"
            )
    return Task(name, classes, {split: tuple(found) for split, found in examples.items()})


def _fields(where: str, line: bytes) -> tuple[Split, str, str]:
    """Split, label and text of a line."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise DataError(
            f"bench streams: {where}: expected a JSON object in UTF-8, got {error}"
        ) from None
    fields = ("split", "label", "text")
    wrong = [type(row).__name__]
    if isinstance(row, dict):
        wrong = [
            f"{name} {json.dumps(row[name])[:SHOWN]}" if name in row else f"no {name}"
            for name in fields
            if not isinstance(row.get(name), str)
        ]
    if wrong:
        raise DataError(
            f"bench streams: {where}: expected an object with the strings {', '.join(fields)}, got "
            f"{' and '.join(wrong)}"
        )
    if row["split"] not in get_args(Split):
        raise DataError(
            f"bench streams: {where}: expected split to be one of {', '.join(SPLITS)}, got "
            f"{row['split']!r}"
        )
    if not row["text"].strip():
        raise DataError(f"bench streams: {where}: expected a text, got an empty one")
    try:
        row["text"].encode("utf-8")  # JSON may name half of a character, \ud800
    except UnicodeEncodeError as error:
        raise DataError(
            f"bench streams: {where}: expected a text of whole characters, got {error}"
        ) from None
    return row["split"], row["label"], row["text"]


def stream(tasks: Mapping[str, Task], name: str) -> Stream:
    """A stream of ``STREAMS``: an order of all tasks, of their thirds, or of four of them."""
    if name != LONG:
        order = SHORT_ORDER if name == SHORT else ORDERS[name]
        found = tuple(tasks[task] for task in order)
    else:
        parts = {task: _thirds(tasks[task]) for task in ORDERS["4"]}
        found = tuple(parts[task][part] for part in range(THIRDS) for task in ORDERS["4"])
    return Stream(name, found)


def _thirds(task: Task) -> list[Task]:
    """The task with a third of its training examples each, drawn once and for all."""
    examples = list(task.examples["train"])
    random.Random(task.name).shuffle(examples)
    return [
        Task(task.name, task.classes, {**task.examples, "train": tuple(examples[part::THIRDS])})
        for part in range(THIRDS)
    ]


def fingerprint(tasks: Iterable[Task]) -> str:
    """Twelve hex digits of all texts, labels and splits."""
    digest = hashlib.sha256()
    for task in sorted(tasks, key=lambda task: task.name):
        for split in SPLITS:
            for example in task.examples[split]:
                digest.update(f"{task.name} {split} {example.label} {example.text}\n".encode())
    return digest.hexdigest()[:12]
