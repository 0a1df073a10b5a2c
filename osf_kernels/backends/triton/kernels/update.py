"""A panel of out = beta·x + alpha·(L1 R1 + L2 R2) + addend.

A task is BLOCK_M rows of a range of columns. Of ranks up to BLOCK_R it holds L1 and L2 of its rows
while it walks across, so that of every further tile R1 and R2 alone are read beside x; of larger
ones it loops over chunks of both ranks. x is read once and out written once, so ``out`` may be x.
Each value is rounded once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    load_mask,
    load_tile,
    load_view,
    operand,
    store_tile,
    tile_mask,
    tile_pointers,
    widen,
)

__all__ = ["update"]


@triton.jit
def left_tile(view, rows, ranks, DOT: tl.constexpr, LAYOUT: tl.constexpr, INTERPRET: tl.constexpr):
    """L[rows, ranks] as an operand; from L2, since another program may have written it."""
    values = tl.load(
        tile_pointers(view, rows, ranks, LAYOUT),
        mask=load_mask(view, rows, ranks, LAYOUT),
        other=0.0,
        cache_modifier=".cg",
    )
    if LAYOUT == 5:
        values = tl.where((ranks < view[4])[None, :], values, 0.0)
    return operand(values, DOT, INTERPRET)


@triton.jit
def right_tile(
    view, ranks, columns, DOT: tl.constexpr, LAYOUT: tl.constexpr, INTERPRET: tl.constexpr
):
    """R[ranks, columns] as an operand; padding of columns may come along, it is not stored."""
    return operand(load_tile(view, ranks, columns, LAYOUT, LAYOUT == 6), DOT, INTERPRET)


@triton.jit
def update(
    bases,
    record,
    local,
    OUT: tl.constexpr,
    X: tl.constexpr,
    L1: tl.constexpr,
    R1: tl.constexpr,
    L2: tl.constexpr,
    R2: tl.constexpr,
    ADDEND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    L1_LAYOUT: tl.constexpr,
    R1_LAYOUT: tl.constexpr,
    L2_LAYOUT: tl.constexpr,
    R2_LAYOUT: tl.constexpr,
    ADDEND_LAYOUT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    NEGATIVE: tl.constexpr,  # beta is -1
    WHOLE: tl.constexpr,  # no rank is beyond BLOCK_R
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    out = load_view(record, 4, 10, 11, OUT, OUT_LAYOUT, bases)
    x = load_view(record, 7, 10, 11, X, X_LAYOUT, bases)
    alpha = tl.load(record + 12).to(tl.int32).to(tl.float32, bitcast=True)
    is_read = tl.load(record + 13) != 0  # beta
    panels = tl.cdiv(out[3], BLOCK_M)
    rows = local % panels * BLOCK_M + tl.arange(0, BLOCK_M)
    strip = tl.multiple_of(tl.load(record + 31).to(tl.int32), BLOCK_N)
    first = local // panels * strip
    end = tl.minimum(first + strip, out[4])
    l1 = load_view(record, 14, 10, 20, L1, L1_LAYOUT, bases)
    r1 = load_view(record, 17, 20, 11, R1, R1_LAYOUT, bases)
    l2 = load_view(record, 21, 10, 27, L2, L2_LAYOUT, bases)
    r2 = load_view(record, 24, 27, 11, R2, R2_LAYOUT, bases)
    # Where they aren't multiplied, below, the compiler drops them.
    ranks = tl.arange(0, BLOCK_R)
    left1 = left_tile(l1, rows, ranks, DOT, L1_LAYOUT, INTERPRET)
    left2 = left_tile(l2, rows, ranks, DOT, L2_LAYOUT, INTERPRET)
    for column in tl.range(first, end, BLOCK_N, num_stages=STAGES if WHOLE else 1):
        columns = column + tl.arange(0, BLOCK_N)
        # With beta = 0 the mask is empty: x is not read. Padding may come along.
        x_tile = tl.load(
            tile_pointers(x, rows, columns, X_LAYOUT),
            mask=load_mask(x, rows, columns, X_LAYOUT) & is_read,
            other=0.0,
        )  # (BLOCK_M, BLOCK_N)
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if WHOLE:
            if HAS_FIRST:
                right = right_tile(r1, ranks, columns, DOT, R1_LAYOUT, INTERPRET)
                products = tl.dot(left1, right, products, input_precision=PRECISION)
            if HAS_SECOND:
                right = right_tile(r2, ranks, columns, DOT, R2_LAYOUT, INTERPRET)
                products = tl.dot(left2, right, products, input_precision=PRECISION)
        else:
            for chunk in tl.range(0, tl.maximum(l1[4], l2[4]), BLOCK_R, num_stages=STAGES):
                inner = chunk + ranks
                if HAS_FIRST:
                    left = left_tile(l1, rows, inner, DOT, L1_LAYOUT, INTERPRET)
                    right = right_tile(r1, inner, columns, DOT, R1_LAYOUT, INTERPRET)
                    products = tl.dot(left, right, products, input_precision=PRECISION)
                if HAS_SECOND:
                    left = left_tile(l2, rows, inner, DOT, L2_LAYOUT, INTERPRET)
                    right = right_tile(r2, inner, columns, DOT, R2_LAYOUT, INTERPRET)
                    products = tl.dot(left, right, products, input_precision=PRECISION)
        if NEGATIVE:
            values = alpha * products - widen(x_tile, INTERPRET)
        else:
            values = widen(x_tile, INTERPRET) + alpha * products
        if HAS_ADDEND:
            addend = load_view(record, 28, 10, 11, ADDEND, ADDEND_LAYOUT, bases)
            values += widen(load_tile(addend, rows, columns, ADDEND_LAYOUT, False), INTERPRET)
        if OUT_LAYOUT == 7 or OUT_LAYOUT == 8:  # whose padding is stored, and is to hold zeros
            values = tl.where(tile_mask(out, rows, columns), values, 0.0)
        store_tile(out, rows, columns, values, OUT, OUT_LAYOUT, INTERPRET, True)
