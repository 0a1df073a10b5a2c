"""``python -m bench``: see ``bench/README.md``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import host, overhead, refresh_cli, report, static, suite, traffic_cli, training_cli
from bench.arguments import device_named, listed, require
from bench.models import MODELS, Rank, shapes_of
from bench.projection import DTYPES, Case, measure
from bench.streams import arguments as streams_arguments

RESULTS = report.ROOT / "bench" / "results"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    projection = commands.add_parser("projection", help="the projection against its peers")

    def several(name: str, text: str) -> None:
        projection.add_argument(name, action="append", type=listed, help=text)

    several("--model", f"{', '.join(MODELS)} or ROWSxCOLUMNS; repeat, or list with commas")
    several("--rank", "directions a side, or a fraction in (0, 1)")
    several("--dtype", ", ".join(DTYPES))
    several("--backend", "auto, torch, triton, cuda; one row each")
    projection.add_argument("--layers", type=int, help="this many blocks of a model, not all")
    projection.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    projection.add_argument(
        "--spans",
        choices=("high", "low", "auto"),
        default="auto",
        help="which basis ours holds of each side; auto takes the smaller one",
    )
    projection.add_argument("--mode", choices=("complement", "core"), default="complement")
    projection.add_argument("--rounds", type=int, default=9, help="0 checks and times nothing")
    projection.add_argument("--no-peers", action="store_true", help="ours alone")
    projection.add_argument(
        "--warm-cache", action="store_true", help="CUDA: leave the L2 cache as it is between calls"
    )
    projection.add_argument("--csv", type=Path, help="append the rows to this file")
    projection.add_argument("--list", action="store_true", help="print the cases and run none")

    cpu = commands.add_parser("cpu-suite", help="the CPU cases whose results are committed")
    cpu.add_argument("--csv", type=Path, default=RESULTS / "projection_cpu.csv")
    cpu.add_argument("--picture", type=Path, help="plot the rows here (default: beside the CSV)")

    over = commands.add_parser("overhead", help="a call's cost over the bare matmuls, on the CPU")
    over.add_argument("--csv", type=Path, help="write the rows here, replacing the file")
    over.add_argument("--batches", type=int, default=200)

    host_time = commands.add_parser("host", help="the host's time for a call, without a device")
    host_time.add_argument("--csv", type=Path, help="write the rows here, replacing the file")
    host_time.add_argument("--layers", type=int, help="this many blocks of the model, not all")
    host_time.add_argument("--rounds", type=int, default=100)

    refresh_cli.add(commands)
    training_cli.add(commands)
    static.add(commands)
    traffic_cli.add(commands)
    streams_arguments.add(commands)

    show = commands.add_parser("show", help="a results file as a short table")
    show.add_argument("csv", type=Path)

    plot = commands.add_parser(
        "plot", help="a picture of projection's, refresh's or protect's rows"
    )
    plot.add_argument("csv", type=Path)
    plot.add_argument("picture", type=Path)
    return top


def _flat(groups: list[list[str]] | None, default: str) -> list[str]:
    return [part for group in groups or [[default]] for part in group]


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every combination of the lists asked for. Raises ValueError for a bad one."""
    device = device_named(arguments.device)
    if arguments.rounds < 0:
        raise ValueError(f"bench: expected --rounds to be 0 or more, got {arguments.rounds}")
    backends = _flat(arguments.backend, "auto")
    for backend in backends:
        if backend not in ("auto", "torch", "triton", "cuda"):
            raise ValueError(
                f"bench: expected --backend to be auto, torch, triton or cuda, got {backend!r}"
            )
    found = []
    for model in _flat(arguments.model, "4096x4096"):
        shapes = shapes_of(model, layers=arguments.layers)
        for dtype in _flat(arguments.dtype, "fp32"):
            if dtype not in DTYPES:
                raise ValueError(
                    f"bench: expected --dtype to be one of {', '.join(DTYPES)}, got {dtype!r}"
                )
            for text in _flat(arguments.rank, "64"):
                rank = Rank.parse(text)
                rank.require_room(shapes)
                found.append(
                    Case(
                        model,
                        shapes,
                        rank,
                        dtype,
                        device,
                        arguments.spans,
                        arguments.mode,
                        backends,
                        not arguments.no_peers,
                        arguments.layers,
                    )
                )
    return found


def _measure(case: Case, rounds: int, csv: Path | None, *, cold: bool = True) -> list[report.Row]:
    """Measure one case, print its table and append its rows at once: a later crash loses none."""
    say = report.progress()
    rows = measure(case, rounds, cold=cold, say=lambda text: say(f"{case.name}: {text}"))
    say("")
    print(report.case_table(rows), end="\n\n", flush=True)
    if csv is not None:
        report.append_csv(csv, rows, report.environment(case.device))
    return rows


def run_projection(arguments: argparse.Namespace) -> int:
    todo = cases(arguments)
    if arguments.list:
        for case in todo:
            print(f"{case.name}: {len(case.shapes)} matrices on {case.device}, spans {case.spans}")
        return 0
    wrong = 0
    for case in todo:
        require(case.device)
        rows = _measure(case, arguments.rounds, arguments.csv, cold=not arguments.warm_cache)
        wrong += sum(map(report.failed, rows))
    return 1 if wrong else 0


def run_cpu_suite(arguments: argparse.Namespace) -> int:
    arguments.csv.unlink(missing_ok=True)
    started = time.perf_counter()
    results = []
    for target in suite.CPU_SUITE:
        case = target.case(torch.device("cpu"))
        results.append((target, _measure(case, target.rounds, arguments.csv)))
    print(suite.verdicts(results))
    print(f"{len(results)} cases in {time.perf_counter() - started:.0f} s; rows in {arguments.csv}")
    _plot(arguments.csv, arguments.picture or arguments.csv.with_suffix(".png"))
    return 1 if any(report.failed(row) for _, rows in results for row in rows) else 0


def _plot(csv: Path, picture: Path) -> None:
    from bench import accuracy_plot, plot, protection_plot

    rows = report.read_csv(csv)
    known = set(rows[0]) if rows else set()
    kinds: tuple[tuple[set[str], Callable[..., None]], ...] = (
        ({"missing_overlap", "times_svd"}, accuracy_plot.draw),
        ({"trained_bytes", "peak_bytes"}, protection_plot.draw),
        ({"times_naive"}, plot.draw),
    )
    drawn = next((draw for names, draw in kinds if names <= known), None)
    if drawn is None:
        raise ValueError(
            "bench plot: expected rows of projection, refresh or protect, got none in "
            f"{csv}; show prints any results file, and continual draws its own picture"
        )
    try:
        drawn(rows, picture)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        print(f"picture in {picture}")


def run_streams(arguments: argparse.Namespace) -> int:
    try:
        from bench.streams import cli

        return cli.run(arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last finished task", file=sys.stderr)
        return 130  # as shells have it of a command that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "projection":
            return run_projection(arguments)
        if arguments.command == "cpu-suite":
            return run_cpu_suite(arguments)
        if arguments.command == "host":
            return host.run(arguments.rounds, arguments.layers, arguments.csv)
        if arguments.command == "overhead":
            return overhead.run(arguments.batches, arguments.csv)
        if arguments.command == "refresh":
            return refresh_cli.run(arguments, report.progress())
        if arguments.command == "refresh-auto":
            return refresh_cli.run_auto(arguments, report.progress())
        if arguments.command in training_cli.COMMANDS:
            return training_cli.run(arguments)
        if arguments.command == "static":
            return static.run(arguments)
        if arguments.command == "traffic":
            return traffic_cli.run_cases(arguments)
        if arguments.command == "streams":
            return run_streams(arguments)
        if arguments.command == "show":
            print(report.short_table(report.read_csv(arguments.csv)))
            return 0
        _plot(arguments.csv, arguments.picture)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
