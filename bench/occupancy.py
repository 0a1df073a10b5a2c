"""Blocks of a kernel that an NVIDIA multiprocessor holds at once: arithmetic, no GPU."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What a multiprocessor has for all of its blocks."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_of_block: int
    registers: int = 65536


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
LIMITS = {
    "sm_80": Limits(warps=64, blocks=32, shared_bytes=164 << 10, shared_bytes_of_block=163 << 10),
    "sm_86": Limits(warps=48, blocks=16, shared_bytes=100 << 10, shared_bytes_of_block=99 << 10),
    "sm_90": Limits(warps=64, blocks=32, shared_bytes=228 << 10, shared_bytes_of_block=227 << 10),
}
WARP = 32
MOST_THREADS, MOST_REGISTERS = 1024, 255
# From 8.0 on a warp gets registers by the 256, from the quarter of the multiprocessor that runs
# it, and a block shared memory by the 128 bytes, 1 KB of it for the system. Source: NVIDIA's
# cuda_occupancy.h, and the guide's section "Shared Memory" of these capabilities.
REGISTER_UNIT, QUARTERS = 256, 4
SHARED_UNIT, SHARED_RESERVE = 128, 1 << 10


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Occupancy(NamedTuple):
    """Blocks a multiprocessor holds by each of its limits, and by the tightest."""

    by_registers: int
    by_shared: int
    by_threads: int
    by_blocks: int
    warps: int  # of a block
    most_warps: int

    @property
    def blocks(self) -> int:
        return min(self[:4])

    @property
    def limited_by(self) -> str:
        """The tightest limit; of equals all."""
        names = ("registers", "shared memory", "threads", "blocks")
        return ", ".join(n for n, v in zip(names, self[:4], strict=True) if v == self.blocks)

    def share(self, most_blocks: int | None = None) -> float:
        """Resident warps over the most there can be, with at most so many blocks launched."""
        blocks = self.blocks if most_blocks is None else min(self.blocks, most_blocks)
        return blocks * self.warps / self.most_warps


def occupancy(architecture: str, registers: int, shared_bytes: int, threads: int) -> Occupancy:
    """Of a kernel with so many registers a thread and bytes and threads a block.

    A block that cannot run at all has 0 by what it exceeds. Raises ValueError for an
    architecture whose limits are not listed here.
    """
    if architecture not in LIMITS:
        raise ValueError(
            f"bench.occupancy: expected one of {', '.join(LIMITS)}, got {architecture!r}"
        )
    limits = LIMITS[architecture]
    warps = -(-threads // WARP)
    of_warp = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    by_registers = limits.registers // QUARTERS // of_warp * QUARTERS // warps
    # The check at launch counts a block's warps in whole quarters.
    if registers > MOST_REGISTERS or of_warp * _up(warps, QUARTERS) > limits.registers:
        by_registers = 0
    of_block = _up(shared_bytes + SHARED_RESERVE, SHARED_UNIT)
    fits = shared_bytes <= limits.shared_bytes_of_block
    return Occupancy(
        by_registers,
        limits.shared_bytes // of_block if fits else 0,
        limits.warps // warps if threads <= MOST_THREADS else 0,
        limits.blocks,
        warps,
        limits.warps,
    )
