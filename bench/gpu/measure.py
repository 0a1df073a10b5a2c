"""What the parts share: arguments, rows that are written as they come, a gate before each speed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import check, report
from bench.arguments import device_named, require
from bench.contenders import first_line
from bench.timing import Clock, Summary, Timed, peak_extra_bytes

Results = Sequence[Tensor]


@dataclass
class Measurement:
    """One contender of one case. None stands for what was not measured."""

    part: str = ""
    case: str = ""
    dtype: str = ""
    rank: int | None = None
    contender: str = ""
    config: str = ""
    device: str = ""
    status: str = ""
    error: float | None = None
    error_bound: float | None = None
    device_ms: float | None = None
    device_p20_ms: float | None = None
    device_p80_ms: float | None = None
    exposed_rounds: int | None = None  # in which the host's work outlasted its head start
    host_hit_ms: float | None = None  # of a call with the tensors of the call before
    host_miss_ms: float | None = None  # of one whose gradients lie at addresses never seen
    extra_bytes: int | None = None
    rounds: int | None = None


def poison(*outputs: Tensor) -> None:
    """NaN, which stays where a contender doesn't write."""
    for output in outputs:
        output.fill_(float("nan"))


class Part:
    """One part of a session: where it runs, how often it measures and where its rows go."""

    def __init__(self, name: str, device: torch.device, out: Path, rounds: int, tiny: bool) -> None:
        self.name = name
        self.device = device
        self.rounds = rounds
        self.tiny = tiny
        self.failed = 0
        self._out = out
        self._where = report.environment(device)

    def row(
        self, case: str, dtype: torch.dtype, rank: int | None, contender: str, config: str = ""
    ) -> Measurement:
        name = str(dtype).removeprefix("torch.")
        return Measurement(self.name, case, name, rank, contender, config, str(self.device))

    @contextmanager
    def writing(self, row: Measurement) -> Iterator[None]:
        """Writes the row on the way out; an error inside becomes the row's status."""
        try:
            yield
            row.status = row.status or "ok"
        except Exception as error:
            row.status = f"failed: {first_line(error)}"
        self.failed += row.status != "ok"
        report.append_csv(self._out, [row], self._where, Measurement)
        figures = {"device": row.device_ms, "hit": row.host_hit_ms, "miss": row.host_miss_ms}
        said = [f"{name} {ms:.3f} ms" for name, ms in figures.items() if ms is not None]
        label = " ".join((row.case, row.dtype, f"r={row.rank}", row.contender, row.config))
        print(f"{label}: {row.status}", *said, sep=", ", flush=True)

    def gate(
        self,
        row: Measurement,
        call: Callable[[], Results],
        error: Callable[[Results], float],
        bound: float,
        prepare: Callable[[], object] | None = None,
    ) -> bool:
        """Whether a contender may be timed: right to ``bound``, and the same bits twice."""

        def results() -> list[Tensor]:
            if prepare is not None:
                prepare()
            return [result.clone() for result in call()]

        first = results()
        row.error, row.error_bound = error(first), bound

        def reproducible() -> bool:
            return all(map(torch.equal, first, results()))

        row.status = check.refusal(row.error, bound, reproducible=reproducible) or ""
        return not row.status

    def time(
        self,
        row: Measurement,
        call: Callable[[], object],
        prepare: Callable[[], object] | None = None,
        head_start_ms: float = 0.5,
    ) -> None:
        """Device time of a call, as the median of the part's rounds after one unrecorded."""
        if not self.rounds:
            return
        # A GPU of 2 GHz; a slower clock makes the head start longer.
        clock = Clock(self.device, head_start_cycles=int(head_start_ms * 2e6))
        timed = Timed(call, prepare)
        clock.time_ms(timed)
        clock.exposed = 0
        summary = Summary.of([clock.time_ms(timed) for _ in range(self.rounds)])
        row.device_ms, row.rounds = summary.median_ms, summary.rounds
        row.device_p20_ms, row.device_p80_ms = summary.p20_ms, summary.p80_ms
        row.exposed_rounds = clock.exposed

    def host_ms(self, calls: Sequence[Callable[[], object]]) -> float:
        """What the host spends until a call returns: the median over calls to an idle device."""
        spent = []
        for call in calls:
            self.synchronize()
            start = time.perf_counter_ns()
            call()
            spent.append((time.perf_counter_ns() - start) / 1e6)
        self.synchronize()
        return Summary.of(spent).median_ms

    def extra_bytes(self, call: Callable[[], object]) -> int:
        return peak_extra_bytes(call, self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def main(
    name: str, run: Callable[[Part], None], rounds: int, argv: Sequence[str] | None = None
) -> int:
    """The command line of a part; exit status 1 where a row has no figure to show."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.gpu.{name}")
    parser.add_argument(
        "--out", type=Path, help="append the rows to this file; without it a dry run keeps none"
    )
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=rounds, help="0 checks and times nothing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny matrices on the CPU, one round: does it run? Triton's kernels do where "
        "TRITON_INTERPRET=1 is set",
    )
    arguments = parser.parse_args(argv)
    if arguments.out is None and not arguments.dry_run:
        parser.error("expected --out, a file for the rows")
    device = "cpu" if arguments.dry_run else arguments.device
    try:
        chosen = require(device_named(device))
        rounds = min(arguments.rounds, 1) if arguments.dry_run else arguments.rounds
        if rounds < 0:
            raise ValueError(f"bench: expected --rounds to be 0 or more, got {rounds}")
        out = arguments.out or Path(os.devnull)
        part = Part(name, chosen, out, rounds, arguments.dry_run)
    except ValueError as error:
        parser.error(str(error))
    with torch.inference_mode(False), torch.no_grad():
        run(part)
    return 1 if part.failed else 0
