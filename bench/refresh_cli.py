"""The command lines of ``python -m bench refresh`` and ``refresh-auto``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench import accuracy_plot, refresh_auto, refresh_suite, report
from bench.arguments import device_named, listed, require
from bench.decompositions import LOWRANK_ITERATIONS
from bench.models import Rank
from bench.refresh import RefreshRow, case_table, comparisons, failed
from bench.refresh_suite import Job
from bench.spectra import SOURCES, SPECTRA

FIGURES_ALONE = "experts"  # which the sweep doesn't have
QUICK_SIZE = 48
QUICK_RHOS = (0.1, 0.8)


def add(commands: Any) -> None:
    """The two commands."""
    refresh = commands.add_parser("refresh", help="truncated_svd against its peers")
    refresh.add_argument(
        "--suite",
        choices=("sweep", "figures", "all"),
        default="sweep",
        help="sweep: --source at every --rho; figures: the cases with a figure to reach",
    )
    refresh.add_argument(
        "--source", type=listed, help=f"{', '.join(SOURCES)}, and of figures {FIGURES_ALONE}"
    )
    refresh.add_argument("--rho", type=listed, help="shares of the shorter side, or numbers")
    refresh.add_argument("--size", type=int, default=1024, help="of the sweep's random matrices")
    refresh.add_argument(
        "--figures-size", type=int, default=refresh_suite.FIGURES_SIZE, help="of those in figures"
    )
    refresh.add_argument(
        "--layers",
        type=int,
        default=refresh_suite.MINILM_LAYERS,
        help="MiniLM's blocks in the sweep",
    )
    refresh.add_argument("--no-curve", action="store_true", help="ours by method=auto alone")
    refresh.add_argument("--no-peers", action="store_true", help="ours and linalg.svd alone")
    refresh.add_argument("--picture", type=Path, help="draw the sweep here")

    auto = commands.add_parser("refresh-auto", help="each method's time at one accuracy")
    auto.add_argument("--source", default="power", help=", ".join(SOURCES[:-1]))
    auto.add_argument("--size", type=listed, help="columns; rows are one and four times as many")
    auto.add_argument("--rho", type=listed, help="shares of the shorter side")

    auto.add_argument("--count", type=int, default=1, help="matrices a call, of one shape")
    auto.add_argument("--complement", action="store_true", help="the low bases too")

    for command in (refresh, auto):
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        command.add_argument("--csv", type=Path, help="write the rows here, replacing the file")
        command.add_argument(
            "--quick", action="store_true", help="tiny random matrices and one round: for tests"
        )


def _device(arguments: argparse.Namespace) -> torch.device:
    if arguments.rounds < 0:
        raise ValueError(f"bench: expected --rounds to be 0 or more, got {arguments.rounds}")
    return require(device_named(arguments.device))


def _sources(names: list[str], known: Sequence[str] = SOURCES) -> list[str]:
    for name in names:
        if name not in known:
            raise ValueError(
                f"bench: expected --source to be one of {', '.join(known)}, got {name!r}"
            )
    return names


def _ranks(texts: list[str] | None, default: tuple[float, ...]) -> list[float]:
    return list(default) if texts is None else [Rank.parse(text, "--rho").value for text in texts]


def jobs(arguments: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    """What is measured, in order. Raises ValueError for a bad argument."""
    size, figures_size = arguments.size, arguments.figures_size
    if arguments.quick:
        size, figures_size = min(size, QUICK_SIZE), min(figures_size, QUICK_SIZE)
    for name, value in (("--size", size), ("--figures-size", figures_size)):
        if value < 8:
            raise ValueError(f"bench: expected {name} to be at least 8, got {value}")
    default = list(SPECTRA if arguments.quick else SOURCES)
    known = SOURCES if arguments.suite == "sweep" else (*SOURCES, FIGURES_ALONE)
    sources = [name for name in _sources(arguments.source or default, known) if name in SOURCES]
    ranks = _ranks(arguments.rho, QUICK_RHOS if arguments.quick else refresh_suite.RHOS)
    sweep = refresh_suite.sweep(
        sources,
        ranks,
        size,
        arguments.layers,
        device,
        curve=not arguments.no_curve,
        lowrank=() if arguments.no_peers else LOWRANK_ITERATIONS,
    )
    layers = 0 if arguments.quick else refresh_suite.MINILM_LAYERS
    wanted = {t.rank for t in refresh_suite.TARGETS if t.source == "minilm"}
    whole = "minilm" in sources and arguments.layers == layers
    if arguments.suite == "all" and whole and wanted <= set(ranks):
        layers = 0  # the sweep measures them
    figures: Iterator[Job] = (
        job
        for job in refresh_suite.figures(figures_size, layers, device)
        if arguments.source is None or job.source in arguments.source
    )
    chosen = {"sweep": [sweep], "figures": [figures], "all": [sweep, figures]}
    return chain(*chosen[arguments.suite])


def run(arguments: argparse.Namespace, say: Callable[[str], object]) -> int:
    """Measure, print tables, append rows as they come; 1 where a result of ours was wrong."""
    device = _device(arguments)
    rounds = min(1, arguments.rounds) if arguments.quick else arguments.rounds
    started = time.perf_counter()
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
    rows: list[RefreshRow] = []
    for fresh in refresh_suite.run(
        jobs(arguments, device), rounds, memory=not arguments.quick, say=say
    ):
        say("")
        print(case_table(fresh), end="\n\n", flush=True)
        if arguments.csv is not None:
            report.append_csv(arguments.csv, fresh, report.environment(device), RefreshRow)
        rows += fresh
    if arguments.suite != "sweep":
        size = QUICK_SIZE if arguments.quick else arguments.figures_size
        print(refresh_suite.verdicts(rows, min(size, arguments.figures_size)), end="\n\n")
    for line in comparisons(rows):
        print(line)
    print(f"{len(rows)} rows in {time.perf_counter() - started:.0f} s")
    if arguments.picture is not None:
        draw(rows, device, arguments.picture)
    return 1 if any(map(failed, rows)) else 0


def draw(rows: list[RefreshRow], device: torch.device, picture: Path) -> None:
    where = report.environment(device)
    cells = [
        {name: report.cell(getattr(row, name)) for name in row.__dataclass_fields__} | where
        for row in rows
    ]
    try:
        accuracy_plot.draw(cells, picture)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        print(f"picture in {picture}")


def run_auto(arguments: argparse.Namespace, say: Callable[[str], object]) -> int:
    device = _device(arguments)
    _sources([arguments.source])
    sizes = [int(text) for text in arguments.size or map(str, refresh_auto.SIZES)]
    rhos = [float(rho) for rho in _ranks(arguments.rho, refresh_auto.RHOS)]
    if arguments.quick:
        sizes, rhos = [QUICK_SIZE], rhos[:2]
    if max(rhos) >= 1.0:
        raise ValueError(f"bench: expected --rho to be shares in (0, 1), got {max(rhos):g}")
    rounds = 1 if arguments.quick else max(1, arguments.rounds)
    if arguments.count < 1:
        raise ValueError(f"bench: expected --count to be at least 1, got {arguments.count}")
    return refresh_auto.run(
        arguments.source,
        sizes,
        rhos,
        rounds,
        arguments.count,
        device,
        arguments.csv,
        say,
        task="complement" if arguments.complement else "cold",
    )
