"""One case of the projection bench: random gradients and random orthonormal bases.

Random bases serve here: no kernel's time depends on their values. Real weights and real
gradients are the demo's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.check import Side
from bench.models import Rank, Shape, low_is_smaller

SpansChoice = Literal["high", "low", "auto"]
SMALL_ELEMENTS = 1 << 16  # cases this small are drawn on the CPU: fewer foreign kernels to sanitise


@dataclass(frozen=True)
class Split:
    """An orthonormal basis of a side in float32: protected directions and, if held, the rest."""

    high: Tensor  # (size, r)
    low: Tensor | None  # (size, size - r)


class Bases:
    """Draws orthonormal splits: one QR a (size, rank), then a random signed row permutation.

    Permuting and negating rows keeps columns orthonormal, and makes every matrix's basis
    memory of its own at a fraction of a QR.
    """

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._device = device
        self._generator = generator
        self._drawn: dict[tuple[int, int, bool], Split] = {}

    def draw(self, size: int, rank: int, *, low: bool) -> Split:
        key = (size, rank, low)
        if key not in self._drawn:
            width = size if low else rank
            gaussian = torch.randn(size, width, generator=self._generator)
            q = torch.linalg.qr(gaussian.to(self._device)).Q
            self._drawn[key] = Split(q[:, :rank], q[:, rank:] if low else None)
        split = self._drawn[key]
        order = torch.randperm(size, generator=self._generator).to(self._device)
        signs = torch.randint(0, 2, (size, 1), generator=self._generator) * 2 - 1
        signs = signs.to(self._device)
        return Split(
            split.high[order] * signs, None if split.low is None else split.low[order] * signs
        )


@dataclass
class Problem:
    """Lists over matrices. ``held`` is what the library holds, ``high`` what its peers do."""

    shapes: Sequence[Shape]
    ranks: Sequence[int]
    pristine: list[Tensor]
    grads: list[Tensor]
    exact: list[tuple[Tensor, Tensor]]  # high bases in float32, for the leak
    high_U: list[Tensor]
    high_V: list[Tensor]
    held: list[tuple[Side, Side]]

    def restore(self) -> None:
        """Give every working gradient its pristine values again."""
        for grad, pristine in zip(self.grads, self.pristine, strict=True):
            grad.copy_(pristine)

    @property
    def spans(self) -> str:
        """What the library holds, left/right: one entry for each combination present."""
        return " ".join(sorted({f"{left.spans}/{right.spans}" for left, right in self.held}))


def draw(
    shapes: Sequence[Shape],
    rank: Rank,
    dtype: torch.dtype,
    device: torch.device,
    spans: SpansChoice,
    seed: int = 0,
) -> Problem:
    """Gaussian gradients, and splits of ``rank`` a side cast to ``dtype``, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    elements = sum(m * n for m, n in shapes)
    on_device = torch.Generator(device=device).manual_seed(seed)
    bases = Bases(torch.device("cpu") if elements <= SMALL_ELEMENTS else device, generator)
    problem = Problem(shapes, [rank.of(s) for s in shapes], [], [], [], [], [], [])
    for shape, r in zip(shapes, problem.ranks, strict=True):
        if elements <= SMALL_ELEMENTS:
            g = torch.randn(shape, generator=generator)
        else:
            g = torch.randn(shape, generator=on_device, device=device)
        problem.pristine.append(g.to(device=device, dtype=dtype))
        problem.grads.append(problem.pristine[-1].clone())
        held, high = [], []
        for size in shape:
            low = spans == "low" or (spans == "auto" and low_is_smaller(size, r))
            split = bases.draw(size, r, low=low)
            exact = split.high.to(device)
            cast = exact.to(dtype)
            high.append((exact, cast))
            if split.low is None:
                held.append(Side(cast, "high"))
            else:
                held.append(Side(split.low.to(device=device, dtype=dtype), "low"))
        problem.exact.append((high[0][0], high[1][0]))
        problem.high_U.append(high[0][1])
        problem.high_V.append(high[1][1])
        problem.held.append((held[0], held[1]))
    return problem
