"""Which matrix of which weight a tensor is, told by the memory that it lies in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from osf_torch.sharding import local, sharding_of


@dataclass(frozen=True)
class Source:
    """Memory that holds matrices of a weight, or a copy of them.

    Attributes:
        storage: a weak reference, so that memory is let go of as ever and no other storage goes by
            its address meanwhile.
        start: the first element.
        matrices: which of the weight's lie one after another.
        sizes, strides: along matrices, rows and columns.
    """

    name: str
    storage: StorageWeakRef
    start: int
    matrices: Sequence[int]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def matrix_at(self, offset: int) -> int | None:
        """Which of the matrices an element is of; None of one outside."""
        rest, found = offset - self.start, 0
        for axis in sorted(range(3), key=lambda axis: -self.strides[axis]):
            place, rest = divmod(rest, self.strides[axis])
            if not 0 <= place < self.sizes[axis]:
                return None
            found = place if axis == 0 else found
        return found


@dataclass(frozen=True)
class Kernel:
    """Memory that holds the weight of a convolution as it is, or some of its rows, or a copy.

    Attributes:
        storage, start: as of a Source.
        first: which of the weight's rows comes first.
        shape, strides: of what lies there.
    """

    name: str
    storage: StorageWeakRef
    start: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def row_at(self, t: Tensor) -> int | None:
        """With which of the weight's rows ``t`` begins; None of what isn't whole rows of it."""
        rows, *rest = self.shape
        step, *steps = self.strides
        at, off = divmod(int(t.storage_offset()) - self.start, max(1, step))
        fits = t.dim() == len(self.shape) and list(t.shape[1:]) == rest and not off
        if not fits or at < 0 or at + t.shape[0] > rows:
            return None
        if t.shape[0] > 1 and t.stride(0) != step:
            return None
        laid = zip(rest, steps, t.stride()[1:], strict=True)
        return self.first + at if all(size == 1 or a == b for size, a, b in laid) else None

    def reaches(self, t: Tensor) -> bool:
        """Whether ``t`` begins within it."""
        sizes = zip(self.shape, self.strides, strict=True)
        last = self.start + sum((size - 1) * step for size, step in sizes)
        return self.start <= int(t.storage_offset()) <= last


@dataclass(frozen=True)
class Piece:
    """A dimension of a view, or a part of one, along an axis of the source."""

    axis: int  # 0 along matrices, 1 along rows, 2 along columns
    size: int
    stride: int


@dataclass(frozen=True)
class View:
    """A tensor in a source's memory.

    Attributes:
        first: the matrix of the source in which it starts.
        dims: what each dimension runs along: nothing (of one, or repeated), or one axis, or
            several where matrices, rows and columns are one dimension.
    """

    source: Source
    first: int
    dims: tuple[tuple[Piece, ...], ...]

    def jumps(self, dim: int) -> list[int]:
        """How many matrices further each place along a dimension lies; [0] where none does."""
        step = self.source.strides[0]
        for at, piece in enumerate(self.dims[dim]):
            if piece.axis == 0:
                within = math.prod(inner.size for inner in self.dims[dim][at + 1 :])
                return [
                    i * (piece.stride // step) for i in range(piece.size) for _ in range(within)
                ]
        return [0]

    def matrix(self, jump: int) -> int:
        """Of the weight."""
        return self.source.matrices[self.first + jump]


class Sources:
    """Where weights and copies of them lie."""

    def __init__(self) -> None:
        self._by_storage: dict[int, list[Source]] = {}
        self._kernels: dict[int, list[Kernel]] = {}
        self._limit = 256

    def holds(self, name: str, weight: Tensor) -> bool:
        """Whether the weight is known where it lies."""
        address = _address(local(weight))
        found = (*self._by_storage.get(address, ()), *self._kernels.get(address, ()))
        return any(source.name == name for source in found)

    def hold(self, name: str, weight: Tensor, *, is_flat: bool = False) -> None:
        """A weight (..., m, n), or what this rank has of one.

        Args:
            is_flat: whether it is a convolution's.
        """
        sharding = sharding_of(weight)
        if is_flat:
            rows = None if sharding is None else sharding.of(-weight.dim())
            self._hold_kernel(name, local(weight.detach()), 0 if rows is None else rows.start)
            return
        cut = None if sharding is None else sharding.of(-3)
        first = 0 if cut is None else cut.start
        held = local(weight.detach())
        if held.dim() < 2 or not held.numel():
            return
        batch = held[None] if held.dim() == 2 else held.flatten(0, -3)
        if _address(batch) == _address(held):
            layout = [
                (i, k, s) for i, (k, s) in enumerate(zip(batch.shape, batch.stride(), strict=True))
            ]
            self._add(name, batch, range(first, first + len(batch)), layout)

    def _hold_kernel(self, name: str, held: Tensor, first: int) -> None:
        """Rows of a convolution's weight from ``first`` on: as they are, and as a matrix where
        their memory is one's."""
        if not held.numel():
            return
        self._drop_expired()
        storage, start = StorageWeakRef(held.untyped_storage()), int(held.storage_offset())
        kernel = Kernel(name, storage, start, first, tuple(held.shape), held.stride())
        there = self._kernels.setdefault(_address(held), [])
        there[:] = [other for other in there if other.start != start] + [kernel]
        matrix = held.flatten(1)
        if _address(matrix) == _address(held):
            (m, n), (step, along) = matrix.shape, matrix.stride()
            self._add(name, matrix, [0], [(0, 1, 0), (1, m, step), (2, n, along)])

    def kernel(self, t: Tensor) -> tuple[str, int] | None:
        """Of which convolution's weight a tensor is rows, and with which they begin."""
        for kernel in self._kernels.get(_address(t), ()):
            first = kernel.row_at(t)
            if first is not None:
                return kernel.name, first
        return None

    def part_of_kernel(self, t: Tensor) -> str | None:
        """In which convolution's weight a tensor begins."""
        there = self._kernels.get(_address(t), ())
        return next((kernel.name for kernel in there if kernel.reaches(t)), None)

    def copied(self, taken: Tensor, made: Tensor) -> None:
        """``made`` holds at each place what was made of the value of ``taken`` there."""
        kernel = self.kernel(taken)
        if kernel is not None:
            if made.shape == taken.shape and not self.knows(made):
                self._hold_kernel(kernel[0], made, kernel[1])
            return
        view = self.view(taken)
        if view is None or made.shape != taken.shape or self.knows(made):
            return
        layout: list[tuple[int, int, int]] = []
        jumps = [0]
        for dim, pieces in enumerate(view.dims):
            stride = made.stride(dim)
            for piece in reversed(pieces):
                layout.append((piece.axis, piece.size, stride))
                stride *= piece.size
                if piece.axis == 0:
                    jumps = list(dict.fromkeys(view.jumps(dim)))
        self._add(view.source.name, made, [view.matrix(j) for j in jumps], layout)

    def indexed(self, taken: Tensor, index: Tensor, made: Tensor) -> None:
        """``made`` are the matrices of ``taken`` that ``index`` (any dimensions) names."""
        view = self.view(taken)
        if view is None or self.knows(made) or [p.axis for p in view.dims[0]] not in ([0], []):
            return
        if index.dtype in (torch.bool, torch.uint8):
            if index.dim() != 1:
                return
            index = index.nonzero().flatten()
        jumps = view.jumps(0)
        matrices = [view.matrix(jumps[i]) for i in index.flatten().tolist()]
        laid = made.reshape(-1, *taken.shape[1:])
        if _address(laid) == _address(made) and all(len(pieces) < 2 for pieces in view.dims):
            layout = [(0, laid.shape[0], laid.stride(0))]
            for dim, pieces in enumerate(view.dims[1:], 1):
                layout += [(piece.axis, piece.size, laid.stride(dim)) for piece in pieces]
            self._add(view.source.name, laid, matrices, layout)

    def view(self, t: object) -> View | None:
        """What a tensor is of a weight; None of one that is no part of any."""
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            return None
        for source in self._by_storage.get(_address(t), ()):
            first = source.matrix_at(int(t.storage_offset()))
            if first is None:
                continue
            dims = [_pieces(source, k, s) for k, s in zip(t.shape, t.stride(), strict=True)]
            if all(dim is not None for dim in dims):
                return View(source, first, tuple(dim for dim in dims if dim is not None))
        return None

    def knows(self, t: Tensor) -> bool:
        """Whether a tensor lies in memory of a weight or a copy of one."""
        return _address(t) in self._by_storage or _address(t) in self._kernels

    def _add(
        self,
        name: str,
        t: Tensor,
        matrices: Sequence[int],
        layout: Sequence[tuple[int, int, int]],
    ) -> None:
        """``layout``: the axis, size and stride of every dimension of t."""
        sizes, strides = [1, 1, 1], [0, 0, 0]
        for axis, size, stride in layout:
            if size > 1:
                if sizes[axis] > 1:
                    return  # rows cut into heads, whose strides alone don't tell what they are
                sizes[axis], strides[axis] = size, stride
        reach = 1
        for axis in sorted(range(3), key=lambda axis: strides[axis]):
            if sizes[axis] > 1:
                if strides[axis] < reach:
                    return  # elements that lie on each other, or between
                reach += (sizes[axis] - 1) * strides[axis]
        for axis in range(3):  # nothing lies along an axis of one: no step within reach is one
            if sizes[axis] == 1:
                strides[axis] = reach + axis
        self._drop_expired()
        storage = StorageWeakRef(t.untyped_storage())
        source = Source(
            name, storage, int(t.storage_offset()), matrices, tuple(sizes), tuple(strides)
        )
        held = self._by_storage.setdefault(_address(t), [])
        held[:] = [other for other in held if other.start != source.start] + [source]

    def _drop_expired(self) -> None:
        if len(self._by_storage) + len(self._kernels) > self._limit:
            for address, held in list(self._by_storage.items()):
                if held[0].storage.expired():
                    del self._by_storage[address]
            for address, there in list(self._kernels.items()):
                if there[0].storage.expired():
                    del self._kernels[address]
            self._limit = max(self._limit, 2 * (len(self._by_storage) + len(self._kernels)))


def _address(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address


def _pieces(source: Source, size: int, stride: int) -> tuple[Piece, ...] | None:
    """What a dimension of a tensor runs along; None where that isn't known."""
    if size == 1 or stride == 0:
        return ()
    fitting = [axis for axis in range(3) if stride % source.strides[axis] == 0]
    if not fitting:
        return None
    axis = max(fitting, key=lambda axis: source.strides[axis])
    last = (size - 1) * (stride // source.strides[axis])
    if last < source.sizes[axis]:
        return (Piece(axis, size, stride),)
    # Matrices laid end to end, or rows: the dimension runs along two axes.
    inner = source.sizes[axis]
    outer = inner * stride
    if inner == 1 or stride != source.strides[axis] or size % inner or outer not in source.strides:
        return None
    rest = _pieces(source, size // inner, outer)
    return None if rest is None else (*rest, Piece(axis, inner, stride))
