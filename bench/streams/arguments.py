"""What ``python -m bench streams`` takes; nothing here imports what a run needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import report
from bench.arguments import listed
from bench.streams.data import STREAMS

CSV = report.ROOT / "bench" / "results" / "streams.csv"
MODELS = ("minilm", "smollm2")
CRITERIA = ("learned", "average")
PRECISIONS = ("fp32", "bf16")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    streams = commands.add_parser("streams", help="14 and 42 tasks in a row, and what is forgotten")
    streams.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    streams.add_argument("--stream", type=listed, default=["4"], help=", ".join(STREAMS))
    streams.add_argument(
        "--methods", type=listed, help="listed with commas; an unknown one lists all"
    )
    streams.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    streams.add_argument("--lr", type=float, help="instead of the tuned ones")
    streams.add_argument("--tune", action="store_true", help="find the learning rates")
    streams.add_argument(
        "--tuned-by",
        choices=CRITERIA,
        default=CRITERIA[0],
        help="accuracy of each task right after it, or of all at the end",
    )
    streams.add_argument("--model", choices=MODELS, default="minilm")
    streams.add_argument("--steps", type=int, help="of each task")
    streams.add_argument("--batch", type=int)
    streams.add_argument("--precision", choices=PRECISIONS, default="bf16")
    streams.add_argument("--csv", type=Path, default=CSV, help="of the rows; default: %(default)s")
    streams.add_argument("--picture", type=Path, help="default: beside the CSV")
    streams.add_argument("--anew", action="store_true", help="train what has rows too")
