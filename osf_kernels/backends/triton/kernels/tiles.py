"""What the kernels share on the device: the tile scheduler's search, matrix views, casts.

Imports triton at the top, so import it only from code that has asked ``unavailable_reason``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_problem(starts, problems, tile):
    """Index of the problem that owns ``tile``: the last one with starts[p] <= tile."""
    low = tile * 0
    high = low + problems
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def load_address(bases, record, FIELD: tl.constexpr):
    """An address of a record: 48 bits behind the base whose number is in the bits above.

    Without ``bases`` a record has addresses as they are.
    """
    place = tl.load(record + FIELD)
    if bases is not None:
        place = tl.load(bases + (place >> 48)) + (place & 0xFFFFFFFFFFFF)
    return place


@triton.jit
def load_view(
    record,
    FIELD: tl.constexpr,  # address, stride along rows, stride along columns
    ROWS: tl.constexpr,  # field of the number of rows
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,  # views.Layout
    bases=None,
):
    """A matrix of a record, to be read before any loop over its tiles.

    The alignment hints must stand on the loads themselves: a hint on the argument of a jitted
    function is lost when that is inlined.
    """
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    base = load_address(bases, record, FIELD).to(tl.pointer_type(DTYPE))
    row_stride = tl.load(record + FIELD + 1)
    column_stride = tl.load(record + FIELD + 2)
    # No dimension passes 2³¹; offsets do, so strides and addresses stay int64.
    row_count = tl.load(record + ROWS).to(tl.int32)
    column_count = tl.load(record + COLUMNS).to(tl.int32)
    if LAYOUT == 1 or LAYOUT == 5 or LAYOUT == 7:
        base = tl.multiple_of(base, 16)
        row_stride = tl.multiple_of(row_stride, VECTOR)
    if LAYOUT == 2 or LAYOUT == 6 or LAYOUT == 8:
        base = tl.multiple_of(base, 16)
        column_stride = tl.multiple_of(column_stride, VECTOR)
    if LAYOUT == 1:
        column_count = tl.multiple_of(column_count, VECTOR)
    if LAYOUT == 2:
        row_count = tl.multiple_of(row_count, VECTOR)
    return base, row_stride, column_stride, row_count, column_count


@triton.jit
def turned(view):
    """The transpose of a view."""
    return view[0], view[2], view[1], view[4], view[3]


@triton.jit
def tile_pointers(view, rows, columns, LAYOUT: tl.constexpr):
    """Addresses of the tile rows[:, None], columns[None, :] of a view."""
    wide_rows = rows.to(tl.int64)[:, None]
    wide_columns = columns.to(tl.int64)[None, :]
    if LAYOUT == 1 or LAYOUT == 3 or LAYOUT == 5 or LAYOUT == 7:
        pointers = view[0] + wide_rows * view[1] + wide_columns
    elif LAYOUT == 2 or LAYOUT == 4 or LAYOUT == 6 or LAYOUT == 8:
        pointers = view[0] + wide_columns * view[2] + wide_rows
    else:
        pointers = view[0] + wide_rows * view[1] + wide_columns * view[2]
    return pointers


@triton.jit
def tile_mask(view, rows, columns):
    """Which elements of a tile exist."""
    return (rows < view[3])[:, None] & (columns < view[4])[None, :]


@triton.jit
def load_mask(view, rows, columns, LAYOUT: tl.constexpr):
    """Which elements of a tile are read: all that exist, and the padding of padded lines.

    With it 16 bytes are read or not as one.
    """
    VECTOR: tl.constexpr = 128 // view[0].dtype.element_ty.primitive_bitwidth
    row_end = view[3]
    column_end = view[4]
    if LAYOUT == 5 or LAYOUT == 7:
        column_end = tl.cdiv(column_end, VECTOR) * VECTOR
    if LAYOUT == 6 or LAYOUT == 8:
        row_end = tl.cdiv(row_end, VECTOR) * VECTOR
    return (rows < row_end)[:, None] & (columns < column_end)[None, :]


@triton.jit
def load_tile(view, rows, columns, LAYOUT: tl.constexpr, CLEAR: tl.constexpr = True):
    """A tile of a view in its own dtype, zero outside of the matrix.

    Without CLEAR, padding comes as it is: for a product's rows and columns that are not stored.
    """
    values = tl.load(
        tile_pointers(view, rows, columns, LAYOUT),
        mask=load_mask(view, rows, columns, LAYOUT),
        other=0.0,
    )
    if CLEAR and LAYOUT == 5:
        values = tl.where((columns < view[4])[None, :], values, 0.0)
    if CLEAR and LAYOUT == 6:
        values = tl.where((rows < view[3])[:, None], values, 0.0)
    return values


@triton.jit
def store_tile(
    view,
    rows,
    columns,
    values,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
    LAST: tl.constexpr = False,
):
    """Write a float32 tile of a view, rounded once to its dtype.

    Where a view's padding holds zeros it is written too: values beyond the matrix must be zero.
    What is stored LAST nothing reads again: in L2 it makes room first.
    """
    if LAYOUT == 7 or LAYOUT == 8:
        mask = load_mask(view, rows, columns, LAYOUT)
    else:
        mask = tile_mask(view, rows, columns)
    tl.store(
        tile_pointers(view, rows, columns, LAYOUT),
        narrow(values, DTYPE, INTERPRET),
        mask=mask,
        eviction_policy="evict_first" if LAST else "",
    )


@triton.jit
def operand(values, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """A loaded tile as an operand of ``tl.dot``.

    The interpreter multiplies the raw bits of bfloat16 (and truncates where it casts), so there
    every operand is rounded as the device would round it and then widened to float32.
    """
    if INTERPRET:
        return widen(narrow(values, DTYPE, INTERPRET), INTERPRET)
    return values.to(DTYPE)


@triton.jit
def widen(values, INTERPRET: tl.constexpr):
    """To float32, exactly."""
    if INTERPRET and values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def narrow(values, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """To DTYPE, rounded to the nearest, ties to even."""
    if INTERPRET and (values.dtype == tl.bfloat16 or tl.bfloat16 == DTYPE):
        if values.dtype == DTYPE:
            return values
        wide = widen(values, INTERPRET)
        if tl.bfloat16 != DTYPE:
            return wide.to(DTYPE)
        bits = wide.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(wide != wide, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def dot_apart(left, right, PRECISION: tl.constexpr):
    """left·right in an accumulator of its own, for the caller to add to a running sum.

    NVIDIA's tensor cores truncate where they add (Fasi, Higham, Mikaitis and Pranesh 2021,
    PeerJ Computer Science 7:e330), so a long sum kept in them drifts toward zero with every
    step; added apart, it is rounded to nearest. Modelled so, a sum of 16384 random products is
    off by 7e-5 of its size kept in, by 7e-7 added apart every 64 (in float32 one by one: 6e-6).
    The last argument is void for these dtypes, but not being 0 it keeps the compiler from taking
    the caller's addition back into the product.
    """
    return tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)


@triton.jit
def leading_bits(values):
    """The sign, the exponent and the first eight bits of the significand: exact in bfloat16.

    Cut off, not rounded: rounding would take values next to the largest float32 to infinity.
    """
    bits = values.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def accurate_product(left, right, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """left·right of two loaded tiles in float32 accuracy, in an accumulator of its own.

    A 16-bit left factor meets the float32 right one as bfloat16 pieces, all products of which
    are exact in float32. Three pieces of eight bits hold the 24 of a float32; a bfloat16 is one
    piece, a float16 (11 bits, and every exponent of it) two. float16 pieces of a float32 would
    be as many but need its scale known first. Small products are added first.
    """
    if left.dtype == tl.float32:
        return dot_apart(left, right, PRECISION)
    high = leading_bits(right)
    rest = right - high
    middle = leading_bits(rest)
    low = operand(rest - middle, tl.bfloat16, INTERPRET)
    high = operand(high, tl.bfloat16, INTERPRET)
    middle = operand(middle, tl.bfloat16, INTERPRET)
    if left.dtype == tl.float16:
        wide = widen(left, INTERPRET)
        first = leading_bits(wide)
        second = operand(wide - first, tl.bfloat16, INTERPRET)
        first = operand(first, tl.bfloat16, INTERPRET)
        product = dot_apart(second, low, "ieee")
        product = tl.dot(second, middle, product)
        product = tl.dot(first, low, product)
        product = tl.dot(second, high, product)
    else:
        first = operand(left, tl.bfloat16, INTERPRET)
        product = dot_apart(first, low, "ieee")
    product = tl.dot(first, middle, product)
    return tl.dot(first, high, product)
