"""Where the bases of a method come from: the weights, what they read, or the library's growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

import osf_kernels
import osf_torch
from bench.streams.bases import Kind, Sums, add, look, spectra, subspaces_of
from bench.streams.subject import Inputs, Subject

Ends = tuple[float, float]  # of a stream: what a share is at its beginning and at its end
# Share of a weight's numbers left to the second task and to the last; evenly in between.
FREE = (0.75, 0.25)
SHARES = (0.5, 0.9)  # of the directions of a weight kept in the first task and in the last
Decompose = Literal["ours", "exact", "lowrank"]


def evenly(ends: Ends, place: float) -> float:
    """What a share is at a place in the stream, from 0 to 1."""
    first, last = ends
    return first + (last - first) * place


@dataclass(frozen=True)
class Task:
    """What a source is told of a task.

    Attributes:
        number: from 0.
        place: in the stream, from 0 to 1.
        weights: those that are trained, by parameter name.
        batches: indices of training examples; at the task's end alone.
        moments: Adam's first moments; likewise.
    """

    number: int
    place: float
    weights: Mapping[str, nn.Parameter]
    batches: Sequence[Tensor] = ()
    moments: Mapping[str, Tensor] = field(default_factory=dict)


class Source(Protocol):
    def subspaces(
        self, subject: Subject, model: nn.Module, task: Task
    ) -> Mapping[str, osf_torch.Subspace]:
        """What a task is kept out of; nothing where it may move all."""

    def learn(self, subject: Subject, model: nn.Module, task: Task) -> None:
        """At the end of a task, whose trained weights require grad."""

    def state(self) -> Any:
        """What going on after a task takes."""

    def load(self, state: Any) -> None: ...


class Memories:
    """A candidate of ``bench.streams.bases``, at a free share that shrinks over the stream. The
    first task is free."""

    def __init__(self, kind: Kind, free: Ends = FREE) -> None:
        self.kind, self.free = kind, free
        self.sums: Sums = {}

    def subspaces(
        self, subject: Subject, model: nn.Module, task: Task
    ) -> Mapping[str, osf_torch.Subspace]:
        return subspaces_of(spectra(self.sums), evenly(self.free, task.place))

    def learn(self, subject: Subject, model: nn.Module, task: Task) -> None:
        for name, seen in look(subject, model, task.number, task.batches).items():
            add(self.sums, self.kind, name, task.weights[name], seen, task.moments.get(name))

    def strongest(self, count: int) -> dict[str, Tensor]:
        """V diag(√e) of the ``count`` leading directions of each weight's inputs, Σe = 1."""
        return {
            name: (vectors * (energies / energies.sum()).sqrt())[:, :count].contiguous()
            for name, sides in spectra(self.sums).items()
            for energies, vectors in [sides["V"]]
        }

    def state(self) -> Any:
        return self.sums

    def load(self, state: Any) -> None:
        self.sums = state


class Probed(Memories):
    """The free share is the largest at which a probe of the new task doesn't raise the loss of the
    earlier ones, judged on a few examples that were kept of each. A probe is one step for each
    share: the signs of the gradient of the task's first examples, as AdamW's first step has them,
    projected. Nothing is trained for it."""

    shares = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
    kept = 8  # examples of each earlier task
    step = 0.01  # of ‖W‖, the length of a probe
    rise = 0.01  # of the earlier tasks' loss that counts as none

    def __init__(self) -> None:
        super().__init__("inputs")
        self.examples: list[Tensor] = []

    def subspaces(
        self, subject: Subject, model: nn.Module, task: Task
    ) -> Mapping[str, osf_torch.Subspace]:
        if not self.examples:
            return {}
        found = spectra(self.sums)
        gradients = self._gradients(subject, model, task)
        before = self._loss(subject, model)
        for share in self.shares:
            held = subspaces_of(found, share)
            if self._moved(subject, model, task, gradients, held) <= before * (1 + self.rise):
                return held
        return subspaces_of(found, self.shares[-1])

    def _gradients(self, subject: Subject, model: nn.Module, task: Task) -> dict[str, Tensor]:
        index = torch.arange(min(64, subject.count(task.number)))
        subject.loss(model, task.number, index).backward()
        found = {}
        for name, weight in task.weights.items():
            assert weight.grad is not None
            found[name], weight.grad = weight.grad, None
        return found

    @torch.no_grad()
    def _loss(self, subject: Subject, model: nn.Module) -> float:
        losses = [
            float(subject.loss(model, number, index)) for number, index in enumerate(self.examples)
        ]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _moved(
        self,
        subject: Subject,
        model: nn.Module,
        task: Task,
        gradients: Mapping[str, Tensor],
        held: Mapping[str, osf_torch.Subspace],
    ) -> float:
        """The earlier tasks' loss after a probe."""
        kept = {name: weight.detach().clone() for name, weight in task.weights.items()}
        for name, weight in task.weights.items():
            sides = held[name]
            step = osf_kernels.project(gradients[name].sign(), sides.U, sides.V)
            weight.sub_(step * (self.step * weight.norm() / step.norm().clamp_min(1e-12)))
        found = self._loss(subject, model)
        for name, weight in task.weights.items():
            weight.copy_(kept[name])
        return found

    def learn(self, subject: Subject, model: nn.Module, task: Task) -> None:
        super().learn(subject, model, task)
        self.examples.append(task.batches[0][: self.kept])

    def state(self) -> Any:
        return {"sums": self.sums, "examples": self.examples}

    def load(self, state: Any) -> None:
        self.sums, self.examples = state["sums"], state["examples"]


class Weights:
    """Leading singular directions of the weights as they are before each task, of which the share
    kept grows over the stream.

    Args:
        decompose: "ours" is ``osf_torch.refresh``, "exact" the same by ``torch.linalg.svd``,
            "lowrank" ``torch.svd_lowrank`` with two iterations, as training code calls it.
        mrr: the minimum retention ratio; ranks are then allocated by the layers' importance for
            the task, and the share kept is the target.
    """

    def __init__(
        self,
        decompose: Decompose = "ours",
        shares: Ends = SHARES,
        mrr: float | None = None,
    ) -> None:
        self.decompose, self.shares, self.mrr = decompose, shares, mrr

    def subspaces(
        self, subject: Subject, model: nn.Module, task: Task
    ) -> Mapping[str, osf_torch.Subspace]:
        share = evenly(self.shares, task.place)
        names = list(task.weights)
        if self.decompose == "lowrank":
            return {name: _lowrank(weight, share) for name, weight in task.weights.items()}
        ranks: Any = share
        if self.mrr is not None:
            batch = subject.inputs(task.number, torch.arange(min(64, subject.count(task.number))))
            importance = osf_torch.layer_importance(
                model,
                [batch],
                masks=subject.masks,
                forward=subject.forward,
                progress=False,
            )
            ranks = osf_torch.allocate_ranks(importance, model, mrr=min(self.mrr, share), trr=share)
        found = osf_torch.refresh(
            model,
            ranks,
            filter=names,
            method="exact" if self.decompose == "exact" else "auto",
            seed=task.number,
            progress=False,
        )
        return dict(found)

    def learn(self, subject: Subject, model: nn.Module, task: Task) -> None:
        pass

    def state(self) -> Any:
        return None

    def load(self, state: Any) -> None:
        pass


def _lowrank(weight: Tensor, share: float) -> osf_torch.Subspace:
    rank = max(1, int(share * min(weight.shape)))
    U, _, V = torch.svd_lowrank(weight.detach(), q=rank, niter=2)
    return osf_torch.Subspace(U.contiguous(), V.contiguous())


class Library:
    """``osf_torch.input_subspaces``: what the weights read, as many directions as its energy takes
    and its floor allows. The first task is free."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.held: Mapping[str, osf_torch.Subspace] = {}

    def subspaces(
        self, subject: Subject, model: nn.Module, task: Task
    ) -> Mapping[str, osf_torch.Subspace]:
        return self.held

    def learn(self, subject: Subject, model: nn.Module, task: Task) -> None:
        batches = [subject.inputs(task.number, index) for index in task.batches]
        self._grow(subject, model, task, batches)

    def _grow(
        self, subject: Subject, model: nn.Module, task: Task, batches: Sequence[Inputs]
    ) -> None:
        self.held = osf_torch.input_subspaces(
            model,
            batches,
            previous=self.held,
            masks=subject.masks,
            forward=subject.forward,
            filter=list(task.weights),
            progress=False,
            **self.options,
        )

    def state(self) -> Any:
        return self.held

    def load(self, state: Any) -> None:
        self.held = state


class Prior(Library):
    """A Library that is shown text of no task before the first task, so that the first task is
    confined too. The subject must have such text."""

    def subspaces(
        self, subject: Subject, model: nn.Module, task: Task
    ) -> Mapping[str, osf_torch.Subspace]:
        if not self.held:
            self._grow(subject, model, task, subject.general_inputs())
        return self.held
