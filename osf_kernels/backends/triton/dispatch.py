"""From a list of jobs to launches: one call a device, a config a job, a key for the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import triton
from torch import Tensor

from osf_kernels.backends.forms import Coefficients, Update

from . import autotune, configs, launch, schedule

__all__ = ["coefficients", "update"]

JobT = TypeVar("JobT", Coefficients, Update)

_PRECISIONS = ("tf32x3", "tf32", "ieee")


def coefficients(
    jobs: Sequence[Coefficients],
    variant: str | None,
    config: configs.OnePass | configs.TwoPass | None,
    float32_precision: str | None,
) -> None:
    precision = _float32_precision(float32_precision)
    for device, mine in _by_device(jobs).items():
        key = ("coefficients", variant, config, precision, _searching(), *map(_identity, mine))
        build = functools.partial(_plan_coefficients, device, mine, variant, config, precision)
        launch.run(key, device, build)


def update(
    jobs: Sequence[Update], config: configs.Update | None, float32_precision: str | None
) -> None:
    precision = _float32_precision(float32_precision)
    for device, mine in _by_device(jobs).items():
        key = ("update", config, precision, _searching(), *map(_identity, mine))
        launch.run(key, device, functools.partial(_plan_update, device, mine, config, precision))


def _plan_coefficients(
    device: torch.device,
    jobs: Sequence[Coefficients],
    variant: str | None,
    config: configs.OnePass | configs.TwoPass | None,
    precision: str,
) -> list[schedule.Batch]:
    architecture = launch.architecture(device)

    def choose(
        job: Coefficients, width: int, r: int, k: int, aligned: bool
    ) -> configs.OnePass | configs.TwoPass:
        if config is not None:
            return config
        # A matrix without elements still has coefficients (zero, less the offset).
        wanted = variant if job.x.numel() else "two_pass"
        pinned = configs.coefficients_config(architecture, width, r, k, wanted, aligned)
        if not _searching():
            return pinned

        def runner() -> Callable[[configs.Config], None]:
            scratch = [autotune.scratch_coefficients(job)]
            return lambda chosen: coefficients(scratch, None, chosen, precision)  # type: ignore[arg-type]

        key = ("coefficients", architecture, aligned, variant, *_bucket(job, job.x, r, k))
        return _tuner().choose(key, pinned, runner)

    return schedule.coefficients_launches(
        jobs, fill=configs.FILL[architecture], float32_precision=precision, choose=choose
    )


def _plan_update(
    device: torch.device,
    jobs: Sequence[Update],
    config: configs.Update | None,
    precision: str,
) -> list[schedule.Batch]:
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
    dtypes = tuple(field.dtype for field in job if isinstance(field, Tensor))
    return (dtypes, *(autotune.bucket(size) for size in (*matrix.shape, *ranks)))


def _float32_precision(asked: str | None) -> str:
    if asked is None:
        permitted = torch.backends.cuda.matmul.fp32_precision == "tf32"
        asked = "tf32" if permitted else "tf32x3"
    if asked not in _PRECISIONS:
        raise ValueError(
            "osf_kernels.backends.triton: expected float32_precision to be one of "
            f"{', '.join(_PRECISIONS)}, got {asked!r}"
        )
    # AMD's matrix cores multiply float32 as it is, and Triton has no tf32x3 for them.
    return "ieee" if asked == "tf32x3" and launch.ON_AMD else asked


def _by_device(jobs: Sequence[JobT]) -> dict[torch.device, list[JobT]]:
    grouped: dict[torch.device, list[JobT]] = {}
    for job in jobs:
        grouped.setdefault(job.x.device, []).append(job)
    return grouped


def _identity(job: Iterable[object]) -> tuple[object, ...]:
    """Everything a job's launches depend on."""
    return tuple(
        (field.data_ptr(), field.shape, field.stride(), field.dtype)
        if isinstance(field, Tensor)
        else field
        for field in job
    )
