"""Lists of matrices to project and to restore, some of them sharded: each list prepared once.

A matrix that is whole on this rank takes one call with all the others. Of one whose rows are
sharded B = x V is this rank's own and A = Uᵀ x a sum over the ranks: all such matrices of a list
take one collective a group, those to project and those to restore together. A matrix whose columns
are sharded comes as its transposed view. One whose rows and columns both are is projected on one
side after the other, so that each sum goes with those of its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from osf_kernels import CoefficientList, Mode, Refusal, prepare, requested_backend
from osf_torch.bases import Held
from osf_torch.sharding import Group, is_first, sum_over_

T_co = TypeVar("T_co", covariant=True)
Key = tuple[Any, ...]
KEPT = 4  # lists of several matrices that are kept ready: which have gradients may alternate


class _At(Protocol[T_co]):
    """What is known of some matrices by their places in a list."""

    def __getitem__(self, at: int, /) -> T_co: ...


class Entry(NamedTuple):
    """What is done to one matrix: x ← P(x), or where S or ``protected`` pins it, P(x) + that part.

    Attributes:
        U, V: its bases; of a sharded matrix this rank's rows of them.
        groups: of the ranks that hold the matrix's other rows; none where it is whole.
        across: of those that hold its other columns, of a matrix that is cut on both sides; then
            nothing but ``protected`` pins it.
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
    across: tuple[Group, ...] = ()

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
        halved: dict[Key, list[int]] = {}
        for i, entry in enumerate(entries):
            in_halves = entry.groups or entry.across or entry.inverse is not None
            sides = (entry.U is None, entry.V is None) if entry.across else ()
            key = entry.groups, entry.across, entry.is_pinned, sides
            alike = halved.setdefault(key, []) if in_halves else None
            (whole.setdefault(entry.is_pinned, []) if alike is None else alike).append(i)
        self._whole = [_Part(at, like, entries, mode, sharded=False) for at in whole.values()]
        self._halved = [
            (_Crossed if across else _Halved)(at, like, entries, mode)
            for (_, across, *_), at in halved.items()
        ]
        self._rounds = _rounds([part.groups for part in self._halved])

    def run_(self, xs: Sequence[Tensor]) -> None:
        """Projects and restores every matrix in place.

        Raises:
            TypeError, ValueError: as ``osf_kernels.Prepared``.
        """
        for part in self._whole:
            part.finish_([xs[i] for i in part.at])
        running = [part.run_([xs[i] for i in part.at]) for part in self._halved]
        summed = [next(steps, None) for steps in running]
        for group, waiting in self._rounds:
            _sum_(group, [flat for i in waiting for flat in summed[i] or ()])
            for i in waiting:
                summed[i] = next(running[i], None)


def _rounds(sequences: Sequence[Sequence[Group]]) -> list[tuple[Group, list[int]]]:
    """In which order sums are taken over groups, and who of those that wait for several of them one
    after another joins each.

    The next one is a group that nobody comes to later. Where all name groups in the order of one
    mesh each group has one sum.
    """
    left = [list(sequence) for sequence in sequences]
    found: list[tuple[Group, list[int]]] = []
    while heads := [groups[0] for groups in left if groups]:
        later = {id(group) for groups in left for group in groups[1:]}
        group = next((head for head in heads if id(head) not in later), heads[0])
        waiting = [i for i, groups in enumerate(left) if groups and groups[0] is group]
        for i in waiting:
            left[i].pop(0)
        found.append((group, waiting))
    return found


class _Part:
    """The matrices of a list that are run by the same calls.

    Attributes:
        at: where they stand in the list.
        prepared: of all of them.
    """

    def __init__(
        self,
        at: Sequence[int],
        like: _At[Tensor],
        entries: _At[Entry],
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


Steps = Iterator[Sequence[Tensor]]  # yields what is to be summed next, in place


class _Halved:
    """Matrices whose coefficients A are sums over the ranks of the same groups, or that an
    ``inverse`` corrects.

    Attributes:
        at: where they stand in the list.
        groups: over which ``run_`` has sums taken, one after another.
    """

    def __init__(
        self, at: Sequence[int], like: _At[Tensor], entries: _At[Entry], mode: Mode
    ) -> None:
        self.at, self.groups = at, entries[at[0]].groups
        self._part = _Part(at, like, entries, mode, sharded=True)

    def run_(self, xs: Sequence[Tensor]) -> Steps:
        found = self._part.coefficients(xs, is_first(self.groups))
        for _ in self.groups:
            yield found.sums
        self._part.finish_(xs, found)
        yield ()


class _Crossed:
    """Matrices that are cut on both sides: P is taken of their rows, then of their columns.

    P(x) = P_V(P_U(x)) in mode "complement"; in mode "core", where P(x) = P_U(x) + P_V(x − P_U(x)),
    with a copy of the matrices. Those of 16 bits are rounded once, at the end. Attributes as of
    ``_Halved``.
    """

    def __init__(
        self, at: Sequence[int], like: Sequence[Tensor], entries: Sequence[Entry], mode: Mode
    ) -> None:
        first = entries[at[0]]
        self.at = at
        self._pins = [entries[i].protected for i in at]
        xs = {i: _wide(like[i]) for i in at}
        self._left = self._right = None
        if first.U is not None:
            left = {i: Entry(entries[i].U, None, first.groups) for i in at}
            self._left = _Halved(at, xs, left, "complement")
        if first.V is not None:
            right = {i: Entry(entries[i].V, None, first.across) for i in at}
            self._right = _Halved(at, {i: x.mT for i, x in xs.items()}, right, "complement")
        self._is_core = mode == "core" and None not in (self._left, self._right)
        sides = self._left, self._right
        self.groups = tuple(group for side in sides if side is not None for group in side.groups)

    def run_(self, xs: Sequence[Tensor]) -> Steps:
        wide = [_wide(x) for x in xs]
        inside = [x.clone() for x in wide] if self._is_core else wide
        yield from _sums(self._left, wide)
        if self._is_core:
            torch._foreach_sub_(inside, wide)
        yield from _sums(self._right, [x.mT for x in inside])
        if self._is_core:
            torch._foreach_add_(wide, inside)
        for x, result, protected in zip(xs, wide, self._pins, strict=True):
            if protected is not None:
                result += protected.to(result.dtype)
            if result is not x:
                x.copy_(result)
        yield ()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() == 2 else x


def _sums(side: _Halved | None, xs: Sequence[Tensor]) -> Steps:
    """The sums that one side takes, and its end."""
    if side is None:
        return
    steps = side.run_(xs)
    for _ in side.groups:
        yield next(steps)
    next(steps)


def _sum_(group: Group, flats: Sequence[Tensor]) -> None:
    """Sums over the ranks of a group, by one collective a dtype and device."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for flat in flats:
        alike.setdefault((flat.dtype, flat.device), []).append(flat)
    for some in alike.values():
        sum_over_([group], some)


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
