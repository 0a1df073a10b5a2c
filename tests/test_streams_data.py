"""The streams' tasks: what a folder must hold, what is refused and how, orders and thirds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.continual_tasks import SPLITS
from bench.streams import data
from tests.small_streams import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_each_task_has_its_labels_and_splits(folder: Path) -> None:
    tasks = data.read(folder)
    assert list(tasks) == list(data.LABELS)
    for name, task in tasks.items():
        assert task.classes == data.LABELS[name]
        for split in SPLITS:
            labels = {example.label for example in task.examples[split]}
            assert labels == set(range(len(task.classes)))
            assert len(task.examples[split]) == 6 * len(task.classes)


def test_streams_have_every_task_once_or_a_third_of_it_three_times(folder: Path) -> None:
    tasks = data.read(folder)
    for name in data.ORDERS:
        found = data.stream(tasks, name)
        assert [task.name for task in found.tasks] == list(data.ORDERS[name])
        assert sorted(data.ORDERS[name]) == sorted(data.LABELS)
    short = [task.name for task in data.stream(tasks, data.SHORT).tasks]
    assert set(short) < set(data.LABELS)
    assert len(set(short)) == len(short) == 4
    long = data.stream(tasks, data.LONG)
    assert len(long.tasks) == 42
    for name, whole in tasks.items():
        parts = [task for task in long.tasks if task.name == name]
        texts = [example.text for part in parts for example in part.examples["train"]]
        assert len(set(texts)) == len(texts)
        assert sorted(texts) == sorted(e.text for e in whole.examples["train"])
        assert all(part.examples["test"] is whole.examples["test"] for part in parts)


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder of tasks, got .*nowhere; DATA"):
        data.read(folder / "nowhere")
    (folder / "cb.jsonl").unlink()
    (folder / "yelp.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="got none for cb, yelp; DATA="):
        data.read(folder)


GOOD = {"split": "test", "label": "Bad", "text": "dull"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "expected a JSON object in UTF-8, got Expecting"),
        ("[1]", "expected an object with the strings split, label, text, got list"),
        (json.dumps({**GOOD, "label": 1}), "strings split, label, text, got label 1$"),
        (json.dumps({**GOOD, "text": None}), "got text null$"),
        (json.dumps({"text": [1]}), r"got no split and no label and text \[1\]$"),
        (json.dumps({**GOOD, "text": list(range(100))}), r"got text \[0, 1, .{33}$"),
        (json.dumps({**GOOD, "text": "half a \ud83d"}), "whole characters, got 'utf-8' codec"),
        (json.dumps({**GOOD, "label": "Awful"}), "label to be one of Bad, Good, got 'Awful'"),
        (json.dumps({**GOOD, "label": "-"}), "label to be one of Bad, Good, got '-'"),
        (json.dumps({**GOOD, "split": "dev"}), "split to be one of train, .* got 'dev'"),
        (json.dumps({**GOOD, "text": "  "}), "expected a text, got an empty one"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(folder: Path, line: str, what: str) -> None:
    path = folder / "imdb.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(data.DataError, match=rf"imdb\.jsonl:5: .*{what}"):
        data.read(folder)


def test_a_byte_that_is_not_utf_8_is_named_by_file_and_line(folder: Path) -> None:
    path = folder / "imdb.jsonl"
    lines = path.read_bytes().splitlines()
    lines[7] = json.dumps({**GOOD, "text": "na?ve"}).encode().replace(b"?", b"\xef")
    path.write_bytes(b"\n".join(lines))
    message = r"imdb\.jsonl:8: expected a JSON object in UTF-8, got 'utf-8' codec can't decode"
    with pytest.raises(data.DataError, match=message):
        data.read(folder)
    lines[7] = json.dumps({**GOOD, "text": "naïve"}, ensure_ascii=False).encode()
    path.write_bytes(b"\r\n".join(lines))
    assert "naïve" in [example.text for example in data.read(folder)["imdb"].examples["test"]]


def edited(folder: Path, name: str, keep: Callable[[dict[str, str]], bool]) -> None:
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if keep(json.loads(line))))


NEUTRAL = r"cb\.jsonl: expected examples of every label for training, got none of neutral$"


def test_a_label_without_examples_to_train_on_is_named(folder: Path) -> None:
    edited(folder, "cb", lambda row: (row["split"], row["label"]) != ("train", "neutral"))
    with pytest.raises(data.DataError, match=NEUTRAL):
        data.read(folder)


@pytest.mark.parametrize(
    ("split", "purpose"),
    [
        ("train", "of every label for training"),
        ("validation", "for validation"),
        ("test", "for testing"),
    ],
)
def test_a_split_without_examples_is_named(folder: Path, split: str, purpose: str) -> None:
    edited(folder, "copa", lambda row: row["split"] != split)
    message = rf"copa\.jsonl: expected examples {purpose}, got none$"
    with pytest.raises(data.DataError, match=message):
        data.read(folder)


def test_pairs_that_have_no_gold_label_are_passed_over(folder: Path) -> None:
    before = data.read(folder)["mnli"]
    with (folder / "mnli.jsonl").open("a") as file:
        file.write(json.dumps({"split": "test", "label": "-", "text": "none agreed"}) + "\n")
    assert data.read(folder)["mnli"].examples == before.examples


def test_the_fingerprint_is_of_texts_labels_and_splits(folder: Path) -> None:
    before = data.fingerprint(data.read(folder).values())
    assert data.fingerprint(reversed(list(data.read(folder).values()))) == before
    path = folder / "wic.jsonl"
    path.write_text(path.read_text().replace("wic True test 3", "wic True test x"))
    assert data.fingerprint(data.read(folder).values()) != before
