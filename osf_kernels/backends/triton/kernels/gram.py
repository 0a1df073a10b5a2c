"""Batched Xᵀ X or X Xᵀ over a list of matrices, one triangle computed.

A program holds a tile of the lower triangle and writes it twice, the second time transposed; a
tile on the diagonal is mirrored inside itself. So the result is symmetric to the bit. A sum that
several programs share goes to a workspace as float32 parts, added in order (``ordered``).
Every step of BLOCK_K products is added to the running sum apart (``tiles.dot_apart``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ordered import claim, done, finish, store_part, sum_parts, wait_for_products
from .tiles import dot_apart, find_problem, load_tile, load_view, operand, store_tile

__all__ = ["gram_kernel"]


@triton.jit
def triangle_tile(place, count):
    """(i, j), i >= j: tile number ``place`` of the lower triangle of count × count tiles.

    Row i has i + 1 of them. Rows from the end, each followed by one from the start, fill lines
    of one length: count + 1 where count is even, else count.
    """
    width = count | 1
    line = place // width
    column = place % width
    row = count - 1 - line
    beyond = column > row
    i = tl.where(beyond, line - count % 2, row)
    j = tl.where(beyond, column - row - 1, column)
    return i, j


@triton.jit
def store_symmetric(
    out, i, j, rows, columns, values, LAYOUT: tl.constexpr, INTERPRET: tl.constexpr
):
    """Write tile (i, j) of the lower triangle, and its mirror image."""
    turned = tl.trans(values)
    if i == j:
        values = tl.where(rows[:, None] >= columns[None, :], values, turned)
    else:
        store_tile(out, columns, rows, turned, tl.float32, LAYOUT, INTERPRET)
    store_tile(out, rows, columns, values, tl.float32, LAYOUT, INTERPRET)


@triton.jit
def symmetric_sum_tile(
    meta,  # int64: sums + 1 prefix sums of tiles, then one Gram record a sum
    workspace,
    sums,
    tile,
    OUT_LAYOUT: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One (SUM_BLOCK, SUM_BLOCK) tile of the triangle from its parts."""
    place = find_problem(meta, sums, tile)
    local = tile - tl.load(meta + place).to(tl.int32)
    record = meta + (sums + 1) + place * 11
    out = load_view(record, 8, 3, 3, tl.float32, OUT_LAYOUT)
    size = tl.load(record + 3).to(tl.int32)
    parts = tl.load(record + 5).to(tl.int32)

    i, j = triangle_tile(local, tl.cdiv(size, SUM_BLOCK))
    rows = i * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    columns = j * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    start = workspace + tl.multiple_of(tl.load(record + 7), 4)
    values = sum_parts(start, parts, rows, columns, size, size)
    store_symmetric(out, i, j, rows, columns, values, OUT_LAYOUT, INTERPRET)


@triton.jit(do_not_specialize=["problems", "tiles", "sums"])
def gram_kernel(
    meta,  # int64: two counters (``ordered``), then what product_schedule says of products and sums
    workspace,  # float32
    problems,
    tiles,
    sums,
    X: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # Xᵀ X of (length, size) matrices, else X Xᵀ of (size, length) ones
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile = claim(meta)
    while tile < tiles:
        starts = meta + 2
        problem = find_problem(starts, problems, tile)
        local = tile - tl.load(starts + problem).to(tl.int32)
        record = starts + (problems + 1) + problem * 11
        if TRANSPOSED:
            x = load_view(record, 0, 4, 3, X, X_LAYOUT)
        else:
            x = load_view(record, 0, 3, 4, X, X_LAYOUT)
        size = tl.load(record + 3).to(tl.int32)
        length = tl.load(record + 4).to(tl.int32)
        parts = tl.load(record + 5).to(tl.int32)
        part_length = tl.multiple_of(tl.load(record + 6).to(tl.int32), BLOCK_K)

        count = tl.cdiv(size, BLOCK)
        triangle = count * (count + 1) // 2
        part = local // triangle
        i, j = triangle_tile(local % triangle, count)
        rows = i * BLOCK + tl.arange(0, BLOCK)
        columns = j * BLOCK + tl.arange(0, BLOCK)
        first = part * part_length
        values = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for inner in range(first, tl.minimum(first + part_length, length), BLOCK_K):
            steps = inner + tl.arange(0, BLOCK_K)
            if TRANSPOSED:
                left = tl.trans(load_tile(x, steps, rows, X_LAYOUT))  # (BLOCK, BLOCK_K)
                right = load_tile(x, steps, columns, X_LAYOUT)  # (BLOCK_K, BLOCK)
            else:
                left = load_tile(x, rows, steps, X_LAYOUT)
                right = tl.trans(load_tile(x, columns, steps, X_LAYOUT))
            left = operand(left, DOT, INTERPRET)
            values += dot_apart(left, operand(right, DOT, INTERPRET), PRECISION)

        if parts == 1:
            out = load_view(record, 8, 3, 3, tl.float32, OUT_LAYOUT)
            store_symmetric(out, i, j, rows, columns, values, OUT_LAYOUT, INTERPRET)
        else:
            start = workspace + tl.multiple_of(tl.load(record + 7), 4)
            store_part(start, part, values, rows, columns, size, size)
        done(meta, AMD)
        tile = claim(meta)
    sums_meta = meta + (2 + problems + 1 + problems * 11)
    end = tiles + tl.load(sums_meta + sums).to(tl.int32)
    if tile < end:
        wait_for_products(meta, tiles)
    while tile < end:
        symmetric_sum_tile(
            sums_meta, workspace, sums, tile - tiles, OUT_LAYOUT, SUM_BLOCK, INTERPRET
        )
        tile = claim(meta)
    finish(meta, tile, end)
