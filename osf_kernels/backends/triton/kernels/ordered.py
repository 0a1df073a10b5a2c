"""Sums over several programs in one launch, in a fixed order.

The grid is persistent: programs claim tiles until there are no more. First those of products, of
which they write what is to be summed to a workspace as float32 parts; then, once all products are
done, those of sums, which add the parts in their order. Only programs that run claim, and a product
waits for nothing, so the wait ends however few programs of the grid are resident, in any order.
Each kind has a loop of its own: one loop over both takes up to 75 registers a thread more (the
small bf16 Gram config at sm_80: 241 where 166 let two programs run side by side).

Counters (int64, zero before a launch and after it): tiles claimed, products done.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["claim", "done", "finish", "store_part", "sum_parts", "wait_for_products"]


@triton.jit
def claim(counters):
    """The next tile, in the order in which programs ask."""
    return tl.atomic_add(counters, 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit
def done(counters, AMD: tl.constexpr):
    """Say so of a product's tile."""
    # The release is one thread's, and covers what the others wrote: stores that reached memory
    # before the barrier. AMD's barrier alone does not wait for those of other wavefronts.
    if AMD:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0", "=v,~{memory}", [], tl.int32, False, 1
        )
    tl.debug_barrier()
    tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_products(counters, products):
    """Return once so many are done."""
    while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < products:
        pass


@triton.jit
def finish(counters, claimed, tiles):
    """Leave the counters at zero: by the program whose claim, beyond all tiles, is the last."""
    if claimed == tiles + tl.num_programs(0) - 1:
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
