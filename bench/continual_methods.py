"""The ways to train an encoder on a sequence of tasks that ``bench.continual`` compares.

Each trains the same weights, those of the encoder's nn.Linear modules (LoRA: adapters of them), and
leaves embeddings, LayerNorms and biases as they are, which is what PEFT's tuners do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import osf_torch
from osf_kernels import Mode
from osf_torch.importance import layer_importance
from osf_torch.ranks import allocate_ranks

LORA_RANK = 16
MIN_RETAINED = 0.1  # mrr of adaptive ranks
INPUT_ENERGY = 0.95  # of 0.95 and 0.99 the one that ended higher on validation, by 0.1 points
PADDING = {"attention_mask": "ids"}  # of ``masked``: which sequence the mask is of

Tokens = tuple[Tensor, Tensor]


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the model's nn.Linear modules, by parameter name."""
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return {name: p for name, p in model.named_parameters() if name in linear}


def linear_modules(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name in linear_weights(model)]


class Plain:
    """Full fine-tuning; also the protocol: ``begin`` a task, ``protect`` its optimizer, ``end``."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        for parameter in encoder.parameters():
            parameter.requires_grad_(False)

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        """The module to train on a task: what of it requires grad goes to the optimizer.

        Args:
            task: its number from 0.
            rank: share of each weight's directions that a protecting method keeps.
            batches: some of the task's inputs.
        """
        for weight in linear_weights(self.encoder).values():
            weight.requires_grad_(True)
        return self.encoder

    def protect(self, optimizer: torch.optim.Optimizer) -> None:
        """Attaches what the method does to the optimizer's steps."""

    def end(self) -> None:
        """Ends the task: ``encoder`` holds what was learned."""


class Everything(Plain):
    """Full fine-tuning of every parameter, embeddings, LayerNorms and biases included."""

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        return self.encoder.requires_grad_(True)


class Lora(Plain):
    """peft's LoRA: one adapter, trained on one task after the other."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=linear_modules(encoder)
        )
        self.encoder = get_peft_model(encoder, config)

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        return self.encoder


class PeftOsf(Plain):
    """peft's OSF: a new decomposition a task, merged into the weights after it."""

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        from peft import OSFConfig, get_peft_model

        names = linear_modules(self.encoder)
        config = OSFConfig(target_modules=names, effective_rank=rank)
        self._wrapped: Any = get_peft_model(self.encoder, config)
        return self._wrapped

    def end(self) -> None:
        # Its example calls unload(), which in 0.21 returns the weights from before the task.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.encoder = self._wrapped.merge_and_unload()
        del self._wrapped


class Ours(Plain):
    """osf_torch: a refresh a task, its subspaces protected through the task's steps."""

    mode: Mode = "complement"
    restore = True

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        super().begin(task, rank, batches)
        self._subspaces: Mapping[str, osf_torch.Subspace] = osf_torch.refresh(
            self.encoder, self.ranks(rank, batches), progress=False, seed=task
        )
        return self.encoder

    def ranks(self, rank: float, batches: Sequence[Tokens]) -> float | dict[str, int]:
        return rank

    def protect(self, optimizer: torch.optim.Optimizer) -> None:
        self._guard = osf_torch.protect(
            self.encoder, self._subspaces, optimizer=optimizer, mode=self.mode, restore=self.restore
        )

    def end(self) -> None:
        self._guard.verify()
        self._guard.remove()
        del self._guard, self._subspaces


class OursWithoutRestore(Ours):
    restore = False


class OursCore(Ours):
    mode: Mode = "core"


class OursAdaptive(Ours):
    """Ranks by layer importance; importance has mean 1, so the mean rank is that of the others."""

    def __init__(self, encoder: nn.Module, mrr: float = MIN_RETAINED) -> None:
        super().__init__(encoder)
        self.mrr = mrr

    def ranks(self, rank: float, batches: Sequence[Tokens]) -> float | dict[str, int]:
        importance = layer_importance(
            self.encoder, masked(batches), masks=PADDING, forward=run_masked, progress=False
        )
        return allocate_ranks(importance, self.encoder, mrr=min(self.mrr, rank), trr=rank)


class OursInputs(Ours):
    """The first task as ours; from then on V alone, of what the weights read in earlier tasks."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self._held: dict[str, osf_torch.Subspace] = {}

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        self._shown = batches
        if not self._held:
            return super().begin(task, rank, batches)
        self._subspaces = self._held
        return Plain.begin(self, task, rank, batches)

    def end(self) -> None:
        super().end()
        self._held = osf_torch.input_subspaces(
            self.encoder,
            masked(self._shown),
            energy=INPUT_ENERGY,
            previous=self._held,
            min_free=0,
            masks=PADDING,
            forward=run_masked,
            progress=False,
        )


class Confine(Plain):
    """osf_torch: the same subspaces as ours has, and C in W + U_l C V_lᵀ alone is trained."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self._confined: osf_torch.Confined | None = None

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        if self._confined is not None:
            self._confined.next_task(rank, progress=False, seed=task)
            return self.encoder
        super().begin(task, rank, batches)
        subspaces = osf_torch.refresh(self.encoder, rank, progress=False, seed=task)
        self._confined = osf_torch.confine(self.encoder, subspaces, update="merge")
        return self.encoder


class ConfineInputs(Plain):
    """The first task as ``Confine``; from then on V alone, of what the weights read earlier."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        self._held: dict[str, osf_torch.Subspace] = {}

    def begin(self, task: int, rank: float, batches: Sequence[Tokens]) -> nn.Module:
        super().begin(task, rank, batches)
        self._shown = batches
        subspaces: Mapping[str, osf_torch.Subspace] = self._held or osf_torch.refresh(
            self.encoder, rank, progress=False, seed=task
        )
        self._confined = osf_torch.confine(self.encoder, subspaces, update="merge")
        return self.encoder

    def end(self) -> None:
        self._confined.release()
        del self._confined
        self._held = osf_torch.input_subspaces(
            self.encoder,
            masked(self._shown),
            energy=INPUT_ENERGY,
            previous=self._held,
            min_free=0,
            masks=PADDING,
            forward=run_masked,
            progress=False,
        )


def masked(batches: Sequence[Tokens]) -> list[dict[str, Tensor]]:
    """Batches that say what of them is padding, for ``run_masked``."""
    return [{"ids": ids, "attention_mask": mask} for ids, mask in batches]


def run_masked(model: nn.Module, batch: dict[str, Tensor]) -> object:
    return model(batch["ids"], batch["attention_mask"])


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    title: str
    build: Callable[[nn.Module], Plain]
    compared: bool = True  # in a run that names no methods
    imports: str = ""  # a module that building it imports
    tuned_as: str = ""  # whose learning rate it takes; its own where this is empty


METHODS: dict[str, Method] = {
    "plain": Method("plain fine-tuning", Plain),
    "lora": Method(f"LoRA (peft, r = {LORA_RANK})", Lora, imports="peft"),
    "peft-osf": Method("OSF (peft)", PeftOsf, imports="peft"),
    "core": Method("ours, core", OursCore, tuned_as="complement"),
    "complement": Method("ours", Ours),
    "no-restore": Method("ours, no restore", OursWithoutRestore, tuned_as="complement"),
    "adaptive": Method("ours, adaptive ranks", OursAdaptive, tuned_as="complement"),
    "inputs": Method("ours, inputs of earlier tasks", OursInputs, tuned_as="complement"),
    # A step of AdamW is as long in C as what is kept of one in W, the rate times √(pq). Tuning has
    # 1e-3 for it, on one seed as on three, by less than the validation documents' standard error.
    "confine": Method("ours, confined", Confine, tuned_as="complement"),
    "confine-inputs": Method("ours, confined, inputs", ConfineInputs, tuned_as="complement"),
    "everything": Method("plain, every parameter", Everything, compared=False),
}
COMPARED = tuple(name for name, method in METHODS.items() if method.compared)
