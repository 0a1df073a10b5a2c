"""What a prepared list remembers of its last call, so that the next one checks what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels.ops._memory import Range, ranges
from osf_kernels.ops._pins import Pin
from osf_kernels.ops._route import Route


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
    """The pins of the last call, what they run, and whether others are the very same tensors.

    Attributes:
        operands: the pins as problems of their weights take them.
        read: the memory that restoring reads, the bases' included.
        routes: by whether coefficients are given.
    """

    def __init__(
        self,
        ids: list[int],
        pins: list[Pin],
        dtypes: Sequence[torch.dtype],
        read: Sequence[Range],
    ) -> None:
        self.ids, self.pins = ids, pins
        self.routes: dict[bool, Route] = {}
        self.operands = [pin.operands(dtype) for pin, dtype in zip(pins, dtypes, strict=True)]
        self._copies = [
            (converted, t)
            for pin, operands in zip(pins, self.operands, strict=True)
            for t, converted in zip(pin, operands, strict=True)
            if t is not None and converted is not None and converted is not t
        ]
        self._held = Held([t for pin in pins for t in pin])
        self.read = [*read, *self._held.ranges]

    def holds(self, ids: list[int]) -> bool:
        return ids == self.ids and self._held.is_as_noted()

    def copy(self) -> None:
        """What is held in another dtype follows writes that no version counts, and a graph's."""
        for converted, t in self._copies:
            converted.copy_(t)
