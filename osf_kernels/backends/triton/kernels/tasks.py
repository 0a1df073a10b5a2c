"""Tasks of one launch that wait for each other, claimed by its programs in their order.

The grid is persistent. A program claims the next task, and the one after it while it runs the
first, so that what the claim returns is there when it is needed. A task may wait for a counter
that only tasks before it count up. So the wait ends however few programs are resident, and in
whatever order they run: of the tasks that haven't ended, the first waits for none, and the program
that claimed it has none before it to run. For C a task may also wait for a later one that has
claimed a tile of it (``reduction``): that one runs, and waits for tasks before both alone.

Counters are int64, zero before a launch and after it. The first two are tasks claimed and programs
that have left; the last program to leave sets all of them back.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["claim", "done", "leave", "settle", "wait"]


@triton.jit
def claim(counters):
    """The next task, in the order in which programs ask."""
    return tl.atomic_add(counters, 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit
def wait(counters, record, FIELD: tl.constexpr):
    """Return once the counter that a record names has the count beside it; at once for 0."""
    count = tl.load(record + FIELD + 1)
    if count > 0:
        counter = counters + tl.load(record + FIELD)
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < count:
            pass


@triton.jit
def settle(AMD: tl.constexpr):
    """Wait for what the program has stored: all of its threads may read it then."""
    # AMD's barrier alone does not wait for stores of other wavefronts.
    if AMD:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0", "=v,~{memory}", [], tl.int32, False, 1
        )
    tl.debug_barrier()


@triton.jit
def done(counters, record, FIELD: tl.constexpr, AMD: tl.constexpr):
    """Count up the counter that a record names: what the task wrote may be read."""
    # The release is one thread's, and covers what the others stored before the barrier.
    settle(AMD)
    tl.atomic_add(counters + tl.load(record + FIELD), 1, sem="release", scope="gpu")


@triton.jit
def leave(counters, count, BLOCK: tl.constexpr):
    """Called by each program at its end; the last one leaves all ``count`` counters at zero."""
    if tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        for first in range(0, count, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            tl.store(counters + offsets, tl.zeros((BLOCK,), tl.int64), mask=offsets < count)
