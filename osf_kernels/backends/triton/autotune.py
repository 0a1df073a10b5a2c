"""``OSF_AUTOTUNE=1``: search a few configs by time instead of taking the pinned one.

The search runs on scratch copies it makes itself. The kernels write in place, so a search on a
caller's gradient would project it once a candidate.

Which config wins depends on timing, so with the search on, two processes may split a sum
differently; within a process the choice is made once a bucket and kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from osf_kernels import env
from osf_kernels.backends.chains import Chain
from osf_kernels.backends.operands import Arena, Operand

from . import configs

__all__ = [
    "Tuner",
    "bucket",
    "enabled",
    "key_of_chain",
    "scratch",
    "scratch_chain",
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


def scratch_chain(chain: Chain, device: torch.device) -> tuple[Chain, Arena]:
    """A chain over copies of all of its matrices, and what its parts may take of a workspace.

    A matrix that stands in several places is copied once, so that a step finds in L2 what the one
    before has read.
    """
    copies: dict[Hashable, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, (Tensor, Operand)):
            return value
        place = value.data_ptr()
        key = getattr(place, "argument", None), int(place), value.numel()
        if key not in copies:
            copies[key] = scratch(value)
        return copies[key].as_strided(value.shape, value.stride())

    links = [link._replace(step=type(link.step)(*map(copied, link.step))) for link in chain]
    return links, Arena(device)


def key_of_chain(chain: Chain) -> tuple[Hashable, ...]:
    """Of chains that take about as long: their steps, dtypes, and sizes by buckets."""
    key: list[Hashable] = []
    for link in chain:
        key.append(type(link.step).__name__)
        for value in link.step:
            if isinstance(value, (Tensor, Operand)):
                key.append((value.dtype, *map(bucket, value.shape)))
    return tuple(key)
