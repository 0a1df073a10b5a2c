"""A small causal language model, data for it and a Trainer's arguments; how far weights have moved.

Imports transformers where it is called, since that takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOVED = 1e-5  # of the weight's norm: float32 weights, a few steps


def small_llama(seed: int = 0, **config: Any) -> Any:
    """Its embeddings are frozen, unless the head is tied to them."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **layers, **config))
    model.get_input_embeddings().requires_grad_(bool(config.get("tie_word_embeddings")))
    return model


def tokens(count: int = 64) -> list[dict[str, Tensor]]:
    drawn = torch.randint(0, 48, (count, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": x, "labels": x} for x in drawn]


def arguments(folder: Any, **options: Any) -> Any:
    import transformers

    given = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    given |= {"weight_decay": 0.1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return transformers.TrainingArguments(str(folder), **(given | options))


def trained(model: Any, folder: Any, callbacks: Any, **options: Any) -> Any:
    """A Trainer that has trained."""
    resume = options.pop("resume", None)
    trainer = made(model, folder, callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def made(model: Any, folder: Any, callbacks: Any, **options: Any) -> Any:
    import transformers

    own = {key: options.pop(key) for key in ("optimizers", "model_init") if key in options}
    return transformers.Trainer(
        model,
        arguments(folder, **options),
        train_dataset=tokens(),
        eval_dataset=tokens(8),
        callbacks=callbacks,
        **own,
    )


def copied(model: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def moved(now: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float = 0.5) -> float:
    """max of ‖UᵀΔW‖ and ‖ΔW V‖ over ‖W‖, of all linear layers, by an SVD in float64."""
    worst = 0.0
    for name, weight in start.items():
        if weight.dim() != 2 or "embed" in name or "lm_head" in name:
            continue
        U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        rank = round(share * min(weight.shape))
        change = now[name].double() - weight.double()
        parts = (U[:, :rank].mT @ change).norm(), (change @ Vh[:rank].mT).norm()
        worst = max(worst, float(max(parts) / weight.double().norm()))
    return worst


def unequal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def history(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]
