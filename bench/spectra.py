"""Matrices to decompose, and what is true of them: random ones by spectrum, and MiniLM's weights.

The truth is a float64 SVD of the float32 matrix as it is handed to the contenders, computed once
for each matrix of a process: LAPACK's, which no driver on a GPU shares a fault with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import osf_kernels
from osf_kernels.testing import matrix_with_spectrum

DRIFT = 1e-3  # relative to ‖A‖_F, between one refresh and the next


def power_law(count: int) -> Tensor:
    """σᵢ = i^-½."""
    values: Tensor = torch.arange(1, count + 1, dtype=torch.float64).rsqrt()
    return values


def steep(count: int) -> Tensor:
    """From 1 to 1e-6, geometrically: a float32 Gram matrix loses what is below 3e-4."""
    return torch.logspace(0, -6, count, dtype=torch.float64)


def flat(m: int, n: int, generator: torch.Generator) -> Tensor:
    """Gaussian entries, as of a layer before training: σ falls slowly, without a gap."""
    return torch.randn(m, n, generator=generator) / math.sqrt(max(m, n))


SPECTRA: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "flat": flat,
    "power": lambda m, n, g: matrix_with_spectrum(m, n, power_law(min(m, n)), generator=g)[0],
    "steep": lambda m, n, g: matrix_with_spectrum(m, n, steep(min(m, n)), generator=g)[0],
}
SOURCES = (*SPECTRA, "minilm")


class Truth(NamedTuple):
    """All singular triplets in float64."""

    U: Tensor  # (m, q)
    S: Tensor  # (q,)
    V: Tensor  # (n, q)


@lru_cache(maxsize=128)  # by the tensor's identity: several problems may be of one matrix
def truth_of(A: Tensor) -> Truth:
    U, S, Vh = torch.linalg.svd(A.double().cpu(), full_matrices=False)
    return Truth(U.to(A.device), S.to(A.device), Vh.mT.to(A.device))


@dataclass
class Problem:
    """Matrices that are decomposed together, and what is known before.

    Attributes:
        source: one of SOURCES, or "experts".
        task: "cold", "complement" (low bases too), "warm" or "deflated" (an earlier result of
            these weights is at hand, with its low bases in the latter).
        earlier: for each rank, that earlier result.
        batch: the matrices in one tensor, which ours then takes as they lie (experts).
    """

    source: str
    task: str
    matrices: list[Tensor]
    earlier: dict[str, list[osf_kernels.TruncatedSVD]] = field(default_factory=dict)
    batch: Tensor | None = None

    @property
    def name(self) -> str:
        m, n = self.matrices[0].shape
        shape = f"{m}x{n}" if len({A.shape for A in self.matrices}) == 1 else "its shapes"
        several = f"{len(self.matrices)} matrices of " if len(self.matrices) > 1 else ""
        return f"{self.source}, {several}{shape}"

    @cached_property
    def truths(self) -> list[Truth]:
        return [truth_of(A) for A in self.matrices]


@lru_cache(maxsize=8)
def random_problem(source: str, m: int, n: int, device: torch.device, seed: int = 0) -> Problem:
    """One matrix of a spectrum, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return Problem(source, "cold", [SPECTRA[source](m, n, generator).to(device)])


@lru_cache(maxsize=2)
def experts_problem(count: int, m: int, n: int, device: torch.device) -> Problem:
    """The matrices of ``count`` experts in one tensor, σᵢ = i^-½."""
    drawn = [random_problem("power", m, n, device, seed).matrices[0] for seed in range(count)]
    batch = torch.stack(drawn)
    return Problem("experts", "cold", list(batch), batch=batch)


@lru_cache(maxsize=2)
def minilm_problem(layers: int, device: torch.device) -> Problem:
    """The encoder's matrices of the first ``layers`` blocks, six a block, as trained.

    Raises FileNotFoundError where the model's package isn't installed.
    """
    from bench import minilm

    model = minilm.load(minilm.model_directory())
    matrices = [
        p.detach().to(device)
        for name, p in model.named_parameters()
        if p.dim() == 2 and "embeddings" not in name and int(name.split(".")[2]) < layers
    ]
    return Problem("minilm", "cold", matrices)


def ranks_of(matrices: Sequence[Tensor], rank: float) -> list[int]:
    """r of each: an int as it is, a float as a share of the shorter side."""
    if isinstance(rank, int):
        return [min(rank, *A.shape) for A in matrices]
    return [max(1, round(rank * min(A.shape))) for A in matrices]


def shown(rank: float) -> str:
    return f"r={rank}" if isinstance(rank, int) else f"rho={rank:g}"


def drifted(problem: Problem, rank: float, *, free: bool, seed: int = 1) -> Problem:
    """The same weights one refresh later: A + ΔA with ‖ΔA‖ = 1e-3 ‖A‖, and the earlier result.

    Args:
        free: ΔA is kept out of the top ``rank`` directions of both sides, as training under
            ``protect`` keeps it, and the earlier result has its low bases: the deflated task.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = ranks_of(problem.matrices, rank)
    earlier = osf_kernels.truncated_svd(
        problem.matrices, ranks, method="exact", complement=free, generator=None
    )
    moved = []
    for A, svd in zip(problem.matrices, earlier, strict=True):
        step = torch.randn(A.shape, generator=generator).to(A.device)
        if free:
            step = osf_kernels.project(step, svd.left(), svd.right())
        moved.append(A + DRIFT * step * (A.norm() / step.norm()))
    task = "deflated" if free else "warm"
    return Problem(problem.source, task, moved, {shown(rank): list(earlier)})
