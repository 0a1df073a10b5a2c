"""How many directions of each weight to protect: by a layer's importance, or by energy.

A fixed rank, a share of min(m, n), and either by name pattern need no function: ``refresh`` takes
them as they are, and what stands here returns what it takes too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from osf_torch.arguments import require_show
from osf_torch.batching import BATCH, Part, packed, parts_of
from osf_torch.free.merging import require_current
from osf_torch.kinds import is_flat, owners
from osf_torch.progress import Show, progress_bar
from osf_torch.selection import (
    Filter,
    Ranks,
    Selected,
    listed,
    matrix_of,
    named_weights,
    select,
    share_of,
)

Shapes = Mapping[str, tuple[int, ...]] | nn.Module

WORK_BYTES = 1 << 30  # what one call may take for its matrices and their Gram matrices in float64


def allocate_ranks(
    importance: Mapping[str, float],
    shapes: Shapes,
    *,
    mrr: float = 0.1,
    trr: float = 0.8,
) -> dict[str, int]:
    """r = ρ·min(m, n), ρ = mrr + I·(trr − mrr): ranks for ``refresh`` from layers' importance.

    ρ is held within [mrr, 1] and r, rounded, within [1, min(m, n)]; below ρ = 1 it leaves at least
    one direction free where there are two. A layer of average importance, I = 1, gets trr; one
    above it gets more than trr. Where nothing is clamped and the mean of I is 1, as
    :func:`layer_importance` gives it, the mean of ρ is trr.

    A weight of one row or column gets r = 1, which leaves nothing of it free, and refresh says so.
    Put a share in its place to pass over it: ``ranks | {"score.weight": 0.5}``.

    Args:
        importance: I by parameter name; below zero counts as zero, so that it gets mrr.
        shapes: (..., m, n) by parameter name, or the model, whose names are as in ``refresh``.
            Names that ``importance`` lacks are left alone.
        mrr: minimum retention ratio, in [0, 1].
        trr: target retention ratio, in [mrr, 1].

    Returns:
        Ranks by parameter name, in the order of ``importance``. Other ranks may be put beside
        them or over them by exact name, which goes before any pattern in ``refresh``:
        ``ranks | {"lm_head.weight": 0.3}``. A pattern serves the names that aren't in the
        mapping, so to override by one take its names out first.

    Raises:
        ValueError: mrr or trr outside [0, 1], mrr above trr, no importances; an importance that
            is NaN or infinite, a missing shape or one that isn't (m, n), which name the layer.

    Source: Nayak et al. 2025, "Sculpting Subspaces" (arXiv 2504.07097), adaptive rank selection,
    with mrr = .1 and trr = .8; after AdaSVD (Li et al. 2025, arXiv 2502.01403), section 3.2.
    """
    for name, ratio in (("mrr", mrr), ("trr", trr)):
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(
                f"osf_torch.allocate_ranks: expected {name} to be a share in [0, 1], got {ratio!r}"
            )
    if mrr > trr:
        raise ValueError(
            f"osf_torch.allocate_ranks: expected mrr to be at most trr, got mrr={mrr!r} and "
            f"trr={trr!r}"
        )
    if not importance:
        raise ValueError(
            "osf_torch.allocate_ranks: expected importance of at least one layer, got none; "
            "layer_importance gives it"
        )
    bad = [f"{name!r}: {value}" for name, value in importance.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"osf_torch.allocate_ranks: expected finite importances, got {listed(bad)}"
        )
    known = _shapes(shapes)
    missing = [repr(name) for name in importance if name not in known]
    if missing:
        raise ValueError(
            "osf_torch.allocate_ranks: expected shapes to hold (m, n) of every layer in "
            f"importance, got none for {listed(missing)}; are they another model's?"
        )
    found = {}
    for name, value in importance.items():
        short = _short_side(name, known[name])
        share = min(max(mrr + value * (trr - mrr), mrr), 1.0)
        found[name] = max(1, share_of(share, short))
    return found


def ranks_by_energy(
    model: nn.Module,
    energy: float,
    *,
    filter: Filter = None,
    minimum: Ranks = 1,
    maximum: Ranks | None = None,
    progress: Show = True,
) -> dict[str, int]:
    """The smallest r with σ₁² + … + σᵣ² ≥ energy·‖W‖²_F: ranks for ``refresh`` from the weights.

    Energies are those of eigenvalues of the smaller Gram matrix in float64, right to rounding in
    float64 relative to ‖W‖²_F, for weights of any dtype. So at energy = 1 r is the numerical rank,
    counting directions down to about 1e-8·√min(m, n) of ‖W‖.

    Args:
        model: its matrices, of float32, bfloat16, float16 or float64. The matrices of a batch
            (experts) have one rank, that of the one that needs most.
        energy: share of ‖W‖²_F, in (0, 1].
        filter: which weights, as in ``refresh``.
        minimum: r at least; an int, a share of min(m, n), or either by name or pattern, as the
            ranks of ``refresh``.
        maximum: r at most, likewise; min(m, n) where None.
        progress: as in ``refresh``.

    Returns:
        Ranks by parameter name as in ``refresh``, in the model's order. A weight of zeros gets
        its minimum. A weight that needs min(m, n) for its energy gets that, which leaves nothing of
        it free, and refresh says so; ``maximum=0.9`` holds some of each weight back, but for a
        weight of one row or column: put a share in its place to pass over it,
        ``ranks | {"score.weight": 0.5}``.

    Raises:
        ValueError: energy outside (0, 1], nothing matches, NaN or Inf in a weight (all weights
            are looked at first), a minimum or maximum outside [1, min(m, n)] or a minimum above
            the maximum; all name the parameter.
        TypeError: a weight that ``refresh`` doesn't take.

    Mutates nothing; synchronises once a weight and once a batch of equal shapes; draws no random
    numbers.

    Source: Nayak et al. 2025, "Sculpting Subspaces" (arXiv 2504.07097), which leaves a data-driven
    rank as an open question; the threshold is that of GPM (Saha et al. 2021, arXiv 2103.09762),
    on the weight instead of the activations.
    """
    if not 0.0 < energy <= 1.0:
        raise ValueError(
            "osf_torch.ranks_by_energy: expected energy to be a share of the squared Frobenius "
            f"norm in (0, 1], got {energy!r}"
        )
    require_show(progress, "osf_torch.ranks_by_energy")
    floors = select(model, minimum, filter, operator="ranks_by_energy")
    ceilings = select(
        model, 1.0 if maximum is None else maximum, filter, operator="ranks_by_energy"
    )
    require_current(model, (s.weight for s in floors), "ranks_by_energy")
    # A share leaves 0 of a weight of one direction, whose one rank is 1.
    limits = {
        low.name: (max(1, low.rank), max(1, high.rank))
        for low, high in zip(floors, ceilings, strict=True)
    }
    crossed = [f"{name!r}: {low} > {high}" for name, (low, high) in limits.items() if low > high]
    if crossed:
        raise ValueError(
            "osf_torch.ranks_by_energy: expected minimum to be at most maximum, got "
            f"{listed(crossed)}"
        )
    bad = [repr(s.name) for s in floors if not bool(torch.isfinite(s.weight.detach()).all())]
    if bad:
        raise ValueError(
            f"osf_torch.ranks_by_energy: expected finite weights, got NaN or Inf in {listed(bad)}; "
            "repair them, or leave these weights out by filter="
        )
    found: dict[str, int] = {}
    parts = [(_kind(s), part) for s in floors for part in parts_of(s, _most(_kind(s)))]
    total = sum(part.count for _, part in parts)
    with progress_bar(progress, "energy", total, sum(_cost(part) for _, part in parts)) as bar:
        for (shape, *_), batch in packed(parts, _most):
            bar.begin(f"{shape[0]}x{shape[1]} {batch[0].name}")
            for part, rank in zip(batch, _energy_ranks(batch, energy), strict=True):
                low, high = limits[part.name]
                found[part.name] = min(max(rank, low, found.get(part.name, 1)), high)
            bar.advance(sum(part.count for part in batch), sum(map(_cost, batch)))
    return {s.name: found[s.name] for s in floors}


@torch.no_grad()
def _energy_ranks(batch: Sequence[Part], energy: float) -> list[int]:
    """r of each part, of matrices of one shape, by what the directions beyond it hold.

    In one run on a CPU core the eigenvalues of a float64 Gram matrix took a fifth to a tenth of
    ``truncated_svd`` at full rank, which computes vectors too, and half to three quarters of
    float64 singular values, to 4e-16 of their energy (384x384 to 768x768).
    """
    values = [part.values() for part in batch]
    W = torch.cat([w.flatten(0, -3) if w.dim() > 2 else w[None] for w in values]).double()
    m, n = W.shape[-2:]
    # Squares of float64 entries overflow above 1e154 and vanish below 1e-162.
    W = W / W.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    gram = W @ W.mT if m <= n else W.mT @ W
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None]
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0)  # ascending: σ², smallest first
    # Summed from the smallest up: what is dropped decides, and it may be far below the rest.
    tails = values.cumsum(-1)  # tails[j]: energy of the j + 1 smallest
    rounding = min(m, n) * torch.finfo(torch.float64).eps
    dropped = (tails <= (1.0 - energy + rounding) * scale).sum(-1)
    ranks = (min(m, n) - dropped).split([part.count for part in batch])
    most: list[int] = torch.stack([of_part.max() for of_part in ranks]).tolist()
    return most


def _cost(part: Part) -> float:
    m, n = part.selected.shape
    return float(part.count * m * n * min(m, n))


def _kind(s: Selected) -> tuple[tuple[int, int], torch.dtype, torch.device]:
    """What matrices of one call have in common."""
    return s.shape, s.weight.dtype, s.weight.device


def _most(kind: tuple[tuple[int, int], torch.dtype, torch.device]) -> int:
    """How many matrices of a kind one call takes."""
    m, n = kind[0]
    return max(1, min(BATCH, WORK_BYTES // (8 * (m * n + 2 * min(m, n) ** 2))))


def _shapes(shapes: Shapes) -> Mapping[str, Sequence[int]]:
    if not isinstance(shapes, nn.Module):
        return shapes
    having = owners(shapes)
    return {
        name: matrix_of(p.shape, True) if is_flat(p, having.get(id(p), ())) else tuple(p.shape)
        for name, p in named_weights(shapes).items()
    }


def _short_side(name: str, shape: Sequence[int]) -> int:
    sizes = tuple(shape)
    if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"osf_torch.allocate_ranks: expected the shape of {name!r} to be (..., m, n), got "
            f"{sizes}"
        )
    return int(min(sizes[-2:]))
