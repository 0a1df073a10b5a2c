"""Which rows of an activation are padding: found by running the model, never from a shape alone.

A model is run on the batch as it is, and on the batch with other values at the padded places. Rows
of padding change, and rows of real tokens don't. Where the rows of an activation change at all the
padded places of a mask and nowhere else, it holds that mask's tokens, in that layout. What else has
as many rows (a decoder's tokens, an image's patches, pooled tokens) doesn't, and counts in full. So
does everything of a model that lets padding reach real tokens. To count padding takes a share of
the energy, so that less of the real tokens' is held than was asked for; to leave out real tokens
loses what was to be protected. Where activations have as many rows as a mask has places, and none
of them was found to hold its tokens, that is logged.

What an expert reads are the tokens routed to it, whose number and places change with padding. Of
these the rows count that the expert reads in both runs, where they are as many as the real tokens,
and else every row.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from osf_torch.coverage import log
from osf_torch.patches import Patches
from osf_torch.selection import listed

Masks = Mapping[str, str] | Literal["auto"] | None

# By a mask's key, what the sequence goes by whose tokens it tells from padding.
USUAL = {
    "attention_mask": ("input_ids", "inputs_embeds"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}
# What is as long as a sequence without being one.
BESIDE = ("labels", "token_type_ids", "position_ids", "special_tokens_mask")
CHANGED = 1e-4  # of a row's norm: above rounding in float32, far below another token
DIRECTIONS = 4  # that a row is seen by: one alone misses a change once in ten thousand rows


class Padding:
    """The padded rows of the batch that is running; a watcher asks by ``rows``."""

    def __init__(self, masks: Masks, operator: str) -> None:
        if isinstance(masks, Mapping):
            fits = all(isinstance(name, str) for pair in masks.items() for name in pair)
        else:
            fits = masks is None or masks == "auto"
        if not fits:
            raise TypeError(
                f'{operator}: expected masks to be "auto", None, or a mapping from the key of a '
                f"mask to that of its sequence, got {masks!r}"
            )
        self._masks, self._operator = masks, operator
        self._told = False
        self._real: list[Tensor] = []  # (batch, length), True for real tokens
        self._keys: list[str] = []  # of these masks
        self._fitting: set[int] = set()  # which of them have as many places as an activation rows
        self._held: set[int] = set()  # and of which tokens one was found to be
        self._probing = False
        # Prints of rows while probing, by watcher and call: by place, or by expert.
        self._before: dict[tuple[Hashable, int], list[Tensor]] = {}
        self._routed: dict[tuple[Hashable, int], dict[int, Tensor]] = {}
        self._calls: dict[Hashable, int] = {}

    def probe(self, batch: Any) -> Any | None:
        """The batch with other values at padded places, to be run first; None where none are."""
        self._real, self._keys, self._before, self._routed = [], [], {}, {}
        self._fitting, self._held = set(), set()
        self._begin(probing=False)
        if self._masks and isinstance(self._masks, Mapping) and not isinstance(batch, Mapping):
            raise TypeError(
                f"{self._operator}: expected batches to be mappings with the keys of "
                f"masks={self._masks!r}, got {type(batch).__name__}; leave masks out, or pass "
                "batches as mappings"
            )
        if self._masks is None or not isinstance(batch, Mapping):
            return None
        other = dict(batch)
        for key, of in self._pairs(batch):
            real = batch[key] != 0
            # Ranks of one model must run it equally often, whatever padding each of them has.
            if bool(real.all()) and not _distributed():
                continue
            self._real.append(real)
            self._keys.append(key)
            other[of] = _with_other_padding(batch[of], real)
        if not self._real:
            return None
        self._begin(probing=True)
        return other

    def run(self) -> None:
        """The batch itself runs now."""
        self._begin(probing=False)

    def ran(self) -> None:
        """The batch itself has run: says of which masks nothing that it read holds the tokens."""
        for at in sorted(self._fitting - self._held):
            if not bool(self._real[at].all()):
                self._tell(
                    "padding is counted like tokens, so that less of the real tokens' energy may "
                    "be held than was asked for: other values at the padded places of %r changed "
                    "the rows of no activation there and nowhere else, whether padding reaches "
                    "real tokens or isn't read; pass batches without padding, or masks=None to "
                    "count every token",
                    self._keys[at],
                )

    @property
    def found(self) -> bool:
        """Whether the batch has padding to be left out."""
        return bool(self._real)

    @property
    def probing(self) -> bool:
        """Whether the probe runs, of which nothing counts."""
        return self._probing

    def rows(self, watcher: Hashable, *activations: Tensor) -> tuple[Tensor, ...]:
        """Of activations (..., d) of one layout the rows (tokens, d) that aren't padding.

        While the probe runs there are none.
        """
        rows = tuple(x.flatten(0, -2) for x in activations)
        which = self._real_of(watcher, rows)
        return rows if which is None else tuple(x[which] for x in rows)

    def patches(self, watcher: Hashable, patches: Patches) -> Patches:
        """Likewise of a convolution's patches, whose places are a layout's tokens."""
        which = self._real_of(watcher, [patches])
        return patches if which is None else patches.chosen(which)

    def _real_of(self, watcher: Hashable, rows: Sequence[Tensor | Patches]) -> Tensor | None:
        """(tokens,) which rows of activations of one layout aren't padding; None is all."""
        if not self._real:
            return None
        call = self._call(watcher)
        prints, norms = zip(*map(_imprinted, rows), strict=True)
        if self._probing:
            self._before[call] = list(prints)
            return torch.zeros(len(rows[0]), dtype=torch.bool, device=rows[0].device)
        before = self._before.get(call, [])
        if [p.shape for p in before] != [p.shape for p in prints]:
            return None
        seen = [_seen(old, new, x) for old, new, x in zip(before, prints, norms, strict=True)]
        for at, real in enumerate(self._real):
            if len(rows[0]) == real.numel():
                self._fitting.add(at)
            for layout in (real, real.mT):
                flat = layout.flatten().to(rows[0].device)
                if all(_is_of(flat, changed, zero) for changed, zero in seen):
                    self._held.add(at)
                    return flat
        return None

    def routed(
        self, watcher: Hashable, parts: Sequence[tuple[int, Tensor]]
    ) -> list[tuple[int, Tensor]]:
        """Of the rows (tokens, d) that each expert read in one call those that aren't padding.

        While the probe runs there are none.
        """
        if not self._real or not parts:
            return list(parts)
        call = self._call(watcher)
        by_expert: dict[int, list[Tensor]] = {}
        for expert, x in parts:
            by_expert.setdefault(expert, []).append(x)
        read = {expert: torch.cat(xs) for expert, xs in by_expert.items()}
        prints = {expert: _prints(x) for expert, x in read.items()}
        if self._probing:
            self._routed[call] = prints
            return []
        before = self._routed.get(call, {})
        stayed, met = {}, 0.0
        for expert, x in read.items():
            had = before.get(expert, prints[expert][:0])
            stayed[expert], count = _met(had, prints[expert], x)
            met += count
        if self._are_real(round(met), sum(len(x) for x in read.values())):
            return [(expert, x[stayed[expert]]) for expert, x in read.items()]
        return list(read.items())

    def _are_real(self, met: int, count: int) -> bool:
        """Whether ``met`` of ``count`` rows are as many as the real tokens of a mask.

        Each token is read as often as another, by as many experts.
        """
        return any(
            count % real.numel() == 0 and met == count // real.numel() * int(real.sum())
            for real in self._real
        )

    def _call(self, watcher: Hashable) -> tuple[Hashable, int]:
        """The watcher with the number of its call in this run, which counts on."""
        number = self._calls.get(watcher, 0)
        self._calls[watcher] = number + 1
        return watcher, number

    def _begin(self, *, probing: bool) -> None:
        self._probing, self._calls = probing, {}

    def _pairs(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The keys of masks (batch, length), and of the sequences that they are of."""
        if isinstance(self._masks, Mapping):
            for key, of in self._masks.items():
                self._require(batch, key, of)
                yield key, of
            return
        for key, usual in USUAL.items():
            if _is_mask(batch.get(key)):
                known = [name for name in usual if isinstance(batch.get(name), Tensor)]
                if not known and key == "attention_mask":
                    known = _sequences(batch, batch[key])
                if len(known) == 1 and _is_laid(batch[known[0]], batch[key], known[0] in usual):
                    yield key, known[0]
                elif bool((batch[key] == 0).any()):
                    self._tell(
                        "padding is counted like tokens, since it can't be told of which sequence "
                        "the batches' %r is (%s); pass masks={%r: KEY} with the key of its "
                        "sequence, or masks=None to count every token",
                        key,
                        f"candidates are {listed([repr(name) for name in known]) or 'none'}",
                        key,
                    )

    def _tell(self, line: str, *values: str) -> None:
        """Once, by the logger "osf_torch"."""
        if not self._told:
            log.warning(f"%s: {line}", self._operator, *values)
        self._told = True

    def _require(self, batch: Mapping[str, Any], key: str, of: str) -> None:
        if not _is_mask(batch.get(key)) or not isinstance(batch.get(of), Tensor):
            raise ValueError(
                f"{self._operator}: expected masks to name a mask (batch, length) of each batch "
                f"and its sequence, got {key!r} and {of!r} of a batch with "
                f"{listed([repr(name) for name in batch])}; masks=None counts every token"
            )
        if _laid(batch[of], batch[key]) is None:
            raise ValueError(
                f"{self._operator}: expected {of!r} to have a token for each of {key!r}, "
                f"{tuple(batch[key].shape)}, got {tuple(batch[of].shape)}; masks=None counts "
                "every token"
            )


def _is_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sequences(batch: Mapping[str, Any], mask: Tensor) -> list[str]:
    """What the mask may be of: there is a value or more of it for each of the mask's."""
    return [
        name
        for name, x in batch.items()
        if isinstance(x, Tensor)
        and x.dtype != torch.bool
        and name not in BESIDE
        and not name.endswith("mask")
        and _laid(x, mask) is not None
    ]


def _laid(x: Tensor, real: Tensor) -> Tensor | None:
    """``real`` as the leading dimensions of ``x`` lie: as it is, transposed or flat."""
    for laid in (real, real.mT, real.flatten()):
        if x.shape[: laid.dim()] == laid.shape:
            return laid
    return None


def _is_laid(x: Tensor, mask: Tensor, usual: bool) -> bool:
    """Whether it is known how; what goes by a usual name lies as the mask does."""
    laid = _laid(x, mask)
    if usual:
        return laid is mask
    square = laid is mask and mask.shape[-1] == mask.shape[-2]
    return laid is not None and not (square and not torch.equal(mask, mask.mT))


def _with_other_padding(x: Tensor, real: Tensor) -> Tensor:
    """A copy with other values where ``real`` is False, each another than the one that it replaces.

    They are two values of the batch, of real tokens where these differ, since any other may mean
    something to the model, or be no id of it. A padded value gets that of the two from which it
    lies further; so it changes whatever it is, be it the first and the last real token's too.
    """
    laid = _laid(x, real)
    assert laid is not None
    there, padded = x[laid], x[~laid]
    if not len(padded):
        return x
    first = there[0] if len(there) else padded[0]
    second = _farthest(there, first)
    if second is None:
        second = _farthest(padded, first)
    if second is None:  # nothing else is in the batch
        second = _another(first)
    nearer = _apart(padded, first) < _apart(padded, second)
    changed = x.clone()
    changed[~laid] = torch.where(nearer.view(-1, *[1] * first.dim()), second, first)
    return changed


def _apart(values: Tensor, one: Tensor) -> Tensor:
    """(values,): how far each lies from one; ids, of which any two lie as far apart, by 0 and 1."""
    away = values - one if values.is_floating_point() else (values != one).float()
    wide = torch.promote_types(away.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(away[:, None].flatten(1), dim=-1, dtype=wide)
    return norms.nan_to_num()


def _farthest(values: Tensor, one: Tensor) -> Tensor | None:
    """The last of the values that lie farthest from one; None where all are that one."""
    away = _apart(values, one)
    return values[(away == away.max()).nonzero()[-1, 0]] if bool((away > 0).any()) else None


def _another(one: Tensor) -> Tensor:
    """An id next to one, downwards where that is an id; of numbers, one that no norm over them
    takes for the same."""
    if one.is_floating_point():
        steps = torch.arange(1, one.numel() + 1, device=one.device, dtype=one.dtype)
        return one + steps.view_as(one)
    return ~one if one.dtype == torch.bool else torch.where(one > 0, one - 1, one + 1)


@lru_cache(maxsize=64)
def _directions(width: int) -> Tensor:
    """Fixed random directions (width, DIRECTIONS), along which rows that differ differ."""
    generator = torch.Generator("cpu").manual_seed(width)
    return torch.randn(width, DIRECTIONS, generator=generator, device="cpu", dtype=torch.float64)


def _prints(rows: Tensor) -> Tensor:
    """(tokens, DIRECTIONS): a few numbers for each row, the same where the row is."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide) @ _directions(rows.shape[-1]).to(rows.device, wide)


def _imprinted(rows: Tensor | Patches) -> tuple[Tensor, Tensor]:
    """(tokens, DIRECTIONS) and (tokens,): the prints of rows, and their norms."""
    found = []
    for piece in [rows] if isinstance(rows, Tensor) else rows.pieces():
        prints = _prints(piece)
        found.append((prints, torch.linalg.vector_norm(piece, dim=-1, dtype=prints.dtype)))
    if len(found) == 1:
        return found[0]
    return torch.cat([prints for prints, _ in found]), torch.cat([norms for _, norms in found])


def _seen(before: Tensor, after: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens,) each: the rows that aren't what they were, NaN among them, and those of zeros."""
    same = ((after - before).abs() <= CHANGED * norms[:, None]).all(-1)
    return ~same, norms == 0


def _met(before: Tensor, after: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """(tokens,) which rows have a print among those before, NaN never; how many met one each.

    Where some rows are alike, no more of them met than there were before.
    """
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=after.dtype)
    there, alike = (
        torch.cat([_alike(new, others, norm) for new, norm in _chunks(after, norms)])
        for others in (before, after)
    )
    met = torch.minimum(there, alike) / alike.clamp_min(1)
    return there > 0, float(met.sum())


def _alike(prints: Tensor, others: Tensor, norms: Tensor) -> Tensor:
    """(tokens,): how many of the others each print is like, to CHANGED of its row's norm."""
    if not len(others):
        return torch.zeros_like(norms, dtype=torch.float64)
    apart = torch.cdist(prints, others, p=float("inf"))
    return (apart <= CHANGED * norms[:, None]).sum(-1, dtype=torch.float64)


def _chunks(prints: Tensor, norms: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows a thousand at a time, since each is held against all others."""
    return zip(prints.split(1024), norms.split(1024), strict=True)


def _is_of(real: Tensor, changed: Tensor, zero: Tensor) -> bool:
    """Whether rows are those of a mask: all padding changed or is blank, and no token did or is."""
    if real.shape != changed.shape:
        return False
    # Where padding is blank and didn't change, that is told by tokens that aren't blank.
    told = (changed & ~real).any() | ~(zero & real).any()
    return bool(~(changed & real).any() & (changed | zero | real).all() & told)
