"""The correctness gate: no contender's speed is reported before its numbers hold.

The truth is the formula in float64 on random slabs of columns and rows of the result, which
costs a few per cent of the projection itself: a slab ``X[:, J]`` of ``L g R`` needs ``g R[:, J]``
only. It is taken over the very columns the contender was given, so it measures arithmetic and
not how well the basis was stored; ``leak`` measures the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bench.contenders import Mode

SLAB = 32  # columns, and rows, of each matrix that are checked
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# An error relative to ‖g‖, in unit roundoffs. 16-bit results come from a few roundings of the
# terms; wider ones carry the rounding of sums over thousands of products as well. Leaving out
# the last term costs 1/64 = 4 roundoffs of bf16 already at r = 64 of 4096.
ERROR_BOUND = {
    torch.float64: 64.0,
    torch.float32: 64.0,
    torch.float16: 2.0,
    torch.bfloat16: 2.0,
}

Spans = Literal["high", "low"]


class Side(NamedTuple):
    """An orthonormal basis and what it spans: the protected directions, or their complement."""

    columns: Tensor
    spans: Spans

    def keep(self, x: Tensor) -> Tensor:
        """The part of x (size, c) outside the protected directions, in x's dtype."""
        q = self.columns.to(x.dtype)
        inside = q @ (q.mT @ x)
        return inside if self.spans == "low" else x - inside

    def protect(self, x: Tensor) -> Tensor:
        """The part of x (size, c) inside the protected directions, in x's dtype."""
        q = self.columns.to(x.dtype)
        inside = q @ (q.mT @ x)
        return x - inside if self.spans == "low" else inside


class Slabs(NamedTuple):
    """Where the result is looked at, and what it must be there."""

    columns: Tensor  # (c,) indices
    rows: Tensor  # (c,) indices
    at_columns: Tensor  # (m, c) float64
    at_rows: Tensor  # (c, n) float64
    scale: float  # ‖g‖ over both slabs


def eager(g: Tensor, left: Side, right: Side, mode: Mode) -> Tensor:
    """The same formula in g's dtype and eager torch, the low side first where there is one."""
    if mode == "core":
        return g - left.protect(right.protect(g.mT).mT)
    if right.spans == "low" and left.spans == "high":
        return left.keep(right.keep(g.mT).mT)
    return right.keep(left.keep(g).mT).mT


def slabs(g: Tensor, left: Side, right: Side, mode: Mode, generator: torch.Generator) -> Slabs:
    """The float64 truth on ``SLAB`` random columns and rows of the result."""
    m, n = g.shape
    g64 = g.double()
    columns = torch.randperm(n, generator=generator)[:SLAB].sort().values.to(g.device)
    rows = torch.randperm(m, generator=generator)[:SLAB].sort().values.to(g.device)
    unit_columns = torch.zeros(n, len(columns), dtype=torch.float64, device=g.device)
    unit_columns[columns, torch.arange(len(columns), device=g.device)] = 1.0  # (n, c)
    unit_rows = torch.zeros(m, len(rows), dtype=torch.float64, device=g.device)
    unit_rows[rows, torch.arange(len(rows), device=g.device)] = 1.0  # (m, c)
    if mode == "complement":
        at_columns = left.keep(g64 @ right.keep(unit_columns))
        at_rows = right.keep(g64.mT @ left.keep(unit_rows)).mT
    else:
        at_columns = g64[:, columns] - left.protect(g64 @ right.protect(unit_columns))
        at_rows = g64[rows] - right.protect(g64.mT @ left.protect(unit_rows)).mT
    scale = float(torch.hypot(g64[:, columns].norm(), g64[rows].norm()))
    return Slabs(columns, rows, at_columns, at_rows, scale)


def error(result: Tensor, truth: Slabs) -> float:
    """‖result − truth‖ / ‖g‖ over the slabs; infinite where the result isn't finite there."""
    at_columns = result[:, truth.columns].double() - truth.at_columns
    at_rows = result[truth.rows].double() - truth.at_rows
    distance = float(torch.hypot(at_columns.norm(), at_rows.norm()))
    if distance != distance:
        return float("inf")
    return distance / truth.scale if truth.scale > 0 else distance


def leak(result: Tensor, g: Tensor, U: Tensor, V: Tensor, truth: Slabs) -> float:
    """The larger of ‖Uᵀg'‖/‖Uᵀg‖ and ‖g'V‖/‖gV‖ over the slabs, in float64, of high bases."""
    U64, V64 = U.double(), V.double()
    left = (U64.mT @ result[:, truth.columns].double()).norm() / (
        U64.mT @ g[:, truth.columns].double()
    ).norm()
    right = (result[truth.rows].double() @ V64).norm() / (g[truth.rows].double() @ V64).norm()
    return max(float(left), float(right))


def bound(dtype: torch.dtype) -> float:
    """The largest error, relative to ‖g‖, with which a contender of this dtype is timed."""
    return ERROR_BOUND[dtype] * UNIT_ROUNDOFF[dtype]


def refusal(
    error: float, limit: float, *, reproducible: Callable[[], bool] | None = None
) -> str | None:
    """Why a contender gets no speed, or None."""
    if not error <= limit:
        return f"wrong: error {error:.1e} above {limit:.1e}"
    if reproducible is not None and not reproducible():
        return "wrong: two runs differ in their bits"
    return None
