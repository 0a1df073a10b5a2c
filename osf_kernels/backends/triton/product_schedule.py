"""Host side of the products in float32 accuracy: which matrices share a launch, and their records.

Pure arithmetic on addresses, sizes and strides. Imports torch, never triton.

A launch's metadata is one int64 array: two counters, zero (``kernels.ordered``); then problems + 1
prefix sums of tiles and a record a problem; then the same of the sums of their parts. A record is

Multiply   0 x, 3 q, 4 summed length, 5 basis, 8 rank, 9 parts, 10 length of a part,
           11 offset of the parts, 12 out (q, rank); of a sum: the same
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
from .launches import Launch, SummedGroup, split
from .views import View, accurate_rule, ceil_div

__all__ = ["gram_launches", "multiply_launches"]


def multiply_launches(
    As: Sequence[Tensor],
    bases: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    transpose: bool,
    fill: int,
    float32_precision: str,
    choose: Callable[[Tensor, Tensor, Tensor, bool], configs.Multiply],
) -> list[Launch]:
    """Group matrices into launches; ``choose(A, basis, out, aligned)`` picks a config.

    Args:
        As: (m, n) each.
        bases: (n, rank), or (m, rank) with transpose, float32.
        out: A·basis, or Aᵀ·basis, float32.
    """
    groups: dict[tuple[object, ...], tuple[configs.Multiply, dict[str, object], SummedGroup]] = {}
    for matrix, basis, result in zip(As, bases, out, strict=True):
        x, b, q = View.of(matrix), View.of(basis), View.of(result)
        if not (q.rows and q.columns):
            continue
        transposed = transpose
        if x.runs_down:
            x, transposed = x.mT, not transpose
        _, precision = accurate_rule(x.dtype, float32_precision)
        config = choose(matrix, basis, result, x.layout.aligned)
        constants: dict[str, object] = {
            "X": x.dtype,
            "BASIS": b.dtype,
            "PRECISION": precision,
            "X_LAYOUT": int(x.layout),
            "BASIS_LAYOUT": int(b.layout),
            "OUT_LAYOUT": int(q.layout),
            "TRANSPOSED": transposed,
        }
        key = (config, *constants.values())
        *_, group = groups.setdefault(key, (config, constants, SummedGroup()))
        block = ceil_div(q.rows, config.block_q) * ceil_div(q.columns, config.block_r)
        # Each is split by itself, so that it has the same bits in every list.
        parts, part = split(block, b.rows, config.block_k, fill)
        offset = group.reserve(parts, q.rows, q.columns) if parts > 1 else 0
        record = (*x.fields, q.rows, b.rows, *b.fields, q.columns, parts, part, offset, *q.fields)
        group.products.add(block * parts, record)
        if parts > 1:
            side = configs.sum_block(config)
            group.sums.add(ceil_div(q.rows, side) * ceil_div(q.columns, side), record)
    return [group.launch("multiply", config, made) for config, made, group in groups.values()]


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
