"""Grouped x·basis, or xᵀ·basis, in float32 accuracy whatever the dtype of x, over a list.

Sums that several programs share go to a workspace as float32 parts, and are added in their order
later in the launch (``ordered``). How a matrix is split depends on its own shape and config alone,
never on its neighbours, so a list gives the bits of a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ordered import claim, done, finish, store_part, sum_parts, wait_for_products
from .tiles import accurate_product, find_problem, load_tile, load_view, store_tile

__all__ = ["multiply_kernel"]


@triton.jit
def product_tile(
    record,
    workspace,
    local,
    X: tl.constexpr,
    BASIS: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    BASIS_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One (BLOCK_Q, BLOCK_R) tile of one part of x·basis, or of xᵀ·basis where TRANSPOSED."""
    if TRANSPOSED:
        x = load_view(record, 0, 4, 3, X, X_LAYOUT)
    else:
        x = load_view(record, 0, 3, 4, X, X_LAYOUT)
    basis = load_view(record, 5, 4, 8, BASIS, BASIS_LAYOUT)
    q_count = tl.load(record + 3).to(tl.int32)
    parts = tl.load(record + 9).to(tl.int32)
    part_length = tl.multiple_of(tl.load(record + 10).to(tl.int32), BLOCK_K)

    # Rank chunks innermost: they share a panel of x.
    chunks = tl.cdiv(basis[4], BLOCK_R)
    panels = tl.cdiv(q_count, BLOCK_Q)
    part = local // (panels * chunks)
    rows = (local // chunks) % panels * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ranks = local % chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    first = part * part_length
    values = tl.zeros((BLOCK_Q, BLOCK_R), dtype=tl.float32)
    for inner in range(first, tl.minimum(first + part_length, basis[3]), BLOCK_K):
        steps = inner + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            x_tile = tl.trans(load_tile(x, steps, rows, X_LAYOUT))
        else:
            x_tile = load_tile(x, rows, steps, X_LAYOUT)
        basis_tile = load_tile(basis, steps, ranks, BASIS_LAYOUT, BASIS_LAYOUT == 6)
        values += accurate_product(x_tile, basis_tile, PRECISION, INTERPRET)
    if parts == 1:
        out = load_view(record, 12, 3, 8, tl.float32, OUT_LAYOUT)
        store_tile(out, rows, ranks, values, tl.float32, OUT_LAYOUT, INTERPRET)
    else:
        start = workspace + tl.multiple_of(tl.load(record + 11), 4)
        store_part(start, part, values, rows, ranks, q_count, basis[4])


@triton.jit
def sum_tile(
    meta,  # int64: sums + 1 prefix sums of tiles, then one record a sum
    workspace,
    sums,
    tile,
    OUT_LAYOUT: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One (SUM_BLOCK, SUM_BLOCK) tile of a product from its parts."""
    place = find_problem(meta, sums, tile)
    local = tile - tl.load(meta + place).to(tl.int32)
    record = meta + (sums + 1) + place * 15
    q_count = tl.load(record + 3).to(tl.int32)
    rank_count = tl.load(record + 8).to(tl.int32)
    parts = tl.load(record + 9).to(tl.int32)
    chunks = tl.cdiv(rank_count, SUM_BLOCK)
    rows = local // chunks * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    ranks = local % chunks * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    start = workspace + tl.multiple_of(tl.load(record + 11), 4)
    values = sum_parts(start, parts, rows, ranks, q_count, rank_count)
    out = load_view(record, 12, 3, 8, tl.float32, OUT_LAYOUT)
    store_tile(out, rows, ranks, values, tl.float32, OUT_LAYOUT, INTERPRET)


@triton.jit(do_not_specialize=["problems", "tiles", "sums"])
def multiply_kernel(
    meta,  # int64: two counters, then what product_schedule says of products and sums
    workspace,  # float32
    problems,
    tiles,
    sums,
    X: tl.constexpr,
    BASIS: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    BASIS_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile = claim(meta)
    while tile < tiles:
        starts = meta + 2
        problem = find_problem(starts, problems, tile)
        local = tile - tl.load(starts + problem).to(tl.int32)
        record = starts + (problems + 1) + problem * 15
        product_tile(
            record,
            workspace,
            local,
            X,
            BASIS,
            PRECISION,
            X_LAYOUT,
            BASIS_LAYOUT,
            OUT_LAYOUT,
            TRANSPOSED,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_R,
            INTERPRET,
        )
        done(meta, AMD)
        tile = claim(meta)
    of_sums = meta + (2 + problems + 1 + problems * 15)
    end = tiles + tl.load(of_sums + sums).to(tl.int32)
    if tile < end:
        wait_for_products(meta, tiles)
    while tile < end:
        sum_tile(of_sums, workspace, sums, tile - tiles, OUT_LAYOUT, SUM_BLOCK, INTERPRET)
        tile = claim(meta)
    finish(meta, tile, end)
