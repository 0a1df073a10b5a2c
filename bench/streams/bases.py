"""Which directions of a weight hold what earlier tasks need: the candidates that are compared.

Every candidate sees the same batches at the end of a task and keeps, of each weight, one sum of
outer products a side, in which each task counts alike. Its leading eigenvectors are the basis, as
many as the free share asks for: where both sides are taken, each leaves √(free) of it free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import osf_torch
from bench.streams.subject import Subject
from osf_kernels import Basis

Kind = Literal["inputs", "outputs", "gradients", "both", "moment", "whitened"]


@dataclass
class Seen:
    """Of one weight (m, n), on the batches of one task: means of outer products."""

    inputs: Tensor  # (n, n)
    gradients: Tensor  # (m, m) of the loss with respect to its outputs


Sums = dict[str, dict[str, Tensor]]  # by parameter name and side


def add(sums: Sums, kind: Kind, name: str, W: Tensor, seen: Seen, moment: Tensor | None) -> None:
    """Adds a task to the sums of a weight as it is at its end; ``moment`` is Adam's first of it."""
    for side, matrix in _matrices(kind, W.detach(), seen, moment).items():
        scaled = matrix / matrix.trace().clamp_min(torch.finfo(matrix.dtype).tiny)
        held = sums.setdefault(name, {})
        held[side] = held[side] + scaled if side in held else scaled


Spectra = dict[str, dict[str, tuple[Tensor, Tensor]]]  # energies, descending, and directions


def spectra(sums: Sums) -> Spectra:
    """The eigenvectors of the sums, by parameter name and side."""

    def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    return {
        name: {side: descending(matrix) for side, matrix in sides.items()}
        for name, sides in sums.items()
    }


def subspaces_of(found: Spectra, free: float) -> dict[str, osf_torch.Subspace]:
    """Bases that leave a share ``free`` of each weight's numbers, to rounding."""
    subspaces = {}
    for name, sides in found.items():
        left = free ** (1 / len(sides))
        bases = {side: _leading(vectors, left) for side, (_, vectors) in sides.items()}
        subspaces[name] = osf_torch.Subspace(bases.get("U"), bases.get("V"))
    return subspaces


def _leading(vectors: Tensor, left: float) -> Basis:
    """The smaller of the leading directions and of the others, at least one of either."""
    size = len(vectors)
    kept = min(size - 1, max(1, round((1 - left) * size)))
    if kept <= size // 2:
        return Basis(vectors[:, :kept].contiguous(), "high")
    return Basis(vectors[:, kept:].contiguous(), "low")


def _matrices(kind: Kind, W: Tensor, seen: Seen, moment: Tensor | None) -> dict[str, Tensor]:
    if kind == "inputs":
        return {"V": seen.inputs}
    if kind == "outputs":
        return {"U": W @ seen.inputs @ W.mT}
    if kind == "gradients":
        return {"U": seen.gradients}
    if kind == "both":
        return {"U": seen.gradients, "V": seen.inputs}
    if kind == "moment":
        assert moment is not None
        return {"U": moment @ moment.mT, "V": moment.mT @ moment}
    assert kind == "whitened"
    # W C^½ = U Σ Rᵀ: U are the directions of its outputs, C^½ R the inputs that make them.
    values, vectors = torch.linalg.eigh(seen.inputs)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    made = W @ root
    return {"U": made @ made.mT, "V": root @ (made.mT @ made) @ root}


def look(
    subject: Subject, model: nn.Module, number: int, batches: Sequence[Tensor]
) -> Mapping[str, Seen]:
    """What the weights that require grad read and what the loss asks of them, on training examples
    of a task."""
    named = {f"{name}.weight": module for name, module in model.named_modules()}
    weights = {name: w for name, w in subject.weights(model).items() if w.requires_grad}
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for index in batches:
        real = subject.inputs(number, index)["attention_mask"].bool()
        with ExitStack() as hooks:
            for name in weights:
                hooks.enter_context(_summing(named[name], name, real, inputs, gradients))
            subject.loss(model, number, index).backward()
        for weight in weights.values():
            weight.grad = None
    return {name: Seen(inputs[name], gradients[name]) for name in inputs}


@contextmanager
def _summing(
    module: nn.Module,
    name: str,
    real: Tensor,
    inputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> Iterator[None]:
    """Adds XᵀX and dYᵀdY of the real tokens that the module is run on to the sums."""

    def add(sums: dict[str, Tensor], rows: Tensor) -> None:
        with torch.autocast(rows.device.type, enabled=False):  # sums in full precision
            flat = rows.detach()[real].float()
            outer = flat.mT @ flat
        sums[name] = sums[name] + outer if name in sums else outer

    def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        add(inputs, args[0])
        output.register_hook(lambda gradient: add(gradients, gradient))

    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
