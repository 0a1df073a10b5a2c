"""FreeBasis: an orthonormal basis of the directions of one side that aren't protected."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels._padding import padded
from osf_kernels.basis import Basis
from osf_kernels.cpu import WHOLE_VECTORS
from osf_kernels.errors import TypeRefusal, ValueRefusal
from osf_kernels.free.orders import Held, Side
from osf_kernels.linalg.orthonormal.complement import reflector


class FreeBasis:
    """Orthonormal columns F (..., n, q) that span what a basis of n rows doesn't protect.

    F is held as whatever takes fewer elements: its columns, or the block reflector
    F = [0; I] − Y N Y₂ᵀ with Y (n, k) and N (k, k), of which Y₂ are the last q rows, where k = n −
    q directions are protected. The reflector is smaller while k is below .41 n. A side that nothing
    is protected of has F = I and holds nothing.

    It is immutable: copies of it, deep ones too, are itself. Made by :meth:`of`.

    Attributes:
        size, width: n and q.
        held: "columns", "reflector" or "everything".
        side: what a plan needs to know of it.
    """

    def __init__(self, size: int, width: int, held: Held, parts: tuple[Tensor, ...]) -> None:
        self.size, self.width = size, width
        self.held: Held = held
        self.side = Side(size, width, held)
        self._parts = parts

    @classmethod
    @torch.no_grad()
    def of(cls, basis: Tensor | Basis | None, size: int) -> FreeBasis:
        """The free directions of a side of ``size`` rows.

        Args:
            basis: what is protected, (..., n, r) orthonormal columns or a ``Basis``; None protects
                nothing. Columns that span what is free already are held as they are, without a
                copy.
            size: n.

        Raises:
            TypeError: basis is neither.
            ValueError: columns of another number of rows, or more columns than rows.

        The reflector is computed in float64 and rounded once to the dtype of the columns (float32
        of half precision is the caller's to ask for). Mutates nothing; doesn't synchronise but
        where the device's singular value decomposition does; draws no random numbers.
        """
        if basis is None:
            return cls(size, size, "everything", ())
        held = basis if isinstance(basis, Basis) else None
        columns: object = basis.columns if isinstance(basis, Basis) else basis
        if not isinstance(columns, Tensor):
            expected = "a tensor, a Basis or None"
            raise TypeRefusal.of("FreeBasis", "basis", expected, type(columns).__name__)
        count = columns.shape[-1]
        if columns.dim() < 2 or columns.shape[-2] != size or count > size:
            raise ValueRefusal.of(
                "FreeBasis",
                "basis",
                f"to have {size} rows and at most as many columns",
                tuple(columns.shape),
                "pass V.mT if it holds rows",
            )
        columns = columns.detach()
        if held is not None and held.spans == "low":
            return cls(size, count, "columns", (columns,))
        side = Side.of(size, count)
        if side.held == "everything":
            return cls(size, size, "everything", ())
        if side.width == 0:
            return cls(size, 0, "columns", (columns[..., :0],))
        Y, N = reflector(columns)
        if side.held == "columns":
            parts: tuple[Tensor, ...] = (cls(size, side.width, "reflector", (Y, N)).columns(),)
        else:
            parts = (Y, N)
        parts = tuple(padded(part, dtype=columns.dtype) for part in parts)
        return cls(size, side.width, side.held, parts)

    @property
    def _batch(self) -> tuple[int, ...]:
        return tuple(self._parts[0].shape[:-2]) if self._parts else ()

    def __repr__(self) -> str:
        lead = "".join(f"{count}×" for count in self._batch)
        return f"FreeBasis({lead}{self.size}×{self.width}, held as {self.held})"

    def __copy__(self) -> FreeBasis:
        return self

    def __deepcopy__(self, memo: object) -> FreeBasis:
        return self

    # --- products ---

    def _as(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        parts = self._parts
        return parts if parts[0].dtype == dtype else tuple(part.to(dtype) for part in parts)

    def reduce(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """x F, (..., T, n) to (..., T, q), of x's dtype; where ``rows`` says so, x has columns for
        these rows of F alone.
        """
        if self.held == "columns" and x.device.type == "cpu" and self.width % WHOLE_VECTORS:
            return self.reduce_rows(x.mT, rows).mT
        if self.held == "everything":
            return x if rows is None else self._placed(x, rows)
        parts = self._as(x.dtype)
        if self.held == "columns":
            return x @ (parts[0] if rows is None else parts[0][..., rows, :])
        Y, N = parts
        at = slice(0, self.size) if rows is None else rows
        start = x[..., -self.width :] if rows is None else self._placed(x, rows)
        return _less(start, (x @ Y[..., at, :]) @ N, Y[..., -self.width :, :].mT)

    def reduce_rows(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """Fᵀ x, (..., n, T) to (..., q, T): as ``reduce``, of the rows of x, and contiguous."""
        if self.held == "everything":
            return x if rows is None else self._placed(x.mT, rows).mT
        parts = self._as(x.dtype)
        if self.held == "columns":
            return (parts[0] if rows is None else parts[0][..., rows, :]).mT @ x
        Y, N = parts
        at = slice(0, self.size) if rows is None else rows
        start = x[..., -self.width :, :] if rows is None else self._placed(x.mT, rows).mT
        return _less(start, Y[..., -self.width :, :], N.mT @ (Y[..., at, :].mT @ x))

    def _placed(self, x: Tensor, at: slice) -> Tensor:
        """x [0; I] for some rows of it: the free columns that they have a one in, and zeros."""
        protected = self.size - self.width
        start, stop = max(at.start, protected), max(at.stop, protected)
        placed = x.new_zeros(*x.shape[:-1], self.width)
        placed[..., start - protected : stop - protected] = x[
            ..., start - at.start : stop - at.start
        ]
        return placed

    def expand(self, y: Tensor, rows: slice | None = None) -> Tensor:
        """y Fᵀ, (..., T, q) to (..., T, n), of y's dtype; some of its columns where ``rows`` says
        which rows of F.
        """
        return self.expand_rows(y.mT, rows).mT

    def expand_rows(self, y: Tensor, rows: slice | None = None) -> Tensor:
        """F y, (..., q, T) to (..., n, T), contiguous; some of its rows where ``rows`` says so."""
        if self.held == "everything":
            return y if rows is None else y[..., rows, :]
        parts = self._as(y.dtype)
        if self.held == "columns":
            return (parts[0] if rows is None else parts[0][..., rows, :]) @ y
        Y, N = parts
        at = slice(0, self.size) if rows is None else rows
        result = Y[..., at, :] @ (N @ (Y[..., -self.width :, :].mT @ y)).neg_()
        protected = self.size - self.width
        start, stop = max(at.start, protected), max(at.stop, protected)
        result[..., start - at.start : stop - at.start, :] += y[
            ..., start - protected : stop - protected, :
        ]
        return result

    def columns(self) -> Tensor:
        """F itself, (..., n, q)."""
        if self.held == "columns":
            return self._parts[0]
        if self.held == "everything":
            raise ValueRefusal.of(
                "FreeBasis.columns", "the side", "to protect something", "one that is free whole"
            )
        Y, N = self._parts
        F = -(Y @ N) @ Y[..., -self.width :, :].mT
        F[..., -self.width :, :].diagonal(dim1=-2, dim2=-1).add_(1)
        return F

    # --- what it is ---

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> FreeBasis:
        """The same on another device or of another dtype; itself where it is there."""
        first = self._parts[0] if self._parts else None  # all are alike in both
        if first is None or (device in (None, first.device) and dtype in (None, first.dtype)):
            return self
        moved = tuple(padded(part, device, dtype) for part in self._parts)
        return FreeBasis(self.size, self.width, self.held, moved)

    def of_batch(self, dim: int, part: slice) -> FreeBasis:
        """The basis of some matrices of a batch; ``dim``, below −2, counts from the end."""
        if len(self._batch) < -dim - 2:  # one basis for every matrix along it
            return self
        parts = tuple(held.narrow(dim, part.start, part.stop - part.start) for held in self._parts)
        return FreeBasis(self.size, self.width, self.held, parts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held: the columns, or Y and N, or nothing."""
        return self._parts

    @property
    def nbytes(self) -> int:
        """Of what is held."""
        return sum(part.nbytes for part in self._parts)


def _less(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """x − A B, contiguous, in one product where it is of two matrices."""
    return torch.addmm(x, A, B, alpha=-1) if x.dim() == A.dim() == B.dim() == 2 else x - A @ B
