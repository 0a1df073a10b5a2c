"""MiniLM with a head a task, trained with it and left alone afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import minilm
from bench.continual_methods import linear_weights
from bench.continual_run import leading, logits, new_head
from bench.continual_tasks import SPLITS, Split
from bench.streams.data import Stream
from bench.streams.subject import Inputs
from bench.training import trimmed

MAX_TOKENS = 64
EVALUATION_BATCH = 64
CLASS_TOKENS = 2  # [CLS] and [SEP]


class Encoded:
    """The examples of a task's split."""

    def __init__(self, tokens: Sequence[tuple[Tensor, Tensor]], labels: Sequence[int]) -> None:
        self.ids = torch.stack([ids for ids, _ in tokens])  # (count, MAX_TOKENS)
        self.mask = torch.stack([mask for _, mask in tokens])
        self.labels = torch.tensor(labels)


def encoded(stream: Stream, directory: Path) -> list[dict[Split, Encoded]]:
    """The stream's tasks as tokens; those that share a split share it here."""
    known: dict[int, Encoded] = {}
    found = []
    for task in stream.tasks:
        for split in SPLITS:
            examples = task.examples[split]
            if id(examples) not in known:
                tokens = cut([e.text for e in examples], directory)
                known[id(examples)] = Encoded(tokens, [e.label for e in examples])
        found.append({split: known[id(task.examples[split])] for split in SPLITS})
    return found


def cut(texts: Sequence[str], directory: Path) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of each text; of a long one its first and last tokens, so that neither sentence
    of a pair is lost."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = encoding.ids
        if len(ids) > MAX_TOKENS:
            last = (MAX_TOKENS - CLASS_TOKENS) // 2
            ids = ids[: MAX_TOKENS - last] + ids[-last:]
        padded = torch.tensor(ids + [0] * (MAX_TOKENS - len(ids)))
        found.append((padded, torch.arange(MAX_TOKENS) < len(ids)))
    return found


class Encoder:
    """A :class:`bench.streams.subject.Subject`.

    Args:
        pretrained: copied, not changed.
        tasks: of ``encoded``.
        classes: of each task.
        precision: torch.bfloat16 multiplies in it, with weights in float32.
    """

    def __init__(
        self,
        pretrained: minilm.SentenceEncoder,
        tasks: Sequence[dict[Split, Encoded]],
        classes: Sequence[int],
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model: nn.Module = copy.deepcopy(pretrained)
        self.width = pretrained.config.hidden_size
        self.tasks, self.classes, self.precision = tasks, classes, precision
        self.heads: list[nn.Linear] = []
        self.masks: Any = {"attention_mask": "ids"}

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return linear_weights(model)

    def open(self, number: int, generator: torch.Generator) -> list[nn.Parameter]:
        for head in self.heads:
            head.requires_grad_(False)
        self.heads.append(new_head(self.width, self.classes[number], generator))
        return list(self.heads[-1].parameters())

    def count(self, number: int) -> int:
        return len(self.tasks[number]["train"].labels)

    def loss(self, model: nn.Module, number: int, index: Tensor) -> Tensor:
        examples = self.tasks[number]["train"]
        with self._precision():
            found = logits(model, self.heads[number], self._tokens(examples, index))
        return F.cross_entropy(found.float(), examples.labels[index])

    def inputs(self, number: int, index: Tensor) -> Inputs:
        ids, mask = self._tokens(self.tasks[number]["train"], index)
        return {"ids": ids, "attention_mask": mask}

    def forward(self, model: nn.Module, batch: Inputs) -> object:
        return model(batch["ids"], batch["attention_mask"])

    @torch.no_grad()
    def accuracies(
        self, model: nn.Module, numbers: Sequence[int], split: Split, limit: int | None = None
    ) -> list[float]:
        # Tasks that come more than once are judged on the same texts, which are run once.
        vectors: dict[int, tuple[Tensor, Tensor]] = {}
        found = []
        for number in numbers:
            examples = self.tasks[number][split]
            if id(examples) not in vectors:
                chosen = leading(examples.labels, self.classes[number], limit)
                vectors[id(examples)] = self._vectors(model, examples, chosen), chosen
            vector, chosen = vectors[id(examples)]
            right = self.heads[number](vector * math.sqrt(self.width)).argmax(1)
            found.append(float((right == examples.labels[chosen]).double().mean()))
        return found

    def _vectors(self, model: nn.Module, examples: Encoded, chosen: Tensor) -> Tensor:
        order = examples.mask[chosen].sum(1).argsort()  # by length: batches with little padding
        found = torch.empty(len(chosen), self.width)
        for part in order.split(EVALUATION_BATCH):
            with self._precision():
                found[part] = model(*self._tokens(examples, chosen[part])).float()
        return found

    def general(self, model: nn.Module) -> float | None:
        return None

    def general_inputs(self) -> list[Inputs]:
        return []

    def state(self) -> dict[str, Any]:
        return {"heads": [head.state_dict() for head in self.heads]}

    def load(self, state: dict[str, Any]) -> None:
        self.heads = []
        for number, saved in enumerate(state["heads"]):
            head = nn.Linear(self.width, self.classes[number])
            head.load_state_dict(saved)
            self.heads.append(head)

    def _tokens(self, examples: Encoded, index: Tensor) -> tuple[Tensor, Tensor]:
        return trimmed(examples.ids[index], examples.mask[index])

    @contextmanager
    def _precision(self) -> Iterator[None]:
        is_half = self.precision == torch.bfloat16
        # The fused attention's backward pass took 44 % of a step in bfloat16 on a CPU core, plain
        # products less than a tenth (16 x 64 tokens).
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            yield
