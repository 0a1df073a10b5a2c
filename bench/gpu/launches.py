"""The projection in its one launch, and its sums and its update alone, beside torch's products.

Settles up to which rank the grouped kernels are worth taking (``gpu.rank_limit``), what a launch of
its own for either half takes more than the whole, and what rows of bases that are no multiple of 16
bytes cost (r = 77, with rows 77 and 80 elements apart).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

import osf_kernels
from bench import check, contenders
from bench.gpu.matrix import Matrix, draw, led, projected, worst
from bench.gpu.measure import Part, Results, main, poison
from bench.models import Shape
from bench.overhead import bare_dual
from osf_kernels.backends import jobs, triton

BF16, F32 = torch.bfloat16, torch.float32
# Of a coefficient, relative to itself: the tensor cores cut off what they add to a float32 sum over
# thousands of products, and torch's products are rounded to bfloat16.
COEFFICIENT_BOUND = {BF16: 2.0**-7, F32: 2.0**-14}


class Case(NamedTuple):
    """One matrix; ``leading`` is the stride of the rows of its bases and coefficients."""

    shape: Shape
    dtype: torch.dtype
    rank: int
    leading: int

    def __str__(self) -> str:
        return f"{self.shape}" + (f" rows of {self.leading}" if self.leading != self.rank else "")


def cases(tiny: bool) -> Iterator[Case]:
    """What settles most comes first: a part that is stopped has lost the least."""
    if tiny:
        square = Shape(80, 96)
        yield Case(square, BF16, 16, 16)
        yield Case(square, F32, 7, 7)
        yield Case(square, BF16, 7, 8)
        return
    square, tall = Shape(4096, 4096), Shape(11008, 4096)
    ranks = ((64, 64), (128, 128), (77, 77), (77, 80), (32, 32), (16, 16), (160, 160), (256, 256))
    for shape, dtype in ((square, BF16), (tall, BF16), (square, F32), (tall, F32)):
        for rank, leading in ranks:
            yield Case(shape, dtype, rank, leading)


def run(part: Part) -> None:
    for case in cases(part.tiny):
        matrix = draw(*case.shape, case.rank, case.dtype, part.device, case.leading)
        whole(part, case, matrix)
        coefficients(part, case, matrix)
        update(part, case, matrix)


def coefficients(part: Part, case: Case, matrix: Matrix) -> None:
    """A = Uᵀx and B = xV."""
    x, U, V = matrix
    m, n = case.shape
    truths = (U.double().mT @ x.double(), x.double() @ V.double())
    A = led(x.new_zeros(n, case.rank, dtype=F32), case.leading).mT
    B = led(x.new_zeros(m, case.rank, dtype=F32), case.leading)
    if case.leading == case.rank:
        A = A.contiguous()  # as the library allocates it
    A_low, B_low = torch.empty_like(A, dtype=case.dtype), torch.empty_like(B, dtype=case.dtype)

    def ours() -> Results:
        triton.coefficients([jobs.Coefficients(x, U, V, A, B)])
        return A, B

    def torchs() -> Results:
        return torch.mm(U.mT, x, out=A_low), torch.mm(x, V, out=B_low)

    for name, call in (("triton", ours), ("torch", torchs)):
        row = part.row(f"coefficients {case}", case.dtype, case.rank, name)
        bound = COEFFICIENT_BOUND[case.dtype if name == "torch" else F32]
        with part.writing(row):
            if part.gate(
                row,
                call,
                lambda results: worst(results, truths),
                bound,
                lambda: poison(A, B, A_low, B_low),
            ):
                part.time(row, call)


def update(part: Part, case: Case, matrix: Matrix) -> None:
    """out = x − U A − B Vᵀ with B less U (A V), beside torch's two products in place."""
    x, U, V = matrix
    truth = projected(x, U, V)
    A64 = U.double().mT @ x.double()
    B64 = x.double() @ V.double()
    B64 -= U.double() @ (A64 @ V.double())
    A, B = A64.float(), led(B64.float(), case.leading)
    A_low, B_low = A.to(case.dtype), B.to(case.dtype)
    out = torch.empty_like(x)

    def ours() -> Results:
        triton.update([jobs.Update(out, x, U, A, B, V.mT, -1.0, 1.0)])
        return (out,)

    def torchs() -> Results:
        torch.addmm(x, U, A_low, alpha=-1, out=out)
        return (out.addmm_(B_low, V.mT, alpha=-1),)

    for name, call in (("triton", ours), ("torch", torchs)):
        row = part.row(f"update {case}", case.dtype, case.rank, name)
        bound = check.bound(case.dtype)
        with part.writing(row):
            if part.gate(
                row, call, lambda results: worst(results, [truth], x), bound, lambda: poison(out)
            ):
                part.time(row, call)


def whole(part: Part, case: Case, matrix: Matrix) -> None:
    """The projection: one launch of ours, beside torch's two orders of products."""
    pristine, U, V = matrix
    g, out, truth = pristine.clone(), torch.empty_like(pristine), projected(pristine, U, V)

    def ours() -> Results:
        with osf_kernels.use_backend("triton"):
            return (osf_kernels.project_(g, U, V),)

    def dual() -> Results:
        return (bare_dual(g, U, V, out),)

    def sequential() -> Results:
        return (contenders.hand_ordered_(g, U, V),)

    def prepare() -> None:
        g.copy_(pristine)

    for name, call in (("triton", ours), ("torch dual", dual), ("torch sequential", sequential)):
        row = part.row(f"projection {case}", case.dtype, case.rank, name)
        bound = check.bound(case.dtype)
        with part.writing(row):
            if part.gate(
                row, call, lambda results: worst(results, [truth], pristine), bound, prepare
            ):
                part.time(row, call, prepare)


if __name__ == "__main__":
    sys.exit(main("launches", run, rounds=7))
