"""A tile of Aᵀ = xᵀ U or of B = x V, less what pins it or corrects it; and C = A V of the tiles.

The sum over a long dimension may be cut in parts, each a task; a task of its own adds them, in
their order. What follows the sum is one piece of code, at the end of ``reduction``, and each value
is rounded once, to the dtype in which it is read.

C is such a sum too, but without tasks. Each tile of A, once stored, makes a part, its product with
V (``store_part_of_C``). Tasks that read C add the parts first (``make_C``): whoever comes claims
tiles of C until none is left, so that a tile is always in the hands of a program that runs. Of
ranks beyond a block, whose parts would be large, such a tile is a product of what is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tasks import done, settle, wait
from .tiles import (
    accurate_product,
    leading_bits,
    load_address,
    load_tile,
    load_view,
    operand,
    store_tile,
    tile_mask,
    tile_pointers,
    turned,
    widen,
)

__all__ = ["reduction"]


@triton.jit
def product(
    bases,
    record,
    part,
    rows,
    ranks,
    X: tl.constexpr,
    BASIS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    BASIS_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """x[rows, :] basis[:, ranks] over a part's length, or xᵀ[rows, :] where TRANSPOSED.

    float32 x that meets a bfloat16 basis in bfloat16 is taken in two pieces, 16 bits of it.
    """
    # Turned as a view: a tile that is turned once it is loaded takes registers on its way. Of a
    # layout's number the next one is its transpose's, or the one before.
    TURNED: tl.constexpr = 0 if X_LAYOUT == 0 else X_LAYOUT - 1 + 2 * (X_LAYOUT % 2)
    LAYOUT: tl.constexpr = TURNED if TRANSPOSED else X_LAYOUT
    if TRANSPOSED:
        x = turned(load_view(record, 4, 8, 7, X, X_LAYOUT, bases))
    else:
        x = load_view(record, 4, 7, 8, X, X_LAYOUT, bases)
    basis = load_view(record, 9, 8, 12, BASIS, BASIS_LAYOUT, bases)
    length = tl.multiple_of(tl.load(record + 34).to(tl.int32), BLOCK_K)
    first = part * length
    values = tl.zeros((BLOCK_Q, BLOCK_R), dtype=tl.float32)
    for step in tl.range(first, tl.minimum(first + length, basis[3]), BLOCK_K, num_stages=STAGES):
        steps = step + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, steps, LAYOUT)
        # Columns beyond the rank are cleared once, when the sum is stored.
        loaded = load_tile(basis, steps, ranks, BASIS_LAYOUT, BASIS_LAYOUT == 6)
        basis_tile = operand(loaded, DOT, INTERPRET)
        if tl.float32 == X and tl.bfloat16 == DOT:
            high = leading_bits(x_tile)
            low = operand(x_tile - high, DOT, INTERPRET)
            values = tl.dot(low, basis_tile, values)
            values = tl.dot(operand(high, DOT, INTERPRET), basis_tile, values)
        else:
            x_tile = operand(x_tile, DOT, INTERPRET)
            values = tl.dot(x_tile, basis_tile, values, input_precision=PRECISION)
    return values


@triton.jit
def part_pointers(bases, record, part, rows, ranks):
    """Addresses of a tile of a part, and which exist; parts are (q, rank up to 4) float32."""
    q_count = tl.load(record + 7).to(tl.int32)
    padded = tl.multiple_of(tl.cdiv(tl.load(record + 12).to(tl.int32), 4) * 4, 4)
    start = load_address(bases, record, 13).to(tl.pointer_type(tl.float32))
    start = tl.multiple_of(start, 16)
    start += part * (q_count.to(tl.int64) * padded)
    pointers = start + rows.to(tl.int64)[:, None] * padded + ranks[None, :]
    return pointers, (rows < q_count)[:, None] & (ranks < padded)[None, :]


@triton.jit
def sum_of_parts(
    bases,
    record,
    rows,
    ranks,
    count,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts that are asked for before the first is added
):
    """The same tile of all parts, added in their order."""
    values = tl.zeros((BLOCK_Q, BLOCK_R), dtype=tl.float32)
    for first in tl.range(0, count, AT_ONCE, num_stages=1):
        for i in tl.static_range(AT_ONCE):
            pointers, mask = part_pointers(bases, record, first + i, rows, ranks)
            # From L2: another program wrote it.
            mask = mask & (first + i < count)
            values += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    return values


@triton.jit
def diagonal(bases, record, rows, ranks):
    """diag(S)[rows, ranks] in float32; zeros for a record without S."""
    rank_count = tl.load(record + 12).to(tl.int32)
    scales = load_address(bases, record, 22).to(tl.pointer_type(tl.float32))
    is_there = (ranks < rank_count) & (tl.load(record + 22) != 0)
    scale = tl.load(scales + ranks * tl.load(record + 23), mask=is_there, other=0.0)
    return tl.where(rows[:, None] == ranks[None, :], scale[None, :], 0.0)


@triton.jit
def plus_initial(
    values,
    bases,
    record,
    rows,
    ranks,
    INITIAL: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """values ± initial[rows, ranks], where a record has it."""
    if HAS_INITIAL:  # noqa: SIM102 (the outer test is taken while compiling)
        if tl.load(record + 18) != 0:
            initial = load_view(record, 18, 7, 12, INITIAL, LAYOUT, bases)
            tile = widen(load_tile(initial, rows, ranks, LAYOUT), INTERPRET)
            values += tl.load(record + 21).to(tl.float32) * tile
    return values


@triton.jit
def store_part_of_C(
    bases,
    record,  # of C
    panel,
    ranks,
    FROM: tl.constexpr,
    BY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FROM_LAYOUT: tl.constexpr,
    BY_LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The part of C that a tile of A or B makes, from what the program has just stored."""
    settle(AMD)
    columns = tl.arange(0, BLOCK_R)  # all: C is in parts where no rank is beyond a block
    part = product(
        bases,
        record,
        panel,
        ranks,
        columns,
        FROM,
        BY,
        DOT,
        PRECISION,
        FROM_LAYOUT,
        BY_LAYOUT,
        True,
        BLOCK_R,
        BLOCK_K,
        BLOCK_R,
        STAGES,
        INTERPRET,
    )
    # Padding of the basis may be NaN.
    part = tl.where((columns < tl.load(record + 12))[None, :], part, 0.0)
    pointers, mask = part_pointers(bases, record, panel, ranks, columns)
    tl.store(pointers, part, mask=mask)


@triton.jit
def make_C(
    counters,
    bases,
    record,
    FROM: tl.constexpr,
    BY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FROM_LAYOUT: tl.constexpr,
    BY_LAYOUT: tl.constexpr,
    LAYOUT: tl.constexpr,
    INITIAL: tl.constexpr,
    INITIAL_LAYOUT: tl.constexpr,
    IN_PARTS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Claim tiles of C, compute and store them, until none is left."""
    chunks = tl.cdiv(tl.load(record + 12).to(tl.int32), BLOCK_R)
    tiles = chunks * tl.cdiv(tl.load(record + 7).to(tl.int32), BLOCK_C)
    claimed = counters + tl.load(record + 35)
    tile = tl.atomic_add(claimed, 1, sem="relaxed", scope="gpu").to(tl.int32)
    if tile < tiles:
        wait(counters, record, 1)
    while tile < tiles:
        rows = tile // chunks * BLOCK_C + tl.arange(0, BLOCK_C)
        ranks = tile % chunks * BLOCK_R + tl.arange(0, BLOCK_R)
        if IN_PARTS:
            count = tl.load(record + 14).to(tl.int32)
            values = sum_of_parts(bases, record, rows, ranks, count, BLOCK_C, BLOCK_R, 8)
        else:
            values = product(
                bases,
                record,
                0,
                rows,
                ranks,
                FROM,
                BY,
                DOT,
                PRECISION,
                FROM_LAYOUT,
                BY_LAYOUT,
                True,
                BLOCK_C,
                BLOCK_K,
                BLOCK_R,
                STAGES,
                INTERPRET,
            )
        # Padding must come out as zeros.
        values = tl.where((ranks < tl.load(record + 12))[None, :], values, 0.0)
        values = plus_initial(
            values, bases, record, rows, ranks, INITIAL, INITIAL_LAYOUT, HAS_INITIAL, INTERPRET
        )
        if HAS_OFFSET:
            values -= diagonal(bases, record, rows, ranks)
        out = load_view(record, 15, 7, 12, tl.float32, LAYOUT, bases)
        store_tile(out, rows, ranks, values, tl.float32, LAYOUT, INTERPRET)
        done(counters, record, 3, AMD)
        tile = tl.atomic_add(claimed, 1, sem="relaxed", scope="gpu").to(tl.int32)


@triton.jit
def plus_product(
    values,
    counters,
    bases,
    record,
    rows,
    ranks,
    OTHER: tl.constexpr,
    OTHER_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_C: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """values + other[rows, :] (alpha c − diag(S))[:, ranks]; waits until c is there."""
    alpha = tl.load(record + 33).to(tl.float32)
    other = load_view(record, 24, 7, 27, OTHER, OTHER_LAYOUT, bases)
    c = load_view(record, 28, 27, 12, tl.float32, 0, bases)
    if HAS_C:
        wait(counters, record, 31)
    # In short pieces, one at a time: beside the sum few registers are left.
    for piece in tl.range(0, other[4], 16, num_stages=1):
        inner = piece + tl.arange(0, 16)
        left = load_tile(other, rows, inner, OTHER_LAYOUT)
        right = tl.zeros((16, ranks.shape[0]), dtype=tl.float32)
        if HAS_C:
            right = alpha * tl.load(
                tile_pointers(c, inner, ranks, 0),
                mask=tile_mask(c, inner, ranks) & (tl.load(record + 28) != 0),
                other=0.0,
                cache_modifier=".cg",  # another program wrote it
            )
        if HAS_OFFSET:
            right -= diagonal(bases, record, inner, ranks)
        values += accurate_product(left, right, PRECISION, INTERPRET)
    return values


@triton.jit
def reduction(
    counters,
    bases,
    record,
    local,
    X: tl.constexpr,
    BASIS: tl.constexpr,
    OUT: tl.constexpr,
    OTHER: tl.constexpr,  # the basis of the other side
    INITIAL: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,  # precision of the products of what is added to the sum
    X_LAYOUT: tl.constexpr,
    BASIS_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    OTHER_LAYOUT: tl.constexpr,
    INITIAL_LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    C_OF_THIS: tl.constexpr,
    FROM: tl.constexpr,
    BY: tl.constexpr,
    C_DOT: tl.constexpr,
    C_PRECISION: tl.constexpr,
    FROM_LAYOUT: tl.constexpr,
    BY_LAYOUT: tl.constexpr,
    C_LAYOUT: tl.constexpr,
    C_INITIAL_LAYOUT: tl.constexpr,
    C_INTO_THIS: tl.constexpr,
    C_IN_PARTS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One (BLOCK_Q, BLOCK_R) tile: of a part, of the sum of parts, or of a result in one go.

    A result is the sum ± initial + other·(alpha c − diag(S)), those terms that a record has.
    """
    # Rank chunks innermost: they share a panel of x.
    chunks = tl.cdiv(tl.load(record + 12).to(tl.int32), BLOCK_R)
    panels = tl.cdiv(tl.load(record + 7).to(tl.int32), BLOCK_Q)
    part = local // (chunks * panels)
    panel = local // chunks % panels
    rows = panel * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ranks = local % chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    count = 0
    is_part = False
    if HAS_PARTS:
        count = tl.load(record + 14).to(tl.int32)
        is_part = (tl.load(record + 13) != 0) & (count == 0)
    if count > 0:
        values = sum_of_parts(bases, record, rows, ranks, count, BLOCK_Q, BLOCK_R, 1)
    elif HAS_SUM:
        values = product(
            bases,
            record,
            part,
            rows,
            ranks,
            X,
            BASIS,
            DOT,
            PRECISION,
            X_LAYOUT,
            BASIS_LAYOUT,
            TRANSPOSED,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_R,
            STAGES,
            INTERPRET,
        )
    else:
        values = tl.zeros((BLOCK_Q, BLOCK_R), dtype=tl.float32)
    # Padding must come out as zeros, and padding of the basis may be NaN.
    values = tl.where((ranks < tl.load(record + 12))[None, :], values, 0.0)
    if is_part:
        pointers, mask = part_pointers(bases, record, part, rows, ranks)
        tl.store(pointers, values, mask=mask)
    else:
        values = plus_initial(
            values, bases, record, rows, ranks, INITIAL, INITIAL_LAYOUT, HAS_INITIAL, INTERPRET
        )
        if C_INTO_THIS:  # noqa: SIM102 (the outer test is taken while compiling)
            if tl.load(record + 36) != 0:
                make_C(
                    counters,
                    bases,
                    record + tl.load(record + 36),
                    FROM,
                    BY,
                    C_DOT,
                    C_PRECISION,
                    FROM_LAYOUT,
                    BY_LAYOUT,
                    C_LAYOUT,
                    INITIAL,
                    C_INITIAL_LAYOUT,
                    C_IN_PARTS,
                    HAS_OFFSET,
                    HAS_INITIAL,
                    BLOCK_C,
                    BLOCK_K,
                    BLOCK_R,
                    STAGES,
                    AMD,
                    INTERPRET,
                )
        if HAS_OFFSET or C_INTO_THIS:
            values = plus_product(
                values,
                counters,
                bases,
                record,
                rows,
                ranks,
                OTHER,
                OTHER_LAYOUT,
                EXACT,
                HAS_OFFSET,
                C_INTO_THIS,
                INTERPRET,
            )
        out = load_view(record, 15, 7, 12, OUT, OUT_LAYOUT, bases)
        store_tile(out, rows, ranks, values, OUT, OUT_LAYOUT, INTERPRET)
        if C_OF_THIS:  # noqa: SIM102
            if tl.load(record + 35) != 0:
                store_part_of_C(
                    bases,
                    record + tl.load(record + 35),
                    panel,
                    ranks,
                    FROM,
                    BY,
                    C_DOT,
                    C_PRECISION,
                    FROM_LAYOUT,
                    BY_LAYOUT,
                    BLOCK_K,
                    BLOCK_R,
                    STAGES,
                    AMD,
                    INTERPRET,
                )
