"""Llama-2-7B's linear layers in bfloat16: time of the device and of the host apart.

At r = 64 the library takes its fused kernels, at r = 128 it may take torch's products: there the
fused kernels are asked for by name too.

The device's time is taken with a head start of 50 ms, in which the host has launched a call of ours
whole. (Of a loop of torch calls it hasn't: a stream takes about a thousand launches ahead.) The
host's time is that of a call to an idle device, once with the gradients of the call before and
once with gradients at addresses that it has never seen, as a training loop may bring them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import osf_kernels
from bench import check, contenders
from bench.gpu.measure import Measurement, Part, Results, main
from bench.models import Rank, Shape, llama_2_7b
from bench.problem import Problem
from bench.problem import draw as draw_problem

BF16 = torch.bfloat16
Contender = Callable[[Sequence[Tensor]], Results]
HEAD_START_MS = 50.0
STEP = 128  # elements between two sets of addresses: 256 bytes, as an allocator aligns to


class Moving:
    """Gradients of given shapes at new addresses each time, in memory that is the same."""

    def __init__(self, like: Sequence[Tensor], times: int) -> None:
        self._shapes = [tuple(g.shape) for g in like]
        self._times = 0
        total = sum(STEP + -(-g.numel() // STEP) * STEP for g in like)
        self._slab = like[0].new_zeros(total + (times + 1) * STEP)
        for place, g in zip(self.next(), like, strict=True):
            place.copy_(g)

    def next(self) -> list[Tensor]:
        start = self._times * STEP
        self._times += 1
        views = []
        for m, n in self._shapes:
            views.append(self._slab[start : start + m * n].view(m, n))
            start += -(-m * n // STEP) * STEP + STEP
        return views


def run(part: Part) -> None:
    if part.tiny:
        project(part, "tiny", [Shape(48, 32), Shape(32, 80)] * 2, 4, ("auto",))
        return
    project(part, "llama-2-7b", llama_2_7b(), 64, ("auto",))
    project(part, "llama-2-7b", llama_2_7b(), 128, ("auto", "triton"))


def project(
    part: Part, model: str, shapes: Sequence[Shape], rank: int, backends: Sequence[str]
) -> None:
    """A prepared list by each of the backends, beside what is not prepared and loops of torch."""
    problem = draw_problem(shapes, Rank(rank), BF16, part.device, "high")
    Us, Vs = problem.high_U, problem.high_V
    generator = torch.Generator().manual_seed(1)
    truths = [
        check.slabs(g, left, right, "complement", generator)
        for g, (left, right) in zip(problem.pristine, problem.held, strict=True)
    ]

    def prepared(backend: str) -> Contender:
        # Without a name it is what OSF_BACKEND says.
        named = contextlib.nullcontext() if backend == "auto" else osf_kernels.use_backend(backend)
        with named:
            made = osf_kernels.prepare(problem.grads, Us, Vs)
        print(made, flush=True)

        def ours(grads: Sequence[Tensor]) -> Results:
            made.project_(grads)
            return grads

        return ours

    def in_halves() -> Contender:
        """As sharded training calls it, where A is summed over the shards in between."""
        made = osf_kernels.prepare(problem.grads, Us, Vs)

        def ours(grads: Sequence[Tensor]) -> Results:
            made.apply_(grads, made.coefficients(grads))
            return grads

        return ours

    def unprepared(grads: Sequence[Tensor]) -> Results:
        osf_kernels.project_many_(grads, Us, Vs)
        return grads

    def loop(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        over_list = contenders.loop(formula)
        return lambda grads: over_list(grads, Us, Vs)

    makers: dict[str, Callable[[], Contender]] = {
        "prepared" if backend == "auto" else f"prepared, {backend}": partial(prepared, backend)
        for backend in backends
    }
    makers |= {
        "prepared, in halves": in_halves,
        "project_many_": lambda: unprepared,
        contenders.HAND: lambda: loop(contenders.hand_ordered_),
        contenders.NAIVE: lambda: loop(contenders.naive),
    }
    for name, make in makers.items():
        row = part.row(f"{model}, {len(shapes)} matrices", BF16, rank, name)
        with part.writing(row):
            measure(part, row, make(), problem, truths)


def measure(
    part: Part,
    row: Measurement,
    contender: Contender,
    problem: Problem,
    truths: Sequence[check.Slabs],
) -> None:
    grads = problem.grads

    def call() -> Results:
        return contender(grads)

    def error(results: Results) -> float:
        return max(map(check.error, results, truths))

    if not part.gate(row, call, error, check.bound(BF16), problem.restore) or not part.rounds:
        return
    part.time(row, call, problem.restore, HEAD_START_MS)
    problem.restore()
    row.extra_bytes = part.extra_bytes(call)
    row.host_hit_ms = part.host_ms([call] * part.rounds)
    moving = Moving(problem.pristine, part.rounds)
    unseen = [moving.next() for _ in range(part.rounds)]
    row.host_miss_ms = part.host_ms([partial(contender, new) for new in unseen])


if __name__ == "__main__":
    sys.exit(main("whole_model", run, rounds=5))
