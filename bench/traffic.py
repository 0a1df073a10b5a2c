"""The bytes that a launch moves between memory, L2 and processors, and the time: a model of a GPU.

``run`` plays the tasks of a launch over time. A fixed number of programs run at once, and each
program claims the next task, waits where the task must wait, and goes through the steps of the
task. A program asks for the tiles of a step while earlier steps are under way. The tiles come
through a cache of the size of the device's L2 (``l2``). ``traffic_tasks`` says which tiles a task
touches, and ``traffic_plan`` plans the launches.

The bytes are counts. The times are the least that this schedule allows, because the model leaves
out the time of instructions and of latencies. ``Device`` holds what the model assumes of a GPU.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bench.l2 import LINE_BYTES, Cache
from bench.traffic_plan import WORKSPACE_END
from bench.traffic_tasks import Step, Tasks

MIB = 1 << 20


class Device(NamedTuple):
    """What the model assumes of a GPU.

    The rate of memory is what copies on the GPU reach, by the data sheets less a tenth. The rate of
    an H100's L2 is from Chips and Cheese, "Nvidia's H100: Funny L2, and Tons of Bandwidth" (2023):
    5.5 to 6 TB/s of 114 processors, scaled here to 132 processors. The rate of an A100's L2 is
    from 2560 to 3840 bytes a cycle.
    """

    name: str
    architecture: str
    processors: int
    l2_mib: int
    memory_tb_s: float  # A copy reaches this rate, which is below the data sheet's.
    l2_tb_s: float  # All processors together reach this rate, of reads and writes.
    processor_gb_s: float  # One processor reaches this rate from L2, at 64 bytes a cycle.
    # Tiles of bfloat16 reach this rate, which is .6 of the data sheet's (with mma.sync .7).
    tensor_tflop_s: float
    # A program needs this time between tasks, to read a record and to ask for the first tile.
    task_us: float = 2.0
    signal_us: float = 1.0  # A waiting program learns of a count after this time.


H100 = Device("H100", "sm_90", 132, 50, 2.96, 6.6, 110.0, 590.0)
H200 = Device("H200", "sm_90", 132, 50, 4.2, 6.6, 110.0, 590.0)
A100 = Device("A100", "sm_80", 108, 40, 1.74, 4.0, 90.0, 218.0)
DEVICES = {each.name: each for each in (A100, H100, H200)}


@dataclass
class Traffic:
    """What one launch moves, and how long the launch takes in the model.

    All figures but ``tasks`` and ``us`` are bytes.
    """

    tasks: int
    memory_read: int
    memory_written: int
    l2_bytes: int  # All that moves between L2 and processors counts here, in whole sectors.
    update_bytes: int  # All tiles of updates count here.
    update_matrix_bytes: int  # Tiles that updates read and write of the matrices count here.
    # Tiles of coefficients and of partial sums count here, once written and once read.
    coefficient_bytes: int
    us: float


class _Program:
    """One of the programs that run at once."""

    def __init__(self) -> None:
        self.task: tuple[int, int] | None = None
        self.steps: Iterator[Step] = iter(())
        self.ended_us = 0.0  # The program's last step ends at this time.
        self.link_free_us = 0.0  # The program's share of the link from L2 is free at this time.
        self.ends: deque[float] = deque()  # The steps that hold a stage end at these times.
        self.stages = 1


def run(tasks: Tasks, device: Device, programs: int, cache: Cache) -> Traffic:
    """Runs the tasks of a launch in the model.

    At the end the cache is flushed, so that lines that only the cache holds count as written.
    Raises RuntimeError where a task waits for a count that is never reached.
    """
    counts = [0] * tasks.counters
    tasks.claimed.clear()
    # For each counter, these are pairs of a count and the program that waits for that count.
    waiting: dict[int, list[tuple[int, int]]] = {}
    todo = iter(tasks.order)
    pool = [_Program() for _ in range(min(programs, len(tasks.order)))]
    events = [(0.0, i) for i in range(len(pool))]
    memory_free_us = l2_free_us = last_us = 0.0
    result = Traffic(len(tasks.order), 0, 0, 0, 0, 0, 0, 0.0)
    seen: set[tuple[int, bool]] = set()
    # Both rates are in FLOPs a microsecond.
    per_processor = device.tensor_tflop_s * 1e6 / device.processors
    per_program = per_processor * device.processors / max(programs, 1)

    def wait(program: int, now: float, counter: int, until: int) -> bool:
        if counts[counter] >= until:
            return False
        waiting.setdefault(counter, []).append((until, program))
        return True

    def count_up(counter: int, now: float) -> None:
        counts[counter] += 1
        still = []
        for until, other in waiting.pop(counter, []):
            if counts[counter] >= until:
                pool[other].ended_us = max(pool[other].ended_us, now + device.signal_us)
                heapq.heappush(events, (now + device.signal_us, other))
            else:
                still.append((until, other))
        if still:
            waiting[counter] = still

    while events:
        now, index = heapq.heappop(events)
        program = pool[index]
        if program.task is None:
            program.task = next(todo, None)
            if program.task is None:
                continue
            place, local = program.task
            program.steps, program.stages = tasks.steps(place, local), tasks.stages(place)
            program.ends.clear()
            counter, until = tasks.waits_for(place)
            if until and wait(index, now, counter, until):
                continue
        step = next(program.steps, None)
        place = program.task[0]
        if step is None or step.signal is not None:
            # The counter is counted up once the program's last step is stored.
            if program.ended_us > now:
                program.steps = itertools.chain([step] if step else [], program.steps)
                heapq.heappush(events, (program.ended_us, index))
                continue
            last_us = max(last_us, now)
            signal = None if step is None else step.signal
            count_up(tasks.counts_up(place) if signal is None else signal, now)
            if signal is None:
                program.task = None
            heapq.heappush(events, (now + (device.task_us if signal is None else 0.0), index))
            continue
        if step.wait is not None:
            counter, until = step.wait
            if not wait(index, now, counter, until):
                heapq.heappush(events, (now, index))
            continue
        reads = [line for region in step.reads for line in region.lines()]
        moved = sum(region.moved for region in (*step.reads, *step.writes))
        from_memory = cache.read(reads) * LINE_BYTES
        written_before = cache.written_bytes
        for region in step.writes:
            cache.write(region.lines(), evict_first=step.last_read)
        from_memory += cache.written_bytes - written_before
        l2_free_us = max(l2_free_us, now) + moved / (device.l2_tb_s * 1e6)
        memory_free_us = max(memory_free_us, now) + from_memory / (device.memory_tb_s * 1e6)
        link_us = moved / (device.processor_gb_s * 1e3) * programs / device.processors
        program.link_free_us = max(program.link_free_us, now) + link_us
        ready = max(l2_free_us, memory_free_us if from_memory else 0.0, program.link_free_us)
        program.ended_us = max(ready, program.ended_us) + step.flops / per_program
        result.l2_bytes += moved
        _count(result, tasks, place, step, seen)
        program.ends.append(program.ended_us)
        # The program asks for the tiles of the next step when a stage is free.
        free = now if len(program.ends) < program.stages else program.ends.popleft()
        heapq.heappush(events, (max(now, free), index))
    if any(waiting.values()):
        raise RuntimeError("bench traffic: tasks wait for what never comes")
    cache.flush()
    result.memory_read, result.memory_written = cache.read_bytes, cache.written_bytes
    result.us = last_us
    return result


def _count(
    result: Traffic, tasks: Tasks, place: int, step: Step, seen: set[tuple[int, bool]]
) -> None:
    """Adds the bytes that a step moves of updates, and the bytes that lie in the workspace."""
    if tasks.is_update(place):
        moved = sum(region.bytes for region in (*step.reads, *step.writes))
        result.update_bytes += moved
        if step.writes:
            result.update_matrix_bytes += step.reads[0].bytes + step.writes[0].bytes
    for regions, stored in ((step.reads, False), (step.writes, True)):
        for region in regions:
            if region.address < WORKSPACE_END and (region.address, stored) not in seen:
                seen.add((region.address, stored))
                result.coefficient_bytes += region.bytes
