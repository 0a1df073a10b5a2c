"""Lists of matrices with bases, their oracle, and what a prepared list of them has to do.

The scenarios take the backend that is in use where they are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import osf_kernels
from osf_kernels import Basis, Prepared
from osf_kernels.backends.cuda.slices import SlicedProgram
from osf_kernels.testing import (
    assert_error_within,
    project_eager,
    project_reference,
    random_basis,
    restore_reference,
)
from tests.helpers import generator_for, randn

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


class Entry(NamedTuple):
    """A matrix, or a batch of them, and its bases."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: str  # "high", "low" or "-" of U and V
    ranks: tuple[int, int]
    basis_dtype: torch.dtype | None = None


# Every form, small and odd, next to what has no elements, no bases or several dtypes.
MIXED = (
    Entry((24, 18), F32, "high high", (4, 5)),
    Entry((18, 30), BF16, "low low", (14, 24)),
    Entry((21, 17), F16, "high -", (3, 0)),
    Entry((17, 24), F32, "- low", (0, 20)),
    Entry((0, 16), F32, "- high", (0, 2)),
    Entry((20, 0), BF16, "high -", (2, 0)),
    Entry((32, 16), BF16, "high low", (6, 12), F32),
    Entry((2, 16, 12), F32, "high high", (3, 3)),
    Entry((19, 23), F32, "low high", (16, 4), BF16),
    Entry((16, 16), F32, "- -", (0, 0)),
    Entry((20, 16), F32, "low low", (3, 3)),
)
# From ready coefficients that pair errs 2.3 times as much as eager in mode "core" (plan.py).
SPLIT = MIXED[:-1]
# Of one rank and high, so that S can pin them.
PINNED = (
    Entry((24, 18), F32, "high high", (4, 4)),
    Entry((18, 32), BF16, "high high", (8, 8)),
    Entry((21, 17), F16, "high high", (3, 3), F32),
    Entry((2, 16, 12), F32, "high high", (3, 3)),
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.clone(memory_format=torch.contiguous_format),
    "columns": lambda t: t.mT.clone(memory_format=torch.contiguous_format).mT,
    "odd offset": lambda t: _within(t, 1, 0),
    "wide rows": lambda t: _within(t, 0, 5),
}


def _within(t: Tensor, before: int, behind: int) -> Tensor:
    """A copy behind ``before`` elements of a buffer, in rows wider by ``behind``."""
    *rows, columns = t.shape
    count = math.prod(rows)
    flat = t.new_full((before + count * (columns + behind),), torch.nan)
    return flat[before:].view(*rows, columns + behind)[..., :columns].copy_(t)


class List:
    """Bases of a list of matrices, and what comes of it."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *key: object,
        mode: str = "complement",
        factor: float = 2.0,
        device: str = "cpu",
    ) -> None:
        """``factor``: how many of eager torch's errors are allowed."""
        self.entries, self.mode, self.factor, self.device = entries, mode, factor, device
        self.generator = generator_for("list", *key, mode)
        self.Us: list[Basis | None] = [self._basis(e, 0) for e in entries]
        self.Vs: list[Basis | None] = [self._basis(e, 1) for e in entries]

    def _basis(self, entry: Entry, side: int) -> Basis | None:
        spans = entry.spans.split()[side]
        if spans == "-":
            return None
        size, held = entry.shape[len(entry.shape) - 2 + side], entry.ranks[side]
        rank = held if spans == "high" else size - held
        dtype = entry.basis_dtype or entry.dtype
        batch = entry.shape[:-2]
        drawn = [
            random_basis(size, rank, dtype=dtype, generator=self.generator).columns
            for _ in range(math.prod(batch))
        ]
        columns = torch.stack(drawn).view(*batch, size, rank).to(self.device)
        return Basis(columns, spans)  # type: ignore[arg-type]

    def draw(self, layout: str = "rows") -> list[Tensor]:
        """Fresh values in fresh memory."""
        return [
            LAYOUTS[layout](self.values(torch.empty(e.shape, dtype=e.dtype, device="meta")))
            for e in self.entries
        ]

    def values(self, like: Tensor) -> Tensor:
        """Of a matrix, drawn anew."""
        drawn = randn(*like.shape, dtype=like.dtype, generator=self.generator)
        return drawn.to(self.device)

    def refill(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """New values in the same memory; returns copies."""
        for x in matrices:
            x.copy_(self.values(x))
        return [x.clone() for x in matrices]

    def prepare(self, like: Sequence[Tensor] | None = None, **options: Any) -> Prepared:
        drawn = self.draw() if like is None else like
        return osf_kernels.prepare(drawn, self.Us, self.Vs, mode=self.mode, **options)  # type: ignore[arg-type]

    def assert_projected(self, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        for y, x, U, V in zip(after, before, self.Us, self.Vs, strict=True):
            if x.numel():
                peer = project_eager(x, U, V, mode=self.mode)
                reference = project_reference(x, U, V, mode=self.mode)
                assert_error_within(y, reference, peer, scale=x, factor=self.factor)

    def assert_restored(
        self, after: Sequence[Tensor], before: Sequence[Tensor], protected: Sequence[Tensor]
    ) -> None:
        """``protected`` in float64."""
        for y, x, U, V, H in zip(after, before, self.Us, self.Vs, protected, strict=True):
            if x.numel():
                reference = restore_reference(x, U, V, protected=H, mode=self.mode)
                peer = project_eager(x, U, V, mode=self.mode) + H.to(x.dtype)
                scale = x.double().abs() + H.abs()
                assert_error_within(y, reference, peer, scale=scale, factor=self.factor)

    def dense(self) -> tuple[list[Tensor], list[Tensor]]:
        """Protected parts as an entry's dtype has them, and what is pinned, in float64."""
        given = []
        for x, U, V in zip(self.draw(), self.Us, self.Vs, strict=True):
            given.append((x.double() - project_reference(x, U, V, mode=self.mode)).to(x.dtype))
        return given, [H.double() for H in given]

    def triplets(self) -> tuple[list[Tensor], list[Tensor]]:
        """Singular values, and what they pin, in float64."""
        S, pinned = [], []
        for entry, U, V in zip(self.entries, self.Us, self.Vs, strict=True):
            assert U is not None
            assert V is not None
            shape = (*entry.shape[:-2], entry.ranks[0])
            s = (torch.rand(shape, generator=self.generator) + 0.5).to(self.device)
            S.append(s)
            pinned.append((U.columns.double() * s.double()[..., None, :]) @ V.columns.double().mT)
        return S, pinned

    def residuals(self) -> tuple[list[Any], list[Tensor]]:
        """Rests beside ``triplets``, and what they add to what is pinned, in float64."""
        rests: list[Any] = []
        added = []
        for x, U, V in zip(self.draw(), self.Us, self.Vs, strict=True):
            assert U is not None
            assert V is not None
            X, u, v = 0.1 * x.double(), U.columns.double(), V.columns.double()
            inner = u.mT @ X @ v
            # What was rounded is what is pinned: a rest is exact in float32 alone to rounding.
            if self.mode == "core":
                rests.append(inner.float())
            else:
                rests.append(((u.mT @ X).float(), (X @ v).float()))
            added.append(X - project_reference(X, U, V, mode=self.mode))
        return rests, added


# --- scenarios -----------------------------------------------------------------------------


def follows_every_address_and_layout(case: List) -> None:
    """One prepared list over the same memory, new memory, other strides and alignments, in turn."""
    prepared = case.prepare()
    grads = case.draw()
    for _ in range(2):
        before = [x.clone() for x in grads]
        prepared.project_(grads)
        case.assert_projected(grads, before)
        case.refill(grads)
    kept = []
    for layout in (*LAYOUTS, "rows", "odd offset"):
        fresh = case.draw(layout)
        before = [x.clone() for x in fresh]
        prepared.project_(fresh)
        case.assert_projected(fresh, before)
        kept.append(fresh)
    before = [x.clone() for x in grads]
    prepared.project_(grads)
    case.assert_projected(grads, before)


def restores_what_is_pinned(case: List) -> None:
    """From triplets, with their rests, dense parts and a mixture; again and elsewhere."""
    S, pinned = case.triplets()
    rests, added = case.residuals()
    dense, protected = case.dense()
    whole = [p + a for p, a in zip(pinned, added, strict=True)]
    count = len(S)
    turns: list[tuple[dict[str, Any], list[Tensor]]] = [
        ({"S": S}, pinned),
        ({"S": S, "residual": rests}, whole),
        ({"protected": dense}, protected),
        (
            {
                "S": [s if i % 2 else None for i, s in enumerate(S)],
                "residual": [r if i % 4 == 1 else None for i, r in enumerate(rests)],
                "protected": [None if i % 2 else h for i, h in enumerate(dense)],
            },
            [
                (whole[i] if i % 4 == 1 else pinned[i]) if i % 2 else protected[i]
                for i in range(count)
            ],
        ),
    ]
    prepared = case.prepare()
    weights = case.draw()
    for pins, expected in (*turns, turns[0]):
        for matrices in (weights, weights, case.draw("columns"), case.draw("odd offset")):
            before = [x.clone() for x in matrices]
            prepared.restore_(matrices, **pins)
            case.assert_restored(matrices, before, expected)


def halves_make_the_whole(case: List) -> None:
    """coefficients and apply_, whose coefficients stay as they were; then restore_ from them."""
    prepared = case.prepare()
    for layout in (*LAYOUTS, "rows"):
        xs = case.draw(layout)
        before = [x.clone() for x in xs]
        halves = prepared.coefficients(xs)
        assert all(map(torch.equal, xs, before))
        kept = [t.clone() for t in (*halves.A, *halves.B)]
        pieces = {t.untyped_storage().data_ptr() for t in halves.sums}
        assert {t.untyped_storage().data_ptr() for t in halves.A} <= pieces
        prepared.apply_(xs, halves)
        case.assert_projected(xs, before)
        assert all(map(torch.equal, (*halves.A, *halves.B), kept))


def small_workspace_serves(case: List, limit: int, shares: int) -> None:
    """With a workspace of ``limit`` bytes a list has the bits that it has with room for all of it.

    ``shares``: how many times the memory of a single matrix it takes where the limit holds less.
    """
    grads = case.draw()
    roomy, tight = case.prepare(grads), case.prepare(grads, workspace_bytes=limit)
    for _ in range(2):
        before = case.refill(grads)
        others = [x.clone() for x in before]
        tight.project_(grads)
        case.assert_projected(grads, before)
        roomy.project_(others)
        assert all(map(torch.equal, grads, others))
    most, taken = roomy.plan.workspace_bytes, tight.plan.workspace_bytes
    each = [
        osf_kernels.prepare([x], [U], [V], mode=case.mode).plan.workspace_bytes  # type: ignore[arg-type]
        for x, U, V in zip(grads, case.Us, case.Vs, strict=True)
    ]
    assert 0 < taken <= max(limit, shares * max(each))
    assert taken < most if limit < most else taken <= most


def slices_share_the_workspace(case: List, monkeypatch: pytest.MonkeyPatch, limit: int) -> int:
    """A list that the workspace doesn't hold is run slice by slice; returns how many. (CUDA's;
    Triton's single launch uses the workspace by halves in turn.)"""
    small_workspace_serves(case, limit, 1)
    slices: list[int] = []
    make = SlicedProgram.__init__

    def making(self: SlicedProgram, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        slices.append(len(self._slices))

    monkeypatch.setattr(SlicedProgram, "__init__", making)
    grads = case.draw()
    case.prepare(grads, workspace_bytes=limit).project_(grads)
    (count,) = slices
    return count


def shards_make_the_whole(
    case: List, ranks: int, pins: dict[str, Any], pinned: list[Tensor]
) -> None:
    """Rows of every matrix on several ranks, in one process: ``sums`` added up by hand."""
    xs = case.draw()
    rows = [[list(range(rank, e.shape[-2], ranks)) for e in case.entries] for rank in range(ranks)]
    prepared, locals_ = [], []
    for mine in rows:
        Us = [
            None if U is None else Basis(U.columns[..., own, :], U.spans)
            for U, own in zip(case.Us, mine, strict=True)
        ]
        local = [x[..., own, :] for x, own in zip(xs, mine, strict=True)]
        prepared.append(
            osf_kernels.prepare(local, Us, case.Vs, mode=case.mode, sharded=True)  # type: ignore[arg-type]
        )
        locals_.append(local)
    for _ in range(2):
        halves = [
            p.coefficients(local, **_rows(pins, mine), root=mine is rows[-1])
            for p, local, mine in zip(prepared, locals_, rows, strict=True)
        ]
        for sums in zip(*(half.sums for half in halves), strict=True):
            total = torch.stack(sums).sum(0)
            for own in sums:
                own.copy_(total)
        before = [torch.empty_like(x) for x in xs]
        after = [torch.empty_like(x) for x in xs]
        for mine, local, p, half in zip(rows, locals_, prepared, halves, strict=True):
            for i, own in enumerate(mine):
                before[i][..., own, :] = local[i]
            if pins:
                p.restore_(local, coefficients=half)
            else:
                p.apply_(local, half)
            for i, own in enumerate(mine):
                after[i][..., own, :] = local[i]
        if pins:
            case.assert_restored(after, before, pinned)
        else:
            case.assert_projected(after, before)


def _rows(pins: dict[str, Any], rows: Sequence[list[int]]) -> dict[str, Any]:
    """A rank's part of what is pinned: S and UᵀW whole, W V and dense parts by rows."""
    mine = dict(pins)
    if "residual" in pins:
        mine["residual"] = [
            r if isinstance(r, Tensor) else (r[0], r[1][..., own, :])
            for r, own in zip(pins["residual"], rows, strict=True)
        ]
    if "protected" in pins:
        mine["protected"] = [H[..., own, :] for H, own in zip(pins["protected"], rows, strict=True)]
    return mine


def writes_to_bases_count(case: List) -> None:
    """In place, by ``.data`` and by ``set_``."""
    prepared = case.prepare()
    other = List(case.entries, "other bases", mode=case.mode)

    def copy(held: Tensor, new: Tensor) -> None:
        held.copy_(new)

    def data(held: Tensor, new: Tensor) -> None:
        held.data = new.clone()

    def data_written(held: Tensor, new: Tensor) -> None:
        held.data.copy_(new)

    def moved(held: Tensor, new: Tensor) -> None:
        held.set_(new.clone())  # type: ignore[call-overload]

    grads = case.draw()
    drawn = [*other.Us, *other.Vs], [*List(case.entries, "others", mode=case.mode).Us, *other.Vs]
    for i, write in enumerate((copy, data, data_written, moved, copy)):
        for held, new in zip((*case.Us, *case.Vs), drawn[i % 2], strict=True):
            if held is not None:
                assert new is not None
                write(held.columns, new.columns)
        before = [x.clone() for x in grads]
        prepared.project_(grads)
        case.assert_projected(grads, before)
        case.refill(grads)


def writes_to_pins_count(case: List, dtype: torch.dtype = F32) -> None:
    """Pins changed in place, with and without a version, and replaced by others."""
    prepared = case.prepare()
    weights = case.draw()
    S, pinned = case.triplets()
    S = [s.to(dtype) for s in S]
    for write in (None, "in place", "data", "replaced", "data"):
        new, pinned = case.triplets()
        if write is None:
            S = [s.to(dtype) for s in new]
        else:
            for i, s in enumerate(new):
                if write == "in place":
                    S[i].copy_(s)
                elif write == "data":
                    S[i].data.copy_(s)
                else:
                    S[i] = s.to(dtype)
        pinned = [
            (U.columns.double() * s.double()[..., None, :]) @ V.columns.double().mT  # type: ignore[union-attr]
            for U, s, V in zip(case.Us, S, case.Vs, strict=True)
        ]
        for _ in range(2):
            before = [x.clone() for x in weights]
            prepared.restore_(weights, S=S)
            case.assert_restored(weights, before, pinned)
            case.refill(weights)
