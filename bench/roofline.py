"""The least time a projection can take on this machine: arithmetic, and two measured ceilings.

The arithmetic is written here a second time, apart from ``osf_kernels.plan``: a planner isn't
measured with its own ruler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.timing import Summary, Timed

COPY_BYTES = 256 << 20  # of the source; twice that moves
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


class Work(NamedTuple):
    """What one form does at least: floating-point operations, and bytes to and from memory."""

    form: str
    flops: int
    bytes: int


def forms(m: int, n: int, r: int, itemsize: int) -> list[Work]:
    """Every form of the two-sided projection of an m×n matrix with r directions a side.

    ``dual`` reads g twice and writes it once, ``sequential`` does so for each side, forms with a
    low side read it once and write it once. A basis is counted once: it is far smaller than g
    wherever bytes are the bound.
    """
    p, q = m - r, n - r  # widths of the low bases
    g = m * n
    return [
        Work("dual", 8 * g * r + 4 * min(m, n) * r * r, itemsize * (3 * g + r * (m + n))),
        Work("sequential", 8 * g * r, itemsize * (6 * g + r * (m + n))),
        Work("mixed, low left", 4 * g * p + 4 * p * n * r, itemsize * (2 * g + m * p + n * r)),
        Work("mixed, low right", 4 * g * q + 4 * m * q * r, itemsize * (2 * g + m * r + n * q)),
        Work(
            "low/low",
            min(4 * g * p + 4 * p * n * q, 4 * g * q + 4 * m * p * q),
            itemsize * (2 * g + m * p + n * q),
        ),
    ]


def naive_flops(m: int, n: int, r: int) -> int:
    """Of ``g − U(Uᵀg) − (gV)Vᵀ + U(UᵀgV)Vᵀ`` as written, nothing reused."""
    return 12 * m * n * r + 2 * n * r * r + 2 * m * r * r


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same rounds as the contenders: medians."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float


@dataclass(frozen=True)
class Bound:
    """The least time for a list of matrices, and what sets it."""

    ms: float
    kind: str  # "memory" or "compute"
    flops: int
    bytes: int


def bound(shapes: Iterable[tuple[int, int, int]], itemsize: int, ceilings: Ceilings) -> Bound:
    """The roofline of a list of (m, n, r): for each matrix the form with the least time."""
    flops = bytes_ = 0
    for m, n, r in shapes:
        best = min(
            forms(m, n, r, itemsize),
            key=lambda w: max(
                w.bytes / ceilings.copy_bytes_per_s, w.flops / ceilings.gemm_flops_per_s
            ),
        )
        flops += best.flops
        bytes_ += best.bytes
    memory_s = bytes_ / ceilings.copy_bytes_per_s
    compute_s = flops / ceilings.gemm_flops_per_s
    kind = "memory" if memory_s >= compute_s else "compute"
    return Bound(1e3 * max(memory_s, compute_s), kind, flops, bytes_)


COPY, GEMM = "(copy)", "(gemm)"  # names of the two ceilings among the contenders


def ceiling_contenders(dtype: torch.dtype, device: torch.device) -> dict[str, Timed]:
    """The two calls to run among the contenders, in the same rounds."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = GEMM_SIZE[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    c = torch.empty_like(a)
    return {
        COPY: Timed(lambda: target.copy_(source)),
        GEMM: Timed(lambda: torch.mm(a, b, out=c)),
    }


def ceilings(copy: Summary, gemm: Summary, device: torch.device) -> Ceilings:
    """The ceilings from the two contenders' times."""
    return Ceilings(
        copy_bytes_per_s=2 * COPY_BYTES / (copy.median_ms / 1e3),
        gemm_flops_per_s=2 * GEMM_SIZE[device.type] ** 3 / (gemm.median_ms / 1e3),
    )
