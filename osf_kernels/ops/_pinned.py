"""The pins of a prepared list and what restoring to them runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from osf_kernels.ops._admission import Held
from osf_kernels.ops._memory import Range
from osf_kernels.ops._pins import Pin
from osf_kernels.ops._route import CoefficientRoute, Route


class Pinned:
    """The pins of the last call, what they run, and whether others are the very same tensors.

    Attributes:
        operands: the pins as problems of their weights take them.
        read: the memory that restoring reads, the bases' included.
        routes: what runs: "whole" restores, "root" and "other" compute the coefficients of a shard,
            "shard" restores from them.
        is_apart: whether the weights that are written are known to share no memory with the pins.
    """

    def __init__(
        self,
        ids: list[int],
        pins: list[Pin],
        dtypes: Sequence[torch.dtype],
        read: Sequence[Range],
    ) -> None:
        self.ids, self.pins = ids, pins
        self.is_apart = False
        self.routes: dict[str, Route | CoefficientRoute] = {}
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
        return ids == self.ids and self.is_as_noted()

    def is_as_noted(self) -> bool:
        """Whether torch has counted no write to what is pinned."""
        return self._held.is_as_noted()

    def copy(self) -> None:
        """What is held in another dtype follows writes that no version counts, and a graph's."""
        for converted, t in self._copies:
            converted.copy_(t)
