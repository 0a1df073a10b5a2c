"""What is known of GPUs before a kernel runs: caches, and up to which rank fused kernels pay.

None of it is measured on a GPU yet. Each figure names where it comes from. Pure Python, no tensors.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ARCHITECTURES",
    "L2_BYTES",
    "RankLimit",
    "architecture_of_capability",
    "fits_l2",
    "rank_limit",
    "room_in_l2",
]

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

# Of the last cache before memory: data sheets of A100, RTX 3090, H100, B200 and MI300X.
L2_BYTES = {
    "sm_80": 40 << 20,
    "sm_86": 6 << 20,
    "sm_90": 50 << 20,
    "sm_100": 126 << 20,
    "gfx942": 256 << 20,
}
# What may be taken of it for matrices that are read again; the rest is for bases, coefficients and
# what is on its way. By the model of ``python -m bench traffic``: 4096² in bfloat16, .84 of an
# A100's 40 MB, is still found at its second read; two of them, 1.3 of an H100's 50 MB, are not.
L2_SHARE = 0.85


class RankLimit(NamedTuple):
    """Up to which rank a fused kernel is ahead of library matrix products, and why."""

    rank: int
    source: str


_MODEL = "a model of the launch (bench traffic) against library products at .85 of their peak"
_TF32X3 = "three TF32 products run at 1.5 to 1.9 times the rate of float32 outside of tensor cores"
# Whose rows serve an architecture without its own.
_LIKE = {"sm_86": "sm_80", "sm_100": "sm_90", "gfx942": "sm_90"}

# Keyed by architecture, then by dtype of the matrix, then by how many sides have a basis.
_RANK_LIMITS: dict[str, dict[str, dict[int, RankLimit]]] = {
    "sm_80": {
        "bfloat16": {1: RankLimit(96, _MODEL), 2: RankLimit(80, _MODEL)},
        "float16": {1: RankLimit(64, _MODEL), 2: RankLimit(64, _MODEL)},
        "float32": {1: RankLimit(256, _TF32X3), 2: RankLimit(256, _TF32X3)},
    },
    "sm_90": {
        "bfloat16": {1: RankLimit(128, _MODEL), 2: RankLimit(112, _MODEL)},
        "float16": {1: RankLimit(64, _MODEL), 2: RankLimit(64, _MODEL)},
        "float32": {1: RankLimit(256, _TF32X3), 2: RankLimit(256, _TF32X3)},
    },
}


def rank_limit(architecture: str, dtype: str, sides: int) -> RankLimit:
    """Of the larger rank of a matrix; ``sides``: 1 or 2 bases are multiplied."""
    table = _RANK_LIMITS.get(architecture)
    if table is None:
        like = _LIKE.get(architecture, "sm_90")
        return RankLimit(rank_limit(like, dtype, sides).rank, f"taken from {like}")
    return table.get(dtype, table["float32"])[sides]


def room_in_l2(architecture: str) -> float:
    """Bytes of L2 for matrices that are read again."""
    return L2_SHARE * L2_BYTES[architecture]


def fits_l2(architecture: str, size_bytes: int, beside_bytes: int = 0) -> bool:
    """Whether a matrix of so many bytes is found in L2 when it is read again.

    ``beside_bytes``: of its bases and coefficients, which pass through L2 meanwhile.
    """
    fits_beside = size_bytes + beside_bytes <= L2_BYTES[architecture]
    return size_bytes <= room_in_l2(architecture) and fits_beside


def architecture_of_capability(major: int, minor: int) -> str:
    """The row of the tables for an NVIDIA compute capability.

    "sm_86" stands for all that have tensor cores of that kind and 99 KB of shared memory a program:
    8.6, 8.9 and 12.x.
    """
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    if (major, minor) == (9, 0):
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_86"
