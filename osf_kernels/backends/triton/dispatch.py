"""From lists of jobs to launches: a config a job, one call a device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton
from torch import Tensor

from osf_kernels.backends.jobs import Coefficients, Job, Update
from osf_kernels.backends.operands import Operand

from . import autotune, configs, launch, schedule
from .gram_schedule import gram_launches

__all__ = ["coefficients", "compiled", "gram", "multiply", "parts_bytes", "spare_bytes", "update"]

JobT = TypeVar("JobT", Coefficients, Update)

_PRECISIONS = ("tf32x3", "tf32", "ieee")


def coefficients(
    jobs: Sequence[Coefficients],
    variant: str | None,
    config: configs.OnePass | configs.TwoPass | None,
    float32_precision: str | None,
    accurate: bool = False,
) -> None:
    options = variant, config, _float32_precision(float32_precision), accurate
    for device, mine in _by_device(jobs).items():
        run(_plan_coefficients(device, mine, *options), device)


def update(
    jobs: Sequence[Update], config: configs.Update | None, float32_precision: str | None
) -> None:
    precision = _float32_precision(float32_precision)
    for device, mine in _by_device(jobs).items():
        run(_plan_update(device, mine, config, precision), device)


def run(launches: Sequence[schedule.Launch], device: torch.device) -> None:
    """Launches over tensors, once."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch.Executable(launches, device, kept=0).run()


def compiled(
    stages: Sequence[Sequence[Job]], device: torch.device, *, kept: int
) -> launch.Executable:
    """``grouped.Kernels.compiled``."""
    precision = _float32_precision(None)
    launches: list[schedule.Launch] = []
    for stage in stages:
        reductions = [job for job in stage if isinstance(job, Coefficients)]
        updates = [job for job in stage if isinstance(job, Update)]
        if reductions:
            launches += _plan_coefficients(device, reductions, None, None, precision, False)
        if updates:
            launches += _plan_update(device, updates, None, precision)
    return launch.Executable(launches, device, kept=kept)


def parts_bytes(job: Coefficients) -> int:
    """``grouped.Kernels.parts_bytes``: where the launch fills the machine, so that it splits none,
    a job by two reductions has no parts, and one by a single read has those of its strips."""
    precision = _float32_precision(None)
    (made, *_) = [
        *_plan_coefficients(job.x.device, [job], None, None, precision, False, fill=1),
        None,
    ]
    return 0 if made is None else 4 * made.workspace_elements


def spare_bytes(device: torch.device) -> int:
    """``grouped.Kernels.spare_bytes``: a launch that is split has at most a tile a processor more
    than its parts need, of the largest tile of two reductions."""
    architecture = launch.architecture(device)
    tile = max(config.block_q * config.block_r for config in configs.two_pass(architecture))
    return 2 * configs.FILL[architecture] * tile * 4


def multiply(
    As: Sequence[Tensor],
    Q: Tensor,
    out: Tensor,
    transpose: bool,
    config: configs.TwoPass | None,
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
    bases = Q.expand(len(As), -1, -1).unbind()
    jobs = [
        Coefficients(A, basis, None, result.mT, None)
        if transpose
        else Coefficients(A, None, basis, None, result)
        for A, basis, result in zip(As, bases, out.unbind(), strict=True)
    ]
    coefficients(jobs, "two_pass", config, "tf32x3", accurate=True)


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
) -> list[schedule.Launch]:
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


def _plan_coefficients(
    device: torch.device,
    jobs: Sequence[Coefficients],
    variant: str | None,
    config: configs.OnePass | configs.TwoPass | None,
    precision: str,
    accurate: bool,
    fill: int | None = None,
) -> list[schedule.Launch]:
    architecture = launch.architecture(device)

    def choose(
        job: Coefficients, width: int, r: int, k: int, aligned: bool
    ) -> configs.OnePass | configs.TwoPass:
        if config is not None:
            return config
        # A matrix without elements still has coefficients (zero, less the offset).
        wanted = variant if job.x.numel() else "two_pass"
        pinned: configs.OnePass | configs.TwoPass
        if accurate:
            beside = [schedule.View.of(tensor) for tensor in job[1:5] if tensor is not None]
            whole = all(view.layout.aligned for view in beside)
            dtype = _name(job.x.dtype)
            pinned = configs.multiply_config(architecture, dtype, max(r, k), aligned, whole)
        else:
            pinned = configs.coefficients_config(architecture, width, r, k, wanted, aligned)
        if not _searching():
            return pinned

        def runner() -> Callable[[configs.Config], None]:
            scratch = [autotune.scratch_coefficients(job)]
            return lambda chosen: coefficients(scratch, None, chosen, precision, accurate)  # type: ignore[arg-type]

        bucket = _bucket(job, job.x, r, k)
        key = ("coefficients", architecture, aligned, variant, accurate, *bucket)
        return _tuner().choose(key, pinned, runner)

    return schedule.coefficients_launches(
        jobs,
        fill=configs.FILL[architecture] if fill is None else fill,
        float32_precision=precision,
        choose=choose,
        accurate=accurate,
    )


def _plan_update(
    device: torch.device,
    jobs: Sequence[Update],
    config: configs.Update | None,
    precision: str,
) -> list[schedule.Launch]:
    architecture = launch.architecture(device)

    def choose(job: Update, width: int, rank: int, aligned: bool) -> configs.Update:
        if config is not None:
            return config
        pinned = configs.update_config(architecture, width, rank, aligned)
        if not _searching():
            return pinned

        def runner() -> Callable[[configs.Config], None]:
            scratch = [autotune.scratch_update(job)]
            return lambda chosen: update(scratch, chosen, precision)  # type: ignore[arg-type]

        return _tuner().choose(
            ("update", architecture, aligned, *_bucket(job, job.out, rank)), pinned, runner
        )

    return schedule.update_launches(jobs, float32_precision=precision, choose=choose)


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


def _bucket(job: Coefficients | Update, matrix: Tensor, *ranks: int) -> tuple[object, ...]:
    dtypes = tuple(field.dtype for field in job if isinstance(field, (Tensor, Operand)))
    return (dtypes, *(autotune.bucket(size) for size in (*matrix.shape, *ranks)))


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


def _by_device(jobs: Sequence[JobT]) -> dict[torch.device, list[JobT]]:
    grouped: dict[torch.device, list[JobT]] = {}
    for job in jobs:
        grouped.setdefault(job.x.device, []).append(job)
    return grouped
