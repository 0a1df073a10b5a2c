"""Tiny mixtures of experts: transformers' own models, made from their configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Of gpt-oss the experts' matrices are (inputs, outputs), gate and up interleaved.
OWN = {
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}
EXPERTS = ("gate_up_proj", "down_proj")


def moe(family: str, implementation: str = "eager", **options: Any) -> nn.Module:
    """A causal language model of 4 experts a layer, of which a token goes to 2; frozen embeddings.

    Args:
        implementation: how transformers multiplies: "eager", "batched_mm" or "grouped_mm".
    """
    transformers = pytest.importorskip("transformers", reason="its models")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **OWN[family], **options)
    config._experts_implementation = implementation
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().requires_grad_(False)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    """Steps on other tokens each."""
    for step in range(steps):
        x = tokens(2, 6, 100 * seed + step)
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
