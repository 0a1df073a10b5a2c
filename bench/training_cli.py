"""The commands of ``python -m bench`` about training; what they run is loaded late.

Parsing needs neither the API for training code nor what tables are drawn with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import report

RESULTS = report.ROOT / "bench" / "results"
COMMANDS = (
    "protect",
    "rounding",
    "optimizers",
    "optimizer-state",
    "continual",
    "redundancy",
    "mrr",
    "paper",
)
COST_ROUNDS = 9
OPTIMIZER_STEPS = 50
STATE_STEPS, STATE_SEEDS = 100, 10
MRR_SEEDS, MRR_STEPS, MRR_TASKS = 1, 40, 3
DEFAULT_MRR = (0.1, 0.3, 0.5, 0.8)
DEFAULT_TRR = 0.8  # the paper's
MRR_RATE = 3e-4


def add(commands: Any) -> None:
    """The subcommands' arguments."""
    protect = commands.add_parser(
        "protect", help="what protecting a step of MiniLM costs and holds"
    )
    protect.add_argument(
        "--rho",
        type=_shares,
        help="protected share of shorter sides, with commas: 0.5,0.8, of a sweep 0.2 to 0.9",
    )
    protect.add_argument(
        "--batch", type=_sizes, help="sentence pairs a step, with commas: 16,64, of a sweep 64"
    )
    protect.add_argument("--rounds", type=int, help="default 9, of a sweep 5")
    protect.add_argument(
        "--drift-steps", type=int, help="at the first rho, default 1000; 0 leaves drift out"
    )
    protect.add_argument("--drift-batch", type=int, default=4, help="sentence pairs of such a step")
    protect.add_argument("--csv", type=Path, help="write the rows here, replacing the file")
    protect.add_argument(
        "--sweep",
        action="store_true",
        help="bytes and times over rho, without drift and with a picture",
    )
    protect.add_argument("--picture", type=Path, help="of a sweep; default: beside the CSV")

    rounding = commands.add_parser(
        "rounding", help="confined weights of bfloat16, by how C gets in"
    )
    rounding.add_argument("--rho", type=float, default=0.5, help="protected share of shorter sides")
    rounding.add_argument("--batch", type=int, default=8, help="sentence pairs a step")
    rounding.add_argument("--steps", type=int, default=200)
    rounding.add_argument("--lr", type=float, default=2e-5)
    rounding.add_argument("--csv", type=Path, help="write the rows here, replacing the file")

    optimizers = commands.add_parser("optimizers", help="each optimizer under protect and confine")
    optimizers.add_argument("--steps", type=int, default=OPTIMIZER_STEPS)
    optimizers.add_argument("--csv", type=Path, help="write the rows here, replacing the file")

    state = commands.add_parser(
        "optimizer-state", help="momentum kept, projected or cleared where the next task begins"
    )
    state.add_argument("--steps", type=int, default=STATE_STEPS, help="of each of two tasks")
    state.add_argument("--seeds", type=int, default=STATE_SEEDS)
    state.add_argument("--csv", type=Path, help="write the rows here, replacing the file")

    continual = commands.add_parser("continual", help="five tasks in a row: what is forgotten")
    _sequence(continual, None, seeds=3, steps=None)
    continual.add_argument(
        "--ranks", type=_shares, help="share of directions kept in the first and last task: 0.3,0.7"
    )
    continual.add_argument("--methods", type=_listed, help="by name, with commas")
    continual.add_argument("--lr", type=float, help="for every method, instead of the tuned ones")
    continual.add_argument(
        "--rates", type=Path, help="the tuning's rows, default bench/results/continual_lr.csv"
    )
    continual.add_argument("--picture", type=Path, help="default: beside the CSV")
    continual.add_argument("--tune", action="store_true", help="find the learning rates, no test")
    continual.add_argument(
        "--rounds", type=int, default=COST_ROUNDS, help="of step times; 0 measures no cost"
    )
    continual.add_argument(
        "--quick",
        action="store_true",
        help="a small random encoder, two steps; without --csv rows go to a new temporary folder",
    )

    paper = commands.add_parser("paper", help="what training Llama-3.1-8B takes, counted")
    paper.add_argument("--tokens", type=int, default=8192, help="of a step")
    paper.add_argument("--rho", type=_shares, default=(0.5, 0.8), help="listed with commas")

    redundancy = commands.add_parser("redundancy", help="zero singular directions, see what's left")
    redundancy.add_argument("--csv", type=Path, default=RESULTS / "redundancy.csv")

    mrr = commands.add_parser("mrr", help="adaptive ranks by minimum retention ratio")
    _sequence(mrr, RESULTS / "continual_mrr.csv", seeds=MRR_SEEDS, steps=MRR_STEPS)
    mrr.add_argument("--mrr", type=_shares, default=DEFAULT_MRR, help="listed with commas")
    mrr.add_argument("--trr", type=float, default=DEFAULT_TRR, help="target retention ratio")
    mrr.add_argument("--tasks", type=int, default=MRR_TASKS, help="of the sequence's first")
    mrr.add_argument("--lr", type=float, default=MRR_RATE)


def _sequence(
    command: argparse.ArgumentParser, csv: Path | None, *, seeds: int, steps: int | None
) -> None:
    command.add_argument("--seeds", type=int, default=seeds, help="0, 1, ...: how many")
    command.add_argument("--steps", type=int, default=steps, help="of each task")
    command.add_argument("--batch", type=int)
    command.add_argument(
        "--csv",
        type=Path,
        default=csv,
        help="rows, by default the committed ones; runs that are there are taken and not trained",
    )
    command.add_argument(
        "--anew", action="store_true", help="train those too, and replace their rows"
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _sizes(text: str) -> list[int]:
    return [int(part) for part in _listed(text)]


def _shares(text: str) -> tuple[float, ...]:
    return tuple(map(float, _listed(text)))


def run(arguments: argparse.Namespace) -> int:
    """Raises ImportError where what the command compares or draws with isn't installed."""
    if arguments.command == "protect":
        from bench import protection

        return protection.run(arguments)
    if arguments.command == "continual":
        from bench import continual

        return continual.run(arguments)
    if arguments.command == "rounding":
        from bench import rounding

        return rounding.run(arguments)
    if arguments.command == "optimizers":
        from bench import optimizers

        return optimizers.run(arguments)
    if arguments.command == "optimizer-state":
        from bench import optimizer_state

        return optimizer_state.run(arguments)
    if arguments.command == "mrr":
        from bench import mrr_sweep

        return mrr_sweep.run(arguments)
    if arguments.command == "paper":
        from bench import paper

        return paper.run(arguments)
    from bench import redundancy

    return redundancy.run(arguments)
