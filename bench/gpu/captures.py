"""Four CUDA graphs of a model's projection captured in a row, each replayed and compared.

224 matrices, as many as Llama-2-7B has, each time at addresses that no call has seen. The kernels
are compiled before, by one call outside of a graph. On the CPU the call itself stands for a replay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import osf_kernels
from bench.gpu.measure import Part, Results, main
from bench.models import Rank, Shape
from bench.problem import draw

BF16 = torch.bfloat16


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A replay of a call that is captured now; on the CPU the call."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run(part: Part) -> None:
    shapes = [Shape(48, 32)] * 3 if part.tiny else [Shape(512, 512)] * 128 + [Shape(768, 512)] * 96
    rank = 4 if part.tiny else 64
    problem = draw(shapes, Rank(rank), BF16, part.device, "high")
    prepared = osf_kernels.prepare(problem.grads, problem.high_U, problem.high_V)
    prepared.project_(problem.grads)
    eager = [g.clone() for g in problem.grads]
    kept = []  # a graph works on the memory of its gradients
    for index in range(4):
        row = part.row(f"capture {index + 1} of 4, {len(shapes)} matrices", BF16, rank, "prepared")
        with part.writing(row):
            grads = [g.clone() for g in problem.pristine]
            replay = captured(lambda grads=grads: prepared.project_(grads), part.device)  # type: ignore[misc]
            kept.append((grads, replay))

            def call(
                grads: list[torch.Tensor] = grads, replay: Callable[[], object] = replay
            ) -> Results:
                replay()
                return grads

            def restore(grads: list[torch.Tensor] = grads) -> None:
                for g, source in zip(grads, problem.pristine, strict=True):
                    g.copy_(source)

            def differing(results: Results) -> float:
                return float(
                    sum(not torch.equal(*pair) for pair in zip(results, eager, strict=True))
                )

            # The error is the number of matrices with other bits than the eager call gave.
            if part.gate(row, call, differing, 0.0, restore):
                part.time(row, call, restore)
                row.host_hit_ms = part.host_ms([call] * max(1, part.rounds))


if __name__ == "__main__":
    sys.exit(main("captures", run, rounds=5))
