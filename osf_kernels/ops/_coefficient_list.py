"""The coefficients of a list of matrices, which a sharded caller sums between the two halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels.backends.forms import coefficient_dtype
from osf_kernels.backends.operands import ALIGNMENT


class CoefficientList(NamedTuple):
    """A = Uᵀ x and B = x V of every matrix of a list.

    Attributes:
        A, B: a tensor (..., r, n) and (..., m, k) a matrix, float32 (float64 for float64 x).
        sums: flat tensors, one a device and dtype, which hold all of A: of matrices whose rows are
            sharded, all-reduce these in place.
    """

    A: list[Tensor]
    B: list[Tensor]
    sums: tuple[Tensor, ...]


def coefficient_shapes(
    g: Tensor, U: Tensor | None, V: Tensor | None
) -> tuple[torch.Size, torch.Size]:
    r = 0 if U is None else U.shape[-1]
    k = 0 if V is None else V.shape[-1]
    batch = tuple(g.shape[:-2])
    return torch.Size((*batch, r, g.shape[-1])), torch.Size((*batch, g.shape[-2], k))


class Allocation:
    """Where the coefficients of a list lie: all of A in one piece a device and dtype, and all of B;
    rows start on 16 bytes."""

    def __init__(
        self, xs: Sequence[Tensor], Us: Sequence[Tensor | None], Vs: Sequence[Tensor | None]
    ) -> None:
        self._kinds: list[tuple[torch.device, torch.dtype]] = []
        self._sizes: list[list[int]] = []  # of the pieces of A and B of each kind
        self._places: list[tuple[int, list[tuple[Sequence[int], Sequence[int], int]]]] = []
        for x, U, V in zip(xs, Us, Vs, strict=True):
            kind = x.device, coefficient_dtype(x)
            if kind not in self._kinds:
                self._kinds.append(kind)
                self._sizes.append([0, 0])
            place = self._kinds.index(kind)
            sizes = self._sizes[place]
            views: list[tuple[Sequence[int], Sequence[int], int]] = []
            for side, shape in enumerate(coefficient_shapes(x, U, V)):
                strides, elements = _pitched(shape, kind[1])
                views.append((shape, strides, sizes[side]))
                sizes[side] += elements
            self._places.append((place, views))

    def new(self) -> CoefficientList:
        """Coefficients without values."""
        pieces = [
            [torch.empty(size, dtype=dtype, device=device) for size in sizes]
            for (device, dtype), sizes in zip(self._kinds, self._sizes, strict=True)
        ]
        A, B = (
            [pieces[kind][side].as_strided(*views[side]) for kind, views in self._places]
            for side in (0, 1)
        )
        return CoefficientList(A, B, tuple(piece[0] for piece in pieces))


def empty_coefficients(g: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and B of one matrix without values, with the strides that an ``Allocation`` gives."""
    dtype = coefficient_dtype(g)
    shape_A, shape_B = coefficient_shapes(g, U, V)
    A = g.new_empty_strided(shape_A, _pitched(shape_A, dtype)[0], dtype=dtype)
    return A, g.new_empty_strided(shape_B, _pitched(shape_B, dtype)[0], dtype=dtype)


def _pitched(shape: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """Strides with padded rows, and how many elements that takes."""
    vector = ALIGNMENT // dtype.itemsize
    strides, step = [1], -(-shape[-1] // vector) * vector
    for size in reversed(shape[:-1]):
        strides.insert(0, step)
        step *= size
    return strides, step
