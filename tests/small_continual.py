"""An encoder and tasks that are small enough to train in a test of the continual bench."""

from __future__ import annotations

import torch

from bench import continual, minilm
from bench.continual_run import Encoded, EncodedTask, Setting
from bench.continual_tasks import SPLITS, Split

SMALL = minilm.Config(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=16,
)
COUNTS: dict[Split, int] = {"train": 60, "validation": 12, "test": 30}


def small_encoder(seed: int = 0) -> minilm.SentenceEncoder:
    torch.manual_seed(seed)
    return minilm.SentenceEncoder(SMALL).eval()


def small_tasks(count: int, seed: int = 0) -> list[EncodedTask]:
    """Three classes, told apart by the first token; the same token means another class later."""
    generator = torch.Generator().manual_seed(seed)

    def examples(size: int, task: int) -> Encoded:
        labels = torch.arange(size) % 3
        ids = torch.randint(20, SMALL.vocab_size, (size, 6), generator=generator)
        ids[:, 0] = (labels + task) % 3 + 1
        mask = torch.arange(6)[None, :] < torch.randint(3, 7, (size, 1), generator=generator)
        return Encoded(ids, mask, labels)

    return [
        EncodedTask(f"t{i}", 3, {split: examples(COUNTS[split], i) for split in SPLITS})
        for i in range(count)
    ]


def sequences(tasks: int = 2, steps: int = 2, **options: object) -> continual.Sequences:
    setting = Setting(steps=steps, batch=4)
    return continual.Sequences(small_encoder(), small_tasks(tasks), setting, text="made", **options)  # type: ignore[arg-type]
