"""``OSF_AUTOTUNE=1``: search a few configs by time instead of taking the pinned one.

The search runs on scratch copies it makes itself. The kernels write in place, so a search on a
caller's gradient would project it once a candidate.

Which config wins depends on timing, so with the search on, two processes may split a sum
differently; within a process the choice is made once a bucket and kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from osf_kernels import env
from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.operands import Operand

from . import configs

__all__ = [
    "Tuner",
    "bucket",
    "enabled",
    "scratch",
    "scratch_coefficients",
    "scratch_update",
    "time_ms",
]

ConfigT = TypeVar("ConfigT", bound=configs.Config)


def enabled() -> bool:
    """Whether OSF_AUTOTUNE asks for a search (read at each call)."""
    return env.get("OSF_AUTOTUNE") == "1"


def bucket(size: int) -> int:
    """The power of two at or above a size (0 for 0): sizes in one bucket share a config."""
    return 1 << (size - 1).bit_length() if size else 0


def time_ms(run: Callable[[], None]) -> float:
    """Median milliseconds of five calls after a first, by device events where there is one."""
    run()
    samples = []
    for _ in range(5):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(float(start.elapsed_time(end)))
        else:
            begin_s = time.perf_counter()
            run()
            samples.append((time.perf_counter() - begin_s) * 1e3)
    return sorted(samples)[2]


class Tuner:
    """Remembers the fastest config of every bucket.

    Args:
        timer: milliseconds of a callable; the default runs it on the device.
        unusable: exceptions by which a candidate says that it does not compile or fit.
    """

    def __init__(
        self,
        timer: Callable[[Callable[[], None]], float] = time_ms,
        unusable: tuple[type[Exception], ...] = (),
    ) -> None:
        self.timer = timer
        self.unusable = unusable
        self.fastest: dict[Hashable, configs.Config] = {}

    def choose(
        self,
        key: Hashable,
        pinned: ConfigT,
        runner: Callable[[], Callable[[configs.Config], None]],
    ) -> ConfigT:
        """The fastest candidate of a bucket; ``runner()`` makes scratch copies to run one on."""
        if key not in self.fastest:
            run = runner()
            best: configs.Config = pinned
            best_ms = float("inf")
            for candidate in configs.candidates(pinned):
                try:
                    elapsed_ms = self.timer(lambda chosen=candidate: run(chosen))  # type: ignore[misc]
                except self.unusable:
                    continue
                if elapsed_ms < best_ms:
                    best, best_ms = candidate, elapsed_ms
            self.fastest[key] = best
        return self.fastest[key]  # type: ignore[return-value]


def scratch(tensor: Tensor | Operand) -> Tensor:
    """A copy in storage of its own with the same strides, so that it compiles to the same code; of
    an operand that has no values yet, random ones."""
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    if isinstance(tensor, Operand):
        return copy.normal_()
    return tensor.clone() if 0 in tensor.stride() else copy.copy_(tensor)


def _place(matrix: Tensor | Operand) -> tuple[int | None, int]:
    """An address, and of an operand the argument that it is behind."""
    address = matrix.data_ptr()
    return getattr(address, "argument", None), address


def _scratch_or_none(tensor: Tensor | Operand | None) -> Tensor | None:
    return None if tensor is None else scratch(tensor)


def scratch_coefficients(job: Coefficients) -> Coefficients:
    """A job over copies of every tensor of ``job``."""
    U, V, A, B, S = map(_scratch_or_none, (job.U, job.V, job.A, job.B, job.S))
    return Coefficients(scratch(job.x), U, V, A, B, S, job.root)


def scratch_update(job: Update) -> Update:
    """A job over copies of every tensor of ``job``; in place where ``job`` is."""
    out = scratch(job.out)
    in_place = _place(job.out) == _place(job.x)
    return Update(
        out,
        out if in_place else scratch(job.x),
        _scratch_or_none(job.L1),
        _scratch_or_none(job.R1),
        _scratch_or_none(job.L2),
        _scratch_or_none(job.R2),
        job.alpha,
        job.beta,
        _scratch_or_none(job.addend),
    )
