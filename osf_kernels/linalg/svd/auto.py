"""Which method ``auto`` takes.

It chooses by thresholds of the device's kind; devices without rows take the CPU's. A batch has its
own where it is one tensor. The matrices of a list are each chosen for alone, so that a list has the
results of a loop over it.
"""

from __future__ import annotations

from osf_kernels import cpu
from osf_kernels.linalg.svd.methods import Method

MEASURED = {"cpu": cpu.THRESHOLDS}


def choose(
    m: int, n: int, rank: int, *, device: str, batch: int, warm: bool, deflatable: bool
) -> Method:
    """The method for one matrix.

    Args:
        m, n, rank: its shape and how many triplets are wanted.
        device: its type, as in torch.device.
        batch: how many matrices there are in its tensor; 1 in a list.
        warm: there is an earlier result to start from.
        deflatable: that result has low bases.
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
