"""The command line that the benches of the integrations share, each against what it replaces."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.arguments import device_named, require

Job = tuple[str, Callable[[], list[Any]]]  # its name, and what measures it
Column = tuple[str, str, str]  # header, a row's field, and its format, or MiB of bytes


def run(
    module: str,
    given: Sequence[str] | None,
    jobs: Callable[[argparse.Namespace, torch.device], Iterable[Job]],
    columns: Sequence[Column],
    *,
    rounds: int,
    rounds_help: str,
    cases: Sequence[str] = (),
) -> int:
    """Measure one job after another, write rows as they come, print one table.

    Args:
        module: whose command line this is.
        given: the arguments, None for the process' own.
        jobs: of the chosen arguments and device.
        columns: of the table. Rows have a case, a contender and a status too.
        rounds: how many there are by default.
        cases: names that ``--case`` may choose from; empty for no such option.

    Returns:
        The exit status: 1 where a row isn't "ok", 2 for a bad argument.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    unspaced = {_unspaced(case): case for case in cases}
    if cases:
        parser.add_argument(
            "--case",
            type=lambda text: unspaced.get(_unspaced(text), text),
            choices=list(cases),
            action="append",
            help="default: all; with or without the spaces",
        )
    parser.add_argument("--csv", type=Path, help="write the rows here, replacing the file")
    chosen = parser.parse_args(given)
    try:
        device = require(device_named(chosen.device))
        if chosen.rounds < 1:
            raise ValueError(f"bench: expected --rounds to be 1 or more, got {chosen.rounds}")
        if chosen.csv is not None:
            chosen.csv.unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    say = report.progress()
    rows: list[Any] = []
    for name, measure in jobs(chosen, device):
        say(name)
        fresh = measure()
        if chosen.csv is not None:
            report.append_csv(chosen.csv, fresh, report.environment(device), type(fresh[0]))
        rows += fresh
    say("")
    lines = [[_shown(getattr(row, field), form) for _, field, form in columns] for row in rows]
    print(report.table([header for header, _, _ in columns], lines))
    wrong = [row for row in rows if row.status != "ok"]
    for row in wrong:
        print(f"{row.case}, {row.contender}: {row.status}")
    return int(bool(wrong))


def _unspaced(text: str) -> str:
    return "".join(text.split())


def _shown(value: Any, form: str) -> str:
    return f"{(value or 0) / 2**20:.1f}" if form == "MiB" else report.shown(value, form)
