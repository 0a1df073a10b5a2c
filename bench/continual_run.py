"""One method on one sequence of tasks: the training loop, the accuracy matrix and its figures.

Task-incremental: each task has a head of its own, trained with it and left alone afterwards, so
that what is forgotten is forgotten by the encoder.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import minilm
from bench.continual_methods import Plain, Tokens
from bench.continual_tasks import SPLITS, Split, Task
from bench.training import trimmed

MAX_TOKENS = 16
HEAD_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
WARM_UP = 0.1  # of a task's steps; then linearly to zero
RANKS = (0.5, 0.9)  # share of directions kept, in the first and in the last task
EVALUATION_BATCH = 64

Build = Callable[[nn.Module], Plain]
Matrix = Sequence[Sequence[float]]  # R[i][j]: accuracy on task j after task i, j ≤ i


class Encoded(NamedTuple):
    """The examples of a split."""

    ids: Tensor  # (count, length)
    mask: Tensor  # (count, length)
    labels: Tensor  # (count,)

    def batch(self, index: Tensor) -> Tokens:
        return trimmed(self.ids[index], self.mask[index])


@dataclass(frozen=True)
class EncodedTask:
    name: str
    classes: int
    splits: dict[Split, Encoded]


@dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    steps: int = 50
    batch: int = 16
    ranks: tuple[float, float] = RANKS

    def rank(self, task: int, tasks: int) -> float:
        """The share of directions kept in a task, growing evenly over the sequence."""
        first, last = self.ranks
        return first + (last - first) * task / max(1, tasks - 1)


def encode(tasks: Sequence[Task], directory: Path) -> list[EncodedTask]:
    """Token ids by the tokenizer of the model in ``directory``."""
    found = []
    for task in tasks:
        splits: dict[Split, Encoded] = {}
        for split in SPLITS:
            examples = task.examples[split]
            tokens = minilm.encode([e.text for e in examples], directory, MAX_TOKENS)
            ids, mask = (torch.stack(part) for part in zip(*tokens, strict=True))
            splits[split] = Encoded(ids, mask, torch.tensor([e.label for e in examples]))
        found.append(EncodedTask(task.name, len(task.classes), splits))
    return found


def logits(encoder: nn.Module, head: nn.Linear, tokens: Tokens) -> Tensor:
    """The head of the unit sentence vectors, scaled to entries of mean square 1."""
    out: Tensor = head(encoder(*tokens) * math.sqrt(head.in_features))
    return out


@torch.no_grad()
def accuracy(encoder: nn.Module, head: nn.Linear, examples: Encoded) -> float:
    order = examples.mask.sum(1).argsort()  # by length: batches with little padding
    right = 0
    for index in order.split(EVALUATION_BATCH):
        found = logits(encoder, head, examples.batch(index)).argmax(1)
        right += int((found == examples.labels[index]).sum())
    return right / len(order)


def leading(labels: Tensor, classes: int, limit: int | None) -> Tensor:
    """The first examples of a split, as many of each label as there are; all where no limit is."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    ranked = torch.cat([(labels == i).nonzero().flatten() for i in range(classes)])
    within = torch.cat([torch.arange(int((labels == i).sum())) for i in range(classes)])
    return ranked[within.argsort(stable=True)][:limit].sort().values


def order_of(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Indices below ``count``, reshuffled whenever they run out, ``wanted`` in all."""
    rounds = -(-wanted // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:wanted]


def new_head(features: int, classes: int, generator: torch.Generator) -> nn.Linear:
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def trainer(model: nn.Module, head: nn.Linear, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over what requires grad and the head."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": trained, "lr": learning_rate},
        {"params": list(head.parameters()), "lr": HEAD_LEARNING_RATE},
    ]
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


def step(
    model: nn.Module,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    tokens: Tokens,
    labels: Tensor,
) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(logits(model, head, tokens), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def slope(step: int, steps: int) -> float:
    """The learning rate's factor at a step from 0."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 - step / steps)


def train_sequence(
    build: Build,
    encoder: minilm.SentenceEncoder,
    tasks: Sequence[EncodedTask],
    setting: Setting,
    *,
    learning_rate: float,
    seed: int,
    split: Split = "test",
    on_step: Callable[[str], object] = lambda _: None,
) -> list[list[float]]:
    """Trains a copy of ``encoder`` on one task after the other.

    Args:
        build: the method, made of the copy.
        split: what accuracies are measured on; training uses "train" alone.
        on_step: called with the task's name after each step.

    Returns:
        R[i][j] (j ≤ i), the accuracy on task j after task i.

    Raises:
        FloatingPointError: a loss that isn't finite.

    Draws heads and the order of examples from ``seed``, the same for every method, and what peft
    draws from the global generator, seeded.
    """
    torch.manual_seed(seed)
    method = build(copy.deepcopy(encoder))
    heads: list[nn.Linear] = []
    matrix: list[list[float]] = []
    for number, task in enumerate(tasks):
        examples = task.splits["train"]
        generator = torch.Generator().manual_seed(1000 * seed + number)
        wanted = setting.steps * setting.batch
        order = order_of(len(examples.labels), wanted, generator)
        todo = order.split(setting.batch)
        head = new_head(encoder.config.hidden_size, task.classes, generator)
        shown = [examples.batch(index) for index in todo[:4]]
        model = method.begin(number, setting.rank(number, len(tasks)), shown)
        optimizer = trainer(model, head, learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: slope(done, setting.steps)
        )
        method.protect(optimizer)
        for index in todo:
            loss = step(model, head, optimizer, examples.batch(index), examples.labels[index])
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"bench.continual: the loss of task {task.name!r} is {loss} at learning rate "
                    f"{learning_rate:g}; take a smaller one"
                )
            schedule.step()
            on_step(task.name)
        method.end()
        heads.append(head)
        matrix.append(
            [accuracy(method.encoder, heads[j], tasks[j].splits[split]) for j in range(number + 1)]
        )
    return matrix


# Figures of an accuracy matrix.


def average_accuracy(R: Matrix) -> float:
    """Mean over all tasks of the accuracy after the last."""
    return statistics.fmean(R[-1])


def learned(R: Matrix) -> float:
    """Mean over all tasks of the accuracy right after the task."""
    return statistics.fmean(row[-1] for row in R)


def forgetting(R: Matrix) -> list[float]:
    """R[j][j] − R[T][j] of every task but the last: negative backward transfer, task by task."""
    return [R[j][j] - R[-1][j] for j in range(len(R) - 1)]


def mean_forgetting(R: Matrix) -> float:
    """−BWT; 0 for a single task, after which nothing can be forgotten."""
    lost = forgetting(R)
    return statistics.fmean(lost) if lost else 0.0
