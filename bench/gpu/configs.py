"""Six tile configs of the update and six of the coefficients, beside the pinned ones.

One bfloat16 matrix of 4096×4096 at r = 64 and 128. A config that doesn't fit has a row that says
so.
"""

from __future__ import annotations

import sys

import torch

from bench import check
from bench.gpu.launches import COEFFICIENT_BOUND
from bench.gpu.matrix import Matrix, draw, projected, worst
from bench.gpu.measure import Part, Results, main, poison
from bench.models import Shape
from osf_kernels.backends import jobs, triton
from osf_kernels.backends.triton.configs import TwoPass, Update

BF16, F32 = torch.bfloat16, torch.float32

# The first of each is what is pinned for sm_90 beyond rank 32 and from rank 65 on.
UPDATES = (
    Update(128, 128, 64, 8, 8, 2, 1),
    Update(128, 64, 32, 8, 8, 2, 2),
    Update(128, 64, 64, 8, 4, 2, 2),
    Update(64, 128, 64, 8, 4, 3, 2),
    Update(128, 128, 32, 8, 8, 3, 1),
    Update(256, 64, 32, 8, 8, 2, 1),
)
TWO_PASSES = (
    TwoPass(128, 64, 128, 8, 4, 1),
    TwoPass(128, 64, 64, 4, 3, 3),
    TwoPass(128, 64, 64, 4, 4, 2),
    TwoPass(128, 128, 64, 8, 3, 1),
    TwoPass(64, 128, 128, 4, 3, 1),
    TwoPass(256, 64, 64, 8, 3, 1),
)


def words(config: Update | TwoPass) -> str:
    """As the pinned table writes it."""
    return f"{type(config).__name__}({', '.join(map(str, config))})"


def run(part: Part) -> None:
    shape = Shape(192, 160) if part.tiny else Shape(4096, 4096)
    for rank in (32,) if part.tiny else (64, 128):
        matrix = draw(*shape, rank, BF16, part.device)
        # Turn about, so that a part that is stopped has some of both.
        for update_config, two_pass_config in zip(UPDATES, TWO_PASSES, strict=True):
            update(part, matrix, update_config)
            two_pass(part, matrix, two_pass_config)


def update(part: Part, matrix: Matrix, config: Update) -> None:
    """out = x − U A − B Vᵀ."""
    x, U, V = matrix
    A, B = U.mT.float() @ x.float(), x.float() @ V.float()
    B -= U.float() @ (A @ V.float())
    out, truth = torch.empty_like(x), projected(x, U, V)

    def call() -> Results:
        triton.update([jobs.Update(out, x, U, A, B, V.mT, -1.0, 1.0)], config=config)
        return (out,)

    row = part.row(f"{Shape(*x.shape)}", BF16, U.shape[1], "update", words(config))
    with part.writing(row):
        if part.gate(
            row,
            call,
            lambda results: worst(results, [truth], x),
            check.bound(BF16),
            lambda: poison(out),
        ):
            part.time(row, call)


def two_pass(part: Part, matrix: Matrix, config: TwoPass) -> None:
    """A = Uᵀx and B = xV."""
    x, U, V = matrix
    truths = (U.double().mT @ x.double(), x.double() @ V.double())
    A, B = (truth.float() for truth in truths)

    def call() -> Results:
        triton.coefficients([jobs.Coefficients(x, U, V, A, B)], variant="two_pass", config=config)
        return A, B

    row = part.row(f"{Shape(*x.shape)}", BF16, U.shape[1], "two_pass", words(config))
    with part.writing(row):
        if part.gate(
            row,
            call,
            lambda results: worst(results, truths),
            COEFFICIENT_BOUND[F32],
            lambda: poison(A, B),
        ):
            part.time(row, call)


if __name__ == "__main__":
    sys.exit(main("configs", run, rounds=10))
