"""``python -m bench refresh-auto``: each method's time at a given accuracy, by shape and rank.

From its rows the thresholds of ``method="auto"`` are read off: for every shape and rank, the
method that reaches the accuracy in the least time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import report, spectra
from bench.decompositions import Contender, ours
from bench.refresh import RefreshRow, examine
from bench.spectra import Problem, shown
from bench.timing import Clock, Summary, Timed, interleave

SIZES = (256, 512, 1024, 2048)
ASPECTS = (1, 4)  # rows over columns
RHOS = (0.01, 0.05, 0.1, 0.15, 0.25, 0.5, 0.8)
ACCURACY = 1e-3  # 1 − overlap to reach
NITERS = (5, 7, 9, 11, 15)  # products that the randomized method may take, the least that does
LARGEST = 2048 * 2048  # elements


@dataclass
class AutoRow:
    """One method at one shape and rank."""

    source: str = ""
    task: str = ""  # "cold", or "complement" where the low bases are wanted too
    m: int | None = None
    n: int | None = None
    rho: float | None = None
    rank: int | None = None
    matrices: int | None = None
    device: str = ""
    method: str = ""
    niter: int | None = None
    status: str = ""  # "ok", or why it has no time
    fastest: str = ""  # "yes" of those that reach the accuracy
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    missing_overlap: float | None = None
    residual: float | None = None


def problems(
    source: str,
    sizes: Sequence[int],
    aspects: Sequence[int],
    count: int,
    device: torch.device,
    task: str = "cold",
) -> Iterator[Problem]:
    """Lists of ``count`` matrices of one shape, each with bases of its own."""
    for n in sizes:
        for aspect in aspects:
            if n * n * aspect <= LARGEST:
                drawn = [
                    spectra.random_problem(source, aspect * n, n, device, seed).matrices[0]
                    for seed in range(count)
                ]
                yield Problem(source, task, drawn)


def _row(problem: Problem, rho: float, method: str, niter: int | None) -> AutoRow:
    m, n = problem.matrices[0].shape
    return AutoRow(
        source=problem.source,
        task=problem.task,
        m=m,
        n=n,
        rho=rho,
        rank=spectra.ranks_of(problem.matrices, rho)[0],
        matrices=len(problem.matrices),
        device=str(problem.matrices[0].device),
        method=method,
        niter=niter,
    )


def candidates(problem: Problem, rho: float) -> list[tuple[AutoRow, Callable[[], object]]]:
    """Each method with the least work that reaches the accuracy, ready to be timed.

    Warm and deflated start from an earlier result after a drift of 1e-3, the other three from
    the same weights without it; where low bases are wanted of a cold start they are left out.
    """
    found: list[tuple[AutoRow, Callable[[], object]]] = []
    later: list[tuple[str, Problem]] = []
    if problem.task == "cold":
        later.append(("warm", spectra.drifted(problem, rho, free=False)))
        later.append(("deflated", spectra.drifted(problem, rho, free=True)))
    for method, where, niters in (
        ("exact", problem, (None,)),
        ("gram", problem, (None,)),
        ("randomized", problem, NITERS),
        *((name, start, (None,)) for name, start in later),
    ):
        for niter in niters:
            run = ours(where, rho, method=method, niter=niter)
            seen: RefreshRow = examine(where, rho, Contender(method, run, True))
            row = _row(problem, rho, method, niter)
            row.missing_overlap, row.residual, row.status = (
                seen.missing_overlap,
                seen.residual,
                seen.status,
            )
            if row.status == "ok" and (row.missing_overlap or 0.0) > ACCURACY:
                row.status = "accuracy not reached"
            if row.status == "ok" or niter == niters[-1]:
                found.append((row, run))
                break
    return found


def measure(
    problem: Problem, rhos: Sequence[float], rounds: int, say: Callable[[str], object]
) -> list[AutoRow]:
    """The rows of one shape, a ρ after the other; within one the methods interleave."""
    rows: list[AutoRow] = []
    for rho in rhos:
        say(f"{problem.name}, {shown(rho)}")
        found = candidates(problem, rho)
        timed = {row.method: Timed(run) for row, run in found if not row.status.startswith("wrong")}
        clock = Clock(problem.matrices[0].device, cold=False)
        times = interleave(timed, rounds, clock, warm_up=0)
        for row, _ in found:
            if row.method not in times:
                continue
            summary = Summary.of(times[row.method])
            row.rounds = summary.rounds
            row.median_ms, row.p20_ms, row.p80_ms = (
                summary.median_ms,
                summary.p20_ms,
                summary.p80_ms,
            )
        cold = [r for r, _ in found if r.status == "ok" and r.method not in ("warm", "deflated")]
        if cold:
            min(cold, key=lambda r: r.median_ms or math.inf).fastest = "yes"
        rows += [row for row, _ in found]
    return rows


def table(rows: Sequence[AutoRow]) -> str:
    """A line a shape and ρ: ms of each method, the least of a cold start starred."""
    methods = list(dict.fromkeys(row.method for row in rows))
    keys = list(dict.fromkeys((row.m, row.n, row.rho) for row in rows))
    lines = []
    for m, n, rho in keys:
        line = [f"{m}x{n}", f"{rho:g}"]
        for method in methods:
            row = next(
                (r for r in rows if (r.m, r.n, r.rho, r.method) == (m, n, rho, method)), None
            )
            if row is None or row.median_ms is None:
                line.append("-")
                continue
            niter = "" if row.niter is None else f" ({row.niter})"
            mark = "*" if row.fastest else "!" if row.status != "ok" else ""
            line.append(f"{row.median_ms:.2f}{niter}{mark}")
        lines.append(line)
    note = f"ms; * least of those with 1 - overlap <= {ACCURACY:g}, ! those above; (niter)"
    return "\n".join([note, report.table(("shape", "rho", *methods), lines)])


def run(
    source: str,
    sizes: Sequence[int],
    rhos: Sequence[float],
    rounds: int,
    count: int,
    device: torch.device,
    csv: Path | None,
    say: Callable[[str], object] = lambda _: None,
    *,
    task: str = "cold",
) -> int:
    rows: list[AutoRow] = []
    if csv is not None:
        csv.unlink(missing_ok=True)
    for problem in problems(source, sizes, ASPECTS, count, device, task):
        fresh = measure(problem, rhos, rounds, say)
        rows += fresh
        if csv is not None:
            report.append_csv(csv, fresh, report.environment(device), AutoRow)
    say("")
    print(table(rows))
    return 1 if any(row.status.startswith("wrong") for row in rows) else 0
