"""What a call of a prepared list checks: that its matrices are of the list, and lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels.errors import Refusal, TypeRefusal, ValueRefusal
from osf_kernels.ops._memory import (
    Range,
    are_apart,
    ranges,
    require_distinct,
    require_no_leaf,
    require_no_meta_among,
    require_own_memory,
    require_target,
    require_writable,
    span,
)
from osf_kernels.ops._names import Names
from osf_kernels.ops._validation import Meta, meta, require_constant, require_lengths


class Held:
    """Tensors that are kept: where they lie, and how often they were written to."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = [t for t in tensors if t is not None]
        # torch counts no writes to tensors of inference mode.
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self.note()

    def note(self) -> None:
        """Takes them as they are now."""
        self._stamp = self._now()
        self.ranges: list[Range] = ranges(self._tensors)

    def is_as_noted(self) -> bool:
        return self._now() == self._stamp

    def require_grad(self) -> bool:
        return True in [t.requires_grad for t in self._tensors]

    def _now(self) -> list[int]:
        stamp = [t.data_ptr() for t in self._tensors]
        stamp += [t._version for t in self._counted]
        return stamp


class Admitted:
    """The matrices of the last call that was accepted, without the tensors."""

    def __init__(self, lies: list[Any], addresses: list[int], spans: list[int]) -> None:
        self.lies, self.addresses, self.spans = lies, addresses, spans


class Admission:
    """The door to a prepared list: it remembers the last call of each operator, and looks at what
    differs from that.

    Attributes:
        bases: those of the list.
    """

    def __init__(
        self,
        metas: Sequence[Meta],
        Us: Sequence[Tensor | None],
        Vs: Sequence[Tensor | None],
    ) -> None:
        self._metas, self._Us, self._Vs = metas, Us, Vs
        self.bases = Held([*Us, *Vs])
        self._admitted: dict[str, Admitted] = {}

    def admit(
        self,
        names: Names,
        xs: Sequence[Tensor],
        read: Sequence[Range] | None,
        *,
        written: bool,
        anew: bool,
    ) -> bool:
        """Refuses matrices that differ from those that were prepared; whether all was looked at,
        since more than addresses differed from the last call or memory may overlap.

        Args:
            read: the memory that is read, that of the bases where it is None.
            written: whether the matrices are.
            anew: forget every earlier call.
        """
        if anew:
            self._admitted.clear()
        if not isinstance(xs, (list, tuple)):
            require_lengths(names.op, **{names.xs: xs})
        try:
            lies: list[Any] = [
                (type(x), x.shape, x.stride(), x.dtype, x.device, x.is_inference()) for x in xs
            ]
            lies.append(torch.is_inference_mode_enabled())
            addresses = [x.data_ptr() for x in xs]
            recorded = torch.is_grad_enabled() and (
                True in [x.requires_grad for x in xs] or self.bases.require_grad()
            )
        except (AttributeError, RuntimeError, NotImplementedError):  # no tensor with memory
            lies, addresses, recorded = [], [], True
        known = self._admitted.get(names.op)
        if known is not None and not recorded and lies == known.lies:
            if addresses == known.addresses:
                return False
            if not written or are_apart(addresses, known.spans, read or self.bases.ranges):
                known.addresses = addresses
                return False
        self.require_alike(names, xs, written=written)
        if written:
            require_apart(names, xs, Us=self._Us, Vs=self._Vs)
        self._admitted[names.op] = Admitted(lies, addresses, [span(x) for x in xs])
        return True

    def require_alike(self, names: Names, xs: Sequence[Tensor], *, written: bool) -> None:
        """Refuses matrices of another number, shape, dtype or device, and those that autograd
        records; of memory nothing is asked."""
        op, count = names.op, len(self._metas)
        require_lengths(op, **{names.xs: xs})
        if len(xs) != count:
            expected = f"as long as what was prepared ({count})"
            raise ValueRefusal.of(op, names.xs, expected, f"{len(xs)} entries")
        i, lists = 0, zip(xs, self._metas, self._Us, self._Vs, strict=True)
        try:
            for i, (x, known, U, V) in enumerate(lists):
                entry = names.entry(i)
                _require_like(op, entry, x, known, written=written)
                require_constant(op, entry, x, U, V)
        except Refusal as refusal:
            refusal.index = i
            raise


def _require_like(op: str, entry: Sequence[str], x: Tensor, known: Meta, *, written: bool) -> None:
    require_target(op, entry[0], x)
    if meta(x) != known:
        shape, dtype, device = known
        expected = f"{tuple(shape)} {dtype} on {device} as it was prepared"
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        refusal = TypeRefusal if x.dtype != dtype else ValueRefusal
        raise refusal.of(op, entry[0], expected, got, "prepare the list again")
    if written:
        require_no_leaf(op, entry[0], x)


def require_apart(names: Names, written: Sequence[Tensor], **read: Sequence[Tensor | None]) -> None:
    """No matrix shares memory with itself, with another, nor with what is read."""
    if names.single:
        operands = ["U" if name == "Us" else "V" if name == "Vs" else name for name in read]
        require_writable(
            names.op, [names.xs, *operands], written[0], *(t[0] for t in read.values())
        )
        return
    i = 0
    try:
        for i, x in enumerate(written):
            require_own_memory(names.op, names.entry(i)[0], x)
    except Refusal as refusal:
        refusal.index = i
        raise
    require_no_meta_among(names.op, names.xs, written)
    require_distinct(names.op, names.xs, written, read)
