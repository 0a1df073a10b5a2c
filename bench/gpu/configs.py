"""Six tile configs of the projection: the pinned one and what lies next to it.

One bfloat16 matrix of 4096×4096 at r = 64 and 128, projected in one launch. A config that doesn't
fit has a row that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench import check
from bench.gpu.matrix import Matrix, draw, projected, worst
from bench.gpu.measure import Part, Results, main
from bench.models import Shape
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.triton import configs
from osf_kernels.backends.triton.configs import Projection
from osf_kernels.plan import Step

BF16 = torch.bfloat16
DUAL = Step("dual", "left", -1.0, 1.0, 0, 0, 0, "", "")


def tried(pinned: Projection) -> list[Projection]:
    """What is pinned for this GPU, then a change in each of what its time may hang on."""
    return [
        pinned,
        pinned._replace(strip=2 * pinned.strip),
        pinned._replace(strip=pinned.strip // 2),
        pinned._replace(block_m=pinned.block_m // 2),
        pinned._replace(reduction_stages=max(1, pinned.reduction_stages - 1)),
        # With half the columns a stage more fits shared memory.
        pinned._replace(block_n=pinned.block_n // 2, update_stages=pinned.update_stages + 1),
    ]


def words(config: Projection) -> str:
    """As the pinned table writes it."""
    return f"{type(config).__name__}({', '.join(map(str, config))})"


def launched(x: Tensor, U: Tensor, V: Tensor, config: Projection) -> Callable[[], None]:
    """A call that projects x in place with that config."""
    from osf_kernels.backends.chains import chain_of
    from osf_kernels.backends.grouped import WORKSPACE_BYTES
    from osf_kernels.backends.operands import Arena
    from osf_kernels.backends.triton import dispatch, launch

    arena = Arena(x.device)
    problem = Problem(x, x, U, V, DUAL)
    chain = chain_of(problem, dispatch._coefficient_dtype(problem), arena.new)
    launches, size = dispatch._launches(x.device, [(chain, arena)], config, None, WORKSPACE_BYTES)
    executable = launch.Executable(launches, x.device, kept=1)
    memory = torch.empty(size, dtype=torch.uint8, device=x.device)
    return lambda: executable.run([memory.data_ptr()])


def architecture(device: torch.device) -> str:
    """The row of the config table of an NVIDIA GPU, and of the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    return configs.architecture_of_capability(*torch.cuda.get_device_capability(device))


def run(part: Part) -> None:
    shape = Shape(192, 160) if part.tiny else Shape(4096, 4096)
    for rank in (32,) if part.tiny else (64, 128):
        matrix = draw(*shape, rank, BF16, part.device)
        pinned = configs.projection_config(architecture(part.device), "bfloat16", rank)
        for config in tried(pinned):
            projection(part, matrix, config)


def projection(part: Part, matrix: Matrix, config: Projection) -> None:
    """x − U A − B Vᵀ in place, with A, B and what corrects B."""
    pristine, U, V = matrix
    x, truth = pristine.clone(), projected(pristine, U, V)

    def prepare() -> None:
        x.copy_(pristine)

    row = part.row(f"{Shape(*x.shape)}", BF16, U.shape[1], "projection", words(config))
    with part.writing(row):
        run_once = launched(x, U, V, config)

        def call() -> Results:
            run_once()
            return (x,)

        if part.gate(
            row,
            call,
            lambda results: worst(results, [truth], pristine),
            check.bound(BF16),
            prepare,
        ):
            part.time(row, call, prepare)


if __name__ == "__main__":
    sys.exit(main("configs", run, rounds=10))
