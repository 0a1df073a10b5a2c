"""Bases that grow by what the weights read: the rows that are kept, and the turn that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import Basis, MergedBasis, merge_basis, padded
from osf_torch.bases import Held, columns_of, mapped, moved
from osf_torch.coverage import log
from osf_torch.grown import ENERGIES, InputSubspace, sides_of
from osf_torch.progress import Show, progress_bar
from osf_torch.reads import SIDES, Rows, Side
from osf_torch.scalars import read
from osf_torch.selection import Selected, listed
from osf_torch.sharding import local
from osf_torch.sharing import Ranks
from osf_torch.subspaces import Subspace

OP = "osf_torch.input_subspaces"
ROUNDED = 1e-10  # of the energy: what rounding in float32 adds along directions that nothing has


class Turn(NamedTuple):
    """What a call has made of the weights, by name."""

    found: dict[str, Subspace]
    released: dict[str, float]  # the share of the energy that was let go of


class _Side(NamedTuple):
    """The same of one side of one weight, by what its factors' names end with."""

    factors: dict[str, Tensor]
    released: Tensor  # (matrices,)


def grow(
    selected: Sequence[Selected],
    meters: Mapping[str, Kept],
    previous: Mapping[str, Subspace],
    energy: float,
    min_free: float,
    sharers: Ranks,
    progress: Show,
) -> Turn:
    """Every weight's bases grown by the rows that its meter has kept, which are let go of.

    A weight's work is one rank's, of all ranks' rows, and what it makes is the same on all.
    """
    costs = [float(meters[s.name].cost) for s in selected]
    owner = {i: rank for rank, share in enumerate(sharers.split(costs)) for i in share}
    turn = Turn({}, {})
    unread: dict[str, list[int]] = {}
    untouched: list[str] = []
    shown = progress if sharers.rank == 0 else False
    with progress_bar(shown, "bases", len(selected), sum(costs)) as bar:
        for i, s in enumerate(selected):
            bar.begin(s.name)
            device = local(s.weight).device
            before = sides_of(previous.get(s.name, Subspace(None, None)))
            factors = {key: columns_of(moved(t, device)) for key, t in before.items()}
            made = []
            for side in _sides_read(meters[s.name], device, sharers):
                rows = meters[s.name].taken(side, device, sharers)
                if rows.dim() > 2:
                    missed = (rows == 0).flatten(0, -3).all(-1).all(-1).nonzero().flatten()
                    unread.update({s.name: missed.tolist()} if len(missed) else {})
                own = [key for key in factors if key.startswith(side)]
                held = {key.removeprefix(side): factors.pop(key) for key in own}
                made.append(_grow_side(s.name, held, rows, energy, min_free, owner[i], sharers))
                factors |= {side + key: t for key, t in made[-1].factors.items()}
            turn.found[s.name] = InputSubspace.of(factors)
            turn.released[s.name] = max(read([one.released.max() for one in made]), default=0.0)
            if not made:
                untouched.append(s.name)
            bar.advance(1, costs[i])
    if sharers.rank == 0:
        _log_untouched(untouched, len(selected))
        _log_unread(unread, meters)
        _log_released(turn)
    return turn


def _grow_side(
    name: str,
    held: Mapping[str, Tensor],
    rows: Tensor,
    energy: float,
    min_free: float,
    owner: int,
    sharers: Ranks,
) -> _Side:
    """Args:
    held: the factors of one side, none where nothing of it is protected.
    rows: (..., tokens, n) of all ranks.
    """
    *batch, _, size = rows.shape
    basis: Held = held.get("")
    if basis is None and "_low" in held:
        basis = Basis(held["_low"], "low")
    given = rows.dtype if basis is None else columns_of(basis).dtype
    dtype = torch.promote_types(given, torch.float32)
    free = _directions(min_free, size)
    merged: MergedBasis | None = None
    error: Exception | None = None
    if owner == sharers.rank:
        try:
            merged = merge_basis(
                mapped(basis, lambda t: t.to(dtype)),
                held.get(ENERGIES),
                rows.to(dtype).mT,
                energy=energy,
                max_rank=_most(free, size),
            )
        except (TypeError, ValueError) as caught:
            error = type(caught)(f"{OP}: parameter {name!r}: {caught}")
    sharers.agree(error, rows.device, "input_subspaces")
    count, like = math.prod(batch), rows.new_empty(0, dtype=dtype)

    def sent(columns: Tensor | None) -> Tensor:
        flat = None if columns is None else columns.flatten(0, -2)
        everywhere = sharers.columns(owner, flat, count * size, like)
        return padded(everywhere.unflatten(0, (*batch, size)))

    directions = sent(None if merged is None else merged.columns)
    figures: Tensor | None = None
    if merged is not None:
        figures = torch.cat([merged.energies, merged.released[..., None]], -1).view(count, -1)
    figures = sharers.columns(owner, figures, count, like.double())
    width = directions.shape[-1]
    factors = {"": directions, ENERGIES: figures[:, :-1].reshape(*batch, width)}
    if 2 * width > size:
        # Protecting takes fewer FLOPs by the narrower basis.
        factors["_low"] = sent(None if merged is None else merged.free)
    return _Side(factors, figures[:, -1])


def _directions(min_free: float, size: int) -> int:
    """How many of a side's directions stay free. A share leaves one protected at least."""
    if isinstance(min_free, int):
        return min_free
    # Less what a product such as 0.1 · 30 has above the whole number.
    return min(size - 1, math.ceil(min_free * size - 1e-9))


def _most(free: int, size: int) -> int:
    if free >= size:
        raise ValueError(
            f"expected min_free to be below the {size} directions of its side, got {free}, which "
            "protects nothing; pass a smaller count, or a share such as 0.1"
        )
    return size - free


def _sides_read(meter: Kept, device: torch.device, sharers: Ranks) -> list[Side]:
    """The sides by which a rank's batches read the weight."""
    flags = torch.tensor([[float(side in meter.sides()) for side in SIDES]], device=device)
    read_by = sharers.gather(flags).sum(0).tolist()
    return [side for side, count in zip(SIDES, read_by, strict=True) if count]


def _log_untouched(untouched: Sequence[str], count: int) -> None:
    if untouched:
        log.warning(
            "%s: no batch reached %d of %d weights, of which what was protected before stays as it "
            "is: %s",
            OP,
            len(untouched),
            count,
            listed(untouched, 4),
        )


def _log_unread(unread: Mapping[str, Sequence[int]], meters: Mapping[str, Kept]) -> None:
    if not unread:
        return
    told = [
        f"{len(which)} of {meters[name].count} of {name} ({listed([str(i) for i in which], 4)})"
        for name, which in unread.items()
    ]
    log.warning(
        "%s: no token reached some experts, of which the directions of before are protected and "
        "arbitrary ones, as many as of the other experts: %s; pass more batches to hold what "
        "these experts do",
        OP,
        listed(told, 4),
    )


def _log_released(turn: Turn) -> None:
    let_go = [name for name, share in turn.released.items() if share > ROUNDED]
    if not let_go:
        return
    most = max(let_go, key=turn.released.__getitem__)
    log.warning(
        "%s: %d of %d weights are at their floor of free directions, and of the energy of the "
        "inputs so far up to %.2g %% was let go of (%s); a smaller min_free keeps more",
        OP,
        len(let_go),
        len(turn.found),
        100 * turn.released[most],
        most,
    )


class Kept:
    """Keeps rows that each matrix of a weight reads by each side: all, or as many drawn at random.

    Attributes:
        count: of matrices.
        cost: of extending their bases, in arbitrary units.
        first: which of all weights read first, second and so on.
    """

    order = itertools.count()  # of first calls, over all weights: who saw a NaN first

    def __init__(self, s: Selected, limit: int, seed: int) -> None:
        self.limit, self.dtype, self.batch = limit, s.weight.dtype, s.batch
        m, n = s.shape
        self.sizes: dict[Side, int] = {"U": m, "V": n}
        self.count = math.prod(self.batch)
        self.cost = self.count * max(self.sizes.values()) ** 2
        self.generator = torch.Generator("cpu").manual_seed(seed)
        # Of a matrix by a side the rows (tokens, n), and a random number each: the smallest stay.
        self.kept: dict[tuple[Side, int], tuple[Tensor, Tensor]] = {}
        self.first = 0

    def sides(self) -> list[Side]:
        """Those by which a matrix was read, U first."""
        return sorted({side for side, _ in self.kept})

    def add(self, side: Side, matrix: int, rows: Rows) -> None:
        if not len(rows):
            return
        if not self.kept:
            self.first = next(self.order)
        keys = torch.rand(len(rows), generator=self.generator, device="cpu")
        none = torch.zeros(0, dtype=torch.int64, device=rows.device)
        before, drawn = self.kept.get((side, matrix), (rows[none], keys[:0]))
        keys = torch.cat([drawn, keys])
        which = torch.arange(len(keys), device="cpu")
        if len(keys) > self.limit:
            keys, which = keys.topk(self.limit, largest=False)
        stay, come = which < len(drawn), which >= len(drawn)
        old = before[which[stay].to(before.device)]
        new = rows[(which[come] - len(drawn)).to(rows.device)].to(before)
        self.kept[side, matrix] = torch.cat([old, new]), torch.cat([keys[stay], keys[come]])

    def taken(self, side: Side, device: torch.device, sharers: Ranks) -> Tensor:
        """The rows (..., tokens, n) of all ranks, which are let go of here.

        Zeros fill up where a matrix read fewer tokens than another.
        """
        read = {
            matrix: self.kept.pop((side, matrix))[0]
            for matrix in range(self.count)
            if (side, matrix) in self.kept
        }
        dtype = next((rows.dtype for rows in read.values()), self.dtype)
        most = max(map(len, read.values()), default=0)
        laid = torch.zeros(most, self.count, self.sizes[side], dtype=dtype, device=device)
        for matrix, rows in read.items():
            laid[: len(rows), matrix] = rows
        gathered = sharers.gather(laid.flatten(1)).view(-1, self.count, self.sizes[side])
        return gathered.transpose(0, 1).reshape(*self.batch, -1, self.sizes[side])
