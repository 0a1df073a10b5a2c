"""A list of matrices projected in one launch: coefficients, what corrects them, and updates.

The host writes what is to be done as tasks in an order (``tasks``), so that of a matrix the update
finds in L2 what the coefficients have read. A task is a tile of a sum (``reduction``) or a panel
of an update (``update``); its record says of what, and for which counter it waits. A launch is
compiled for the kinds of tasks that it has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduction import reduction
from .tasks import claim, done, leave, wait
from .update import update

__all__ = ["projection_kernel"]


@triton.jit(do_not_specialize=["tasks", "counters"])
def projection_kernel(
    meta,  # int64: counters, then 0 and the addresses of the arguments
    constant,  # int64: of each task where its record is and which tile of it, then the records
    counters,  # how many
    tasks,
    X: tl.constexpr,
    U: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,  # Aᵀ (n, r)
    B: tl.constexpr,
    INITIAL: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    U_LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    B_LAYOUT: tl.constexpr,
    A_INITIAL_LAYOUT: tl.constexpr,
    B_INITIAL_LAYOUT: tl.constexpr,
    # C = A V, or Cᵀ = Bᵀ U: of the tiles of A or B, or from what they have stored.
    C_OF_A: tl.constexpr,
    C_OF_B: tl.constexpr,
    C_INTO_A: tl.constexpr,  # A is corrected by it, or made of it
    C_INTO_B: tl.constexpr,
    C_IN_PARTS: tl.constexpr,
    FROM: tl.constexpr,
    BY: tl.constexpr,
    C_DOT: tl.constexpr,
    C_PRECISION: tl.constexpr,
    FROM_LAYOUT: tl.constexpr,
    BY_LAYOUT: tl.constexpr,
    C_LAYOUT: tl.constexpr,
    C_INITIAL_LAYOUT: tl.constexpr,
    EXACT: tl.constexpr,
    OUT: tl.constexpr,
    READ: tl.constexpr,  # x of the update
    L1: tl.constexpr,
    R1: tl.constexpr,
    L2: tl.constexpr,
    R2: tl.constexpr,
    ADDEND: tl.constexpr,
    UPDATE_DOT: tl.constexpr,
    UPDATE_PRECISION: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    READ_LAYOUT: tl.constexpr,
    L1_LAYOUT: tl.constexpr,
    R1_LAYOUT: tl.constexpr,
    L2_LAYOUT: tl.constexpr,
    R2_LAYOUT: tl.constexpr,
    ADDEND_LAYOUT: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_SUM: tl.constexpr,  # over x, of A or B
    HAS_PARTS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    NEGATIVE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REDUCTION_STAGES: tl.constexpr,
    UPDATE_STAGES: tl.constexpr,
    AMD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    bases = meta + counters
    task = claim(meta)
    while task < tasks:
        entry = tl.load(constant + task)
        record = constant + tasks + (entry >> 32)
        local = entry.to(tl.int32)
        following = claim(meta)
        kind = tl.load(record)
        wait(meta, record, 1)
        if HAS_A:  # noqa: SIM102 (the outer tests are taken while compiling)
            if kind == 0:
                reduction(
                    meta,
                    bases,
                    record,
                    local,
                    X,
                    U,
                    A,
                    V,
                    INITIAL,
                    DOT,
                    PRECISION,
                    EXACT,
                    X_LAYOUT,
                    U_LAYOUT,
                    A_LAYOUT,
                    V_LAYOUT,
                    A_INITIAL_LAYOUT,
                    True,
                    C_OF_A,
                    FROM,
                    BY,
                    C_DOT,
                    C_PRECISION,
                    FROM_LAYOUT,
                    BY_LAYOUT,
                    C_LAYOUT,
                    C_INITIAL_LAYOUT,
                    C_INTO_A,
                    C_IN_PARTS,
                    HAS_SUM,
                    HAS_PARTS,
                    HAS_OFFSET,
                    HAS_INITIAL,
                    BLOCK_C,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_R,
                    REDUCTION_STAGES,
                    AMD,
                    INTERPRET,
                )
        if HAS_B:  # noqa: SIM102
            if kind == 1:
                reduction(
                    meta,
                    bases,
                    record,
                    local,
                    X,
                    V,
                    B,
                    U,
                    INITIAL,
                    DOT,
                    PRECISION,
                    EXACT,
                    X_LAYOUT,
                    V_LAYOUT,
                    B_LAYOUT,
                    U_LAYOUT,
                    B_INITIAL_LAYOUT,
                    False,
                    C_OF_B,
                    FROM,
                    BY,
                    C_DOT,
                    C_PRECISION,
                    FROM_LAYOUT,
                    BY_LAYOUT,
                    C_LAYOUT,
                    C_INITIAL_LAYOUT,
                    C_INTO_B,
                    C_IN_PARTS,
                    HAS_SUM,
                    HAS_PARTS,
                    HAS_OFFSET,
                    HAS_INITIAL,
                    BLOCK_C,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_R,
                    REDUCTION_STAGES,
                    AMD,
                    INTERPRET,
                )
        if HAS_UPDATE:  # noqa: SIM102
            if kind == 3:
                update(
                    bases,
                    record,
                    local,
                    OUT,
                    READ,
                    L1,
                    R1,
                    L2,
                    R2,
                    ADDEND,
                    UPDATE_DOT,
                    UPDATE_PRECISION,
                    OUT_LAYOUT,
                    READ_LAYOUT,
                    L1_LAYOUT,
                    R1_LAYOUT,
                    L2_LAYOUT,
                    R2_LAYOUT,
                    ADDEND_LAYOUT,
                    HAS_FIRST,
                    HAS_SECOND,
                    HAS_ADDEND,
                    NEGATIVE,
                    WHOLE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                    UPDATE_STAGES,
                    INTERPRET,
                )
        done(meta, record, 3, AMD)
        task = following
    leave(meta, counters, 256)
