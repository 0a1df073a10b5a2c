"""Tiny mixture-of-experts models of transformers, and what their experts read, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import generator_for

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
WAYS = ("eager", "batched_mm", "grouped_mm")
EXPERTS, CHOSEN = 4, 2


def experts_model(kind: str, way: str = "eager", *, layers: int = 2) -> nn.Module:
    """In eval mode, with weights that are the same whichever way its experts run."""
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "num_experts_per_tok": CHOSEN,
    }
    if kind == "mixtral":
        config = transformers.MixtralConfig(**common, num_local_experts=EXPERTS)
        model = transformers.MixtralForCausalLM(config)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **common, num_experts=EXPERTS, moe_intermediate_size=12, decoder_sparse_step=1
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        kinds = ["full_attention"] * layers
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = transformers.GptOssConfig(
            **common, num_local_experts=EXPERTS, layer_types=kinds, rope_parameters=rope
        )
        model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation(way)
    generator = generator_for("experts", kind)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 or name.endswith(("bias", "sinks")):
                scale = 1.0 if "embed" in name else 0.4
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def ids(*key: object, shape: tuple[int, int] = (4, 8)) -> torch.Tensor:
    return torch.randint(1, 32, shape, generator=generator_for("ids", *key))


def experts_read(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What each expert of the last layer reads (tokens, width) by name, worked out by hand.

    Of a batch with an attention_mask the real tokens.
    """
    block = model.model.layers[-1].mlp
    name = f"model.layers.{len(model.model.layers) - 1}.mlp"
    taken: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        mask = batch.get("attention_mask")
        x = taken[0] if mask is None else taken[0][mask != 0][None]
        x = x.flatten(0, 1)
        router = block.router if hasattr(block, "router") else block.gate
        *_, chosen = router(x)
        found: dict[str, list[torch.Tensor]] = {"up": [], "down": []}
        for e in range(EXPERTS):
            own = x[(chosen == e).any(-1)]
            found["up"].append(own)
            up = block.experts.gate_up_proj[e]
            if hasattr(block.experts, "gate_up_proj_bias"):
                inner = block.experts._apply_gate(own @ up + block.experts.gate_up_proj_bias[e])
            else:
                gate, value = F.linear(own, up).chunk(2, -1)
                inner = F.silu(gate) * value
            found["down"].append(inner)
    return {
        f"{name}.experts.gate_up_proj": found["up"],
        f"{name}.experts.down_proj": found["down"],
    }
