"""``python -m bench traffic``: bytes and least times of lists on several GPUs, with no GPU.

``traffic`` says what the model counts and what the model assumes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.arguments import listed
from bench.l2 import Cache
from bench.models import llama_2_7b
from bench.traffic import DEVICES, MIB, Device, run
from bench.traffic_plan import planned


@dataclass
class Row:
    """One launch on one device. Every count of bytes is divided by the bytes of the matrices."""

    device: str
    list: str
    r: int
    k: int
    launches: int
    tasks: int
    passes: float  # This is how often the matrices' bytes cross between memory and L2.
    passes_without_hints: float  # The same, where L2 ignores the hints of stores.
    read: float
    written: float
    l2: float  # These bytes move between L2 and processors.
    # Bytes of updates are divided by the bytes that updates read and write of the matrices.
    update: float
    coefficients: float  # Coefficients and partial sums count once written and once read.
    us: float
    three_pass_share: float  # The time of three passes of memory is divided by ``us``.
    config: str


# A case is a label, the shapes of its matrices, and the ranks (r, k).
Case = tuple[str, list[tuple[int, int]], tuple[int | None, int | None]]


def cases() -> list[Case]:
    square = [(4096, 4096)] * 4
    layer = [(m, n) for m, n in llama_2_7b(1)]
    return [
        ("4 of 4096x4096", square, (64, 64)),
        ("4 of 4096x4096", square, (None, 64)),
        ("4 of 4096x4096", square, (64, None)),
        ("4 of 4096x4096", square, (128, 128)),
        ("1 of 4096x4096", square[:1], (64, 64)),
        ("12 of 2048x2048", [(2048, 2048)] * 12, (64, 64)),
        ("48 of 768x768", [(768, 768)] * 48, (64, 64)),
        ("a layer of Llama-2-7B", layer, (64, 64)),
        ("a layer of Llama-2-7B", layer, (128, 128)),
    ]


def measure(case: Case, device: Device) -> Row:
    """The row of one case, which the model runs with hints and without hints."""
    label, shapes, ranks = case
    (tasks,) = made = planned(shapes, ranks, device.architecture)
    programs = device.processors * tasks.programs_per_processor
    with_hints, without = (
        run(tasks, device, programs, Cache(device.l2_mib * MIB, hints=hints))
        for hints in (True, False)
    )
    size = sum(2 * m * n for m, n in shapes)
    read, written = with_hints.memory_read / size, with_hints.memory_written / size
    return Row(
        device.name,
        label,
        ranks[0] or 0,
        ranks[1] or 0,
        len(made),
        with_hints.tasks,
        read + written,
        (without.memory_read + without.memory_written) / size,
        read,
        written,
        with_hints.l2_bytes / size,
        with_hints.update_bytes / with_hints.update_matrix_bytes,
        with_hints.coefficient_bytes / size,
        with_hints.us,
        3 * size / (device.memory_tb_s * 1e6) / with_hints.us,
        tasks.config,
    )


def add(commands: Any) -> None:
    """Adds the subcommand and its arguments."""
    traffic = commands.add_parser("traffic", help="bytes and least times of lists, no GPU; 3 min")
    traffic.add_argument(
        "--device", type=listed, default=list(DEVICES), help=f"of {', '.join(DEVICES)}"
    )
    traffic.add_argument("--csv", type=Path, help="write the rows to this file, anew")


def run_cases(arguments: argparse.Namespace) -> int:
    """Prints a line for each case, and writes the rows."""
    if not arguments.device or not set(arguments.device) <= set(DEVICES):
        raise ValueError(
            f"bench traffic: expected --device of {', '.join(DEVICES)}, "
            f"got {','.join(arguments.device)!r}"
        )
    header = ("device", "list", "r", "k", "passes", "L2", "coefficients", "us", "of 3 passes")
    rows: list[Row] = []
    lines = []
    for name, case in itertools.product(arguments.device, cases()):
        row = measure(case, DEVICES[name])
        rows.append(row)
        figures = row.passes, row.l2, row.coefficients, row.us, row.three_pass_share
        lines.append((row.device, row.list, str(row.r), str(row.k), *(f"{f:.2f}" for f in figures)))
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
    print(report.table(header, lines))
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
        report.append_csv(arguments.csv, rows, report.environment(torch.device("cpu")), Row)
    return 0
