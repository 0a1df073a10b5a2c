"""Sums over several programs in one launch, in a fixed order.

A program does one tile: of a product, of which it writes what is to be summed to a workspace as
float32 parts; or of a sum, which waits until all products are done and adds the parts in their
order. Programs claim their tiles, products first. Only those that run claim, and a product waits
for nothing, so the wait ends however few programs of the grid are resident, in whatever order. A
loop over claimed tiles, as of a persistent grid, takes 40 to 80 registers a thread more (bf16
two_pass at sm_80: 181, where 128 let two programs run side by side) and spills in float32 at sm_90.

Counters (int64, zero before a launch and after it): tiles claimed, tiles done.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["claim", "done", "store_part", "sum_parts", "wait_for_products"]


@triton.jit
def claim(counters):
    """This program's tile, in the order in which programs start."""
    return tl.atomic_add(counters, 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit
def wait_for_products(counters, products):
    """Return once so many tiles are done: a sum, which waits for them, is not among them."""
    while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < products:
        pass


@triton.jit
def done(counters, AMD: tl.constexpr):
    """Say so of this program's tile; the last leaves the counters at zero."""
    # The release is one thread's, and covers what the others wrote: stores that reached memory
    # before the barrier. AMD's barrier alone does not wait for those of other wavefronts.
    if AMD:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0", "=v,~{memory}", [], tl.int32, False, 1
        )
    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit
def store_part(workspace, part, values, rows, ranks, row_count, rank_count):
    """Write a tile of part ``part`` of a (parts, row_count, rank_count up to 4) workspace."""
    padded = tl.multiple_of(tl.cdiv(rank_count, 4) * 4, 4)
    start = workspace + part * (row_count.to(tl.int64) * padded)
    pointers = start + rows.to(tl.int64)[:, None] * padded + ranks[None, :]
    tl.store(pointers, values, mask=(rows < row_count)[:, None] & (ranks < padded)[None, :])


@triton.jit
def sum_parts(workspace, parts, rows, ranks, row_count, rank_count):
    """The same tile of all parts, added in their order."""
    padded = tl.multiple_of(tl.cdiv(rank_count, 4) * 4, 4)
    size = row_count.to(tl.int64) * padded
    pointers = workspace + rows.to(tl.int64)[:, None] * padded + ranks[None, :]
    mask = (rows < row_count)[:, None] & (ranks < padded)[None, :]
    values = tl.zeros((rows.shape[0], ranks.shape[0]), dtype=tl.float32)
    # Two loads in flight. A zero in place of a part that does not exist changes no bit of a sum.
    for part in range(0, parts, 2):
        first = load_part(pointers, part, parts, size, mask)
        second = load_part(pointers, part + 1, parts, size, mask)
        values = values + first + second
    return values


@triton.jit
def load_part(pointers, part, parts, size, mask):
    # From L2: another program wrote it.
    return tl.load(
        pointers + part * size, mask=mask & (part < parts), other=0.0, cache_modifier=".cg"
    )
