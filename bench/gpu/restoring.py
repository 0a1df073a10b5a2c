"""Restoring in bfloat16 at r = 2048, and projecting at ρ = .8 by low bases of 819 columns.

Both are bound by their products, so they are held against the same products by hand: of the first
case in bfloat16 and in float32. The second is drawn twice, with rows of the bases 819 and 824
elements apart: only the latter are a multiple of 16 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import osf_kernels
from bench import check, contenders
from bench.gpu.matrix import draw, led, projected, worst
from bench.gpu.measure import Part, Results, main
from bench.models import Rank, Shape
from bench.problem import draw as draw_problem

BF16 = torch.bfloat16


def run(part: Part) -> None:
    restore(part, *((64, 32, 2) if part.tiny else (4096, 2048, 4)))
    for leading in (13, 16) if part.tiny else (819, 824):
        project(part, 64 if part.tiny else 4096, leading)


def restore(part: Part, size: int, rank: int, count: int) -> None:
    """W ← P(W) + U S Vᵀ for a list."""
    drawn = [draw(size, size, rank, BF16, part.device, seed=i) for i in range(count)]
    pristine, Us, Vs = map(list, zip(*drawn, strict=True))
    S = [torch.linspace(2.0, 1.0, rank, device=part.device) for _ in drawn]
    truths = [
        projected(W, U, V) + (U.double() * s) @ V.double().mT
        for W, U, V, s in zip(pristine, Us, Vs, S, strict=True)
    ]
    weights = [W.clone() for W in pristine]
    prepared = osf_kernels.prepare(weights, Us, Vs)
    print(prepared, flush=True)

    def ours() -> Results:
        prepared.restore_(weights, S=S)
        return weights

    def unprepared() -> Results:
        osf_kernels.restore_many_(weights, Us, Vs, S=S)
        return weights

    def by_hand() -> Results:
        for W, U, V, s in zip(weights, Us, Vs, S, strict=True):
            contenders.hand_ordered_(W, U, V).addmm_(U * s.to(U.dtype), V.mT)
        return weights

    def by_hand_in_float32() -> Results:
        for W, U, V, s in zip(weights, Us, Vs, S, strict=True):
            wide, left, right = W.float(), U.float(), V.float()
            W.copy_(contenders.hand_ordered_(wide, left, right).addmm_(left * s, right.mT))
        return weights

    def prepare() -> None:
        reset(weights, pristine)

    for name, call in (
        ("prepared", ours),
        ("restore_many_", unprepared),
        (contenders.HAND, by_hand),
        (f"{contenders.HAND} in float32", by_hand_in_float32),
    ):
        row = part.row(f"restore {count} of {size}x{size}", BF16, rank, name)
        with part.writing(row):
            bound = check.bound(BF16)
            if part.gate(
                row, call, lambda results: worst(results, truths, pristine[0]), bound, prepare
            ):
                part.time(row, call, prepare, head_start_ms=5.0)


def project(part: Part, size: int, leading: int) -> None:
    """The projection at ρ = .8 by low bases, beside the formula by the high ones."""
    problem = draw_problem([Shape(size, size)], Rank(0.8), BF16, part.device, "low")
    ((left, right),) = problem.held
    P, Q = led(left.columns, leading), led(right.columns, leading)
    (U,), (V,), (pristine,), grads = problem.high_U, problem.high_V, problem.pristine, problem.grads
    P64, Q64 = P.double(), Q.double()
    by_low = P64 @ (P64.mT @ pristine.double() @ Q64) @ Q64.mT
    by_high = projected(pristine, U, V)
    low = [osf_kernels.Basis(P, spans="low")], [osf_kernels.Basis(Q, spans="low")]
    prepared = osf_kernels.prepare(grads, *low)
    print(prepared, flush=True)

    def ours() -> Results:
        prepared.project_(grads)
        return grads

    def unprepared() -> Results:
        osf_kernels.project_many_(grads, *low)
        return grads

    def by_hand() -> Results:
        return [torch.mm(P @ (P.mT @ grads[0] @ Q), Q.mT, out=grads[0])]

    def naive() -> Results:
        return [contenders.naive(grads[0], U, V)]

    for name, call, truth in (
        ("prepared", ours, by_low),
        ("project_many_", unprepared, by_low),
        ("low bases by hand", by_hand, by_low),
        (contenders.NAIVE, naive, by_high),
    ):
        row = part.row(f"rho=0.8 {size}x{size} rows of {leading}", BF16, U.shape[1], name)
        bound = check.bound(BF16)
        with part.writing(row):
            if part.gate(
                row,
                call,
                partial(error, truth=truth, scale=pristine),
                bound,
                problem.restore,
            ):
                part.time(row, call, problem.restore)


def error(results: Results, truth: Tensor, scale: Tensor) -> float:
    return worst(results, [truth], scale)


def reset(tensors: Sequence[Tensor], pristine: Sequence[Tensor]) -> None:
    for tensor, source in zip(tensors, pristine, strict=True):
        tensor.copy_(source)


if __name__ == "__main__":
    sys.exit(main("restoring", run, rounds=10))
