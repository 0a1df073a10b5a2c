"""osf_torch's ways to keep what earlier tasks need, as a stream's methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import osf_torch
from bench.streams.bases import Kind, Memory, look
from bench.streams.peers import Plain
from bench.streams.subject import Subject

Update = Literal["protect", "projected", "confine", "soft"]
Layers = Literal["all", "attention", "mlp"]
LOOKED_AT = 8  # batches of a task, at its end
SOFT = 64  # directions of a weight's inputs that a soft penalty looks at
FREE = (0.75, 0.25)  # share of a weight's numbers left to the second task and to the last


@dataclass(frozen=True)
class Recipe:
    """What is protected, and how.

    Attributes:
        bases: which directions; see ``bench.streams.bases``.
        update: "protect" projects and restores, "projected" projects alone, "confine" trains C,
            "soft" adds strength·‖ΔW V‖² of normalised inputs to the loss in place of a basis.
        free: share of each weight's numbers left free, in the second task and in the last; evenly
            in between. The first task is free, but for bases of the weights themselves.
        energy: of ``osf_torch.input_subspaces``, whose ranks then follow from it; in place of free.
        min_free: its floor.
        layers: which are trained at all.
        strength: of "soft".
    """

    bases: Kind = "inputs"
    update: Update = "confine"
    free: tuple[float, float] = FREE
    energy: float | None = None
    min_free: float = 0.0
    layers: Layers = "all"
    strength: float = 0.0


class Ours(Plain):
    """One recipe over one stream."""

    def __init__(self, subject: Subject, recipe: Recipe) -> None:
        super().__init__(subject)
        self.recipe = recipe
        self.memory = Memory(recipe.bases)
        self.grown: dict[str, osf_torch.Subspace] = {}
        self._guard: osf_torch.Guard | None = None
        self._confined: osf_torch.Confined | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def begin(self, number: int, place: float) -> None:
        weights = self._trained()
        for weight in weights.values():
            weight.requires_grad_(True)
        subspaces = self._subspaces(number, place, list(weights))
        self._now, self._start = subspaces, {}
        if self.recipe.update != "soft":
            self.free = free_share(weights, subspaces)
        if not subspaces:
            return
        if self.recipe.update == "confine":
            self._confined = osf_torch.confine(self.model, subspaces)
        elif self.recipe.update == "soft":
            self._start = {name: weight.detach().clone() for name, weight in weights.items()}
            self._soft = {name: self.memory.strongest(name, SOFT) for name in weights}

    def _trained(self) -> dict[str, nn.Parameter]:
        weights = self.subject.weights(self.model)
        if self.recipe.layers == "all":
            return weights
        attention = {name: w for name, w in weights.items() if is_attention(name)}
        if self.recipe.layers == "attention":
            return attention
        return {name: w for name, w in weights.items() if name not in attention}

    def _subspaces(
        self, number: int, place: float, names: Sequence[str]
    ) -> dict[str, osf_torch.Subspace]:
        first, last = self.recipe.free
        free = first + (last - first) * place
        if self.recipe.bases == "weights":
            found = osf_torch.refresh(self.model, 1 - free**0.5, filter=list(names), progress=False)
            return dict(found)
        held = self.grown if self.recipe.energy is not None else self.memory.subspaces(free)
        return {name: held[name] for name in names if name in held}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        if self._now and self.recipe.update in ("protect", "projected"):
            self._guard = osf_torch.protect(
                self.model,
                self._now,
                optimizer=optimizer,
                restore=self.recipe.update == "protect",
            )

    def extra(self, number: int, generator: torch.Generator) -> Tensor | None:
        if not self._start:
            return None
        weights = self.subject.weights(self.model)
        moved = [(weights[name] - start) @ self._soft[name] for name, start in self._start.items()]
        return self.recipe.strength * torch.stack([m.square().sum() for m in moved]).sum()

    def end(self, number: int, seen: Sequence[Tensor]) -> None:
        moments = self._moments()
        if self._guard is not None:
            if self.recipe.update == "protect":
                self._guard.verify()
            self._guard.remove()
        if self._confined is not None:
            self._confined.verify()
            self._confined.release()
        self._guard = self._confined = self._optimizer = None
        shown = list(seen[-LOOKED_AT:])
        if self.recipe.energy is not None:
            self.grown = dict(
                osf_torch.input_subspaces(
                    self.model,
                    [self.subject.inputs(number, index) for index in shown],
                    energy=self.recipe.energy,
                    previous=self.grown,
                    masks=self.subject.masks,
                    forward=self.subject.forward,
                    filter=list(self._trained()),
                    progress=False,
                )
            )
        elif self.recipe.bases != "weights":
            trained = self._trained()
            for weight in trained.values():
                weight.requires_grad_(True)
            for name, found in look(self.subject, self.model, number, shown).items():
                self.memory.add(name, trained[name], found, moments.get(name))

    def _moments(self) -> dict[str, Tensor]:
        """Adam's first moments of the weights, by their names; of C in the weight's coordinates
        there are none, so that bases of moments take another update."""
        if self._optimizer is None:
            return {}
        state = self._optimizer.state
        return {
            name: state[weight]["exp_avg"].clone()
            for name, weight in self.subject.weights(self.model).items()
            if weight in state
        }

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "sums": self.memory.sums,
            "grown": {name: (held.U, held.V) for name, held in self.grown.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.memory.sums = state["sums"]
        self.grown = {name: osf_torch.Subspace(*sides) for name, sides in state["grown"].items()}


def is_attention(name: str) -> bool:
    return ".attention." in name or ".self_attn." in name


def free_share(weights: Mapping[str, Tensor], subspaces: Mapping[str, osf_torch.Subspace]) -> float:
    """Numbers of all C (p, q), of those of the weights."""
    free = total = 0
    for name, weight in weights.items():
        m, n = weight.shape
        held = subspaces.get(name)
        rows = m if held is None else m - protected(held.U)
        columns = n if held is None else n - protected(held.V)
        free += rows * columns
        total += m * n
    return free / total


def protected(basis: Any) -> int:
    """How many directions of a side are protected."""
    if basis is None:
        return 0
    columns: Tensor = getattr(basis, "columns", basis)
    size, width = columns.shape
    return size - width if getattr(basis, "spans", "high") == "low" else width
