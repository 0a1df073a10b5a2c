"""Grouped out = beta·x + alpha·(L1 R1 + L2 R2) + addend over a list of matrices.

A program holds a tile of the sum in its accumulator while it loops over chunks of r, then of k;
x is read once and out written once, so ``out`` may be x. Each value is rounded once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    find_problem,
    load_mask,
    load_tile,
    load_view,
    operand,
    store_tile,
    tile_pointers,
    widen,
)

__all__ = ["update_kernel"]


@triton.jit
def add_chunk(
    accumulator,
    left,
    right,
    rows,
    ranks,
    columns,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT_LAYOUT: tl.constexpr,
    RIGHT_LAYOUT: tl.constexpr,
    CLEAR: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """accumulator + L[rows, ranks] R[ranks, columns]."""
    left_tile = load_tile(left, rows, ranks, LEFT_LAYOUT, CLEAR)  # (BLOCK_M, BLOCK_R)
    right_tile = load_tile(right, ranks, columns, RIGHT_LAYOUT, CLEAR)  # (BLOCK_R, BLOCK_N)
    return tl.dot(
        operand(left_tile, DOT, INTERPRET),
        operand(right_tile, DOT, INTERPRET),
        accumulator,
        input_precision=PRECISION,
    )


@triton.jit
def add_product(
    accumulator,
    record,
    LEFT_FIELD: tl.constexpr,  # left view, right view, rank
    rows,
    columns,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    LEFT_LAYOUT: tl.constexpr,
    RIGHT_LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """accumulator + L[rows, :] R[:, columns], in chunks of the rank.

    Padding beyond the rank is cleared in a last chunk apart: in the loop, where loads are under
    way side by side, that would take more registers than there are.
    """
    PADDED: tl.constexpr = LEFT_LAYOUT == 5 or RIGHT_LAYOUT == 6
    left = load_view(record, LEFT_FIELD, 6, LEFT_FIELD + 6, LEFT, LEFT_LAYOUT)
    right = load_view(record, LEFT_FIELD + 3, LEFT_FIELD + 6, 7, RIGHT, RIGHT_LAYOUT)
    rank = left[4]
    end = rank
    if PADDED:
        end = rank // BLOCK_R * BLOCK_R
    for chunk in range(0, end, BLOCK_R):
        ranks = chunk + tl.arange(0, BLOCK_R)
        accumulator = add_chunk(
            accumulator,
            left,
            right,
            rows,
            ranks,
            columns,
            DOT,
            PRECISION,
            LEFT_LAYOUT,
            RIGHT_LAYOUT,
            False,
            INTERPRET,
        )
    if PADDED:  # noqa: SIM102 (the outer test is taken while compiling)
        if end < rank:
            ranks = end + tl.arange(0, BLOCK_R)
            accumulator = add_chunk(
                accumulator,
                left,
                right,
                rows,
                ranks,
                columns,
                DOT,
                PRECISION,
                LEFT_LAYOUT,
                RIGHT_LAYOUT,
                True,
                INTERPRET,
            )
    return accumulator


@triton.jit(do_not_specialize=["problems", "tiles"])
def update_kernel(
    meta,  # int64: problems + 1 prefix sums of tiles, then one schedule.UpdateRecord a problem
    problems,
    tiles,
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
    HAS_ADDEND: tl.constexpr,
    NEGATIVE: tl.constexpr,  # beta is -1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        problem = find_problem(meta, problems, tile)
        local = tile - tl.load(meta + problem).to(tl.int32)
        record = meta + (problems + 1) + problem * 27
        alpha = tl.load(record + 8).to(tl.int32).to(tl.float32, bitcast=True)
        beta = tl.load(record + 9).to(tl.int32)
        out = load_view(record, 0, 6, 7, OUT, OUT_LAYOUT)

        # GROUP_M tiles down, then across: neighbours in time share rows of L and columns of R.
        down = tl.cdiv(out[3], BLOCK_M)
        across = tl.cdiv(out[4], BLOCK_N)
        group = local // (GROUP_M * across)
        height = tl.minimum(down - group * GROUP_M, GROUP_M)
        inside = local - group * (GROUP_M * across)
        rows = (group * GROUP_M + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)

        # Asked for before the products, so that the read of x overlaps with them. With beta = 0
        # the mask is empty: x is not read. Beside the products its padding is not stored.
        x = load_view(record, 3, 6, 7, X, X_LAYOUT)
        x_tile = tl.load(
            tile_pointers(x, rows, columns, X_LAYOUT),
            mask=load_mask(x, rows, columns, X_LAYOUT) & (beta != 0),
            other=0.0,
        )  # (BLOCK_M, BLOCK_N)
        products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        products = add_product(
            products,
            record,
            10,
            rows,
            columns,
            L1,
            R1,
            DOT,
            PRECISION,
            L1_LAYOUT,
            R1_LAYOUT,
            BLOCK_R,
            INTERPRET,
        )
        products = add_product(
            products,
            record,
            17,
            rows,
            columns,
            L2,
            R2,
            DOT,
            PRECISION,
            L2_LAYOUT,
            R2_LAYOUT,
            BLOCK_R,
            INTERPRET,
        )
        if NEGATIVE:
            values = alpha * products - widen(x_tile, INTERPRET)
        else:
            values = widen(x_tile, INTERPRET) + alpha * products
        if HAS_ADDEND:
            addend = load_view(record, 24, 6, 7, ADDEND, ADDEND_LAYOUT)
            values += widen(load_tile(addend, rows, columns, ADDEND_LAYOUT), INTERPRET)
        store_tile(out, rows, columns, values, OUT, OUT_LAYOUT, INTERPRET)
