"""Who decomposes: ours by method, torch's own, a Gram matrix by hand, and optional peers.

A contender takes a list of matrices (m, n) and a rank for each, and gives a list of triplets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import osf_kernels
from bench.contenders import OURS
from bench.spectra import Problem, ranks_of, shown

SVD, LOWRANK, GRAM = "linalg.svd", "svd_lowrank", "Gram + eigh by hand"
LOWRANK_ITERATIONS = (2, 8)
# Products with A that ours takes, beside its default: the curve of accuracy against time.
RANDOMIZED_ITERATIONS = (3, 5, 7)
# And its leanest points: spaces of 2 to 2.5 r in five blocks, or of two of r and a few columns more
# where r is small. On σᵢ = i^-½ at n = 2048 and r = 64 they miss a fifth to two thirds of what two
# iterations of svd_lowrank miss, at r = 20 a sixth to two fifths.
LEAN_ITERATIONS, LEAN_OVERSAMPLES = 5, (1.0, 1.25, 1.5)
LEAN_FEW_ITERATIONS, LEAN_FEW_COLUMNS, LEAN_FEW_RANK = 2, (6, 8, 12), 28
RANDOMIZED_LIMIT = 0.25  # of min(m, n): above it a sketch is no smaller than the matrix


class Triplets(NamedTuple):
    U: Tensor  # (m, r)
    S: Tensor  # (r,)
    V: Tensor  # (n, r)


Results = Sequence[Any]  # of Triplets or osf_kernels.TruncatedSVD


@dataclass(frozen=True)
class Contender:
    """``run`` at one rank; ``rankless`` ones compute all triplets, and are timed once."""

    name: str
    run: Callable[[], Results]
    ours: bool = False
    rankless: bool = False
    setting: str = ""  # what was chosen of it: niter, driver, method
    family: str = ""  # points of one family are joined in a picture


def each(
    one: Callable[[Tensor, int], Triplets], matrices: Sequence[Tensor], ranks: Sequence[int]
) -> list[Triplets]:
    """The loop over a model's weights that users write."""
    return [one(A, r) for A, r in zip(matrices, ranks, strict=True)]


def by_svd(A: Tensor, driver: str | None = None) -> Triplets:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False, driver=driver)
    return Triplets(U, S, Vh.mT)


def by_lowrank(A: Tensor, rank: int, niter: int) -> Triplets:
    """As training code calls it: q = r, no further columns."""
    return Triplets(*torch.svd_lowrank(A, q=rank, niter=niter))


def by_gram(A: Tensor, rank: int) -> Triplets:
    """Eigenvectors of the smaller Gram matrix in float32, the other side by a product."""
    if A.shape[0] < A.shape[1]:
        V, S, U = by_gram(A.mT, rank)
        return Triplets(U, S, V)
    squares, vectors = torch.linalg.eigh(A.mT @ A)
    V = vectors[:, -rank:].flip(-1)
    S = squares[-rank:].flip(-1).clamp_min(0).sqrt()
    return Triplets(A @ V / S.clamp_min(torch.finfo(S.dtype).tiny), S, V)


def by_flashlib(A: Tensor, rank: int) -> Triplets:
    """flashlib's exact mode: it gives S and V, on CUDA only."""
    from flashlib import flash_truncated_svd

    S, Vh = flash_truncated_svd(A, rank)
    return Triplets(A @ Vh.mT / S.clamp_min(torch.finfo(S.dtype).tiny), S, Vh.mT)


# Peers beyond torch: imported when they run; without them their row says why.
OPTIONAL: dict[str, Callable[[Tensor, int], Triplets]] = {"flashlib": by_flashlib}


def drivers(
    device: torch.device, *, cold: bool = True, square: bool = False
) -> tuple[str | None, ...]:
    """Of torch.linalg.svd; on a CPU there is one.

    On CUDA from a cold start all, but gesvda, made for tall matrices, not where one is ``square``;
    else gesvdj alone, torch's default: the matrices hardly differ from a cold start's.
    """
    if device.type != "cuda":
        return (None,)
    if not cold:
        return ("gesvdj",)
    return ("gesvd", "gesvdj") if square else ("gesvd", "gesvdj", "gesvda")


def ours(problem: Problem, rank: float, **options: Any) -> Callable[[], Results]:
    """``truncated_svd`` over the whole list or batch in one call, with what is known before."""
    matrices = problem.matrices
    ranks = ranks_of(matrices, rank)
    device = matrices[0].device

    def run() -> Results:
        if problem.batch is not None:
            found = osf_kernels.truncated_svd(
                problem.batch,
                ranks[0],
                generator=torch.Generator(device).manual_seed(0),
                **options,
            )
            return found.unbind()
        return osf_kernels.truncated_svd(
            matrices,
            ranks,
            warm_start=problem.earlier.get(shown(rank)),
            complement=problem.task in ("complement", "deflated"),
            generator=torch.Generator(device).manual_seed(0),
            **options,
        )

    return run


def _lean(rank: int) -> dict[str, dict[str, int]]:
    if rank < LEAN_FEW_RANK:
        return {
            f"niter={LEAN_FEW_ITERATIONS} lean +{more}": {
                "niter": LEAN_FEW_ITERATIONS,
                "oversample": LEAN_FEW_ITERATIONS * (rank + more) - rank,
            }
            for more in LEAN_FEW_COLUMNS
        }
    return {
        f"niter={LEAN_ITERATIONS} lean {share:g}": {
            "niter": LEAN_ITERATIONS,
            "oversample": math.ceil(share * rank),
        }
        for share in LEAN_OVERSAMPLES
    }


def contenders(
    problem: Problem,
    rank: float,
    *,
    curve: bool = True,
    lowrank: Sequence[int] = LOWRANK_ITERATIONS,
) -> list[Contender]:
    """Everyone for one problem and rank, ours first.

    Args:
        curve: run ours also by Gram matrix, and by sketches with fewer products.
        lowrank: niter of each svd_lowrank; with none, ours meets linalg.svd alone.
    """
    matrices = problem.matrices
    ranks = ranks_of(matrices, rank)
    device = matrices[0].device
    found = [Contender(OURS, ours(problem, rank), True, setting="auto", family=f"{OURS} auto")]
    if problem.task in ("warm", "deflated"):
        cold = Problem(problem.source, "cold", matrices)
        found.append(
            Contender(
                f"{OURS}, cold", ours(cold, rank), True, setting="auto", family=f"{OURS} cold"
            )
        )
    if curve:
        name = f"{OURS} gram"
        run = ours(problem, rank, method="gram")
        found.append(Contender(name, run, True, setting="gram", family=name))
        if max(r / min(A.shape) for A, r in zip(matrices, ranks, strict=True)) <= RANDOMIZED_LIMIT:
            name = f"{OURS} randomized"
            points: dict[str, dict[str, int]] = {
                **_lean(max(ranks)),
                **{f"niter={niter}": {"niter": niter} for niter in RANDOMIZED_ITERATIONS},
                "default": {},
            }
            for text, options in points.items():
                run = ours(problem, rank, method="randomized", **options)
                found.append(Contender(f"{name} {text}", run, True, setting=text, family=name))
    square = any(A.shape[0] == A.shape[1] for A in matrices)
    for driver in drivers(device, cold=problem.task == "cold", square=square):
        found.append(
            Contender(
                SVD if driver is None else f"{SVD} {driver}",
                lambda driver=driver: [by_svd(A, driver) for A in matrices],  # type: ignore[misc]
                rankless=True,
                setting=driver or "",
                family=SVD if driver is None else f"{SVD} {driver}",
            )
        )
    if not lowrank:
        return found
    for niter in lowrank:
        found.append(
            Contender(
                f"{LOWRANK} niter={niter}",
                lambda niter=niter: each(  # type: ignore[misc]
                    lambda A, r: by_lowrank(A, r, niter), matrices, ranks
                ),
                setting=f"niter={niter}",
                family=LOWRANK,
            )
        )
    found.append(Contender(GRAM, lambda: each(by_gram, matrices, ranks), family=GRAM))
    for name, one in OPTIONAL.items():
        found.append(
            Contender(name, lambda one=one: each(one, matrices, ranks), family=name)  # type: ignore[misc]
        )
    return found
