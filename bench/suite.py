"""The fixed list of CPU cases whose results are committed, and the figures they aim at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.contenders import HAND, NAIVE, OURS
from bench.models import Rank, shapes_of
from bench.projection import Case
from bench.report import Row, table

NOISE = 0.25  # ratios of medians on a shared machine repeat to about this


class Target(NamedTuple):
    """A case of the suite, and by how much ours is to beat its peers (ratios of medians)."""

    model: str
    dtype: str
    rank: Rank
    over_naive: float
    over_hand_ordered: float
    rounds: int

    def case(self, device: torch.device) -> Case:
        return Case(self.model, shapes_of(self.model), self.rank, self.dtype, device)


CPU_SUITE = (
    Target("4096x4096", "fp32", Rank(64), 3.5, 1.2, 15),
    Target("4096x4096", "fp32", Rank(2048), 2.5, 1.2, 7),
    Target("4096x4096", "fp32", Rank(3277), 11.0, 5.0, 5),
    Target("4096x4096", "bf16", Rank(64), 6.0, 1.1, 15),
    Target("4096x4096", "bf16", Rank(3277), 13.0, 4.0, 9),
    Target("minilm", "fp32", Rank(0.5), 2.0, 1.1, 15),
)


def verdict(reached: float | None, wanted: float) -> str:
    """``reached``, ``within noise`` or ``missed`` for a ratio; ``no speed`` where there is none."""
    if reached is None:
        return "no speed"
    if reached >= wanted:
        return "reached"
    return "within noise" if reached >= wanted * (1.0 - NOISE) else "missed"


def verdicts(results: Sequence[tuple[Target, Sequence[Row]]]) -> str:
    """One line a case: the ratio to each peer, the figure to reach, and whether it was."""
    lines = []
    for target, rows in results:
        ours = next(row for row in rows if row.contender == OURS)
        line = [ours.case]
        for reached, wanted in (
            (ours.times_naive, target.over_naive),
            (ours.times_hand_ordered, target.over_hand_ordered),
        ):
            number = "-" if reached is None else f"{reached:.2f}"
            line += [number, f"{wanted:g}", verdict(reached, wanted)]
        lines.append(line)
    header = ("case", f"x {NAIVE}", "to reach", "", f"x {HAND}", "to reach", "")
    return table(header, lines)
