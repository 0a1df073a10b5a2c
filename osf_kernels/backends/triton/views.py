"""Matrices as the kernels see them, and in which dtype products of them are taken.

Imports torch, never triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import _padding

__all__ = ["Layout", "View", "accurate_rule", "ceil_div", "dot_rule"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LONGEST = 2**31 - 2**12  # of one dimension; tile indices are int32


class Layout(IntEnum):
    """What the compiler may assume of a view's strides."""

    GENERAL = 0
    ROW = 1  # unit stride along dim 1; address, other stride and width multiples of 16 bytes
    COLUMN = 2  # the same along dim 0
    UNALIGNED_ROW = 3  # unit stride along dim 1 and no more
    UNALIGNED_COLUMN = 4  # unit stride along dim 0 and no more
    # As ROW and COLUMN but for the width. The last 16 bytes of a line hold padding, which may be
    # read (it is in the storage) and holds anything.
    PADDED_ROW = 5
    PADDED_COLUMN = 6
    # The same, and the padding holds zeros: what the kernels have stored themselves.
    ZERO_PADDED_ROW = 7
    ZERO_PADDED_COLUMN = 8

    @property
    def aligned(self) -> bool:
        """Whether every line can be read in aligned pieces of 16 bytes."""
        return self not in (Layout.GENERAL, Layout.UNALIGNED_ROW, Layout.UNALIGNED_COLUMN)


class View(NamedTuple):
    """A 2-D tensor's address, shape and strides, and whether its last line has its padding."""

    address: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    dtype: torch.dtype
    padded: bool = False  # looked up only where the layout depends on it
    zeroed: bool = False  # whether the padding holds zeros

    @staticmethod
    def of(tensor: Tensor, *, zeroed: bool = False) -> View:
        """``zeroed``: that padding, where there is some, holds zeros."""
        (rows, columns), (row_stride, column_stride) = tensor.shape, tensor.stride()
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                "osf_kernels.backends.triton: expected bfloat16, float16 or float32, got "
                f"{str(tensor.dtype).removeprefix('torch.')}; float64 runs on the torch backend"
            )
        if max(rows, columns) > _LONGEST:
            raise ValueError(
                "osf_kernels.backends.triton: expected no dimension beyond "
                f"{_LONGEST}, got {tuple(tensor.shape)}; use the torch backend"
            )
        width = columns if column_stride == 1 else rows
        ragged = width * tensor.itemsize % _padding.VECTOR_BYTES != 0
        padded = ragged and _padding.is_padded(tensor)
        address = tensor.data_ptr()
        return View(address, rows, columns, row_stride, column_stride, tensor.dtype, padded, zeroed)

    @property
    def mT(self) -> View:
        return View(
            self.address,
            self.columns,
            self.rows,
            self.column_stride,
            self.row_stride,
            self.dtype,
            self.padded,
            self.zeroed,
        )

    @property
    def fields(self) -> tuple[int, int, int]:
        return self.address, self.row_stride, self.column_stride

    @property
    def layout(self) -> Layout:
        vector = _padding.VECTOR_BYTES // self.dtype.itemsize
        if self.address % _padding.VECTOR_BYTES == 0:
            if self.column_stride == 1 and not self.row_stride % vector:
                if not self.columns % vector:
                    return Layout.ROW
                if self.padded:
                    return Layout.ZERO_PADDED_ROW if self.zeroed else Layout.PADDED_ROW
            if self.row_stride == 1 and not self.column_stride % vector:
                if not self.rows % vector:
                    return Layout.COLUMN
                if self.padded:
                    return Layout.ZERO_PADDED_COLUMN if self.zeroed else Layout.PADDED_COLUMN
        if self.column_stride == 1:
            return Layout.UNALIGNED_ROW
        return Layout.UNALIGNED_COLUMN if self.row_stride == 1 else Layout.GENERAL

    def rows_from(self, first: int, count: int) -> View:
        """Some of the rows."""
        offset = first * self.row_stride * self.dtype.itemsize
        return self._replace(address=self.address + offset, rows=count)

    def columns_from(self, first: int, count: int) -> View:
        """Some of the columns; of a padded row the last ones have its padding."""
        return self.mT.rows_from(first, count).mT

    @property
    def runs_down(self) -> bool:
        """Whether neighbours in memory are neighbours in a column."""
        return self.column_stride != 1 and (
            self.row_stride == 1 or 0 < self.row_stride < self.column_stride
        )


def dot_rule(
    x: torch.dtype,
    bases: Sequence[torch.dtype],
    coefficients: Sequence[torch.dtype],
    float32_precision: str,
) -> tuple[torch.dtype, str]:
    """(operand dtype, input_precision) of a kernel's products; sums are always float32.

    16-bit operands of one dtype multiply as they are, and bfloat16 takes float32 coefficients
    rounded to it. float16 cannot (a coefficient may pass 65504), so those products, and those of
    16-bit values of two dtypes, are taken in TF32, in which every 16-bit value is exact. All
    else follows ``float32_precision``.
    """
    sources = {x, *bases}
    if sources == {torch.bfloat16} or sources | set(coefficients) == {torch.float16}:
        return x, "ieee"
    if torch.float32 not in sources and float32_precision != "ieee":
        return torch.float32, "tf32"
    return torch.float32, float32_precision


def accurate_rule(x: torch.dtype, float32_precision: str) -> tuple[torch.dtype, str]:
    """As :func:`dot_rule`, for x times float32 in float32 accuracy.

    16-bit x: in bfloat16 pieces, whose products are exact.
    """
    if x == torch.float32:
        return x, "ieee" if float32_precision == "ieee" else "tf32x3"
    return torch.bfloat16, "ieee"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
