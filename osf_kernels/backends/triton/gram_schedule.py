"""Host side of the symmetric products: which matrices share a launch, and their records.

As ``schedule``, whose terms it uses: pure arithmetic, imports torch, never triton. A record is

Gram       0 x, 3 size, 4 summed length, 5 parts, 6 length of a part, 7 offset of the parts,
           8 out (size, size); of a sum: the same

A matrix that runs down its columns is scheduled as its transpose, so that Xᵀ X of the one is
X Xᵀ of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import configs
from .schedule import Launch, SummedGroup, View, accurate_rule, ceil_div

__all__ = ["gram_launches"]


def gram_launches(
    As: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    right: bool,
    fill: int,
    float32_precision: str,
    choose: Callable[[Tensor, int, bool], configs.Gram],
) -> list[Launch]:
    """Group matrices into launches; ``choose(A, size, aligned)`` picks a config.

    Args:
        As: (m, n) each.
        out: Aᵀ A (n, n) where ``right``, else A Aᵀ (m, m), float32.
    """
    groups: dict[tuple[object, ...], list[_GramGroup]] = {}
    for matrix, result in zip(As, out, strict=True):
        x, square = View.of(matrix), View.of(result)
        if not square.rows:
            continue
        if square.runs_down:
            square = square.mT  # symmetric
        transposed = right
        if x.runs_down:
            x, transposed = x.mT, not right
        # Products of 16-bit values are exact in float32 as they are.
        dot, precision = x.dtype, "ieee"
        if dot == torch.float32:
            dot, precision = accurate_rule(dot, float32_precision)
        config = choose(matrix, square.rows, x.layout.aligned)
        constants: dict[str, object] = {
            "X": x.dtype,
            "DOT": dot,
            "PRECISION": precision,
            "X_LAYOUT": int(x.layout),
            "OUT_LAYOUT": int(square.layout),
            "TRANSPOSED": transposed,
        }
        slices = groups.setdefault((config, *constants.values()), [])
        if not slices or slices[-1].group.workspace_elements >= configs.GRAM_WORKSPACE_ELEMENTS:
            slices.append(_GramGroup(config, constants, fill))
        slices[-1].add(x, square)
    return [group.launch() for slices in groups.values() for group in slices]


class _GramGroup:
    """One launch of symmetric products under construction."""

    def __init__(self, config: configs.Gram, constants: dict[str, object], fill: int) -> None:
        self.config = config
        self.constants = constants
        self.fill = fill
        self.group = SummedGroup()

    def add(self, x: View, out: View) -> None:
        size = out.rows
        length = x.rows if self.constants["TRANSPOSED"] else x.columns
        tiles = _triangle(size, self.config.block)
        # Rounded down: a part is a whole square, written and read again.
        parts = max(1, min(self.fill // tiles, length // configs.SHORTEST_GRAM_SPLIT))
        part = ceil_div(ceil_div(length, parts), self.config.block_k) * self.config.block_k
        parts = max(1, ceil_div(length, part)) if part else 1
        offset = self.group.reserve(parts, size, size) if parts > 1 else 0
        record = (*x.fields, size, length, parts, part, offset, *out.fields)
        self.group.products.add(tiles * parts, record)
        if parts > 1:
            self.group.sums.add(_triangle(size, configs.sum_block(self.config)), record)

    def launch(self) -> Launch:
        return self.group.launch("gram", self.config, self.constants)


def _triangle(size: int, block: int) -> int:
    """Tiles of the lower triangle, the diagonal included."""
    count = ceil_div(size, block)
    return count * (count + 1) // 2
