"""The demo's training runs on real weights and text, and what it measures about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import osf_torch
from bench.contenders import naive

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


def batches(
    encoded: Sequence[tuple[Tokens, Tokens]], size: int, steps: int, generator: torch.Generator
) -> list[Batch]:
    """``steps`` batches of ``size`` pairs, reshuffled whenever the pairs run out."""
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
            (torch.stack([ids for ids, _ in side]), torch.stack([mask for _, mask in side]))
            for side in sides
        )
        found.append((first, second))
    return found


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every 2-D weight."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def top_subspace(weight: Tensor, rho: float) -> osf_torch.Subspace:
    """The top singular triplets, ρ of the shorter side of them, from ``torch.linalg.svd``."""
    rank = max(1, round(rho * min(weight.shape)))
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    return osf_torch.Subspace(
        U[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank].mT.contiguous()
    )


def in_span(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """x − P(x) in float64: the part of x (m, n) that P removes."""
    x64 = x.double()
    return x64 - naive(x64, U.double(), V.double())


def share(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """‖x − P(x)‖ / ‖x‖ over all (x, U, V) together; 0 where every x is zero."""
    inside = whole = 0.0
    for x, U, V in parts:
        inside += float(in_span(x, U, V).square().sum())
        whole += float(x.double().square().sum())
    return math.sqrt(inside / whole) if whole > 0 else 0.0


def leak(raw: Tensor, projected: Tensor, U: Tensor, V: Tensor) -> float:
    """The larger of ‖Uᵀg'‖/‖Uᵀg‖ and ‖g'V‖/‖gV‖, in float64."""
    U64, V64, raw64, projected64 = U.double(), V.double(), raw.double(), projected.double()
    left = (U64.mT @ projected64).norm() / (U64.mT @ raw64).norm()
    right = (projected64 @ V64).norm() / (raw64 @ V64).norm()
    return max(float(left), float(right))


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
    subspaces: Mapping[str, osf_torch.Subspace],
    todo: Sequence[Batch],
    *,
    restore: bool,
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """AdamW with weight decay under ``protect``, on the model given (changed in place)."""
    weights = matrices(model)
    before = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
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
    guard.remove()
    run.change = {name: p.detach() - before[name] for name, p in weights.items()}
    return run
