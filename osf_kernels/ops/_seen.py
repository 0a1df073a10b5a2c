"""What a prepared list remembers of its last call, so that the next one checks what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from osf_kernels.ops._memory import Range, ranges
from osf_kernels.ops._pins import Pin


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

    def _now(self) -> list[int]:
        stamp = [t.data_ptr() for t in self._tensors]
        stamp += [t._version for t in self._counted]
        return stamp


class Admitted:
    """The matrices of the last call that was accepted, without the tensors."""

    def __init__(self, lies: list[Any], addresses: list[int], spans: list[int]) -> None:
        self.lies, self.addresses, self.spans = lies, addresses, spans


class Pinned:
    """The pins of the last call, and whether others are the very same tensors."""

    def __init__(self, ids: list[int], pins: list[Pin], read: Sequence[Range]) -> None:
        self.ids, self.pins = ids, pins
        self._held = Held([t for pin in pins for t in pin])
        self.read = [*read, *self._held.ranges]

    def holds(self, ids: list[int]) -> bool:
        return ids == self.ids and self._held.is_as_noted()
