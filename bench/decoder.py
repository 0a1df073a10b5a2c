"""Classification as text: a decoder reads an example, and the label that it finds likeliest wins.

The score of a label of k tokens t after a prompt is the mean of their log-likelihoods,
(1/k) Σ_i log p(t_i | prompt, t_<i): by their sum, labels lose for being long (AG News without
training: .57 by the sum, .69 by the mean). The loss of an example is minus the score of its label,
so that training raises what is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import corpus
from bench.continual_methods import linear_weights
from bench.continual_run import leading
from bench.continual_tasks import SPLITS, Split, Task, split_of

MAX_TOKENS = 96  # of a prompt; what a text has more is cut out of its middle
EVALUATION_BATCH = 16
WINDOW, WINDOWS = 256, 16  # of general prose: 4,096 tokens in all
IGNORED = -100

Batch = dict[str, Tensor]


def prompt(task: Task) -> tuple[str, str]:
    """What stands before and after a text; no cut of the text takes it away.

    Of a dozen forms it is the one that judged best without training, by validation accuracy of
    SmolLM2-135M-Instruct on 100 examples: .70 of SST-2 and .69 of AG News, where asking after the
    text, "Is this A or B?", had .44 and .25, in the chat template .50 and .25.
    """
    return f"Categories: {', '.join(task.classes)}\n", "\nCategory:"


@dataclass(frozen=True)
class Encoded:
    """A task as tokens: of each split the prompts, and the labels that they belong to."""

    name: str
    labels: tuple[tuple[int, ...], ...]  # the tokens of each
    prompts: dict[Split, tuple[tuple[int, ...], ...]]
    gold: dict[Split, Tensor]  # (examples,)


class Decoder:
    """Tasks, losses and accuracies for a causal language model of transformers.

    Nothing here holds a model: it is an argument, so that a method may wrap it.

    Args:
        tokenizer: of transformers.
        max_tokens: of a prompt, the question included.
        precision: torch.bfloat16 multiplies in it (autocast), with weights as they are.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int = MAX_TOKENS,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.tokenizer, self.max_tokens, self.precision = tokenizer, max_tokens, precision

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of the nn.Linear modules by name, without a head tied to the embedding."""
        return linear_weights(model)

    def encode(self, task: Task) -> Encoded:
        """Raises ValueError where the question leaves no room for a text."""
        before, after = (self._tokens(part) for part in prompt(task))
        room = self.max_tokens - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"bench.decoder: expected max_tokens above {len(before) + len(after)}, which the "
                f"question of {task.name!r} takes, got {self.max_tokens}"
            )
        prompts, gold = {}, {}
        for split in SPLITS:
            texts = [self._tokens(example.text) for example in task.examples[split]]
            prompts[split] = tuple((*before, *cut(text, room), *after) for text in texts)
            gold[split] = torch.tensor([example.label for example in task.examples[split]])
        labels = tuple(self._tokens(f" {label}") for label in task.classes)
        return Encoded(task.name, labels, prompts, gold)

    def inputs(self, encoded: Encoded, index: Tensor) -> Batch:
        """Training examples with their labels, as ``model(**batch)`` takes them.

        Prompts end at one place: they are padded on the left, labels on the right.
        """
        return self._batch(encoded, index)[0]

    def loss(self, model: nn.Module, encoded: Encoded, index: Tensor) -> Tensor:
        """Minus the mean score of the labels of training examples, a scalar of float32."""
        batch, targets = self._batch(encoded, index)
        logits = self._logits(model, batch, targets.shape[1])
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        return (losses.sum(1) / (targets != IGNORED).sum(1)).mean()

    @torch.no_grad()
    def accuracy(
        self, model: nn.Module, encoded: Encoded, split: Split, limit: int | None = None
    ) -> float:
        """On the first ``limit`` examples of a split, as many of each label as there are."""
        chosen = leading(encoded.gold[split], len(encoded.labels), limit)
        prompts = [encoded.prompts[split][i] for i in chosen.tolist()]
        found = self.scores(model, prompts, encoded.labels).argmax(1)
        return float((found == encoded.gold[split][chosen]).double().mean())

    @torch.no_grad()
    def scores(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """(prompts, labels), the score of each label after each prompt."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        found = torch.empty(len(prompts), len(labels))
        for part in lengths.argsort().split(EVALUATION_BATCH):  # by length: little padding
            found[part] = self._scores(model, [prompts[i] for i in part.tolist()], labels)
        return found

    def _scores(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """All labels after a prompt in one pass: their tokens stand one label after the other
        behind it, and each reads the prompt and those of its own label before it."""
        width = max(map(len, prompts))
        tail = [token for label in labels for token in label[:-1]]
        of = torch.tensor([i for i, label in enumerate(labels) for _ in label[:-1]]).long()
        depth = torch.tensor([j for label in labels for j in range(len(label) - 1)]).long()
        ids, real = _padded([[*prompt, *tail] for prompt in prompts], left=True)
        length = width + len(tail)
        reads = torch.ones(length, length, dtype=torch.bool).tril()
        reads[width:, width:] &= of[:, None] == of
        # Padding reads itself: a row that reads nothing has no softmax.
        mask = (reads & real[:, None, :]) | torch.eye(length, dtype=torch.bool)
        positions = (real.cumsum(1) - 1).clamp_min(0)
        positions[:, width:] = positions[:, width - 1 : width] + 1 + depth
        batch = {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": positions}
        logs = self._logits(model, batch, 1 + len(tail)).log_softmax(-1)
        # Where each label's tokens are predicted: at the prompt's end, then at its own tokens.
        found, start = [], 1
        for label in labels:
            places = [0, *range(start, start + len(label) - 1)]
            found.append(logs[:, places, list(label)].mean(1))
            start += len(label) - 1
        return torch.stack(found, 1)

    @torch.no_grad()
    def general_loss(self, model: nn.Module, windows: int = WINDOWS) -> float:
        """The mean next-token loss, in nats, on prose that is of no task and not trained on.

        It is the text of ``corpus``: as many windows of 256 tokens as the topics of its test split
        have, ``windows`` at most.
        """
        losses = []
        for ids in self.prose("test", windows).split(2):  # logits of a window take 50 MB
            logits = self._logits(model, {"input_ids": ids}, WINDOW)[:, :-1]
            targets = ids[:, 1:].flatten()
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets, reduction="none"))
        return float(torch.cat(losses).double().mean())

    def prose(self, split: Split, windows: int) -> Tensor:
        """(windows, 256) tokens of general prose; its topics go to a split as a whole.

        Raises:
            ImportError: a Python without ``corpus``' text.
            ValueError: there is less than one window.
        """
        found = self._prose[split][:windows]
        if not len(found):
            raise ValueError(
                f"bench.decoder: expected {WINDOW} tokens or more to {split} of {corpus.SOURCE}, "
                "got fewer"
            )
        return found

    @cached_property
    def _prose(self) -> dict[Split, Tensor]:
        texts = corpus.topics()
        found: dict[Split, Tensor] = {}
        for split in SPLITS:
            topics = [texts[name] for name in sorted(texts) if split_of(name) == split]
            parts = dict.fromkeys(part for text in topics for part in corpus.paragraphs(text))
            tokens = torch.tensor(self._tokens("\n\n".join(parts)))
            found[split] = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
        return found

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _batch(self, encoded: Encoded, index: Tensor) -> tuple[Batch, Tensor]:
        """The batch, and the tokens (batch, k) that its last k places are to predict."""
        labels = [encoded.labels[i] for i in encoded.gold["train"][index].tolist()]
        prompts = [encoded.prompts["train"][i] for i in index.tolist()]
        targets, meant = _padded(labels, left=False)
        head, real = _padded(prompts, left=True)
        # The last token of a label predicts nothing, and is not among what is read.
        ids = torch.cat([head, targets[:, :-1]], 1)
        mask = torch.cat([real, meant[:, 1:]], 1).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return batch, targets.masked_fill(~meant, IGNORED)

    def _logits(self, model: nn.Module, batch: Batch, last: int) -> Tensor:
        """(batch, last, vocabulary) of the last places: a head on all of them costs a quarter."""
        with self._autocast():
            logits: Tensor = model(**batch, use_cache=False, logits_to_keep=last).logits
        return logits.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16)


def cut(tokens: Sequence[int], most: int) -> tuple[int, ...]:
    """Of a long text its first and its last tokens: of two sentences neither is lost."""
    if len(tokens) <= most:
        return tuple(tokens)
    last = most // 2
    return (*tokens[: most - last], *tokens[len(tokens) - last :])


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask of real tokens), zeros where a row is shorter than the longest."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        places = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, places], real[i, places] = torch.tensor(row), True
    return ids, real
