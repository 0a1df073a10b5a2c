"""The protocol of a method, and the methods that ours are compared with.

Every method trains the same matrices of the model (LoRA: adapters of them) and leaves embeddings,
norms and biases as they are, which is what PEFT's tuners do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.streams.sources import SHARES, evenly
from bench.streams.subject import Subject

LORA_RANK = 16
LORA_DECAY = 0.1  # of the adapters, ten times what the others have
OLORA_RANK = 8  # and O-LoRA's own strength of its orthogonality loss, arXiv 2310.14152
OLORA_STRENGTH = 0.5
REPLAYED = 0.01  # of each earlier task's training examples, beside every batch
REPLAY_BATCH = 4


class Plain:
    """Full fine-tuning; also the protocol of a method over one stream.

    Attributes:
        model: what is trained, evaluated and run: the subject's, or a wrapper of it.
        decay: weight decay of what is trained.
        free: the share of the trained matrices' numbers that an update can take, in this task.
    """

    decay = 0.01

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.model = subject.model
        self.free = 1.0
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def begin(self, number: int, place: float) -> None:
        """Before the optimizer of a task is made: what requires grad goes to it.

        Args:
            number: the task's, from 0.
            place: in the stream, from 0 to 1.
        """
        for weight in self.subject.weights(self.model).values():
            weight.requires_grad_(True)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """What the method does to the optimizer's steps."""

    def extra(self, number: int, generator: torch.Generator) -> Tensor | None:
        """What the method adds to the loss of a batch."""
        return None

    def stepped(self) -> None:
        """After each step of the optimizer."""

    def end(self, number: int, seen: Sequence[Tensor]) -> None:
        """Ends a task: ``model`` holds what was learned.

        Args:
            seen: indices of the batches that it was trained on.
        """

    def state(self) -> dict[str, Any]:
        """Between two tasks, what going on takes beside the subject's state."""
        return {"model": self.model.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])


class Heads(Plain):
    """Trains the heads alone: what there is to gain over it is all that training the model brings,
    and it forgets nothing."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.free = 0.0

    def begin(self, number: int, place: float) -> None:
        pass


class Matched(Plain):
    """Plain fine-tuning whose weights stay as close to those at the task's start as another
    method's: after each step the whole update is scaled back onto a ball of that radius."""

    def __init__(self, subject: Subject, radii: Sequence[float]) -> None:
        super().__init__(subject)
        self.radii = radii

    def begin(self, number: int, place: float) -> None:
        super().begin(number, place)
        self._radius = self.radii[number]
        self._start = {
            name: weight.detach().clone()
            for name, weight in self.subject.weights(self.model).items()
        }

    @torch.no_grad()
    def stepped(self) -> None:
        weights = self.subject.weights(self.model)
        moved = norm_of(weights, self._start)
        if moved > self._radius:
            for name, weight in weights.items():
                weight.lerp_(self._start[name], 1 - self._radius / moved)


class Replay(Plain):
    """Plain fine-tuning that keeps a hundredth of each earlier task's examples, and trains on a
    few of them beside every batch: no method without old data is expected to forget less."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.kept: list[list[int]] = []

    def extra(self, number: int, generator: torch.Generator) -> Tensor | None:
        memory = [(task, index) for task, kept in enumerate(self.kept) for index in kept]
        if not memory:
            return None
        drawn = torch.randint(len(memory), (REPLAY_BATCH,), generator=generator).tolist()
        by_task: dict[int, list[int]] = {}
        for which in drawn:
            task, index = memory[which]
            by_task.setdefault(task, []).append(index)
        losses = [
            self.subject.loss(self.model, task, torch.tensor(found)) * len(found)
            for task, found in by_task.items()
        ]
        return torch.stack(losses).sum() / REPLAY_BATCH

    def end(self, number: int, seen: Sequence[Tensor]) -> None:
        count = max(1, math.ceil(REPLAYED * self.subject.count(number)))
        self.kept.append(torch.cat(list(seen)).unique()[:count].tolist())

    def state(self) -> dict[str, Any]:
        return super().state() | {"kept": self.kept}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.kept = state["kept"]


class Lora(Plain):
    """peft's LoRA with weight decay: one adapter, trained on one task after the other."""

    decay = LORA_DECAY

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.model = adapted(subject, LORA_RANK)
        self.free = trained_share(self.model)

    def begin(self, number: int, place: float) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)


class OLora(Plain):
    """O-LoRA (arXiv 2310.14152): an adapter a task, whose A is kept orthogonal to earlier ones by a
    penalty; earlier adapters are merged."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.earlier: dict[str, Tensor] = {}  # by module, the rows of all earlier A

    def begin(self, number: int, place: float) -> None:
        self.model = adapted(self.subject, OLORA_RANK)
        self.free = trained_share(self.model)

    def extra(self, number: int, generator: torch.Generator) -> Tensor | None:
        if not self.earlier:
            return None
        found = [(self.earlier[name] @ A.mT).abs().sum() for name, A in self._factors().items()]
        return OLORA_STRENGTH * torch.stack(found).sum()

    @torch.no_grad()
    def end(self, number: int, seen: Sequence[Tensor]) -> None:
        for name, A in self._factors().items():
            before = self.earlier.get(name, A[:0])
            self.earlier[name] = torch.cat([before, A]).detach().clone()
        self.model = self.subject.model = merged(self.model)

    def _factors(self) -> dict[str, Tensor]:
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if ".lora_A." in name
        }

    def state(self) -> dict[str, Any]:
        return super().state() | {"earlier": self.earlier}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.earlier = state["earlier"]


class PeftOsf(Plain):
    """peft's OSF: a new decomposition a task, merged into the weights after it. What it protects
    grows evenly over the stream."""

    def begin(self, number: int, place: float) -> None:
        from peft import OSFConfig, get_peft_model

        share = evenly(SHARES, place)
        self.free = (1 - share) ** 2
        config = OSFConfig(target_modules=modules_of(self.subject), effective_rank=share)
        self.model = get_peft_model(self.subject.model, config)

    def end(self, number: int, seen: Sequence[Tensor]) -> None:
        # Its example calls unload(), which in 0.21 returns the weights from before the task.
        self.model = self.subject.model = merged(self.model)


def modules_of(subject: Subject) -> list[str]:
    return [name.removesuffix(".weight") for name in subject.weights(subject.model)]


def adapted(subject: Subject, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules_of(subject))
    return get_peft_model(subject.model, config)


def merged(wrapped: Any) -> nn.Module:
    """The plain model with what the wrapper trained in its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = wrapped.merge_and_unload()
    return found.requires_grad_(False)


def trained_share(wrapped: nn.Module) -> float:
    """Trained numbers of adapters, of those of the matrices that they adapt."""
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return trained / sum(
        p.numel() for name, p in wrapped.named_parameters() if name.endswith("base_layer.weight")
    )


def norm_of(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """‖ΔW‖_F over all matrices."""
    squares = [(weight - start[name]).square().sum() for name, weight in weights.items()]
    return float(torch.stack(squares).sum().sqrt())
