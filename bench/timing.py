"""Timing by interleaved rounds: medians and 20/80 percentiles of single calls.

Every contender runs once a round and the order rotates from round to round, so drift of the
machine (frequency, neighbours, temperature) reaches all of them alike and cancels in ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What a GPU waits before it starts to count: about half a millisecond below 2 GHz, for the host to
# plan and launch a small call meanwhile. Estimated, not measured.
HEAD_START_CYCLES = 1_000_000
CACHE_FLUSH_BYTES = 256 << 20  # above the last-level cache of every GPU in use (H200: 50 MB)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (q in [0, 100]) by linear interpolation between order statistics."""
    if not values:
        raise ValueError("bench: percentile of no values")
    if not 0.0 <= q <= 100.0:
        raise ValueError(f"bench: expected q in [0, 100], got {q}")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100.0
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Summary:
    """Of one contender's single-call times, in ms."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Summary:
        p20, median, p80 = (percentile(times_ms, q) for q in (20.0, 50.0, 80.0))
        return cls(median, p20, p80, len(times_ms))


@dataclass
class Timed:
    """A call to time. ``prepare`` and ``context`` run outside the timed region."""

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)


def rotation(count: int, index: int) -> list[int]:
    """The order of ``count`` contenders in round ``index``: each leads every ``count``-th round."""
    return [(index + i) % count for i in range(count)]


class Clock:
    """Times one call on one device: ``perf_counter`` on the CPU, events on a CUDA device.

    On a CUDA device the caches are flushed before every call when ``cold`` is set, as between
    two optimizer steps, where activations have passed through them. And the host gets a head start
    of so many cycles, as in training, where it runs ahead: of its work on a call, what ends within
    them is not counted. ``exposed`` counts the calls in which the host was slower than that.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        cold: bool = True,
        head_start_cycles: int = HEAD_START_CYCLES,
    ) -> None:
        self.device = device
        self.head_start_cycles = head_start_cycles
        self.exposed = 0
        self._flush: Tensor | None = None
        if device.type == "cuda" and cold:
            self._flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time_ms(self, timed: Timed) -> float:
        if timed.prepare is not None:
            timed.prepare()
        with timed.context():
            if self.device.type != "cuda":
                start = time.perf_counter_ns()
                timed.call()
                return (time.perf_counter_ns() - start) / 1e6
            if self._flush is not None:
                self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(self.head_start_cycles)
            begin.record(torch.cuda.current_stream(self.device))
            timed.call()
            end.record(torch.cuda.current_stream(self.device))
            self.exposed += begin.query()  # the device began before the host was done
            end.synchronize()
            return float(begin.elapsed_time(end))


def interleave(
    contenders: Mapping[str, Timed],
    rounds: int,
    clock: Clock,
    *,
    warm_up: int = 1,
    on_round: Callable[[int], object] | None = None,
) -> dict[str, list[float]]:
    """Single-call times in ms of every contender over ``rounds`` rounds, ``warm_up`` unrecorded."""
    if rounds < 1:
        raise ValueError(f"bench: expected at least 1 round, got {rounds}")
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warm_up, rounds):
        for position in rotation(len(names), index % len(names)) if names else []:
            elapsed = clock.time_ms(contenders[names[position]])
            if index >= 0:
                times[names[position]].append(elapsed)
        if on_round is not None and index >= 0:
            on_round(index)
    return times


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes torch had allocated during ``call`` beyond what it held before.

    Counts what the caller keeps of the result too. From the allocator's own high-water mark on
    a CUDA device, from the profiler's record of allocations on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    # acc_events: torch 2.11 warns without it.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        call()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
