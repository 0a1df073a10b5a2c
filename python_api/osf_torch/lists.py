"""Lists of matrices to project and to restore, some of them sharded: each list prepared once.

A matrix that is whole on this rank takes one call with all the others. Of one whose rows are
sharded B = x V is this rank's own and A = Uᵀ x a sum over the ranks: all such matrices of a list
take one collective a group, those to project and those to restore together. A matrix whose columns
are sharded comes as its transposed view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels import CoefficientList, Mode, Refusal, prepare, requested_backend
from osf_torch.bases import Held
from osf_torch.sharding import Group, is_first, sum_over_

Key = tuple[Any, ...]
KEPT = 4  # lists of several matrices that are kept ready: which have gradients may alternate


class Entry(NamedTuple):
    """What is done to one matrix: x ← P(x), or where S or ``protected`` pins it, P(x) + that part.

    Attributes:
        U, V: its bases; of a sharded matrix this rank's rows of U.
        groups: of the ranks that hold the matrix's other rows; none where it is whole.
        S, residual, protected: as in ``osf_kernels.restore_many_``; each the same tensor at every
            step.
        inverse: (UᵀU)⁻¹ (r, r), which takes U for what its columns span where they aren't quite
            orthonormal: A becomes (UᵀU)⁻¹ Uᵀ x. Of a left basis alone.
    """

    U: Held
    V: Held
    groups: tuple[Group, ...] = ()
    S: Tensor | None = None
    residual: tuple[Tensor, Tensor] | Tensor | None = None
    protected: Tensor | None = None
    inverse: Tensor | None = None

    @property
    def is_pinned(self) -> bool:
        return self.S is not None or self.protected is not None


class Side(NamedTuple):
    """The side of a matrix that one basis projects.

    Attributes:
        dim: -2 for (I − B Bᵀ) x, -1 for x (I − B Bᵀ).
        groups: of the ranks that hold the rest of that dimension.
        inverse: as in Entry.
    """

    dim: int
    groups: tuple[Group, ...] = ()
    inverse: Tensor | None = None

    def view(self, x: Tensor) -> Tensor:
        """The matrix as a list takes it."""
        return x.mT if self.dim == -1 and self._in_halves() else x

    def entry(self, basis: Held) -> Entry:
        """What is done to ``view``."""
        if self.dim == -1 and not self._in_halves():
            return Entry(None, basis)
        return Entry(basis, None, self.groups, inverse=self.inverse)

    def _in_halves(self) -> bool:
        return bool(self.groups) or self.inverse is not None


class MatrixList:
    """A list of matrices with what is done to each, decided once and run at every step.

    Args:
        like: matrices of the shapes, dtypes and devices of those to come; none is kept.
        entries: one a matrix.

    Raises:
        TypeError, ValueError: as ``osf_kernels.prepare``.
    """

    def __init__(
        self, like: Sequence[Tensor], entries: Sequence[Entry], mode: Mode = "complement"
    ) -> None:
        whole: dict[bool, list[int]] = {}
        halved: dict[tuple[Group, ...], dict[bool, list[int]]] = {}
        for i, entry in enumerate(entries):
            in_halves = entry.groups or entry.inverse is not None
            alike = halved.setdefault(entry.groups, {}) if in_halves else whole
            alike.setdefault(entry.is_pinned, []).append(i)
        self._whole = [_Part(at, like, entries, mode, sharded=False) for at in whole.values()]
        self._halved = {
            groups: [_Part(at, like, entries, mode, sharded=True) for at in alike.values()]
            for groups, alike in halved.items()
        }

    def run_(self, xs: Sequence[Tensor]) -> None:
        """Projects and restores every matrix in place.

        Raises:
            TypeError, ValueError: as ``osf_kernels.Prepared``.
        """
        for part in self._whole:
            part.finish_([xs[i] for i in part.at])
        for groups, parts in self._halved.items():
            taken = [[xs[i] for i in part.at] for part in parts]
            root = is_first(groups)
            ready = [part.coefficients(x, root) for part, x in zip(parts, taken, strict=True)]
            if groups:
                _sum_(groups, ready)
            for part, mine, found in zip(parts, taken, ready, strict=True):
                part.finish_(mine, found)


class _Part:
    """The matrices of a list that are run by the same calls.

    Attributes:
        at: where they stand in the list.
        prepared: of all of them.
    """

    def __init__(
        self,
        at: Sequence[int],
        like: Sequence[Tensor],
        entries: Sequence[Entry],
        mode: Mode,
        *,
        sharded: bool,
    ) -> None:
        mine = [entries[i] for i in at]
        self.at = at
        Us, Vs = [entry.U for entry in mine], [entry.V for entry in mine]
        try:
            xs = [like[i] for i in at]
            self.prepared = prepare(xs, Us, Vs, mode=mode, sharded=sharded)
        except Refusal as refusal:
            raise self._of_list(refusal) from None
        pins: dict[str, list[Any]] = {
            "S": [entry.S for entry in mine],
            "residual": [entry.residual for entry in mine],
            "protected": [entry.protected for entry in mine],
        }
        self._pins: dict[str, Any] = {
            name: pinned for name, pinned in pins.items() if any(t is not None for t in pinned)
        }
        self._inverses = [
            (i, entry.inverse) for i, entry in enumerate(mine) if entry.inverse is not None
        ]

    def _of_list(self, refusal: Refusal) -> Refusal:
        """With the place of the entry in the whole list."""
        if isinstance(refusal.index, int):
            refusal.index = self.at[refusal.index]
        return refusal

    def coefficients(self, xs: Sequence[Tensor], root: bool) -> CoefficientList:
        """Those of this rank's rows."""
        try:
            return self.prepared.coefficients(xs, root=root, **self._pins)
        except Refusal as refusal:
            raise self._of_list(refusal) from None

    def finish_(self, xs: Sequence[Tensor], found: CoefficientList | None = None) -> None:
        """Projects or restores them, from their coefficients where these come in halves."""
        if found is not None:
            for i, inverse in self._inverses:
                A = found.A[i]
                A.copy_(inverse.to(A) @ A)
        try:
            if self._pins and found is not None:
                self.prepared.restore_(xs, coefficients=found)
            elif self._pins:
                self.prepared.restore_(xs, **self._pins)
            elif found is None:
                self.prepared.project_(xs)
            else:
                self.prepared.apply_(xs, found)
        except Refusal as refusal:
            raise self._of_list(refusal) from None


def _sum_(groups: Sequence[Group], found: Sequence[CoefficientList]) -> None:
    """Sums A of all lists over the ranks, by one collective a group, dtype and device."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for coefficients in found:
        for flat in coefficients.sums:
            alike.setdefault((flat.dtype, flat.device), []).append(flat)
    for flats in alike.values():
        sum_over_(groups, flats)


class Lists:
    """The lists that ran last, ready to run again.

    A matrix is known by a key: whose it is, which bases it takes now, and what else tells entries
    apart. No list keeps a matrix alive, and once a matrix has taken other bases none keeps the
    earlier ones. Lists of one matrix stay until then, of longer ones the last four.
    """

    def __init__(self, mode: Mode = "complement") -> None:
        self._mode = mode
        self._kept: dict[tuple[Key, ...], tuple[Key, MatrixList, object]] = {}

    def run_(
        self,
        keys: Sequence[Key],
        xs: Sequence[Tensor],
        entries: Callable[[], Sequence[Entry]],
        named: object = None,
    ) -> None:
        """Projects and restores every matrix in place.

        Args:
            keys: one a matrix.
            entries: called where the list isn't ready.
            named: what keys name by its id: kept with the list, so that nothing else has that id.

        Raises:
            TypeError, ValueError: as ``MatrixList``.
        """
        if not xs:
            return
        key = tuple(keys)
        kinds = requested_backend(), [(x.shape, x.dtype, x.device) for x in xs]
        known, ready, _ = self._kept.pop(key, (None, None, None))
        if ready is None or known != kinds:
            self._forget(key)
            ready = MatrixList(xs, entries(), self._mode)
        self._kept[key] = kinds, ready, named  # behind those that ran before
        ready.run_(xs)

    def clear(self) -> None:
        """Drops all lists."""
        self._kept.clear()

    def _forget(self, key: tuple[Key, ...]) -> None:
        """Drops lists of bases that were replaced, and the oldest where there are too many."""
        now = {whose: which for whose, which, *_ in key}
        longer = []
        for other in list(self._kept):
            if any(now.get(whose, which) != which for whose, which, *_ in other):
                self._kept.pop(other, None)
            elif len(other) > 1:
                longer.append(other)
        for other in longer[: max(0, len(longer) - KEPT + 1)]:
            self._kept.pop(other, None)
