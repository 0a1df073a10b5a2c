"""Grouped A = Uᵀ x and B = x V over a list of matrices.

Two variants, chosen per job by ``configs.coefficients_config``:

``one_pass``  every tile of x is read once and multiplied from both sides. A program walks down a
              strip of BLOCK_N columns with its part of Aᵀ in the accumulator and writes each
              tile's part of B: 4 (k / BLOCK_N + r / split_rows) bytes an element of x.
``two_pass``  A and B are two reductions that meet in L2, each over chunks of the rank. No bound
              on the rank; also serves one-sided jobs, and float32 bases in float32 accuracy
              whatever the dtype of x (ACCURATE).

Sums that several programs share go to a workspace as float32 parts, and are added in their order
later in the launch (``ordered``). How a job is split depends on its own shape and
config alone, never on its neighbours, so a list gives the bits of a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ordered import claim, done, finish, store_part, sum_parts, wait_for_products
from .tiles import (
    accurate_product,
    find_problem,
    load_tile,
    load_view,
    operand,
    store_tile,
    widen,
)

__all__ = ["one_pass_kernel", "two_pass_kernel"]


@triton.jit
def store_result(
    record,
    values,
    rows,
    ranks,
    OUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    OTHER: tl.constexpr,
    OTHER_LAYOUT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Write a finished tile of Aᵀ or B, less other·diag(S) where there is an S."""
    out = load_view(record, 13, 3, 8, OUT, OUT_LAYOUT)
    if HAS_OFFSET:
        other = load_view(record, 17, 3, 8, OTHER, OTHER_LAYOUT)
        address = tl.load(record + 16)
        scales = address.to(tl.pointer_type(tl.float32))
        scaled = (ranks < out[4]) & (address != 0)
        scale = tl.load(scales + ranks * tl.load(record + 20), mask=scaled, other=0.0)
        values -= widen(load_tile(other, rows, ranks, OTHER_LAYOUT), INTERPRET) * scale[None, :]
    store_tile(out, rows, ranks, values, OUT, OUT_LAYOUT, INTERPRET)


@triton.jit
def sum_tile(
    meta,  # int64: sums + 1 prefix sums of tiles, then one schedule.Reduction record a sum
    workspace,
    sums,
    tile,
    U: tl.constexpr,
    V: tl.constexpr,
    OUT: tl.constexpr,
    U_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,  # of Aᵀ (n, r)
    B_LAYOUT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One (SUM_BLOCK, SUM_BLOCK) tile of Aᵀ or B from its parts."""
    place = find_problem(meta, sums, tile)
    local = tile - tl.load(meta + place).to(tl.int32)
    record = meta + (sums + 1) + place * 21
    q_count = tl.load(record + 3).to(tl.int32)
    rank_count = tl.load(record + 8).to(tl.int32)
    parts = tl.load(record + 9).to(tl.int32)
    chunks = tl.cdiv(rank_count, SUM_BLOCK)
    rows = local // chunks * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    ranks = local % chunks * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    start = workspace + tl.multiple_of(tl.load(record + 12), 4)
    values = sum_parts(start, parts, rows, ranks, q_count, rank_count)
    if tl.load(record + 11) == 0:
        store_result(record, values, rows, ranks, OUT, A_LAYOUT, V, V_LAYOUT, HAS_OFFSET, INTERPRET)
    else:
        store_result(record, values, rows, ranks, OUT, B_LAYOUT, U, U_LAYOUT, HAS_OFFSET, INTERPRET)


@triton.jit
def add_sums(
    counters,
    meta,  # of the sums, as sum_tile takes it
    workspace,
    products,  # how many tiles come before those of sums
    sums,
    tile,  # the first that was claimed beyond them
    U: tl.constexpr,
    V: tl.constexpr,
    OUT: tl.constexpr,
    U_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The rest of a launch, once its products are claimed."""
    end = products + tl.load(meta + sums).to(tl.int32)
    if tile < end:
        wait_for_products(counters, products)
    while tile < end:
        sum_tile(
            meta,
            workspace,
            sums,
            tile - products,
            U,
            V,
            OUT,
            U_LAYOUT,
            V_LAYOUT,
            A_LAYOUT,
            B_LAYOUT,
            HAS_OFFSET,
            SUM_BLOCK,
            INTERPRET,
        )
        tile = claim(counters)
    finish(counters, tile, end)


@triton.jit(do_not_specialize=["problems", "tiles", "sums"])
def one_pass_kernel(
    meta,  # int64: two counters, then what schedule says of products and sums
    workspace,  # float32
    problems,
    tiles,
    sums,
    X: tl.constexpr,
    U: tl.constexpr,
    V: tl.constexpr,
    OUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    U_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,  # of Aᵀ (n, r)
    B_LAYOUT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    ranks = tl.arange(0, BLOCK_R)
    tile = claim(meta)
    while tile < tiles:
        starts = meta + 2
        problem = find_problem(starts, problems, tile)
        local = tile - tl.load(starts + problem).to(tl.int32)
        record = starts + (problems + 1) + problem * 16
        x = load_view(record, 0, 3, 4, X, X_LAYOUT)
        u = load_view(record, 5, 3, 8, U, U_LAYOUT)
        v = load_view(record, 9, 4, 12, V, V_LAYOUT)
        a_parts = workspace + tl.multiple_of(tl.load(record + 13), 4)
        b_parts = workspace + tl.multiple_of(tl.load(record + 14), 4)
        split_rows = tl.multiple_of(tl.load(record + 15).to(tl.int32), BLOCK_M)

        strips = tl.cdiv(x[4], BLOCK_N)
        strip = local % strips
        split = local // strips
        columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
        first = split * split_rows
        a = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for row in range(first, tl.minimum(first + split_rows, x[3]), BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            x_tile = operand(load_tile(x, rows, columns, X_LAYOUT), DOT, INTERPRET)
            u_tile = operand(load_tile(u, rows, ranks, U_LAYOUT, U_LAYOUT == 6), DOT, INTERPRET)
            v_tile = operand(load_tile(v, columns, ranks, V_LAYOUT, V_LAYOUT == 6), DOT, INTERPRET)
            a = tl.dot(tl.trans(x_tile), u_tile, a, input_precision=PRECISION)
            b = tl.dot(x_tile, v_tile, input_precision=PRECISION)  # (BLOCK_M, BLOCK_R)
            store_part(b_parts, strip, b, rows, ranks, x[3], v[4])
        store_part(a_parts, split, a, columns, ranks, x[4], u[4])
        done(meta, AMD)
        tile = claim(meta)
    add_sums(
        meta,
        meta + (2 + problems + 1 + problems * 16),
        workspace,
        tiles,
        sums,
        tile,
        U,
        V,
        OUT,
        U_LAYOUT,
        V_LAYOUT,
        A_LAYOUT,
        B_LAYOUT,
        HAS_OFFSET,
        SUM_BLOCK,
        INTERPRET,
    )


@triton.jit
def reduction_tile(
    record,
    workspace,
    local,
    X: tl.constexpr,
    BASIS: tl.constexpr,
    OTHER: tl.constexpr,
    OUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    BASIS_LAYOUT: tl.constexpr,
    OTHER_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ACCURATE: tl.constexpr,
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
            x_tile = load_tile(x, steps, rows, X_LAYOUT)
        else:
            x_tile = load_tile(x, rows, steps, X_LAYOUT)
        basis_tile = load_tile(basis, steps, ranks, BASIS_LAYOUT, BASIS_LAYOUT == 6)
        if not ACCURATE:
            x_tile = operand(x_tile, DOT, INTERPRET)
            basis_tile = operand(basis_tile, DOT, INTERPRET)
        if TRANSPOSED:
            x_tile = tl.trans(x_tile)
        if ACCURATE:
            values += accurate_product(x_tile, basis_tile, PRECISION, INTERPRET)
        else:
            values = tl.dot(x_tile, basis_tile, values, input_precision=PRECISION)

    if parts == 1:
        store_result(
            record,
            values,
            rows,
            ranks,
            OUT,
            OUT_LAYOUT,
            OTHER,
            OTHER_LAYOUT,
            HAS_OFFSET,
            INTERPRET,
        )
    else:
        start = workspace + tl.multiple_of(tl.load(record + 12), 4)
        store_part(start, part, values, rows, ranks, q_count, basis[4])


@triton.jit(do_not_specialize=["problems", "tiles", "sums"])
def two_pass_kernel(
    meta,  # int64: two counters, then what schedule says of products and sums
    workspace,  # float32
    problems,
    tiles,
    sums,
    X: tl.constexpr,
    U: tl.constexpr,
    V: tl.constexpr,
    OUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    U_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,  # of Aᵀ (n, r)
    B_LAYOUT: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ACCURATE: tl.constexpr,
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
        record = starts + (problems + 1) + problem * 21
        is_a = tl.load(record + 11) == 0
        if HAS_A:  # noqa: SIM102 (the outer test is taken while compiling)
            if is_a:
                reduction_tile(
                    record,
                    workspace,
                    local,
                    X,
                    U,
                    V,
                    OUT,
                    DOT,
                    PRECISION,
                    X_LAYOUT,
                    U_LAYOUT,
                    V_LAYOUT,
                    A_LAYOUT,
                    True,
                    HAS_OFFSET,
                    ACCURATE,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_R,
                    INTERPRET,
                )
        if HAS_B:  # noqa: SIM102
            if not is_a:
                reduction_tile(
                    record,
                    workspace,
                    local,
                    X,
                    V,
                    U,
                    OUT,
                    DOT,
                    PRECISION,
                    X_LAYOUT,
                    V_LAYOUT,
                    U_LAYOUT,
                    B_LAYOUT,
                    False,
                    HAS_OFFSET,
                    ACCURATE,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_R,
                    INTERPRET,
                )
        done(meta, AMD)
        tile = claim(meta)
    add_sums(
        meta,
        meta + (2 + problems + 1 + problems * 21),
        workspace,
        tiles,
        sums,
        tile,
        U,
        V,
        OUT,
        U_LAYOUT,
        V_LAYOUT,
        A_LAYOUT,
        B_LAYOUT,
        HAS_OFFSET,
        SUM_BLOCK,
        INTERPRET,
    )
