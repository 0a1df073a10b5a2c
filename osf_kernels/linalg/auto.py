"""Which method ``auto`` takes.

The thresholds come from bench/results/refresh_auto_cpu.csv, which ``python -m bench refresh-auto``
wrote: two cores, σᵢ = i^-½, the least time to 1 − overlap ≤ 1e-3, up to 4096 × 1024. Other devices
take the CPU's until their rows are measured.

Low bases (rows of task "complement") cost the methods alike, and move no crossing. A batch does: of
eight matrices of 256² at ρ = .1 a Krylov space takes .49 of the Gram matrix's time, of one 1.03
times. That counts for a batch in one tensor; the matrices of a list are each chosen for alone, so
that a list has the results of a loop over it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Method = Literal["auto", "randomized", "gram", "warm", "deflated", "exact"]


class Thresholds(NamedTuple):
    """Where one method gives way to another on a kind of device.

    Attributes:
        krylov_ratio: up to this share of min(m, n) = 1024, growing as its square root, a Krylov
            space of three times the rank is built in less time than the Gram matrix is
            decomposed: products of larger matrices run at a higher rate, eigenvectors don't.
        krylov_largest: and up to this share of any.
        krylov_size: below it the iterations' many small products take longer than one
            decomposition.
        batch: a tensor of as many matrices has less to lose by small products:
        batch_size: in place of krylov_size,
        batch_gain: and a factor on krylov_ratio.
        deflation_ratio: from it on the low block is small enough to be worth its two wide products.
    """

    krylov_ratio: float
    krylov_largest: float
    krylov_size: int
    batch: int
    batch_size: int
    batch_gain: float
    deflation_ratio: float


MEASURED = {
    "cpu": Thresholds(
        krylov_ratio=0.16,
        krylov_largest=0.25,
        krylov_size=256,
        batch=8,
        batch_size=128,
        batch_gain=1.5,
        deflation_ratio=0.35,
    )
}


def choose(
    m: int, n: int, rank: int, *, device: str, batch: int, warm: bool, deflatable: bool
) -> Method:
    """The method for one matrix.

    Args:
        m, n, rank: its shape and how many triplets are wanted.
        device: its type, as in torch.device.
        batch: how many matrices the tensor holds that it is of; 1 in a list.
        warm: an earlier result is at hand.
        deflatable: with its low bases.
    """
    size = min(m, n)
    if size == 0 or rank == 0:
        return "exact"
    at = MEASURED.get(device, MEASURED["cpu"])
    ratio = rank / size
    if deflatable and ratio >= at.deflation_ratio:
        return "deflated"
    if warm and ratio <= 0.5:
        return "warm"
    krylov, least = at.krylov_ratio * (size / 1024) ** 0.5, at.krylov_size
    if batch >= at.batch:
        krylov, least = krylov * at.batch_gain, at.batch_size
    if size >= least and ratio <= min(at.krylov_largest, krylov):
        return "randomized"
    return "gram"
