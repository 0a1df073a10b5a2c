"""Pinned tile configs: architecture × kernel × operand width × rank, chosen by rule, not search.

Every row is compiled ahead of time for its architecture by ``tests/triton/test_aot*.py``, which
holds it to: tensor-core instructions, no spills, shared memory within the limit, and room for
``programs_per_sm`` of its programs on a processor side by side. Those tests compile the dual form
of every row for every class of operands, every other form and pin of bfloat16, and those that hold
most of TF32, float32, padded rows and odd widths. None of the rows has been timed on a GPU yet;
``OSF_AUTOTUNE=1`` searches :func:`candidates` instead.

Imports neither torch nor triton.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from osf_kernels.gpu import ARCHITECTURES, architecture_of_capability

__all__ = [
    "ARCHITECTURES",
    "FILL",
    "Config",
    "Gram",
    "Math",
    "Multiply",
    "Projection",
    "architecture_of_capability",
    "beside_addend",
    "candidates",
    "gram_config",
    "multiply_config",
    "projection_config",
    "registers",
    "shipped",
    "shipped_products",
    "sum_block",
]


class Projection(NamedTuple):
    """Tiles of a projection's launch.

    Sums: (block_q, block_r) tiles, block_k of the summed dimension a step; block_q is a multiple of
    block_k. Updates: panels of block_m rows, block_n columns a step, ``strip`` columns a task.
    """

    block_q: int
    block_k: int
    block_r: int  # of a rank at once
    block_m: int
    block_n: int
    strip: int
    num_warps: int
    reduction_stages: int
    update_stages: int
    programs_per_sm: int = 1


class Multiply(NamedTuple):
    """x·basis as (block_q, block_r) tiles over block_k of the summed dimension a step."""

    block_q: int
    block_k: int
    block_r: int
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


Config = Projection | Multiply | Gram

# Tiles a single matrix is split into at least, where its shape allows: about one a processor.
FILL = {"sm_80": 128, "sm_86": 82, "sm_90": 128, "sm_100": 160, "gfx942": 304}
# Rows of a tile of C whose parts are added: few, so that several programs share what all wait for.
BLOCK_C = 16
# A split is never shorter than this many summed elements: each costs a float32 part of the result,
# written and read again.
SHORTEST_SPLIT = 256

# Of a symmetric product: a tile of it is large, so its parts cost more.
SHORTEST_GRAM_SPLIT = 512
# Lists whose parts of symmetric products would take more (256 MB) are launched in slices.
GRAM_WORKSPACE_ELEMENTS = 1 << 26

# How the products of a projection are taken: in bfloat16 alone, some in TF32 (which float16 needs
# where a coefficient may pass 65504), or some in float32 accuracy.
Math = Literal["bfloat16", "tf32", "float32"]

# Keyed by math: the first row that holds the rank at once serves it; the last serves any rank, in
# pieces.
_PROJECTION: dict[str, dict[Math, tuple[Projection, ...]]] = {
    "sm_80": {
        "bfloat16": (
            Projection(128, 64, 32, 256, 64, 512, 8, 3, 3),
            Projection(128, 64, 64, 256, 32, 512, 8, 3, 3),
            Projection(64, 64, 128, 128, 32, 512, 8, 3, 3),
            Projection(64, 64, 64, 128, 32, 512, 8, 3, 3),
        ),
        "tf32": (
            Projection(128, 32, 32, 128, 64, 512, 8, 3, 3),
            Projection(64, 32, 64, 64, 16, 512, 4, 3, 3, 2),
            Projection(64, 32, 32, 128, 32, 512, 8, 3, 3),
        ),
        "float32": (Projection(64, 32, 32, 64, 16, 512, 4, 3, 3, 2),),
    },
    # 99 KB of shared memory.
    "sm_86": {
        "bfloat16": (
            Projection(128, 64, 32, 128, 64, 512, 8, 3, 3),
            Projection(128, 64, 64, 128, 32, 512, 8, 3, 3),
            Projection(64, 64, 128, 128, 16, 512, 8, 3, 3),
            Projection(64, 32, 64, 64, 32, 512, 8, 3, 3),
        ),
        "tf32": (
            Projection(64, 32, 32, 64, 32, 512, 4, 3, 3),
            Projection(64, 32, 64, 64, 32, 512, 4, 3, 3),
            Projection(64, 16, 32, 128, 32, 512, 8, 3, 3),
        ),
        "float32": (Projection(64, 16, 32, 64, 16, 512, 4, 3, 3),),
    },
    "sm_90": {
        "bfloat16": (
            Projection(128, 64, 32, 256, 64, 704, 8, 4, 3),
            Projection(128, 64, 64, 256, 64, 704, 8, 4, 3),
            Projection(64, 64, 128, 128, 64, 512, 8, 3, 3),
            Projection(64, 64, 64, 128, 64, 512, 8, 3, 3),
        ),
        "tf32": (
            Projection(128, 32, 32, 128, 64, 512, 8, 3, 3),
            Projection(128, 32, 64, 128, 32, 512, 8, 3, 3),
            Projection(64, 32, 32, 64, 64, 512, 8, 3, 3),
        ),
        "float32": (
            Projection(64, 16, 32, 64, 16, 512, 4, 3, 3, 2),
            Projection(64, 16, 16, 64, 16, 512, 4, 3, 3, 2),
        ),
    },
    "sm_100": {
        "bfloat16": (
            Projection(128, 64, 32, 128, 128, 512, 8, 4, 3),
            Projection(128, 64, 64, 128, 128, 512, 8, 4, 3),
            # With all of rank 128 at once padded ranks spill.
            Projection(64, 64, 64, 64, 64, 512, 8, 3, 3),
        ),
        "tf32": (
            Projection(64, 16, 64, 64, 64, 512, 8, 3, 3),
            Projection(32, 32, 32, 64, 64, 512, 8, 3, 3),
        ),
        "float32": (Projection(64, 32, 32, 64, 64, 512, 8, 3, 3),),
    },
    "gfx942": {
        "bfloat16": (
            Projection(128, 32, 32, 128, 64, 512, 8, 1, 1),
            Projection(128, 32, 64, 128, 64, 512, 8, 1, 1),
        ),
        # Matrix cores that multiply float32 as it is, and no TF32.
        "float32": (Projection(64, 32, 32, 64, 64, 512, 8, 1, 1),),
    },
}
# x·basis in float32 accuracy, keyed by the dtype of x, then by rank block as above.
_MULTIPLY: dict[str, dict[str, tuple[Multiply, Multiply]]] = {
    "sm_80": {
        "bfloat16": (Multiply(64, 32, 64, 4, 2, 3), Multiply(128, 16, 128, 8, 3, 1)),
        "float16": (Multiply(64, 32, 64, 4, 2, 2), Multiply(128, 32, 64, 8, 2, 1)),
        "float32": (Multiply(64, 32, 64, 4, 2, 2), Multiply(128, 32, 64, 8, 2, 1)),
    },
    "sm_90": {
        "bfloat16": (Multiply(128, 64, 64, 4, 2, 2), Multiply(128, 64, 128, 8, 2, 1)),
        "float16": (Multiply(128, 64, 64, 4, 2, 2), Multiply(128, 64, 128, 8, 2, 1)),
        "float32": (Multiply(64, 32, 64, 4, 2, 3), Multiply(128, 32, 64, 8, 2, 1)),
    },
    # A product of two pieces has an accumulator of its own in tensor memory (512 columns).
    "sm_100": {
        "bfloat16": (Multiply(128, 64, 64, 4, 2, 2), Multiply(128, 64, 128, 8, 2, 1)),
        "float16": (Multiply(128, 64, 64, 4, 2, 1), Multiply(128, 32, 64, 8, 2, 1)),
        "float32": (Multiply(64, 32, 64, 4, 2, 2), Multiply(128, 32, 64, 8, 2, 1)),
    },
    "gfx942": {
        "bfloat16": (Multiply(64, 32, 64, 4, 1, 2), Multiply(128, 32, 64, 8, 1, 1)),
        "float16": (Multiply(64, 32, 64, 4, 1, 2), Multiply(128, 32, 64, 8, 1, 1)),
        "float32": (Multiply(64, 32, 64, 4, 1, 2), Multiply(128, 32, 64, 8, 1, 1)),
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
# Both fit 99 KB.
_MULTIPLY["sm_86"], _GRAM["sm_86"] = _MULTIPLY["sm_80"], _GRAM["sm_80"]

# Where some row is not a multiple of 16 bytes every element has an address of its own, and the
# tiles above would spill; these serve every architecture and any width of operand.
_UNALIGNED_PROJECTION: dict[Math, Projection] = {
    "bfloat16": Projection(64, 16, 32, 32, 32, 256, 4, 1, 1),
    "tf32": Projection(64, 32, 32, 64, 16, 256, 4, 1, 1),
    "float32": Projection(64, 16, 32, 32, 16, 256, 8, 1, 1),
}
_UNALIGNED_MULTIPLY = Multiply(64, 32, 32, 4, 1, 2)
# x is aligned, but the basis or the result beside it is not.
_RAGGED_MULTIPLY = Multiply(64, 32, 64, 4, 1, 2)
_UNALIGNED_GRAM = Gram(64, 32, 8, 1, 1)


def projection_config(architecture: str, math: Math, rank: int, aligned: bool = True) -> Projection:
    """The pinned config of a projection.

    Args:
        architecture: one of ARCHITECTURES.
        rank: the larger of its two.
        aligned: whether every matrix has rows or columns of whole, aligned 16-byte vectors.
    """
    if not aligned:
        return _UNALIGNED_PROJECTION[math]
    table = _PROJECTION[architecture]
    rows = table.get(math, table["float32"])
    return next((row for row in rows if rank <= row.block_r), rows[-1])


def beside_addend(config: Projection, width: float) -> Projection:
    """For updates that add a matrix, tiles of which are under way beside those of x.

    Half the columns a step, so that shared memory holds about as many bytes. ``tl.dot`` takes no
    fewer than 16 columns; there, one step fewer is under way.

    Args:
        width: bytes of an element of that matrix over those of x; 0 where none is added.
    """
    if not width or config.update_stages == 1:  # of one stage nothing is under way
        return config
    if width > 1:
        # With 64 summed elements a step, rank 64 of sm_100 spilled 8 bytes beside such a matrix.
        config = config._replace(block_k=max(16, config.block_k // 2))
    if config.block_n > 16:
        return config._replace(block_n=config.block_n // 2)
    return config._replace(update_stages=config.update_stages - 1)


def multiply_config(
    architecture: str, dtype: str, rank: int, aligned: bool = True, whole: bool = True
) -> Multiply:
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


def sum_block(config: Multiply | Gram) -> int:
    """Side of the square tiles in which the parts of a product are added.

    As large as a program's threads hold without spills: a claim takes about as long as reading a
    part of a tile.
    """
    return 64 if config.num_warps >= 8 else 32


def registers(config: Config) -> int:
    """Registers that a thread may hold where ``programs_per_sm`` programs share a processor.

    An NVIDIA processor has 65536. A thread can name 255, and a warp is given them 8 a thread.
    """
    threads = 32 * config.num_warps * config.programs_per_sm
    return min(255, 65536 // threads // 8 * 8)


def candidates(config: Config) -> list[Config]:
    """What a search tries besides a pinned config: its neighbours in stages, warps and tile."""
    nearby: list[Config] = [config]
    stages = ("reduction_stages", "update_stages")
    for name in stages if isinstance(config, Projection) else ("num_stages",):
        for number in (getattr(config, name) - 1, getattr(config, name) + 1):
            if number >= 1:
                nearby.append(config._replace(**{name: number}))
    for warps in (4, 8):
        if warps != config.num_warps:
            # More warps, fewer programs: each thread keeps its registers.
            programs = max(1, config.programs_per_sm * config.num_warps // warps)
            programs = min(config.programs_per_sm, programs)
            nearby.append(config._replace(num_warps=warps, programs_per_sm=programs))
    if isinstance(config, Projection):
        nearby.append(config._replace(block_n=config.block_n // 2))
        if config.block_q // 2 % config.block_k == 0:
            nearby.append(config._replace(block_q=config.block_q // 2))
    elif isinstance(config, Multiply):
        nearby.append(config._replace(block_q=config.block_q // 2))
        nearby.append(config._replace(block_k=config.block_k * 2))
    else:
        nearby.append(config._replace(block=config.block // 2))
        nearby.append(config._replace(block_k=config.block_k * 2))
    return nearby


def shipped(architecture: str, aligned: bool = True) -> list[tuple[Math, Projection]]:
    """Every config that a projection can be given on an architecture, and its math."""
    table = _PROJECTION[architecture]
    if not aligned:
        return [(math, _UNALIGNED_PROJECTION[math]) for math in table]
    return [(math, config) for math, rows in table.items() for config in rows]


def shipped_products(architecture: str, dtype: str, aligned: bool = True) -> list[Multiply | Gram]:
    """Every config that the products in float32 accuracy of a dtype can be given."""
    if not aligned:
        return [_UNALIGNED_MULTIPLY, _UNALIGNED_GRAM]
    width = 4 if dtype == "float32" else 2
    return [*_MULTIPLY[architecture][dtype], *_GRAM[architecture][width]]
