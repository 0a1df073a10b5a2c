"""Host side of a projection's launch: its tasks, and the records that they read.

Pure arithmetic on addresses, sizes and strides. Imports torch, never triton.

A launch has two int64 arrays. ``metadata`` is a call's own: counters, zero (``kernels.tasks``),
then 0 and the addresses of the arguments that the call brings, the workspace first. The counters
lie there so that calls in flight on several streams share none, a graph has its own, and a kernel
that is aborted leaves no context to launch another in. ``constant`` is the same in every call: of
each task, in the order in which they are claimed, where its record is (times 2³²) and which tile of
it; then the records.

The records (field: meaning; a view is an address and two strides in elements; an address is the
number of an argument, times 2⁴⁸, and what is added to that; of number 0 it is the address itself):

every one   0 kind (0 Aᵀ, 1 B, 2 C, 3 update), 1 counter it waits for, 2 up to what (0: doesn't),
            3 counter it counts up
Reduction   4 x, 7 q, 8 length, 9 basis, 12 rank, 13 parts or 0, 14 how many to add (0: a product),
            15 out (q, rank), 18 initial, 21 its sign, 22 S, 23 its stride, 24 other basis,
            27 its width, 28 c, 31 counter that c waits for, 32 up to what, 33 alpha,
            34 length of a part, 35 the C that it makes parts of, 36 the C that c is: where their
            records are from here, or 0
C           as of a Reduction; no task is of it: 35 counter of the tiles that are claimed
Update      4 out, 7 x, 10 m, 11 n, 12 alpha's float32 bits, 13 beta, 14 L1, 17 R1, 20 r,
            21 L2, 24 R2, 27 k, 28 addend, 31 columns of a task

A tile's number counts chunks of the rank first, then panels of rows, then parts; of an update,
panels of rows, then strips of columns.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

from osf_kernels.backends.chains import Reduction
from osf_kernels.backends.jobs import Matrix, Update
from osf_kernels.backends.operands import ALIGNMENT, WORKSPACE, Placed

from .groups import DEFAULTS, Cut, Group, Planned, in_launches, is_C, rank_of, view_of
from .launches import Launch
from .order import Chained, Tasks, in_order
from .views import View, ceil_div

__all__ = ["ARGUMENT_BITS", "projection_launches"]

ARGUMENT_BITS = 48  # of an address in a record, what is below them is added to the argument
_MOST_ARGUMENTS = 2**15 - 2
_NO_VIEW = (0, 0, 0)
_KINDS = {"A": 0, "B": 1, "C": 2}
_FREE_COUNTERS = 2  # tasks claimed, programs that have left


def projection_launches(
    planned: Sequence[Planned], *, fill: int, room: float, limit: int
) -> tuple[list[Launch], int]:
    """The launches of chains, and the bytes of workspace that they take.

    ``room``: bytes of L2 for matrices that are read again. Sums are split only where the tiles of a
    launch are fewer than half of ``fill``, so that a list may have other bits than a loop over it.
    Where the chains of a launch take more than ``limit`` of workspace, halves of it serve in turn,
    or all of it: what writes there waits until all that used it before are done.
    """
    phases = in_launches(planned)
    for group in itertools.chain.from_iterable(phases):
        group.split(fill)
    if len(phases) > 1 and len(planned) > 1 and sum(p.arena.bytes for p in planned) > limit:
        # A chain keeps its memory from the first to the last of its launches.
        middle = len(planned) // 2
        parts = [planned[:middle], planned[middle:]]
        made = [projection_launches(part, fill=fill, room=room, limit=limit) for part in parts]
        return [each for launches, _ in made for each in launches], max(most for _, most in made)
    launches, most = [], 0
    kept = None
    if len(phases) > 1:
        starts = [0, *itertools.accumulate(each.arena.bytes for each in planned)]
        kept = {id(each): start for each, start in zip(planned, starts, strict=False)}
        most = starts[-1]
    for group in itertools.chain.from_iterable(phases):
        places, end = _places(group, limit) if kept is None else (_kept(group, kept), 0)
        launch = _Builder(group, fill, room).launch(places)
        launches += [launch] if launch.tasks else []
        most = max(most, end)
    return launches, most


class _Place(NamedTuple):
    """Where a chain's memory starts in the workspace, and its turn there."""

    start: int
    turn: int  # It begins when all of turn − 2 are done.


def _kept(group: Group, starts: dict[int, int]) -> list[_Place]:
    return [_Place(starts[id(planned)], 0) for planned, _ in group.members]


def _places(group: Group, limit: int) -> tuple[list[_Place], int]:
    """A place for each chain: side by side, or by turns in the halves of the workspace.

    Where a chain takes more than a half, each turn has all of it. Such turns count in twos, so that
    one begins where the one before it ends.
    """
    sizes = [planned.arena.bytes for planned, _ in group.members]
    if sum(sizes) <= limit:
        starts = [0, *itertools.accumulate(sizes)]
        return [_Place(start, 0) for start in starts[:-1]], starts[-1]
    half = limit // 2 // ALIGNMENT * ALIGNMENT
    by = 1 if max(sizes) <= half else 2
    room = half if by == 1 else max(limit, *sizes)
    places, turn, used = [], 0, 0
    for size in sizes:
        if used + size > room:
            turn, used = turn + by, 0
        places.append(_Place(turn % 2 * room + used, turn))
        used += size
    return places, max(p.start + size for p, size in zip(places, sizes, strict=True))


# --- records and order ---------------------------------------------------------------------


class _Wait(NamedTuple):
    """For a counter of the launch to have been counted so far."""

    counter: int
    until: int


_AT_ONCE = _Wait(0, 0)


class _SumOfC(NamedTuple):
    """A C, which has a record but no tasks: where that is, and when C is there."""

    place: int
    done: _Wait


class _Builder:
    """One launch under construction."""

    def __init__(self, group: Group, fill: int, room: float) -> None:
        self.group, self.config, self.fill, self.room = group, group.config, fill, room
        self.counters = _FREE_COUNTERS
        self.records: list[int] = []
        self.arguments = 0

    def launch(self, places: Sequence[_Place]) -> Launch:
        chains = self._chains(places)
        tasks = [*itertools.chain.from_iterable(in_order(chains, self.fill, self.room))]
        updates = [step for step in self.group.steps if isinstance(step, Update)]
        constants = DEFAULTS | self.group.constants
        constants["WHOLE"] = max(map(rank_of, updates), default=0) <= self.config.block_r
        metadata = [0] * self.counters + [0]
        metadata += [Placed.at(0, argument) for argument in range(self.arguments)]
        return Launch(
            "projection",
            self.config,
            constants,
            metadata,
            (self.counters, len(tasks)),
            len(tasks),
            constant=tasks + self.records,
        )

    def _counter(self) -> int:
        self.counters += 1
        return self.counters - 1

    def _chains(self, places: Sequence[_Place]) -> list[Chained]:
        """The tasks of each link of each chain."""
        turns = [self._counter() for _ in range(1 + max((p.turn for p in places), default=0))]
        used = [0] * len(turns)  # tasks after which nothing of a turn is read any more
        strip = self._strip()
        chains = []
        for (planned, links), place in zip(self.group.members, places, strict=True):
            begin = _AT_ONCE
            if place.turn > 1:
                begin = _Wait(turns[place.turn - 2], used[place.turn - 2])
            waited = {link.after for link in planned.chain}
            waits: dict[int | None, _Wait] = {None: begin}
            chain = []
            sums: dict[int, _SumOfC] = {}  # by link
            for i in links:
                step, after, c_after = planned.chain[i]
                if is_C(step):
                    continue
                counter = self._counter() if i in waited else turns[place.turn]
                wait = waits.get(after, begin)
                if isinstance(step, Update):
                    tasks = self._update(step, wait, counter, strip, place.start)
                    counted = len(tasks[0])
                else:
                    made = planned.of_C.get(i)
                    if made is not None:
                        ready = _Wait(counter, self.group.tiles_of(step))
                        sums[made] = self._sum_of_C(planned, made, ready, place.start)
                    if c_after is not None and c_after not in sums:
                        ready = waits.get(planned.chain[c_after].after, begin)
                        sums[c_after] = self._sum_of_C(planned, c_after, ready, place.start)
                    of_C = tuple(None if j is None else sums[j] for j in (made, c_after))
                    tasks, counted = self._reduction(
                        step, planned.cuts.get(i), wait, counter, of_C, place.start
                    )
                waits[i] = _Wait(counter, counted)
                if not counted:  # what is behind a step without tasks waits for what that would
                    source = after if c_after is None else planned.chain[c_after].after
                    waits[i] = waits.get(source, begin)
                if i not in waited:
                    used[place.turn] += counted
                chain.append(tasks)
            xs = [s.x for s in planned.steps if isinstance(s, Reduction) and not is_C(s)]
            read = [x.numel() * x.dtype.itemsize for x in xs if x is not None]
            chains.append(Chained(chain, max(read, default=0), place.turn))
        return chains

    def _record(self, kind: int, wait: _Wait, counter: int, fields: Sequence[int]) -> int:
        """Where a record is."""
        place = len(self.records)
        self.records += [kind, *wait, counter, *map(self._number, fields)]
        return place

    def _number(self, field: int) -> int:
        """A field as the kernel reads it."""
        if not isinstance(field, Placed):
            return field
        if field.argument > _MOST_ARGUMENTS:
            raise ValueError(
                f"osf_kernels.backends.triton: expected at most {_MOST_ARGUMENTS} matrices in a "
                "list; project it in several calls"
            )
        self.arguments = max(self.arguments, field.argument + 1)
        return (field.argument + 1 << ARGUMENT_BITS) + int(field)

    def _reduction(
        self,
        step: Reduction,
        cut: Cut | None,
        wait: _Wait,
        counter: int,
        of_C: Sequence[_SumOfC | None],
        start: int,
    ) -> tuple[Tasks, int]:
        """The tasks of a sum, and how many of them write the result.

        ``of_C``: the one that it makes parts of, and the one that it reads.
        """
        kind = _KINDS[step.into]
        out = _placed(step.out, start)
        tiles = self.group.tiles_of(step)
        _, reads = of_C
        tail = _tail(step, out, reads, start)
        factors, whole = self._factors(step, out, start)

        def result(ready: _Wait, memory: int, parts: int) -> range:
            distances = [0 if c is None else c.place - len(self.records) for c in of_C]
            fields = (*factors, memory, parts, *tail, whole, *distances)
            return _numbers(self._record(kind, ready, counter, fields), tiles)

        if cut is None:
            return [result(wait, 0, 0)], tiles
        made, memory = self._counter(), _placed(cut.memory, start).address
        fields = (*factors, memory, 0, *[0] * len(tail), cut.length, 0, 0)
        parts = _numbers(self._record(kind, wait, made, fields), cut.parts * tiles)
        return [parts, result(_Wait(made, len(parts)), memory, cut.parts)], tiles

    def _sum_of_C(self, planned: Planned, link: int, ready: _Wait, start: int) -> _SumOfC:
        """The record of a C, for the tasks that make its parts, or it, and that read it."""
        step, cut = planned.chain[link].step, planned.cuts.get(link)
        assert isinstance(step, Reduction)
        out = _placed(step.out, start)
        rows, columns = planned.rows_of_C(link), self.config.block_r
        factors, length = self._factors(step, out, start)
        memory, parts = 0, 0
        if cut is not None:
            memory, parts, length = _placed(cut.memory, start).address, cut.parts, cut.length
        done = _Wait(self._counter(), ceil_div(out.rows, rows) * ceil_div(out.columns, columns))
        if not done.until:  # who would read it waits for what it would be made from
            done = ready
        tail = _tail(step, out, None, start)
        fields = (*factors, memory, parts, *tail, length, self._counter())
        return _SumOfC(self._record(_KINDS["C"], ready, done.counter, fields), done)

    def _factors(self, step: Reduction, out: View, start: int) -> tuple[tuple[int, ...], int]:
        """What a record says of the matrices that are multiplied, and the length of the sum in
        whole steps."""
        factors: tuple[int, ...] = (*_NO_VIEW, out.rows, 0, *_NO_VIEW, out.columns)
        length = 0
        if step.x is not None and step.basis is not None:
            x, basis = _placed(step.x, start), _placed(step.basis, start)
            length = x.columns
            loaded = x if step.into == "B" else x.mT
            factors = (*loaded.fields, out.rows, length, *basis.fields, out.columns)
        return factors, ceil_div(max(1, length), self.config.block_k) * self.config.block_k

    def _strip(self) -> int:
        """Columns of a task of an update: fewer where all of a launch would be too few tasks."""
        block_m, block_n, strip = self.config.block_m, self.config.block_n, self.config.strip
        sizes = [step.out.shape for step in self.group.steps if isinstance(step, Update)]
        while strip > block_n and self.fill > sum(
            ceil_div(m, block_m) * ceil_div(n, strip) for m, n in sizes
        ):
            strip = ceil_div(strip // 2, block_n) * block_n
        return strip

    def _update(self, job: Update, wait: _Wait, counter: int, strip: int, start: int) -> Tasks:
        """Panels of an update, those first that were read last."""
        out, x = _placed(job.out, start), _placed(job.x, start)
        fields: list[int] = [*out.fields, *x.fields, out.rows, out.columns]
        fields += [struct.unpack("<i", struct.pack("<f", job.alpha))[0], int(job.beta)]
        for left, right in ((job.L1, job.R1), (job.L2, job.R2)):
            if left is not None and right is not None and left.shape[1]:
                l_view, r_view = _placed(left, start), _placed(right, start)
                fields += [*l_view.fields, *r_view.fields, l_view.columns]
            else:
                fields += [*_NO_VIEW, *_NO_VIEW, 0]
        fields += _placed(job.addend, start).fields if job.addend is not None else _NO_VIEW
        place = self._record(3, wait, counter, [*fields, strip])
        tiles = ceil_div(out.rows, self.config.block_m) * ceil_div(out.columns, strip)
        return [_numbers(place, tiles)[::-1]]


def _numbers(place: int, tiles: int) -> range:
    """Of the tasks of a record."""
    return range(place << 32, (place << 32) + tiles)


def _placed(t: Matrix, start: int) -> View:
    """A view of a matrix, of the workspace behind its chain's ``start``."""
    view = view_of(t)
    return view._replace(address=_moved(view.address, start))


def _moved(address: int, start: int) -> int:
    if isinstance(address, Placed) and address.argument == WORKSPACE:
        return address + start
    return address


def _tail(step: Reduction, out: View, reads: _SumOfC | None, start: int) -> tuple[int, ...]:
    """What a record says of what follows the sum."""
    initial, other, c = (
        None if t is None else _placed(t, start) for t in (step.initial, step.other, step.c)
    )
    if step.S is None and (c is None or not c.rows):
        other = c = None
    S = (0, 0) if step.S is None else (_moved(step.S.data_ptr(), start), step.S.stride(0))
    return (
        *out.fields,
        *(initial.fields if initial else _NO_VIEW),
        step.sign,
        *S,
        *(other.fields if other else _NO_VIEW),
        other.columns if other else 0,
        *(c.fields if c else _NO_VIEW),
        *(reads.done if reads else _AT_ONCE),
        step.alpha,
    )
