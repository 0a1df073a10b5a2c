"""The demo's training runs on real weights and text, and what it measures about them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import osf_torch
from bench import corpus, minilm
from osf_kernels import Basis, TruncatedSVD

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


def minilm_and_pairs() -> tuple[minilm.SentenceEncoder, list[tuple[Tokens, Tokens]]]:
    """The trained encoder, and the encoded sentence pairs that it is trained on.

    Raises FileNotFoundError where the model's package isn't installed.
    """
    directory = minilm.model_directory()
    pairs = corpus.sentence_pairs(corpus.topics())
    tokens = minilm.encode([s for pair in pairs for s in pair], directory)
    return minilm.load(directory), list(zip(tokens[::2], tokens[1::2], strict=True))


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


def triplets_of(svd: TruncatedSVD) -> Triplets:
    """The triplets of a decomposition, with the low bases that are no wider than the high ones.

    Such a basis is taken from the decomposition, or completes its columns by QR.
    """

    def smaller(high: Tensor, low: Tensor | None) -> Tensor | Basis:
        size, rank = high.shape
        if size - rank > rank:
            return high
        if low is None:
            low = torch.linalg.qr(high.double(), mode="complete").Q[:, rank:].to(high.dtype)
        return Basis(low, "low")

    return Triplets(svd.U, svd.S, svd.V, smaller(svd.U, svd.U_low), smaller(svd.V, svd.V_low))


class Refreshed(NamedTuple):
    """A model's 2-D weights by one refresh, and what a loop of torch.linalg.svd took for them."""

    subspaces: osf_torch.Subspaces
    triplets: dict[str, Triplets]
    seconds: float
    loop_seconds: float

    @property
    def residual(self) -> float:
        """The worst, relative to σ₁."""
        return max(entry.residual for entry in self.subspaces.values())

    @property
    def methods(self) -> str:
        """How many matrices by which method."""
        taken = [entry.method for entry in self.subspaces.values()]
        return ", ".join(f"{taken.count(name)} by {name}" for name in dict.fromkeys(taken))


def refreshed(model: nn.Module, rho: float, say: Callable[[str], object]) -> Refreshed:
    """``osf_torch.refresh`` of every 2-D weight at ρ, and the loop that it stands for.

    Each runs once, one after the other, both in float64: the residual of a float32 decomposition
    would be most of what leaks and drifts afterwards.
    """
    weights = matrices(model)
    say(f"refreshing {len(weights)} weights")
    started = time.perf_counter()
    subspaces = osf_torch.refresh(
        model, rho, filter="*", keep="all", compute_dtype=torch.float64, progress=False
    )
    seconds = time.perf_counter() - started
    triplets = {}
    for name, entry in subspaces.items():
        assert entry.svd is not None
        triplets[name] = triplets_of(entry.svd)
    say(f"torch.linalg.svd of {len(weights)} weights in a loop")
    started = time.perf_counter()
    for weight in weights.values():
        torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return Refreshed(subspaces, triplets, seconds, time.perf_counter() - started)


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
    # Without restore the weights drift, which is what such a run is to show.
    guard.verify(tol=None if restore else math.inf)
    guard.remove()
    run.change = {name: p.detach() - before[name] for name, p in weights.items()}
    return run
