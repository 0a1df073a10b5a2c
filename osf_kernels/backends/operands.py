"""Operands whose addresses come later: what a program is planned with before it is given tensors.

An :class:`Operand` has the shape, strides, dtype and device of a tensor, and an address that is an
offset from one of a program's arguments. Programs (``grouped.py``) write the sums into their
records when they run.

May import: torch, ``osf_kernels._padding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels import _padding

ALIGNMENT = _padding.VECTOR_BYTES  # addresses of arguments are cut to it
WORKSPACE = 0  # the argument in which an Arena lies


class Placed(int):
    """A number of bytes behind an argument of a program."""

    argument: int

    @staticmethod
    def at(offset: int, argument: int) -> Placed:
        placed = Placed(offset)
        placed.argument = argument
        return placed

    def __add__(self, offset: int) -> Placed:
        return Placed.at(int(self) + offset, self.argument)


class Lie(NamedTuple):
    """How a tensor lies in memory, but for where."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    beyond: int  # bytes of its address beyond a multiple of 16
    is_padded: bool  # as ``_padding`` says

    @staticmethod
    def of(t: Tensor) -> Lie:
        padded = t.dim() > 1 and _padding.is_padded(t)
        return Lie(t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT, padded)


class Operand:
    """A matrix, or a vector, at a place; answers what a planner asks of a tensor."""

    __slots__ = ("_address", "_strides", "device", "dtype", "is_padded", "shape")

    def __init__(
        self,
        address: Placed,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_padded: bool = False,
    ) -> None:
        self._address, self.is_padded = address, is_padded
        self.shape, self._strides = tuple(shape), tuple(strides)
        self.dtype, self.device = dtype, device

    @staticmethod
    def like(t: Tensor, argument: int) -> Operand:
        """A tensor's, as the argument of that number."""
        return Operand.lying(Lie.of(t), t.device, argument)

    @staticmethod
    def lying(as_: Lie, device: torch.device, argument: int) -> Operand:
        place = Placed.at(as_.beyond, argument)
        padded = as_.is_padded
        return Operand(place, as_.shape, as_.strides, as_.dtype, device, is_padded=padded)

    def data_ptr(self) -> int:
        return self._address

    def stride(self, dim: int | None = None) -> Any:
        return self._strides if dim is None else self._strides[dim]

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def mT(self) -> Operand:
        *shape, rows, columns = self.shape
        *strides, down, across = self._strides
        return self._view(0, (*shape, columns, rows), (*strides, across, down))

    def __getitem__(self, index: tuple[int, ...]) -> Operand:
        """One matrix of a batch."""
        steps = sum(i * stride for i, stride in zip(index, self._strides, strict=False))
        return self._view(steps, self.shape[len(index) :], self._strides[len(index) :])

    def narrow(self, dim: int, first: int, length: int) -> Operand:
        """Some of the rows, or of the columns, of a matrix."""
        shape = list(self.shape)
        shape[dim] = length
        return self._view(first * self._strides[dim], shape, self._strides)

    def diagonal(self) -> Operand:
        return self._view(0, (min(self.shape),), (sum(self._strides),))

    def unsqueeze(self, dim: int) -> Operand:
        assert dim == 0
        return self._view(0, (1, *self.shape), (0, *self._strides))

    def _view(self, steps: int, shape: Sequence[int], strides: Sequence[int]) -> Operand:
        offset = self._address + steps * self.dtype.itemsize
        place = Placed.at(offset, self._address.argument)
        padded = self.is_padded and len(shape) > 1
        return Operand(place, shape, strides, self.dtype, self.device, is_padded=padded)


class Arena:
    """Matrices without values, side by side in the workspace; their rows start on 16 bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def new(self, rows: int, columns: int, dtype: torch.dtype) -> Operand:
        width = _padding.padded_width(columns, dtype.itemsize)
        place = Placed.at(self.bytes, WORKSPACE)
        self.bytes += rows * width * dtype.itemsize
        padded = columns != width
        return Operand(place, (rows, columns), (width, 1), dtype, self.device, is_padded=padded)
