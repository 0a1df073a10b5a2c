"""A folder of tasks with texts of its own, and a stream that is small enough to train in a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench.continual_tasks import SPLITS, Split
from bench.streams import data
from bench.streams.encoder import Encoded, Encoder
from bench.streams.subject import Inputs
from tests.small_continual import SMALL, small_encoder

CLASSES = 3
COUNTS: dict[Split, int] = {"train": 60, "validation": 12, "test": 30}


def write_folder(folder: Path, per_label: int = 6) -> Path:
    """A file a task, as many lines of each split as three times ``per_label`` of each label."""
    for task, labels in data.LABELS.items():
        lines = [
            json.dumps({"split": split, "label": label, "text": f"{task} {label} {split} {i}"})
            for split in SPLITS
            for label in labels
            for i in range(per_label)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def small_tokens(tasks: int, seed: int = 0) -> list[dict[Split, Encoded]]:
    """Three classes, told apart by the first token; the same token means another class later."""
    generator = torch.Generator().manual_seed(seed)

    def examples(size: int, task: int) -> Encoded:
        labels = torch.arange(size) % CLASSES
        ids = torch.randint(20, SMALL.vocab_size, (size, 6), generator=generator)
        ids[:, 0] = (labels + task) % CLASSES + 1
        mask = torch.arange(6)[None, :] < torch.randint(3, 7, (size, 1), generator=generator)
        return Encoded(list(zip(ids, mask, strict=True)), labels.tolist())

    return [{split: examples(COUNTS[split], i) for split in SPLITS} for i in range(tasks)]


class Read(Encoder):
    """An encoder that has read text of no task: here tokens of a task that the stream lacks."""

    def general_inputs(self) -> list[Inputs]:
        text = small_tokens(1, seed=1)[0]["test"]
        return [{"ids": text.ids, "attention_mask": text.mask}]


def small_subject(tasks: int = 3) -> Encoder:
    return Read(small_encoder(), small_tokens(tasks), [CLASSES] * tasks)


def open_small(stream: data.Stream) -> Encoder:
    """A small encoder for a stream's counts and classes, on tokens of no text."""
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for task in stream.tasks:
        found = {}
        for split, examples in task.examples.items():
            ids = torch.randint(SMALL.vocab_size, (len(examples), 4), generator=generator)
            mask = torch.ones_like(ids, dtype=torch.bool)
            labels = [example.label for example in examples]
            found[split] = Encoded(list(zip(ids, mask, strict=True)), labels)
        tasks.append(found)
    return Encoder(small_encoder(), tasks, [len(task.classes) for task in stream.tasks])
