"""osf_torch's ways to keep what earlier tasks need, as a stream's methods: bases from a source,
and how updates are kept out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import osf_torch
from bench.streams.peers import Plain
from bench.streams.sources import Memories, Source, Task
from bench.streams.subject import Subject

Update = Literal["protect", "projected", "confine", "soft"]
Layers = Literal["all", "attention", "mlp"]
LOOKED_AT = 8  # batches of a task, at its end
SOFT = 64  # directions of a weight's inputs that a soft penalty looks at


class Ours(Plain):
    """One source and one update over one stream.

    Args:
        source: of the bases.
        update: "protect" projects and restores, "projected" projects alone, "confine" trains C,
            "soft" adds strength·Σ‖ΔW V diag(√e)‖² of the leading directions of the inputs to the
            loss and projects nothing.
        layers: which are trained at all.
    """

    def __init__(
        self,
        subject: Subject,
        source: Source,
        update: Update = "confine",
        *,
        layers: Layers = "all",
        strength: float = 0.0,
    ) -> None:
        super().__init__(subject)
        self.source, self.update, self.layers, self.strength = source, update, layers, strength
        self._guard: osf_torch.Guard | None = None
        self._confined: osf_torch.Confined | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def begin(self, number: int, place: float) -> None:
        weights = self._trained()
        for weight in weights.values():
            weight.requires_grad_(True)
        self._held: Mapping[str, osf_torch.Subspace] = {}
        self._soft: dict[str, tuple[Tensor, Tensor]] = {}
        if self.update == "soft":
            assert isinstance(self.source, Memories)
            strongest = self.source.strongest(SOFT)
            self._soft = {
                name: (weights[name].detach().clone(), V) for name, V in strongest.items()
            }
            return
        self._held = self.source.subspaces(self.subject, self.model, Task(number, place, weights))
        self.free = free_share(weights, self._held)
        if self._held and self.update == "confine":
            self._confined = osf_torch.confine(self.model, self._held)

    def _trained(self) -> dict[str, nn.Parameter]:
        def is_taken(name: str) -> bool:
            return self.layers == "all" or is_attention(name) == (self.layers == "attention")

        weights = self.subject.weights(self.model)
        return {name: weight for name, weight in weights.items() if is_taken(name)}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        if self._held and self.update in ("protect", "projected"):
            self._guard = osf_torch.protect(
                self.model, self._held, optimizer=optimizer, restore=self.update == "protect"
            )

    def extra(self, number: int, generator: torch.Generator) -> Tensor | None:
        if not self._soft:
            return None
        weights = self.subject.weights(self.model)
        moved = [((weights[name] - start) @ V) for name, (start, V) in self._soft.items()]
        return self.strength * torch.stack([part.square().sum() for part in moved]).sum()

    def end(self, number: int, seen: Sequence[Tensor]) -> None:
        moments = self._moments()
        if self._guard is not None:
            if self.update == "protect":
                self._guard.verify()
            self._guard.remove()
        if self._confined is not None:
            self._confined.verify()
            self._confined.release()
        self._guard = self._confined = self._optimizer = None
        weights = self._trained()
        for weight in weights.values():
            weight.requires_grad_(True)
        task = Task(number, 0.0, weights, list(seen[-LOOKED_AT:]), moments)
        self.source.learn(self.subject, self.model, task)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's first moments of the weights; there are none where C is trained in their place."""
        state = {} if self._optimizer is None else self._optimizer.state
        return {
            name: state[weight]["exp_avg"].clone()
            for name, weight in self.subject.weights(self.model).items()
            if weight in state
        }

    def state(self) -> dict[str, Any]:
        return super().state() | {"source": self.source.state()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.source.load(state["source"])


def is_attention(name: str) -> bool:
    return ".attention." in name or ".self_attn." in name


def free_share(weights: Mapping[str, Tensor], subspaces: Mapping[str, osf_torch.Subspace]) -> float:
    """Numbers of all C (p, q), of those of the weights."""
    free = total = 0
    for name, weight in weights.items():
        m, n = weight.shape
        held = subspaces.get(name, osf_torch.Subspace(None, None))
        free += (m - protected(held.U)) * (n - protected(held.V))
        total += m * n
    return free / total


def protected(basis: Any) -> int:
    """How many directions of a side are protected."""
    if basis is None:
        return 0
    columns: Tensor = getattr(basis, "columns", basis)
    size, width = columns.shape
    return size - width if getattr(basis, "spans", "high") == "low" else width
