"""What launches are planned and what the driver is asked for, as tests look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from osf_kernels.backends.triton import launch
from osf_kernels.backends.triton.launches import Launch


class Watching(launch.Driver):
    """Runs everything, and keeps what there was."""

    def __init__(self) -> None:
        self.planned: list[Launch] = []
        self.records: list[Tensor] = []  # of each launch, those of later ones of its call behind
        self.constants: list[Tensor] = []  # of each, what is the same in every call, or parts
        self.uploads = 0

    def upload(self, *args: Any) -> Tensor:
        self.uploads += 1
        return super().upload(*args)

    def launch(self, kernel: Any, grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
        self.records.append(args[0])
        self.constants.append(args[1])
        super().launch(kernel, grid, *args, **options)


def watch(monkeypatch: pytest.MonkeyPatch) -> Watching:
    """From now on launches run so."""
    watching = Watching()

    class Executable(launch.Executable):
        def __init__(self, launches: Sequence[Launch], device: torch.device, *, kept: int) -> None:
            watching.planned += launches
            super().__init__(launches, device, kept=kept)

    monkeypatch.setattr(launch, "driver", watching)
    monkeypatch.setattr(launch, "Executable", Executable)
    return watching


def records_of(made: Launch) -> list[list[int]]:
    """The records of a projection's launch, as ``tasks`` numbers their fields."""
    assert made.kernel == "projection"
    _, tasks = made.counts
    places = sorted({task >> 32 for task in made.constant[:tasks]})
    records = list(made.constant[tasks:])
    ends = [*places[1:], len(records)]
    return [records[place:end] for place, end in zip(places, ends, strict=True)]
