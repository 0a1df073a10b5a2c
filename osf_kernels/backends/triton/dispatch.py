"""From lists of jobs to launches: a config a job, one call a device."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from osf_kernels import gpu
from osf_kernels.backends.chains import Chain, chain_of_halves, chain_of_job, chains_of
from osf_kernels.backends.jobs import Coefficients, Problem, Update, each_of_batch
from osf_kernels.backends.operands import Arena

from . import autotune, configs, groups, launch, tasks
from .launches import Launch
from .product_schedule import gram_launches, multiply_launches
from .views import View, dot_rule

__all__ = ["gram", "multiply", "program", "run_jobs"]

_PRECISIONS = ("tf32x3", "tf32", "ieee")


class Program:
    """``grouped.Runnable``: the launches of problems, and the workspace that they take."""

    def __init__(
        self,
        problems: Sequence[Problem],
        limit: int,
        *,
        kept: int,
        halves: bool,
    ) -> None:
        device = problems[0].x.device
        band = gpu.room_in_l2(launch.architecture(device)) / 4
        planned: list[tuple[Chain, Arena]] = []
        for problem in itertools.chain.from_iterable(map(each_of_batch, problems)):
            if halves:
                planned.append((chain_of_halves(problem), Arena(device)))
            else:
                planned += chains_of(problem, _coefficient_dtype(problem), band)
        launches, self.workspace_bytes = _launches(device, planned, None, None, limit)
        self.calls = len(launches)
        self._executable = launch.Executable(launches, device, kept=kept)

    def run(self, addresses: Sequence[int]) -> None:
        self._executable.run(addresses)


def program(problems: Sequence[Problem], limit: int, *, kept: int, halves: bool) -> Program:
    """``grouped.Kernels.program``."""
    return Program(problems, limit, kept=kept, halves=halves)


def run_jobs(
    jobs: Sequence[Coefficients | Update],
    config: configs.Projection | None,
    float32_precision: str | None,
) -> None:
    """Jobs over tensors, once, that don't wait for each other."""
    for device, mine in _by_device(jobs).items():
        chains = [(chain_of_job(job), Arena(device)) for job in mine]
        launches, size = _launches(device, chains, config, float32_precision, _ANY_SIZE)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        run(launches, device, [memory.data_ptr()])


_ANY_SIZE = 1 << 62


def _launches(
    device: torch.device,
    chains: Sequence[tuple[Chain, Arena]],
    config: configs.Projection | None,
    float32_precision: str | None,
    limit: int,
) -> tuple[list[Launch], int]:
    """The launches of chains that lie in workspaces of their own, and the workspace of all."""
    architecture = launch.architecture(device)
    precision = _float32_precision(float32_precision)

    def choose(chain: Chain, math: configs.Math, rank: int, aligned: bool) -> configs.Projection:
        if config is not None:
            return config
        pinned = configs.projection_config(architecture, math, rank, aligned)
        pinned = configs.beside_addend(pinned, groups.addend_width(chain))
        if not _searching():
            return pinned

        def runner() -> Callable[[configs.Config], None]:
            copies, arena = autotune.scratch_chain(chain, device)

            def run_with(chosen: configs.Config) -> None:
                made, size = _launches(device, [(copies, arena)], chosen, precision, limit)  # type: ignore[arg-type]
                memory = torch.empty(size, dtype=torch.uint8, device=device)
                run(made, device, [memory.data_ptr()])

            return run_with

        key = ("projection", architecture, aligned, *autotune.key_of_chain(chain))
        return _tuner().choose(key, pinned, runner)

    planned = [groups.plan_chain(chain, arena, precision, choose) for chain, arena in chains]
    return tasks.projection_launches(
        planned,
        fill=configs.FILL[architecture],
        room=gpu.room_in_l2(architecture),
        limit=limit,
    )


def _coefficient_dtype(problem: Problem) -> torch.dtype:
    """Of A and B where an update multiplies them."""
    bases = [t.dtype for t in (problem.U, problem.V) if t is not None]
    return dot_rule(problem.x.dtype, bases, (torch.float32,), "tf32x3")[0]


def run(launches: Sequence[Launch], device: torch.device, addresses: Sequence[int] = ()) -> None:
    """Launches over tensors, once."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch.Executable(launches, device, kept=0).run(addresses)


def multiply(
    As: Sequence[Tensor],
    Q: Tensor,
    out: Tensor,
    transpose: bool,
    config: configs.Multiply | None,
) -> None:
    _check_alike("multiply", As, out)
    _check_float32("multiply", "Q", Q)
    _check_device("multiply", "Q", Q, out)
    if not As:
        return
    m, n = As[0].shape[::-1] if transpose else As[0].shape
    expected = (
        f"({len(As)} or 1, {n}, l) with A of shape {tuple(As[0].shape)} and transpose={transpose}"
    )
    if Q.ndim != 3 or Q.shape[0] not in (1, len(As)) or Q.shape[1] != n:
        _refuse("multiply", "Q", expected, Q)
    if out.shape != (len(As), m, Q.shape[2]):
        _refuse("multiply", "out", str((len(As), m, Q.shape[2])), out)
    device = out.device
    precision = _float32_precision("tf32x3")
    architecture = launch.architecture(device)

    def choose(A: Tensor, basis: Tensor, result: Tensor, aligned: bool) -> configs.Multiply:
        if config is not None:
            return config
        whole = all(View.of(t).layout.aligned for t in (basis, result))
        rank = basis.shape[1]
        pinned = configs.multiply_config(architecture, _name(A.dtype), rank, aligned, whole)
        if not _searching():
            return pinned

        def runner() -> Callable[[configs.Config], None]:
            copy, factor = autotune.scratch(A), autotune.scratch(basis).unsqueeze(0)
            made = autotune.scratch(result).unsqueeze(0)
            return lambda chosen: multiply([copy], factor, made, transpose, chosen)  # type: ignore[arg-type]

        sizes = tuple(autotune.bucket(length) for length in (*A.shape, rank))
        key = ("multiply", architecture, aligned, whole, transpose, A.dtype, *sizes)
        return _tuner().choose(key, pinned, runner)

    bases = Q.expand(len(As), -1, -1).unbind()
    launches = multiply_launches(
        As,
        bases,
        out.unbind(),
        transpose=transpose,
        fill=configs.FILL[architecture],
        float32_precision=precision,
        choose=choose,
    )
    run(launches, device)


def gram(As: Sequence[Tensor], out: Tensor, side: str, config: configs.Gram | None) -> None:
    if side not in ("right", "left"):
        raise ValueError(
            f"osf_kernels.backends.triton.gram: expected side to be 'right' or 'left', got {side!r}"
        )
    _check_alike("gram", As, out)
    if not As:
        return
    size = As[0].shape[1 if side == "right" else 0]
    if out.shape != (len(As), size, size):
        _refuse("gram", "out", str((len(As), size, size)), out)
    device = As[0].device
    run(_plan_gram(device, As, out, side, config, _float32_precision("tf32x3")), device)


def _plan_gram(
    device: torch.device,
    As: Sequence[Tensor],
    out: Tensor,
    side: str,
    config: configs.Gram | None,
    precision: str,
) -> list[Launch]:
    architecture = launch.architecture(device)

    def choose(A: Tensor, size: int, aligned: bool) -> configs.Gram:
        if config is not None:
            return config
        pinned = configs.gram_config(architecture, _name(A.dtype), size, aligned)
        if not _searching():
            return pinned

        def runner() -> Callable[[configs.Config], None]:
            scratch = autotune.scratch(A)
            result = torch.empty((1, size, size), dtype=torch.float32, device=device)
            return lambda chosen: gram([scratch], result, side, chosen)  # type: ignore[arg-type]

        sizes = tuple(autotune.bucket(length) for length in A.shape)
        return _tuner().choose(
            ("gram", architecture, aligned, side, A.dtype, *sizes), pinned, runner
        )

    return gram_launches(
        As,
        out.unbind(),
        right=side == "right",
        fill=configs.FILL[architecture],
        float32_precision=precision,
        choose=choose,
    )


@functools.lru_cache
def _tuner() -> autotune.Tuner:
    return autotune.Tuner(
        unusable=(
            triton.runtime.errors.OutOfResources,
            triton.runtime.errors.PTXASError,
            triton.compiler.errors.CompilationError,
        )
    )


def _searching() -> bool:
    """Whether to search; never while a graph is captured, since a search waits for the device."""
    if not autotune.enabled():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _float32_precision(asked: str | None) -> str:
    asked = (
        asked or "tf32x3"
    )  # plain TF32 only for who names it, whatever the process lets torch do
    if asked not in _PRECISIONS:
        raise ValueError(
            "osf_kernels.backends.triton: expected float32_precision to be one of "
            f"{', '.join(_PRECISIONS)}, got {asked!r}"
        )
    # AMD's matrix cores multiply float32 as it is, and Triton has no tf32x3 for them.
    return "ieee" if asked == "tf32x3" and launch.ON_AMD else asked


def _check_alike(operator: str, As: Sequence[Tensor], out: Tensor) -> None:
    """Raises unless the matrices are of one kind, and ``out`` float32 beside them."""
    _check_float32(operator, "out", out)
    if out.ndim != 3 or len(As) != len(out):
        _refuse(operator, "out", f"({len(As)}, rows, columns), one result a matrix", out)
    for i, A in enumerate(As):
        if A.ndim != 2:
            _refuse(operator, f"As[{i}]", "a matrix", A)
        if (A.shape, A.dtype) != (As[0].shape, As[0].dtype):
            expected = f"{tuple(As[0].shape)} {_name(As[0].dtype)} like As[0]; call once a kind"
            _refuse(operator, f"As[{i}]", expected, A)
        _check_device(operator, f"As[{i}]", A, out)


def _check_device(operator: str, name: str, tensor: Tensor, out: Tensor) -> None:
    if tensor.device != out.device:
        raise ValueError(
            f"osf_kernels.backends.triton.{operator}: expected {name} on {out.device} beside out, "
            f"got {tensor.device}"
        )


def _check_float32(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(
            f"osf_kernels.backends.triton.{operator}: expected {name} to be float32, got "
            f"{_name(tensor.dtype)}"
        )


def _refuse(operator: str, name: str, expected: str, got: Tensor) -> None:
    raise ValueError(
        f"osf_kernels.backends.triton.{operator}: expected {name} to be {expected}, got "
        f"{tuple(got.shape)} {_name(got.dtype)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_device(
    jobs: Sequence[Coefficients | Update],
) -> dict[torch.device, list[Coefficients | Update]]:
    grouped: dict[torch.device, list[Coefficients | Update]] = {}
    for job in jobs:
        grouped.setdefault(job.x.device, []).append(job)
    return grouped
