"""A tiny random Llama, MiniLM's vocabulary, and a task for them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from torch import nn

from bench import minilm
from bench.continual_tasks import SPLITS, Example, Task

LABELS = ("good", "utterly bad", "neither of the two")  # of one, two and four tokens
TEXTS = ("A fine day.", "It rained on the tents all night long.", "Nobody came.", "What a feast!")


def small_tokenizer() -> Any:
    """Skips the test where the package that ships the vocabulary isn't installed."""
    try:
        directory = minilm.model_directory()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


def small_decoder() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,  # far from uniform: a wrong place shows
    )
    made: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return made


def task(name: str = "mood", per_split: int = 8) -> Task:
    examples = [Example(TEXTS[i % len(TEXTS)], i % len(LABELS), "") for i in range(per_split)]
    return Task(name, LABELS, {split: tuple(examples) for split in SPLITS})
