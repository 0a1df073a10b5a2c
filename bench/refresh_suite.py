"""``python -m bench refresh``: the sweep over spectra and ranks, and the figures to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bench import report, spectra
from bench.contenders import OURS, first_line
from bench.decompositions import LOWRANK_ITERATIONS
from bench.refresh import RefreshRow, measure
from bench.spectra import Problem, shown
from bench.suite import verdict

RHOS = (0.01, 0.1, 0.25, 0.5, 0.8)
MINILM_LAYERS = 6


class Job(NamedTuple):
    """A problem of a source, made when its turn comes, and what is measured of it.

    Where what it is made from is missing (FileNotFoundError), an optional one becomes a row that
    says so.
    """

    source: str
    make: Callable[[], Problem]
    ranks: Sequence[float]
    curve: bool
    lowrank: Sequence[int]  # niter of each svd_lowrank; with none, linalg.svd is the only peer
    optional: bool = False


class Target(NamedTuple):
    """A figure to reach: ours over linalg.svd, at an accuracy."""

    source: str
    task: str
    rank: float
    over_svd: float
    missing_overlap: float | None = None
    missing_captured: float | None = None
    residual: float | None = None

    def accurate(self, row: RefreshRow) -> bool:
        limits = (
            (row.missing_overlap, self.missing_overlap),
            (row.missing_captured, self.missing_captured),
            (row.residual, self.residual),
        )
        return all(
            limit is None or (value is not None and value <= limit) for value, limit in limits
        )

    @property
    def condition(self) -> str:
        names = ("1 - overlap", "1 - captured", "residual")
        limits = (self.missing_overlap, self.missing_captured, self.residual)
        return ", ".join(
            f"{name} <= {limit:g}"
            for name, limit in zip(names, limits, strict=True)
            if limit is not None
        )


TARGETS = (
    Target("power", "cold", 64, 15.0, missing_overlap=1e-3),
    Target("power", "cold", 256, 4.0, missing_overlap=1e-3),
    Target("power", "cold", 1024, 2.5, missing_overlap=1e-4),
    Target("power", "complement", 1024, 1.5, missing_overlap=1e-4),
    Target("power", "warm", 256, 30.0, missing_captured=1e-4),
    Target("power", "deflated", 0.8, 15.0),
    Target("minilm", "cold", 0.5, 2.0, residual=1e-5),
    Target("experts", "cold", 0.1, 3.0, missing_overlap=1e-3),
    Target("experts", "cold", 0.25, 3.0, missing_overlap=1e-3),
    Target("experts", "cold", 0.5, 3.0, missing_overlap=1e-3),
    Target("experts", "cold", 0.8, 3.0, missing_overlap=1e-3),
)
FIGURES_SIZE = 2048
# Of σᵢ = i^-½ also a few triplets, ρ = .01, where the figure is svd_lowrank's missing overlap.
FIGURES_FEW = 20
EXPERTS = 64  # in one tensor, 512 × 256 at the size of the figures
FIGURES_LOWRANK = (2,)  # the one that figures are against; eight take longer than all the others


def sweep(
    sources: Sequence[str],
    rhos: Sequence[float],
    size: int,
    layers: int,
    device: torch.device,
    *,
    curve: bool = True,
    lowrank: Sequence[int] = LOWRANK_ITERATIONS,
) -> Iterator[Job]:
    """Every source at every ρ, from a cold start."""
    for source in sources:

        def make(source: str = source) -> Problem:
            if source == "minilm":
                return spectra.minilm_problem(layers, device)
            return spectra.random_problem(source, size, size, device)

        yield Job(source, make, rhos, curve, lowrank)


def figures(size: int, layers: int, device: torch.device) -> Iterator[Job]:
    """The problems of TARGETS; ranks are those of n = 2048, in proportion at another size.

    With 0 ``layers`` MiniLM is left out.
    """

    def scaled(rank: float) -> float:
        return max(1, rank * size // FIGURES_SIZE) if isinstance(rank, int) else rank

    def power() -> Problem:
        return spectra.random_problem("power", size, size, device)

    def of(task: str) -> list[float]:
        return [scaled(t.rank) for t in TARGETS if (t.source, t.task) == ("power", task)]

    yield Job("power", power, [scaled(FIGURES_FEW), *of("cold")], True, FIGURES_LOWRANK)

    def both() -> Problem:
        return Problem("power", "complement", power().matrices)

    yield Job("power", both, of("complement"), False, ())
    for task in ("warm", "deflated"):
        for rank in of(task):

            def later(rank: float = rank, free: bool = task == "deflated") -> Problem:
                return spectra.drifted(power(), rank, free=free)

            yield Job("power", later, [rank], False, ())

    def experts() -> Problem:
        return spectra.experts_problem(EXPERTS, max(2, size // 4), max(2, size // 8), device)

    experts_ranks = [t.rank for t in TARGETS if t.source == "experts"]
    yield Job("experts", experts, experts_ranks, True, FIGURES_LOWRANK)
    if layers == 0:
        return
    minilm_ranks = [t.rank for t in TARGETS if t.source == "minilm"]

    def minilm() -> Problem:
        return spectra.minilm_problem(layers, device)

    yield Job("minilm", minilm, minilm_ranks, True, FIGURES_LOWRANK, optional=True)


def run(
    jobs: Iterator[Job],
    rounds: int,
    *,
    memory: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> Iterator[list[RefreshRow]]:
    """The rows of each job, as soon as they are there."""
    for job in jobs:
        say("drawing")
        try:
            problem = job.make()
        except FileNotFoundError as error:
            if not job.optional:
                raise
            why = f"unavailable: {first_line(error)}"
            yield [RefreshRow(case="figures", contender=OURS, status=why)]
            continue

        def named(text: str, name: str = f"{problem.name}, {problem.task}") -> object:
            return say(f"{name}: {text}")

        yield measure(
            problem,
            job.ranks,
            rounds,
            curve=job.curve,
            lowrank=job.lowrank,
            memory=memory,
            say=named,
        )


def verdicts(rows: Sequence[RefreshRow], size: int) -> str:
    """One line a figure: the ratio to linalg.svd, the one to reach, and at what accuracy."""
    lines = []
    for target in TARGETS:
        rank = target.rank
        if isinstance(rank, int) and target.source == "power":
            rank = max(1, rank * size // FIGURES_SIZE)
        row = next(
            (
                row
                for row in rows
                if (row.contender, row.source, row.task, row.rank)
                == (OURS, target.source, target.task, shown(rank))
            ),
            None,
        )
        if row is None:
            continue
        reached = "-" if row.times_svd is None else f"{row.times_svd:.2f}"
        accurate = "" if not target.condition else "yes" if target.accurate(row) else "NO"
        lines.append(
            (
                row.case,
                row.method,
                reached,
                f"{target.over_svd:g}",
                verdict(row.times_svd, target.over_svd),
                target.condition or "-",
                accurate or "-",
                report.shown(row.missing_overlap, ".1e"),
                report.shown(row.missing_captured, ".1e"),
                report.shown(row.residual, ".1e"),
            )
        )
    header = (
        "case",
        "method",
        "x linalg.svd",
        "to reach",
        "",
        "accuracy to reach",
        "reached",
        "1 - overlap",
        "1 - captured",
        "residual",
    )
    return report.table(header, lines)
