"""The coefficients of a list of matrices, which a sharded caller sums between the two halves."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.backends.grouped import Ready
from osf_kernels.backends.jobs import coefficient_dtype
from osf_kernels.errors import TypeRefusal, ValueRefusal
from osf_kernels.ops._validation import require_constant


class CoefficientList(NamedTuple):
    """A = Uᵀ x and B = x V of every matrix of a list.

    Attributes:
        A, B: a tensor (..., r, n) and (..., m, k) a matrix, float32 (float64 for float64 x).
        sums: flat tensors, one a device and dtype, which hold all of A: of matrices whose rows are
            sharded, all-reduce these in place.
        origin: what they were computed from; None where they weren't by a prepared list.
    """

    A: list[Tensor]
    B: list[Tensor]
    sums: tuple[Tensor, ...]
    origin: Origin | None = None


class Origin:
    """What coefficients were computed from, as it was then.

    Args:
        number: of the prepared list.
        bases: its left bases, which are another list once something was written to a basis.
        pinned: what the matrices are pinned to.
        xs: the matrices, of which none is kept.

    Attributes:
        made: A, B and sums of the coefficients, as they were made.
    """

    made: tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]

    def __init__(
        self, number: int, bases: Sequence[Tensor | None], pinned: Any, xs: Sequence[Tensor]
    ) -> None:
        self.number, self.bases, self.pinned = number, bases, pinned
        self._xs = [weakref.ref(x) for x in xs]
        self._versions = _versions(xs)

    def written(self, xs: Sequence[Tensor]) -> int | None:
        """The place of one of the matrices to which something was written since.

        Told of the very same tensors where they are all of their memory: torch counts the writes
        to a buffer together, whichever of its parts they are to.
        """
        versions = _versions(xs)
        if versions == self._versions:
            return None
        lists = zip(xs, self._xs, self._versions, versions, strict=True)
        for i, (x, then, before, now) in enumerate(lists):
            if before != now and then() is x and _is_whole(x):
                return i
        return None

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no list."""
        no_xs: dict[str, Any] = {"_xs": [], "_versions": []}
        return self.__dict__ | {"number": -1, "pinned": None} | no_xs


def _is_whole(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _versions(xs: Sequence[Tensor]) -> list[int | None]:
    # torch counts no writes to tensors of inference mode.
    return [None if x.is_inference() else x._version for x in xs]


def coefficient_shapes(
    shape: Sequence[int], U: Tensor | None, V: Tensor | None
) -> tuple[torch.Size, torch.Size]:
    """Of A and B, for a matrix of that shape."""
    r = 0 if U is None else U.shape[-1]
    k = 0 if V is None else V.shape[-1]
    *batch, m, n = shape
    return torch.Size((*batch, r, n)), torch.Size((*batch, m, k))


class Allocation:
    """Where the coefficients of a list lie: all of A in one piece a device and dtype, and all of B;
    on a GPU rows start on 16 bytes."""

    def __init__(
        self, xs: Sequence[Tensor], Us: Sequence[Tensor | None], Vs: Sequence[Tensor | None]
    ) -> None:
        self._kinds: list[tuple[torch.device, torch.dtype]] = []
        self._sides = [(U is not None, V is not None) for U, V in zip(Us, Vs, strict=True)]
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
            for side, shape in enumerate(coefficient_shapes(x.shape, U, V)):
                strides, elements = _pitched(shape, *kind)
                views.append((shape, strides, sizes[side]))
                sizes[side] += elements
            self._places.append((place, views))

    def new(self, origin: Origin) -> CoefficientList:
        """Coefficients without values."""
        pieces = [
            [torch.empty(size, dtype=dtype, device=device) for size in sizes]
            for (device, dtype), sizes in zip(self._kinds, self._sizes, strict=True)
        ]
        A, B = (
            [pieces[kind][side].as_strided(*views[side]) for kind, views in self._places]
            for side in (0, 1)
        )
        origin.made = A, B, tuple(piece[0] for piece in pieces)
        return CoefficientList(*origin.made, origin)

    def checked(self, op: str, given: object) -> list[Ready]:
        """A and B of each matrix as backends take them, where they are those of this list.

        Raises:
            ValueError: they aren't, naming the entry; one that autograd differentiates.
        """
        remedy = "take them from coefficients(xs) of this prepared list"
        places, sides = self._places, self._sides
        if not isinstance(given, CoefficientList) or not (
            len(given.A) == len(given.B) == len(places)
        ):
            expected = f"those of {len(places)} matrices"
            raise ValueRefusal.of(op, "coefficients", expected, "others", remedy)
        found: list[Ready] = []
        lists = zip(given.A, given.B, places, sides, strict=True)
        for i, (A, B, (kind, views), (has_U, has_V)) in enumerate(lists):
            device, dtype = self._kinds[kind]
            pair: tuple[Any, Any] = A, B
            for side, t in enumerate(pair):
                shape, is_tensor = views[side][0], isinstance(t, Tensor)
                fits = is_tensor and (t.shape, t.dtype, t.device) == (shape, dtype, device)
                if fits and not t.requires_grad:
                    continue
                name = f"coefficients.{'AB'[side]}[{i}]"
                if not is_tensor:
                    raise TypeRefusal.of(op, name, "a tensor", type(t).__name__, remedy)
                if not fits:
                    expected = f"{tuple(shape)} {dtype} on {device}"
                    got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
                    raise ValueRefusal.of(op, name, expected, got, remedy)
                require_constant(op, [name], t)
            found.append((A if has_U else None, B if has_V else None))
        return found


def empty_coefficients(g: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    """A and B of one matrix without values.

    A is what shards all-reduce, which takes contiguous tensors only; its rows are as long as those
    of g. B stays, and its width is a rank.
    """
    dtype = coefficient_dtype(g)
    shape_A, shape_B = coefficient_shapes(g.shape, U, V)
    A = g.new_empty(shape_A, dtype=dtype)
    return A, _padding.empty(shape_B[-2], shape_B[-1], g, dtype=dtype, batch=shape_B[:-2])


def _pitched(
    shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[list[int], int]:
    """Strides with padded rows, and how many elements that takes."""
    strides, step = [1], _padding.leading_dimension(shape[-1], device, dtype)
    for size in reversed(shape[:-1]):
        strides.insert(0, step)
        step *= size
    return strides, step
