"""What a model must offer to learn a stream of tasks: its losses, its accuracies, its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.continual_tasks import Split

# A batch as a model takes it by name, with what of it is padding under "attention_mask".
Inputs = dict[str, Tensor]


class Subject(Protocol):
    """A model that learns a stream; one object a run, since it may hold what tasks leave behind.

    Attributes:
        model: the plain model, that a method trains in place or wraps.
        masks: of ``osf_torch.input_subspaces``.
    """

    model: nn.Module
    masks: Any

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The matrices that every method trains, by parameter name."""

    def open(self, number: int, generator: torch.Generator) -> list[nn.Parameter]:
        """Begins a task; what beside the model is trained with it, such as a head."""

    def count(self, number: int) -> int:
        """How many training examples the task has."""

    def loss(self, model: nn.Module, number: int, index: Tensor) -> Tensor:
        """The mean loss of training examples of a task."""

    def inputs(self, number: int, index: Tensor) -> Inputs:
        """Training examples of a task as a batch for ``forward``."""

    def forward(self, model: nn.Module, batch: Inputs) -> object:
        """Runs the model on a batch."""

    def accuracies(
        self, model: nn.Module, numbers: Sequence[int], split: Split, limit: int | None = None
    ) -> list[float]:
        """The accuracy of each task on the first ``limit`` examples of a split."""

    def general(self, model: nn.Module) -> float | None:
        """The loss on text that is of no task; None where the model has none."""

    def general_inputs(self) -> list[Inputs]:
        """Batches for ``forward`` of text that is of no task either, nor what ``general`` judges;
        none where the model has none."""

    def state(self) -> dict[str, Any]:
        """What tasks have left behind, beside the model."""

    def load(self, state: dict[str, Any]) -> None: ...
