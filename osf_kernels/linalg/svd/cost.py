"""plan_svd: which method truncated_svd takes of a matrix, and its FLOPs, without the matrix.

Counted are products of matrices, 2 a b c for (a, b) times (b, c), and eigendecompositions by
9 n³, which run at a rate of their own. Steps that depend on values are not: a spectrum so steep
that a method is run anew in float64, Lanczos steps, larger singular values that are looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from osf_kernels import cpu
from osf_kernels.errors import ValueRefusal
from osf_kernels.linalg.svd import auto
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import Method, krylov
from osf_kernels.linalg.svd.methods.gram import EDGE

EIGEN = 9  # n³: FLOPs of all eigenvectors of a symmetric matrix, by Golub & Van Loan's count


@dataclass(frozen=True, slots=True)
class SVDPlan:
    """What truncated_svd takes of one matrix.

    Attributes:
        method: the one that "auto" chooses.
        flops: of products of matrices.
        eigen_flops: of eigendecompositions, 9 n³ each.
        eigen_size: n of the largest of them.
    """

    method: Method
    flops: int
    eigen_flops: int
    eigen_size: int


def plan_svd(
    m: int,
    n: int,
    rank: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    complement: bool = False,
    batch: int = 1,
) -> SVDPlan:
    """The method and the FLOPs of ``truncated_svd(A, rank, complement=complement)``, A (m, n).

    Args:
        m, n, rank: the shape, and how many triplets are wanted.
        device: its type, such as "cuda".
        dtype: of A.
        complement: whether low bases are wanted too.
        batch: how many matrices there are in one tensor; the figures are those of one.

    Raises:
        ValueError: a rank beyond min(m, n), or below 0.

    Computes nothing. The products agree with those of a real call to a tenth.
    """
    if not 0 <= rank <= min(m, n):
        raise ValueRefusal.of("plan_svd", "rank", f"from 0 to min(m, n) = {min(m, n)}", rank)
    method = auto.choose(m, n, rank, device=device, batch=batch, warm=False, deflatable=False)
    large, small = max(m, n), min(m, n)
    if method == "gram":
        return _gram(large, small, rank, complement)
    if method == "randomized":
        return _krylov(large, small, rank, dtype)
    return SVDPlan(method, 0, 0, 0)  # of nothing


def _triangle(columns: int) -> float:
    """The share of a Gram matrix that is multiplied."""
    blocks = cpu.GRAM_BLOCKS
    return (blocks + 1) / (2 * blocks) if columns >= cpu.GRAM_BLOCKED_FROM else 1.0


def _polished(rows: int, columns: int) -> float:
    return 2 * rows * columns**2 * (1 + _triangle(columns))


def _residual(large: int, small: int, rank: int) -> float:
    probes = min(cpu.RESIDUAL_PROBES, rank)
    once = 2 * probes * (large * small + large * rank + 2 * rank * (large + small))
    return once * (2 * cpu.RESIDUAL_STEPS + 1)


def _complement(rows: int, rank: int) -> float:
    free = rows - rank
    return 2 * rows * rank * free + 2 * rank**2 * free + 2 * rank**3 / 3


def _gram(large: int, small: int, rank: int, complement: bool) -> SVDPlan:
    flops = 2 * large * small**2 * _triangle(small)
    flops += 2 * large * small * min(small, rank + EDGE)
    flops += _polished(large, rank) + _residual(large, small, rank)
    if complement:  # of the shorter side it is the other eigenvectors
        flops += _complement(large, rank)
    return SVDPlan("gram", int(flops), EIGEN * small**3, small)


def _krylov(large: int, small: int, rank: int, dtype: torch.dtype) -> SVDPlan:
    A = torch.empty(large, small, dtype=dtype, device="meta")
    block, width = krylov.plan(Group([A], [1.0], rank, torch.Generator))
    blocks = max(1, width // block)
    # The start, A and Aᵀ of each block but the last, which goes back in its residual.
    flops = 2 * large * small * (2 * width + block)
    # Each block against those before it, twice, and its own factorization.
    flops += 2 * 2 * small * width * (width - block) + 4 * small * block * width
    flops += 4 * large * block * block * blocks
    # The Rayleigh–Ritz step.
    flops += 2 * large * width**2 + 2 * (large + small) * width * rank + int(_polished(large, rank))
    return SVDPlan("randomized", flops, EIGEN * width**3, width)
