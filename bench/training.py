"""The demo's training runs on real weights and text, and what it measures about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import osf_torch
from osf_kernels import Basis

TEMPERATURE = 0.05
LEARNING_RATE = 2e-4
WEIGHT_DECAY = 0.1

Tokens = tuple[Tensor, Tensor]  # ids (batch, length), mask of real tokens
Batch = tuple[Tokens, Tokens]  # a sentence and the one that follows it


def contrastive_loss(model: nn.Module, batch: Batch) -> Tensor:
    """InfoNCE: each sentence must find the one that follows it among those of the batch."""
    first, second = (model(ids, mask) for ids, mask in batch)
    logits = first @ second.mT / TEMPERATURE  # (batch, batch)
    targets = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, targets)


def trimmed(ids: Tensor, mask: Tensor) -> Tokens:
    """Without the columns where every sentence is padding."""
    length = int(mask.sum(1).max())
    return ids[:, :length], mask[:, :length]


def batches(
    encoded: Sequence[tuple[Tokens, Tokens]], size: int, steps: int, generator: torch.Generator
) -> list[Batch]:
    """``steps`` batches of ``size`` pairs, reshuffled whenever the pairs run out.

    A batch is as long as its longest sentence.
    """
    if len(encoded) < size:
        raise ValueError(f"bench: expected at least {size} sentence pairs, got {len(encoded)}")
    order: list[int] = []
    found = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(encoded), generator=generator).tolist()
        picked, order = order[:size], order[size:]
        sides = [[encoded[i][side] for i in picked] for side in (0, 1)]
        first, second = (
            trimmed(torch.stack([ids for ids, _ in side]), torch.stack([mask for _, mask in side]))
            for side in sides
        )
        found.append((first, second))
    return found


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every 2-D weight."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


class Triplets(NamedTuple):
    """Top singular triplets of a weight (m, n), and their subspaces as cheaply as they are held."""

    U: Tensor  # (m, r)
    S: Tensor  # (r,)
    V: Tensor  # (n, r)
    smaller_U: Tensor | Basis  # U, or the low basis of its complement where that is no wider
    smaller_V: Tensor | Basis


def top_triplets(weight: Tensor, rho: float) -> Triplets:
    """ρ of the shorter side of them, at least one, from ``torch.linalg.svd`` in float64.

    Rounded to the weight's dtype at the end: the columns of a float32 decomposition of these
    weights are orthonormal to 2e-5 only and reproduce the weight to 1e-6, which would be most
    of what leaks and drifts afterwards.
    """
    rank = max(1, round(rho * min(weight.shape)))
    U, S, Vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)

    def split(columns: Tensor) -> tuple[Tensor, Tensor | Basis]:
        """The first ``rank`` columns, and the rest where it is all of their complement."""
        high, low = (
            part.to(weight.dtype).contiguous() for part in (columns[:, :rank], columns[:, rank:])
        )
        whole = columns.shape[0] == columns.shape[1]
        return high, Basis(low, "low") if whole and low.shape[1] <= rank else high

    (U, smaller_U), (V, smaller_V) = split(U), split(Vh.mT)
    return Triplets(U, S[:rank].to(weight.dtype), V, smaller_U, smaller_V)


class Squares(NamedTuple):
    """Of one matrix, in float64: ‖Uᵀx‖², ‖xV‖², ‖x − P(x)‖² and ‖x‖²."""

    left: float
    right: float
    removed: float
    whole: float


def squares(x: Tensor, basis: Triplets) -> Squares:
    """x − P(x) is a sum of three orthogonal parts: ‖x − P(x)‖² = ‖Uᵀx‖² + ‖xV‖² − ‖UᵀxV‖²."""
    x64, U, V = x.double(), basis.U.double(), basis.V.double()
    A = U.mT @ x64  # (r, n)
    left, right, both, whole = (float(part.square().sum()) for part in (A, x64 @ V, A @ V, x64))
    return Squares(left, right, left + right - both, whole)


def share(parts: Sequence[Squares]) -> float:
    """‖x − P(x)‖ / ‖x‖ over several matrices together; 0 where every x is zero."""
    whole = sum(part.whole for part in parts)
    removed = max(0.0, sum(part.removed for part in parts))
    return math.sqrt(removed / whole) if whole > 0 else 0.0


def leak(raw: Squares, projected: Squares) -> float:
    """The larger of ‖Uᵀg'‖/‖Uᵀg‖ and ‖g'V‖/‖gV‖."""
    return math.sqrt(max(projected.left / raw.left, projected.right / raw.right))


@dataclass
class Run:
    """What a training run leaves: losses, its first step's projected gradients, the changes."""

    losses: list[float] = field(default_factory=list)
    projected: dict[str, Tensor] = field(default_factory=dict)
    change: dict[str, Tensor] = field(default_factory=dict)


def raw_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The gradient of every 2-D weight for one batch, nothing projected."""
    contrastive_loss(model, batch).backward()
    found = {}
    for name, p in matrices(model).items():
        assert p.grad is not None, f"{name} has no gradient"
        found[name] = p.grad.clone()
    model.zero_grad()
    return found


def train(
    model: nn.Module,
    triplets: Mapping[str, Triplets],
    todo: Sequence[Batch],
    *,
    restore: bool,
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """AdamW with weight decay under ``protect``, on the model given (changed in place)."""
    weights = matrices(model)
    before = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    subspaces = {n: osf_torch.Subspace(U=t.U, V=t.V, S=t.S) for n, t in triplets.items()}
    guard = osf_torch.protect(model, subspaces, optimizer=optimizer, restore=restore)
    run = Run()

    def keep_first(*_: object) -> None:
        # Registered after the guard's own hook, so it sees what the optimizer is about to use.
        if not run.projected:
            run.projected = {n: p.grad.clone() for n, p in weights.items() if p.grad is not None}

    handle = optimizer.register_step_pre_hook(keep_first)
    for batch in todo:
        optimizer.zero_grad()
        loss = contrastive_loss(model, batch)
        loss.backward()
        optimizer.step()
        run.losses.append(float(loss.detach()))
        on_step()
    handle.remove()
    guard.verify()
    guard.remove()
    run.change = {name: p.detach() - before[name] for name, p in weights.items()}
    return run
