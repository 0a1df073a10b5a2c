"""Whether one Triton projection is right on this GPU, before anything else is tried.

One bfloat16 matrix of 4096×4096 with 64 directions a side, against float64, the same bits twice.
Then its speed beside the same by hand, a copy and a large matmul. ``--rounds 0`` is for a profiler.
"""

from __future__ import annotations

import sys

import torch

import osf_kernels
from bench import check, contenders, roofline
from bench.gpu.matrix import draw, projected, worst
from bench.gpu.measure import Part, Results, main

BF16 = torch.bfloat16


def run(part: Part) -> None:
    size, rank = (96, 16) if part.tiny else (4096, 64)
    pristine, U, V = draw(size, size, rank, BF16, part.device)
    g, truth = pristine.clone(), projected(pristine, U, V)

    def ours() -> Results:
        with osf_kernels.use_backend("triton"):
            return (osf_kernels.project_(g, U, V),)

    def by_hand() -> Results:
        return (contenders.hand_ordered_(g, U, V),)

    def naive() -> Results:
        return (contenders.naive(g, U, V),)

    def prepare() -> None:
        g.copy_(pristine)

    for name, call in (("triton", ours), (contenders.HAND, by_hand), (contenders.NAIVE, naive)):
        row = part.row(f"{size}x{size}", BF16, rank, name)
        with part.writing(row):
            if part.gate(
                row,
                call,
                lambda results: worst(results, [truth], pristine),
                check.bound(BF16),
                prepare,
            ):
                part.time(row, call, prepare)
        if name == "triton" and not part.rounds:
            return
    if part.tiny:
        return
    for name, timed in roofline.ceiling_contenders(BF16, part.device).items():
        case = "256 MiB" if name == roofline.COPY else f"{roofline.GEMM_SIZE[part.device.type]}^3"
        row = part.row(case, BF16, None, name)
        with part.writing(row):
            part.time(row, timed.call)


if __name__ == "__main__":
    sys.exit(main("first_kernel", run, rounds=10))
