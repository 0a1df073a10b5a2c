"""Pinned tile configs: architecture × kernel × operand width × rank, chosen by rule, not search.

Every row is compiled ahead of time for its architecture by ``tests/triton/test_aot.py``, which
holds it to: tensor-core instructions, no spills, shared memory within the limit, and room for
``programs_per_sm`` of its programs on a processor side by side. None of the rows has been timed on
a GPU yet; ``OSF_AUTOTUNE=1`` searches :func:`candidates` instead.

Imports neither torch nor triton.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ARCHITECTURES",
    "FILL",
    "ONE_PASS_RANK_SUM",
    "Config",
    "Gram",
    "OnePass",
    "TwoPass",
    "Update",
    "candidates",
    "coefficients_config",
    "gram_config",
    "multiply_config",
    "shipped",
    "shipped_products",
    "sum_block",
    "update_config",
]


class OnePass(NamedTuple):
    """A and B from one read of x: strips of block_n columns, walked down block_m rows at a time."""

    block_m: int
    block_n: int
    block_r: int  # holds both r and k
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2


class TwoPass(NamedTuple):
    """x·basis as (block_q, block_r) tiles over block_k of the summed dimension a step."""

    block_q: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2


class Update(NamedTuple):
    """(block_m, block_n) tiles of out, block_r of a rank a step, group_m tiles down at a time."""

    block_m: int
    block_n: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2


class Gram(NamedTuple):
    """(block, block) tiles of a symmetric product, block_k of the summed dimension a step."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


Config = OnePass | TwoPass | Update | Gram

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

# Tiles a single matrix is split into at least, where its shape allows: about one a processor.
FILL = {"sm_80": 128, "sm_90": 128, "sm_100": 160, "gfx942": 304}
# A split is never shorter than this many rows (one_pass) or summed elements (two_pass): each
# costs a float32 part of the result, written and read again.
SHORTEST_SPLIT = 256

# Of a symmetric product: a tile of it is large, so its parts cost more.
SHORTEST_GRAM_SPLIT = 512
# Lists whose parts of symmetric products would take more (256 MB) are launched in slices.
GRAM_WORKSPACE_ELEMENTS = 1 << 26

# One read of x costs about 4 (r + k) / T bytes an element of partial sums for tile side T; two
# reductions read x once more, from L2 at best.
ONE_PASS_RANK_SUM = 64

# Keyed by the bytes of a dot operand, then by rank block, ascending; the last serves any rank
# (of one_pass: up to its block).
_ONE_PASS: dict[str, dict[int, tuple[OnePass, OnePass]]] = {
    # float32 operands 16 rows at a time: of 32 the pieces of TF32 alone fill 255 registers.
    "sm_80": {
        2: (OnePass(64, 256, 32, 8, 2, 1), OnePass(64, 128, 64, 8, 2, 1)),
        4: (OnePass(16, 64, 32, 8, 2, 1), OnePass(16, 64, 64, 8, 2, 1)),
    },
    "sm_90": {
        2: (OnePass(64, 256, 32, 8, 2, 2), OnePass(32, 128, 64, 8, 2, 2)),
        4: (OnePass(16, 64, 32, 8, 2, 1), OnePass(16, 64, 64, 8, 2, 1)),
    },
    "sm_100": {
        2: (OnePass(64, 256, 32, 8, 2, 1), OnePass(64, 128, 64, 8, 2, 2)),
        4: (OnePass(64, 64, 32, 8, 1, 1), OnePass(32, 64, 64, 8, 1, 1)),
    },
    "gfx942": {
        2: (OnePass(64, 128, 32, 8, 1, 1), OnePass(64, 128, 64, 8, 1, 1)),
        4: (OnePass(32, 64, 32, 8, 1, 1), OnePass(32, 64, 64, 8, 1, 1)),
    },
}

_TWO_PASS: dict[str, dict[int, tuple[TwoPass, TwoPass]]] = {
    # The small tile of 16-bit operands: four warps spill, and with three stages so many registers
    # are taken that two programs do not fit side by side.
    "sm_80": {
        2: (TwoPass(128, 64, 64, 8, 2, 2), TwoPass(128, 64, 128, 8, 3, 1)),
        4: (TwoPass(64, 32, 64, 4, 3, 2), TwoPass(128, 32, 64, 8, 3, 1)),
    },
    "sm_90": {
        2: (TwoPass(128, 64, 64, 4, 3, 3), TwoPass(128, 64, 128, 8, 4, 1)),
        4: (TwoPass(64, 32, 64, 4, 3, 2), TwoPass(128, 32, 64, 8, 3, 1)),
    },
    "sm_100": {
        2: (TwoPass(128, 64, 64, 4, 3, 2), TwoPass(128, 64, 128, 8, 4, 1)),
        4: (TwoPass(64, 32, 64, 4, 3, 2), TwoPass(128, 32, 64, 8, 3, 1)),
    },
    "gfx942": {
        2: (TwoPass(128, 64, 64, 8, 2, 1), TwoPass(128, 32, 128, 8, 2, 1)),
        4: (TwoPass(64, 32, 64, 4, 2, 2), TwoPass(128, 32, 64, 8, 2, 1)),
    },
}

_UPDATE: dict[str, dict[int, tuple[Update, Update]]] = {
    "sm_80": {
        2: (Update(64, 128, 32, 8, 4, 2, 2), Update(64, 128, 64, 8, 8, 2, 1)),
        4: (Update(64, 64, 16, 8, 4, 2, 2), Update(64, 128, 16, 8, 8, 2, 1)),
    },
    # One stage where one chunk holds the rank. With two, what clears a padded rank's last chunk
    # takes so many registers that two programs do not fit side by side.
    "sm_90": {
        2: (Update(128, 64, 32, 8, 8, 1, 2), Update(128, 128, 64, 8, 8, 2, 1)),
        4: (Update(64, 64, 32, 8, 4, 1, 2), Update(64, 128, 16, 8, 8, 2, 1)),
    },
    "sm_100": {
        2: (Update(128, 64, 32, 8, 8, 2, 2), Update(128, 128, 64, 8, 8, 2, 1)),
        4: (Update(64, 64, 32, 8, 4, 1, 2), Update(64, 128, 32, 8, 8, 2, 1)),
    },
    "gfx942": {
        2: (Update(128, 128, 32, 8, 8, 1, 1), Update(128, 128, 64, 8, 8, 1, 1)),
        4: (Update(64, 64, 32, 8, 4, 1, 2), Update(64, 128, 32, 8, 8, 1, 1)),
    },
}
# x·basis in float32 accuracy, keyed by the dtype of x, then by rank block as above.
_MULTIPLY: dict[str, dict[str, tuple[TwoPass, TwoPass]]] = {
    "sm_80": {
        "bfloat16": (TwoPass(64, 32, 64, 4, 2, 3), TwoPass(128, 16, 128, 8, 3, 1)),
        "float16": (TwoPass(64, 32, 64, 4, 2, 2), TwoPass(128, 32, 64, 8, 2, 1)),
        "float32": (TwoPass(64, 32, 64, 4, 2, 2), TwoPass(128, 32, 64, 8, 2, 1)),
    },
    "sm_90": {
        "bfloat16": (TwoPass(128, 64, 64, 4, 2, 2), TwoPass(128, 64, 128, 8, 2, 1)),
        "float16": (TwoPass(128, 64, 64, 4, 2, 2), TwoPass(128, 64, 128, 8, 2, 1)),
        "float32": (TwoPass(64, 32, 64, 4, 2, 3), TwoPass(128, 32, 64, 8, 2, 1)),
    },
    # A product of two pieces has an accumulator of its own in tensor memory (512 columns).
    "sm_100": {
        "bfloat16": (TwoPass(128, 64, 64, 4, 2, 2), TwoPass(128, 64, 128, 8, 2, 1)),
        "float16": (TwoPass(128, 64, 64, 4, 2, 1), TwoPass(128, 32, 64, 8, 2, 1)),
        "float32": (TwoPass(64, 32, 64, 4, 2, 2), TwoPass(128, 32, 64, 8, 2, 1)),
    },
    "gfx942": {
        "bfloat16": (TwoPass(64, 32, 64, 4, 1, 2), TwoPass(128, 32, 64, 8, 1, 1)),
        "float16": (TwoPass(64, 32, 64, 4, 1, 2), TwoPass(128, 32, 64, 8, 1, 1)),
        "float32": (TwoPass(64, 32, 64, 4, 1, 2), TwoPass(128, 32, 64, 8, 1, 1)),
    },
}

# Keyed by the bytes of a dot operand, then by size, ascending; the last serves any size.
_GRAM: dict[str, dict[int, tuple[Gram, Gram]]] = {
    "sm_80": {
        2: (Gram(64, 64, 4, 3, 2), Gram(128, 32, 8, 3, 1)),
        4: (Gram(64, 32, 4, 2, 2), Gram(128, 16, 8, 2, 1)),
    },
    "sm_90": {
        2: (Gram(64, 64, 4, 3, 4), Gram(128, 64, 8, 3, 1)),
        4: (Gram(64, 32, 4, 2, 2), Gram(128, 32, 8, 1, 1)),
    },
    "sm_100": {
        2: (Gram(64, 64, 4, 3, 3), Gram(128, 64, 8, 3, 1)),
        4: (Gram(64, 32, 4, 2, 2), Gram(128, 32, 8, 1, 1)),
    },
    "gfx942": {
        2: (Gram(64, 64, 4, 1, 2), Gram(128, 32, 8, 1, 1)),
        4: (Gram(64, 32, 4, 1, 2), Gram(128, 16, 8, 1, 1)),
    },
}
# Where some row is not a multiple of 16 bytes every element has an address of its own, and the
# tiles above would spill; these serve every architecture and any width of operand.
_UNALIGNED_ONE_PASS = (OnePass(16, 32, 32, 8, 1, 1), OnePass(32, 32, 64, 8, 1, 1))
_UNALIGNED_TWO_PASS = TwoPass(64, 32, 32, 4, 1, 2)
_UNALIGNED_UPDATE = Update(64, 32, 16, 8, 4, 1, 2)
_UNALIGNED_MULTIPLY = TwoPass(64, 32, 32, 4, 1, 2)
# x is aligned, but the basis or the result beside it is not.
_RAGGED_MULTIPLY = TwoPass(64, 32, 64, 4, 1, 2)
_UNALIGNED_GRAM = Gram(64, 32, 8, 1, 1)
# Up to this rank the first row of _UPDATE serves, beyond it the second.
_SMALL_UPDATE_RANK = 32


def coefficients_config(
    architecture: str,
    operand_bytes: int,
    r: int,
    k: int,
    variant: str | None = None,
    aligned: bool = True,
) -> OnePass | TwoPass:
    """The pinned config of A = Uᵀx, B = xV at ranks r and k (0: that side is absent).

    Args:
        architecture: one of ARCHITECTURES.
        operand_bytes: width of a dot operand, 2 or 4.
        r, k: ranks.
        variant: "one_pass" or "two_pass" to override the rule.
        aligned: whether every matrix has rows or columns of whole, aligned 16-byte vectors.

    Raises:
        ValueError: one_pass asked for where it cannot serve (a side absent, or the rank beyond
            its block).
    """
    both = r > 0 and k > 0
    if variant is None:
        variant = "one_pass" if both and r + k <= ONE_PASS_RANK_SUM else "two_pass"
    if variant == "one_pass":
        rows = _ONE_PASS[architecture][operand_bytes] if aligned else _UNALIGNED_ONE_PASS
        if not both or max(r, k) > rows[-1].block_r:
            raise ValueError(
                "osf_kernels.backends.triton: expected both sides and ranks of at most "
                f"{rows[-1].block_r} for one_pass, got r={r}, k={k}; use two_pass"
            )
        return next(row for row in rows if max(r, k) <= row.block_r)
    if variant == "two_pass":
        if not aligned:
            return _UNALIGNED_TWO_PASS
        small, large = _TWO_PASS[architecture][operand_bytes]
        return small if max(r, k) <= small.block_r else large
    raise ValueError(
        "osf_kernels.backends.triton: expected variant to be 'one_pass' or 'two_pass', "
        f"got {variant!r}"
    )


def two_pass(architecture: str) -> list[TwoPass]:
    """Every config of two reductions that an architecture can be given."""
    rows = [row for pair in _TWO_PASS[architecture].values() for row in pair]
    return [*rows, _UNALIGNED_TWO_PASS]


def update_config(architecture: str, operand_bytes: int, rank: int, aligned: bool = True) -> Update:
    """The pinned config of a rank-``rank`` update (the larger rank of its two terms)."""
    if not aligned:
        return _UNALIGNED_UPDATE
    small, large = _UPDATE[architecture][operand_bytes]
    return small if rank <= _SMALL_UPDATE_RANK else large


def multiply_config(
    architecture: str, dtype: str, rank: int, aligned: bool = True, whole: bool = True
) -> TwoPass:
    """The pinned config of x·basis in float32 accuracy, ``rank`` columns wide.

    Args:
        dtype: "bfloat16", "float16" or "float32", of x.
        aligned: whether x has rows or columns of whole, aligned 16-byte vectors.
        whole: whether the basis and the result have.
    """
    if not aligned:
        return _UNALIGNED_MULTIPLY
    if not whole:
        return _RAGGED_MULTIPLY
    small, large = _MULTIPLY[architecture][dtype]
    return small if rank <= small.block_r else large


def gram_config(architecture: str, dtype: str, size: int, aligned: bool = True) -> Gram:
    """The pinned config of a symmetric product of ``size`` rows; arguments as above."""
    if not aligned:
        return _UNALIGNED_GRAM
    small, large = _GRAM[architecture][4 if dtype == "float32" else 2]
    return small if size <= small.block else large


def sum_block(config: Config) -> int:
    """Side of the square tiles in which the parts of a product are added.

    As large as a program's threads hold without spills: a claim takes about as long as reading a
    part of a tile.
    """
    return 64 if config.num_warps >= 8 else 32


def candidates(config: Config) -> list[Config]:
    """What a search tries besides a pinned config: its neighbours in stages, warps and tile."""
    nearby: list[Config] = [config]
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if stages >= 1:
            nearby.append(config._replace(num_stages=stages))
    for warps in (4, 8):
        if warps != config.num_warps:
            nearby.append(config._replace(num_warps=warps))
    if isinstance(config, (OnePass, Update)):
        nearby.append(config._replace(block_n=config.block_n // 2))
        nearby.append(config._replace(block_m=config.block_m * 2))
    elif isinstance(config, TwoPass):
        nearby.append(config._replace(block_q=config.block_q // 2))
        nearby.append(config._replace(block_k=config.block_k * 2))
    elif isinstance(config, Gram):
        nearby.append(config._replace(block=config.block // 2))
        nearby.append(config._replace(block_k=config.block_k * 2))
    return nearby


def shipped(architecture: str, aligned: bool = True) -> list[tuple[int, Config]]:
    """Every (operand bytes, config) a rule of this file can choose on an architecture."""
    rows: list[tuple[int, Config]] = []
    if not aligned:
        general = (*_UNALIGNED_ONE_PASS, _UNALIGNED_TWO_PASS, _UNALIGNED_UPDATE)
        return [(width, config) for width in (2, 4) for config in general]
    for table in (_ONE_PASS, _TWO_PASS, _UPDATE):
        for operand_bytes, configs in table[architecture].items():
            rows.extend((operand_bytes, config) for config in configs)
    return rows


def shipped_products(architecture: str, dtype: str, aligned: bool = True) -> list[TwoPass | Gram]:
    """Every config that the products in float32 accuracy of a dtype can be given."""
    if not aligned:
        return [_UNALIGNED_MULTIPLY, _UNALIGNED_GRAM]
    width = 4 if dtype == "float32" else 2
    return [*_MULTIPLY[architecture][dtype], *_GRAM[architecture][width]]


def architecture_of_capability(major: int, minor: int) -> str:
    """The row of the tables for an NVIDIA compute capability.

    Capabilities with no row of their own (8.6, 8.9, 12.x: 99 KB of shared memory) take sm_80's,
    whose tiles fit them.
    """
    if (major, minor) == (9, 0):
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_80"
