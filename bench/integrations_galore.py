"""``python -m bench.integrations_galore``: a GaLore projector's refreshes, ours and the original's.

What is timed is ``project`` at a step that refreshes the basis. galore-torch runs where it is
installed; elsewhere its formula does, torch.linalg.svd of the whole gradient and a product, and
the contender's name says so. Gradients are matrices with σᵢ = i^-½, and those a projector meets
at its next refresh: moved a little, or with as much of something new as they had of the old.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import integrations, report
from bench.contenders import OURS
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from osf_kernels.testing import matrix_with_spectrum
from osf_torch.integrations.galore import GaLoreProjector

CASES = ((1024, 1024, 128), (2048, 1024, 128), (1024, 1024, 256))
# ‖new − old‖ / ‖old‖ from one refresh to the next; None is the first one.
DRIFTS: tuple[float | None, ...] = (None, 1e-2, 1.0)


@dataclass
class Row:
    """One projector at one refresh."""

    case: str
    m: int
    n: int
    rank: int
    drift: float | None
    device: str
    contender: str
    method: str
    status: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    times_peer: float | None = None
    overlap: float | None = None
    captured_of_best: float | None = None
    extra_bytes: int | None = None


class Formula:
    """galore-torch's computation at a refresh, for where it isn't installed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.ortho_matrix: Tensor | None = None

    def project(self, G: Tensor, iter: int) -> Tensor:
        del iter
        _, _, Vh = torch.linalg.svd(G, full_matrices=False)
        self.ortho_matrix = Vh[: self.rank]
        return G @ self.ortho_matrix.mT


def peer(rank: int) -> tuple[str, Any]:
    """galore-torch's projector and its name, or the formula and what it is."""
    with contextlib.suppress(ImportError):  # its package fails without bitsandbytes, this doesn't
        importlib.import_module("galore_torch")
    module = sys.modules.get("galore_torch.galore_projector")
    if module is None:
        return "torch.linalg.svd, galore-torch's formula", Formula(rank)
    return f"galore-torch {report.version('galore-torch')}", module.GaLoreProjector(rank)


def gradients(m: int, n: int, drift: float | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The gradient of the refresh before, and of this one; float32."""
    generator = torch.Generator().manual_seed(m + n)
    spectrum = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.5
    before, now = (matrix_with_spectrum(m, n, spectrum, generator=generator)[0] for _ in range(2))
    now = before + (drift or 0.0) * now
    return before.float().to(device), now.float().to(device)


def measure(
    m: int, n: int, rank: int, drift: float | None, device: torch.device, rounds: int
) -> list[Row]:
    """Rows of one case: galore-torch first, ours second."""
    before, now = gradients(m, n, drift, device)
    what = "first refresh" if drift is None else f"moved by {drift:g}"
    name, theirs = peer(rank)
    started: dict[str, Any] = {name: theirs, OURS: GaLoreProjector(rank)}
    if drift is not None:
        for projector in started.values():
            projector.project(before, 0)
    running: dict[str, Any] = {}

    def timed(contender: str) -> Timed:
        def prepare() -> None:
            running[contender] = copy.copy(started[contender])

        return Timed(lambda: running[contender].project(now, 0), prepare)

    times = interleave({c: timed(c) for c in started}, rounds, Clock(device))
    squares, vectors = torch.linalg.eigh(now.double().mT @ now.double())  # float64: σ₁/σ_r is 16
    Vh, best = vectors[:, -rank:].mT, squares[-rank:].sum()
    rows = []
    for contender, samples in times.items():
        V = running[contender].ortho_matrix.double().mT
        row = Row(f"{m}x{n} r={rank}, {what}", m, n, rank, drift, str(device), contender, "", "ok")
        row.method = getattr(running[contender], "method", None) or "exact"
        row.overlap = float((Vh @ V).square().sum() / rank)
        row.captured_of_best = float((now.double() @ V).square().sum() / best)
        if row.captured_of_best < 0.99:
            row.status = f"wrong: holds {row.captured_of_best:.2%} of what the best basis does"
        else:
            summary = Summary.of(samples)
            row.median_ms, row.rounds = summary.median_ms, summary.rounds
            row.p20_ms, row.p80_ms = summary.p20_ms, summary.p80_ms
        again = copy.copy(started[contender])
        row.extra_bytes = peak_extra_bytes(lambda p=again: p.project(now, 0), device)  # type: ignore[misc]
        rows.append(row)
    for row in rows:
        if row.median_ms is not None and rows[0].median_ms is not None:
            row.times_peer = rows[0].median_ms / row.median_ms
    return rows


COLUMNS = (
    ("case", "case", ""),
    ("contender", "contender", ""),
    ("method", "method", ""),
    ("median ms", "median_ms", ".1f"),
    ("x peer", "times_peer", ".2f"),
    ("overlap", "overlap", ".5f"),
    ("of best", "captured_of_best", ".5f"),
    ("extra MiB", "extra_bytes", "MiB"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where a basis is wrong."""
    return integrations.run(
        "bench.integrations_galore",
        arguments,
        lambda chosen, device: [
            (
                f"{m}x{n}, r={rank}",
                functools.partial(measure, m, n, rank, drift, device, chosen.rounds),
            )
            for m, n, rank in CASES
            for drift in DRIFTS
        ],
        COLUMNS,
        rounds=3,
        rounds_help="of each contender",
    )


if __name__ == "__main__":
    sys.exit(main())
