"""What ``bench protect`` compares: a model trained by each contender, and the bytes it holds.

All train the same other parameters (embeddings, biases, LayerNorms), which PEFT would freeze, so
that what differs between them is the protected weights alone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import osf_torch
from bench import contenders
from bench.training import LEARNING_RATE, WEIGHT_DECAY, Batch, contrastive_loss
from osf_torch.integrations import mini_trainer as osf_mini_trainer
from osf_torch.integrations import peft as osf_peft

UNPROTECTED = "unprotected"
RESTORED = "protect"
PROJECTED = "protect, no restore"
EAGER = "formula as written, in hooks"
CONFINED = "confine"
BESIDE = "confine, beside"
PEFT_OSF = "PEFT OSF"
FACTORED = "mini_trainer"
COMPARED = (
    *(UNPROTECTED, RESTORED, PROJECTED, EAGER),
    *(CONFINED, BESIDE, PEFT_OSF, FACTORED),
)
MODULES = {PEFT_OSF: "peft", FACTORED: "mini_trainer.osft_utils"}  # which they are made of


class Memory(NamedTuple):
    """Bytes between two steps, each storage once."""

    parameters: int  # of the model, frozen ones too
    state: int  # of the optimizer
    held: int  # all else: bases, pins, buffers
    trained: int  # gradients and state of the protected weights, or of what stands for them


@dataclass
class Trainer:
    """A model of its own, its optimizer, and what protects it.

    Attributes:
        held: tensors that the contender keeps beside the model.
        others: the parameters that aren't protected, which all contenders train.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: osf_torch.Guard | None = None
    confined: osf_torch.Confined | None = None
    held: tuple[Tensor, ...] = ()
    others: tuple[nn.Parameter, ...] = ()

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        contrastive_loss(self.model, batch).backward()
        self.optimizer.step()

    @property
    def held_bytes(self) -> int:
        tensors = [*self.held, *self.model.buffers()]
        if self.guard is not None:
            for entry in self.guard.state_dict()["weights"].values():
                tensors += [t for t in entry.values() if isinstance(t, Tensor)]
        found = _nbytes(tensors)
        if self.confined is not None:
            for place in self.confined.places:
                found += place.spec.left.nbytes + place.spec.right.nbytes
            for reference in self.confined.references.values():
                found += _nbytes(reference)
        return found

    def memory(self) -> Memory:
        """After a step, whose gradients are still there."""
        others = {id(p) for p in self.others}
        trained = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        states = {
            id(p): [t for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
            for p in trained
        }
        own = [p for p in trained if id(p) not in others]
        return Memory(
            _nbytes(self.model.parameters()),
            _nbytes(t for state in states.values() for t in state),
            self.held_bytes,
            _nbytes(p.grad for p in own if p.grad is not None)
            + _nbytes(t for p in own for t in states[id(p)]),
        )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def without_package(names: Sequence[str]) -> dict[str, str]:
    """Contenders that can't run here, each with the reason."""
    found = {}
    for name in names:
        if name in MODULES:
            try:
                importlib.import_module(MODULES[name])
            except ImportError as error:
                found[name] = str(error)
    return found


def trainer(contender: str, model: nn.Module, subspaces: osf_torch.Subspaces) -> Trainer:
    """A copy of the model with AdamW, by one of ``COMPARED``.

    Raises ImportError where the contender's package is missing.
    """
    model = copy.deepcopy(model)
    others = tuple(p for name, p in model.named_parameters() if name not in subspaces)
    if contender in (CONFINED, BESIDE):
        update: Any = "merge" if contender == CONFINED else "beside"
        confined = osf_torch.confine(model, subspaces, update=update)
        return Trainer(model, _adamw(model), confined=confined, others=others)
    if contender == PEFT_OSF:
        model = _by_peft(model, subspaces)
        for p in others:
            p.requires_grad_(True)
        return Trainer(model, _adamw(model), others=others)
    if contender == FACTORED:
        model = _by_mini_trainer(model, subspaces)
        wrap = importlib.import_module(MODULES[FACTORED]).optim_wrapper
        return Trainer(model, wrap(_adamw(model), model), others=others)
    optimizer = _adamw(model)
    if contender in (RESTORED, PROJECTED):
        restore = contender == RESTORED
        guard = osf_torch.protect(model, subspaces, optimizer=optimizer, restore=restore)
        return Trainer(model, optimizer, guard, others=others)
    held: list[Tensor] = []
    for name, entry in subspaces.items() if contender == EAGER else ():
        assert entry.svd is not None
        held += [entry.svd.U, entry.svd.V]
        model.get_parameter(name).register_post_accumulate_grad_hook(
            _as_written(entry.svd.U, entry.svd.V)
        )
    return Trainer(model, optimizer, held=tuple(held), others=others)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def _as_written(U: Tensor, V: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad = contenders.naive(parameter.grad, U, V)

    return hook


def _ranks(subspaces: osf_torch.Subspaces) -> dict[str, int]:
    """How many directions are protected of each weight."""
    found = {}
    for name, entry in subspaces.items():
        assert entry.svd is not None
        found[name] = entry.svd.U.shape[1]
    return found


def _by_peft(model: nn.Module, subspaces: osf_torch.Subspaces) -> nn.Module:
    """PEFT's OSF as it is, without ours in it, at the same ranks."""
    peft: Any = importlib.import_module(MODULES[PEFT_OSF])
    osf_peft.disable()
    ranks = {name.removesuffix(".weight"): rank for name, rank in _ranks(subspaces).items()}
    config = peft.OSFConfig(
        target_modules=list(ranks),
        rank_pattern={f"(^|\\.){re.escape(name)}$": rank for name, rank in ranks.items()},
    )
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


class Given(nn.Module):
    """A model in the place of the config that mini_trainer's classes are made of."""

    def __init__(self, config: nn.Module) -> None:
        super().__init__()
        self.given = config

    def forward(self, *arguments: Any) -> Any:
        return self.given(*arguments)


def _by_mini_trainer(model: nn.Module, subspaces: osf_torch.Subspaces) -> nn.Module:
    """mini_trainer's OSFT as it is, in float32: layers that run on all factors of their weight."""
    osft: Any = importlib.import_module(MODULES[FACTORED])
    osf_mini_trainer.disable()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        made: nn.Module = osft.create_osft_model_class(Given)(
            model,
            osft_config={f"given.{name}": rank for name, rank in _ranks(subspaces).items()},
            upcast_dtype=torch.float32,
            output_dtype=torch.float32,
        )
    return made
