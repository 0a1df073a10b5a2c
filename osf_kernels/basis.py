"""Basis: orthonormal columns, and which side of the split they span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from osf_kernels.errors import TypeRefusal, ValueRefusal

Spans = Literal["high", "low"]


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """A protected subspace, held by whichever orthonormal basis is smaller.

    With ``spans="high"`` the columns span the protected directions, H = columns·columnsᵀ; with
    ``spans="low"`` they span the orthogonal complement, the free ones, H = I − columns·columnsᵀ.
    Every operator that takes a tensor for U or V takes a Basis; a bare tensor is a high one.
    At ρ = r/m > 0.5 the low basis is smaller, takes fewer FLOPs and leaks less.

    Args:
        columns: (..., m, r) for "high", (..., m, m − r) for "low"; orthonormal columns, which is
            the caller's promise and is not checked (a check costs as much as the projection).
        spans: "high" or "low".

    Raises:
        TypeError: columns is no tensor.
        ValueError: spans is neither.
    """

    columns: Tensor
    spans: Spans = "high"

    def __post_init__(self) -> None:
        columns: object = self.columns
        if not isinstance(columns, Tensor):
            raise TypeRefusal.of("Basis", "columns", "a tensor", type(columns).__name__)
        if self.spans not in ("high", "low"):
            raise ValueRefusal.of("Basis", "spans", '"high" or "low"', repr(self.spans))
