"""The numbers that are tuned to a CPU, each with the measurement that it comes from.

All of them were measured on two cores, with float32 where nothing else is said. Where a number
isn't for CPUs alone, other devices take it until it is measured there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def looks_are_free(X: Tensor) -> bool:
    """Whether the host may decide by the values of a tensor: on a CPU, where nothing waits."""
    return X.device.type == "cpu"


# --- projections ---------------------------------------------------------------------------

# FLOPs in the time of one byte: two AVX-512/AMX cores do 0.19 TFLOP/s in float32 and 0.6 in
# bfloat16 against copies of 16 GB/s, of which large in-place updates reach 25
# (bench/results/projection_cpu.csv).
_FLOPS_PER_BYTE = {"bfloat16": 24.0}
_FLOPS_PER_BYTE_ELSE = 12.0
# A matrix this small stays in the caches, where passes over it cost nothing beside the calls. Time
# of dual over that of sequential: fp32 1.0-2 at 384² to 2048², 0.9 at 3072²; bf16 1.0-1.4 at 384²
# to 1024², 0.7-0.98 at 2048² with r ≤ n/8.
_CACHE_BYTES = {"bfloat16": 4 * 2**20}
_CACHE_BYTES_ELSE = 32 * 2**20

# Without a kernel of our own, two updates joined into one cost a copy of their factors and save a
# read and a write of g: worth it while the joined rank is under this part of the smaller side.
JOIN_LIMIT = 0.25

# Both sides in turn on all of g, as a person writes the formula, err less for a gradient that lies
# where both sides hold. That is taken where it costs no more than this beside the fewest products:
# so many FLOPs (3 µs of a core), or this part of them; in float64 always.
IN_TURN_FLOPS = 3 * 10**5
IN_TURN_PART = 0.1

# A list runs so many elements at a time: matrices that are converted would take a model's memory
# again, and would leave the cache between one call and the next.
GROUP_ELEMENTS = 2**18

# bfloat16: Uᵀ x took 0.65 of its time with a copy of Uᵀ at 4096² and ranks 64 to 819 (but 1.1 to
# 1.7 of a smaller x).
COPIED_FROM = 2**23


# x V, or xᵀ U, of at most so many columns shows errors of U Uᵀ (x V) in float32: it is summed in
# float64. Of many columns they are random, and no larger than those of x V itself; a few, which
# BLAS sums one product after another, erred up to 12 times as much as eager torch.
NARROW = 32

# g V, of which Uᵀ then cancels the most, is summed so many products at a time, where g has at most
# SUMMED_TO columns. MKL on a Sapphire Rapids sums up to 384 one after another: of g along one
# direction that V holds and U doesn't, the error of U (Uᵀ (g V)) Vᵀ, in rounding of g, was
#     m, n, r, k         eager   384     150     96     38 products at a time
#     64, 256, 40, 32    .49     4.3     1.7     1.3    .9
#     256, 300, 248, 8   .62     4.0     2.2     1.4    .8
#     300, 300, 100, 20  .59     2.4     1.1     .9     .6
#     1024, 1024, 256, 64  .84   1.4     1.0     1.0    .7
# It costs 4 µs for each part.
SUMMED = 96
SUMMED_TO = 1024


def flops_per_byte(dtype: str, size: int) -> float:
    """What a pass over a matrix of ``size`` bytes costs, in FLOPs a byte."""
    if size <= _CACHE_BYTES.get(dtype, _CACHE_BYTES_ELSE):
        return 0.0
    return _FLOPS_PER_BYTE.get(dtype, _FLOPS_PER_BYTE_ELSE)


# x F with a width of F that isn't a multiple of this many columns is computed as (Fᵀ xᵀ)ᵀ, where
# the odd size is of the rows: for 608 × 384 by 77, 115, 154 columns in .74, .82, .91 of the time,
# at 2560 rows .69, .84, .90; of 192 columns it takes 1.0 to 1.16 times as long.
WHOLE_VECTORS = 16


def is_faster_transposed(m: int, n: int) -> bool:
    """Whether aᵀ b of (T, m) and (T, n) is computed as (bᵀ a)ᵀ, so that BLAS writes n rows.

    A width that is no multiple of WHOLE_VECTORS, here called odd, goes into the rows, and of two
    odd or two even ones the smaller. Time with the smaller one in the rows over that with the
    larger, by MKL 2024.2 on two AVX-512 cores (matrices not in the caches):

        T      384, 80   1536, 80   384, 192   1536, 192   384, 304   1536, 304   1344, 384
        320    .89       .68        1.01       1.01        .98        .93         .99
        640    .89       .70        1.01       1.01        .99        .92         .99
        1280   .88       .70        1.01       1.00        1.01       .94         .99
        2560   .86       .67        .95        .79         .94        .85         .94
        5120   .87       .59        .95        .75         .91        .79         .90

    Of odd ones, at 640 and 2560: 77, 1459 .68 and .66; 115, 307 .94 and .88. With the odd one of
    the rows over with the even one: 384, 77 .61 and .57; 1536, 115 .64 and .61; 1345, 384 .95 and
    .97.
    """
    is_odd = bool(m % WHOLE_VECTORS), bool(n % WHOLE_VECTORS)
    return is_odd[1] if is_odd[0] != is_odd[1] else n < m


# --- truncated_svd by method ---------------------------------------------------------------


class Thresholds(NamedTuple):
    """Where one method of truncated_svd gives way to another on a kind of device.

    Attributes:
        krylov_ratio: upper limit of rank / min(m, n) for "randomized" at min(m, n) = 1024. It grows
            as the square root of min(m, n): up to it a Krylov space of three times the rank is
            built in less time than the Gram matrix is decomposed. Products of larger matrices run
            at a higher rate, eigenvectors don't.
        krylov_largest: upper limit of rank / min(m, n) for "randomized" at any size.
        krylov_size: lower limit of min(m, n) for "randomized". Below it the many small products of
            the iterations take longer than one decomposition.
        batch: how many matrices in one tensor have ``batch_size`` and ``batch_gain`` apply, since
            small products cost a batch less.
        batch_size: takes the place of krylov_size for such a batch.
        batch_gain: factor on krylov_ratio for such a batch.
        deflation_ratio: lower limit of rank / min(m, n) for "deflated". From it on the low block is
            small enough to be worth its two wide products.
    """

    krylov_ratio: float
    krylov_largest: float
    krylov_size: int
    batch: int
    batch_size: int
    batch_gain: float
    deflation_ratio: float


# From bench/results/refresh_auto_cpu.csv, which ``python -m bench refresh-auto`` wrote: σᵢ = i^-½,
# the least time to 1 − overlap ≤ 1e-3, up to 4096 × 1024. Low bases (rows of task "complement")
# cost the methods alike, and move no crossing. A batch does: of eight matrices of 256² at ρ = .1 a
# Krylov space takes .49 of the Gram matrix's time, of one 1.03 times.
THRESHOLDS = Thresholds(
    krylov_ratio=0.16,
    krylov_largest=0.25,
    krylov_size=256,
    batch=8,
    batch_size=128,
    batch_gain=1.5,
    deflation_ratio=0.35,
)

# --- memory --------------------------------------------------------------------------------

# The bytes that a group may take beside its results where no cap is given, so that a few matrices
# at a time stay in cache; and in multiples of one matrix, so that a large one has room for a Krylov
# space of a fourth of its columns.
WORKSPACE_BYTES = 1 << 28
WORKSPACE_OF_ONE = 26

# --- products ------------------------------------------------------------------------------

# Widths at which A Q takes .6 to .8 of the time where Q lies in columns, with the copy.
WANTED_IN_COLUMNS = range(32, 56)
# Blocks a side of a Gram matrix that are multiplied one triangle at a time: 9/16 of the products,
# of which BLAS at 2048² makes 0.7 of the time; fewer blocks multiply more, more run slower. Below
# GRAM_BLOCKED_FROM columns half of the matrix takes longer than the whole.
GRAM_BLOCKS = 8
GRAM_BLOCKED_FROM = 1024
# From so many columns it pays in Cholesky QR to skip the half of a product that is zero or known.
TRIANGLE_BLOCKED_FROM = 512
# Numbers that are turned to float64 at a time, 1 MB: they stay in a core's cache.
DOUBLED_AT_ONCE = 1 << 17
# Columns that are factorized by Householder reflections; between blocks everything is products.
HOUSEHOLDER_BLOCK = 64

# --- Krylov spaces and residuals -----------------------------------------------------------

# A Krylov space of three times the rank in some twelve blocks: on σᵢ = i^-½ at n = 2048 it holds
# .9999 of the leading subspace, in less time than fewer wider blocks take to .999.
KRYLOV_STEPS = 12
BLOCK_MULTIPLE = 8
# Up to so many columns one product with all of the last block takes no longer than three with the
# eight probes of its residual (2048²: 32 columns 2.1 to 3.2 ms, the three 4.2).
WHOLE_BLOCK = 48
# Columns and steps of the power iteration for a residual. Sixteen columns and one step come within
# 17 % of the norm of a 2048 × 1024 matrix of pure noise, the flattest of spectra (two steps: 10 %).
# Of one singular value of 2 to 3 beside r − 1 of one they see .93, .82, .63 for r = 64, 256, 1000
# in nine draws of ten, four steps all of it. Eight columns see .87, .67, .55 and take longer, 36 ms
# for 33: BLAS is slow with few columns.
RESIDUAL_PROBES = 16
RESIDUAL_STEPS = 1

# --- Gram matrices of steep spectra --------------------------------------------------------

# Columns below which a Gram matrix in float64 takes no longer than Lanczos steps beside one in
# float32.
LANCZOS_FROM = 256
# At λ_i = 1/i of 2048 six steps of 16 columns find 4 or 5 eigenvalues to rounding, seven 9, nine
# all sixteen. A step takes 3 ms of a second, and the lower the largest eigenvalue is set the less
# the eigensolver deflates: by 7 % of its time with sixteen. At λ_i = i^-1.4 six steps leave twice
# the residual that is allowed in float32 at rank n/2, seven two thirds of it. Couplings need the
# same width: BLAS takes six times as long for ten columns as for sixteen.
LANCZOS_BLOCK = 16
LANCZOS_STEPS = 7

# --- passes over results -------------------------------------------------------------------

# Numbers of a line whose norm is taken at once: torch's float32 norm of 4096² numbers is off by
# 7e-4, which ``captured`` would be too; norms of pieces, summed in float64, by 4e-9, in a half of
# the time (of equal numbers, the worst case, by 2e-6).
SUMMED_AT_ONCE = 4096
# Columns that lie 2048 numbers apart or so share a few lines of a cache: more at a time, and each
# number of a row is read from memory again (2048 × 1024: 12 ms at once, 3 by 64 columns).
TRANSPOSED_AT_ONCE = 64
