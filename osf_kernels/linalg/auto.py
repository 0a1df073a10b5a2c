"""Which method ``auto`` takes.

The thresholds come from bench/results/refresh_auto_cpu.csv, which ``python -m bench refresh-auto``
wrote: two cores, σᵢ = i^-½, the least time to 1 − overlap ≤ 1e-3, up to 4096 × 1024. On a GPU they
are unmeasured.

Low bases (rows of task "complement") cost the methods alike: they move no threshold by more than a
twentieth of the time. A batch does: of eight matrices of 256² at ρ = .05 a Krylov space takes .44
of the Gram matrix's time, of one 1.05 times. It stays out of the choice all the same, since a list
would then have other results than a loop over it, by more than rounding.
"""

from __future__ import annotations

from typing import Literal

Method = Literal["auto", "randomized", "gram", "warm", "deflated", "exact"]

# Up to this share of min(m, n) = 1024, growing as its square root, a Krylov space of three times
# the rank is built in less time than the Gram matrix is decomposed: products of larger matrices
# run at a higher rate, eigenvectors don't.
KRYLOV_RANK_RATIO = 0.13
KRYLOV_LARGEST_RATIO = 0.25
# Below this size the iterations' many small products take longer than one decomposition.
KRYLOV_SIZE = 320
# From this share on the low block is small enough to be worth its two wide products.
DEFLATION_RANK_RATIO = 0.35


def choose(m: int, n: int, rank: int, *, warm: bool, deflatable: bool) -> Method:
    """The method for one matrix, by shape, rank and what is known of it."""
    size = min(m, n)
    if size == 0 or rank == 0:
        return "exact"
    ratio = rank / size
    if deflatable and ratio >= DEFLATION_RANK_RATIO:
        return "deflated"
    if warm and ratio <= 0.5:
        return "warm"
    krylov = min(KRYLOV_LARGEST_RATIO, KRYLOV_RANK_RATIO * (size / 1024) ** 0.5)
    if size >= KRYLOV_SIZE and ratio <= krylov:
        return "randomized"
    return "gram"
