"""A decoder that reads a task's examples as text, and scores its labels as text: no head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.continual_tasks import Split, Task
from bench.decoder import WINDOWS, Decoder, Encoded
from bench.streams.subject import Inputs


def encoded(tasks: Sequence[Task], decoder: Decoder) -> list[Encoded]:
    """A stream's tasks as tokens."""
    return [decoder.encode(task) for task in tasks]


class Reader:
    """A :class:`bench.streams.subject.Subject`.

    Args:
        pretrained: copied, not changed.
        decoder: what turns tasks into losses and accuracies.
        tasks: of ``encoded``.
    """

    def __init__(self, pretrained: nn.Module, decoder: Decoder, tasks: Sequence[Encoded]) -> None:
        self.model = copy.deepcopy(pretrained)
        self.decoder, self.tasks = decoder, tasks
        self.masks: Any = "auto"

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.decoder.weights(model)

    def open(self, number: int, generator: torch.Generator) -> list[nn.Parameter]:
        return []

    def count(self, number: int) -> int:
        return len(self.tasks[number].gold["train"])

    def loss(self, model: nn.Module, number: int, index: Tensor) -> Tensor:
        return self.decoder.loss(model, self.tasks[number], index)

    def inputs(self, number: int, index: Tensor) -> Inputs:
        return self.decoder.inputs(self.tasks[number], index)

    def forward(self, model: nn.Module, batch: Inputs) -> object:
        return model(**batch)

    def accuracies(
        self, model: nn.Module, numbers: Sequence[int], split: Split, limit: int | None = None
    ) -> list[float]:
        # Tasks that come more than once are judged alike: they have no heads of their own.
        found: dict[str, float] = {}
        for number in numbers:
            task = self.tasks[number]
            if task.name not in found:
                found[task.name] = self.decoder.accuracy(model, task, split, limit)
        return [found[self.tasks[number].name] for number in numbers]

    def general(self, model: nn.Module) -> float | None:
        return self.decoder.general_loss(model)

    def general_inputs(self) -> list[Inputs]:
        windows = self.decoder.prose("train", WINDOWS).split(2)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
