"""One problem of the refresh bench: accuracy and gate of everyone, then interleaved rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.contenders import OURS, first_line
from bench.decompositions import LOWRANK, LOWRANK_ITERATIONS, SVD, Contender, Results, contenders
from bench.spectra import Problem, Truth, ranks_of, shown
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from osf_kernels.testing import orthonormality_ratio

ORTHONORMAL = 30.0  # LAPACK's ratio ‖I − QᵀQ‖₁ / (m·eps)
ROUNDING = 10.0  # in √max(m, n)·eps: residual relative to σ₁ of what is right to rounding
HONEST = 1.5  # what a residual may exceed the one that the result states by, above rounding
LOWRANK_2 = f"{LOWRANK} niter=2"


@dataclass
class RefreshRow:
    """One contender at one rank of one problem. None stands for what was not measured."""

    case: str = ""
    source: str = ""
    task: str = ""
    matrices: int | None = None
    m: int | None = None  # of the first matrix
    n: int | None = None
    rank: str = ""
    device: str = ""
    contender: str = ""
    family: str = ""
    setting: str = ""
    method: str = ""  # that ours says it took
    iterations: int | None = None
    status: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    times_svd: float | None = None
    times_lowrank: float | None = None
    overlap: float | None = None
    missing_overlap: float | None = None
    captured: float | None = None
    missing_captured: float | None = None
    residual: float | None = None
    stated_residual: float | None = None
    orthonormality: float | None = None
    extra_bytes: int | None = None


# --- accuracy ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Of a list of triplets against the truth: means of overlap and captured, worst of the rest.

    Overlap is that of the worse side. Captured is over the best possible for that rank.
    """

    overlap: float
    captured: float
    residual: float
    orthonormality: float


def orthonormal(Q: Tensor) -> tuple[Tensor, float]:
    """Q in float64, orthonormalized where it isn't to rounding, and its ratio as it came."""
    ratio = orthonormality_ratio(Q)
    Q = Q.double()
    return (Q if ratio < ORTHONORMAL else torch.linalg.qr(Q)[0]), ratio


def accuracy_of_one(A: Tensor, triplets: Any, truth: Truth, rank: int) -> Accuracy:
    U, S, V = (x[..., :rank] for x in (triplets.U, triplets.S, triplets.V))
    if not all(bool(x.isfinite().all()) for x in (U, S, V)):
        return Accuracy(0.0, 0.0, math.inf, math.inf)
    A64, S64, top = A.double(), S.double(), float(truth.S[0])
    left = A64 @ V.double() - U.double() * S64
    right = A64.mT @ U.double() - V.double() * S64
    residual = float((left.square().sum(0) + right.square().sum(0)).sqrt().max()) / top
    (U64, u_ratio), (V64, v_ratio) = orthonormal(U), orthonormal(V)
    overlap = min(
        float((best[:, :rank].mT @ found).square().sum()) / rank
        for best, found in ((truth.U, U64), (truth.V, V64))
    )
    captured = float((A64 @ V64).square().sum() / truth.S[:rank].square().sum())
    return Accuracy(overlap, captured, residual, max(u_ratio, v_ratio))


def accuracy(problem: Problem, results: Results, ranks: Sequence[int]) -> Accuracy:
    each = [
        accuracy_of_one(A, triplets, truth, r)
        for A, triplets, truth, r in zip(
            problem.matrices, results, problem.truths, ranks, strict=True
        )
    ]
    return Accuracy(
        sum(a.overlap for a in each) / len(each),
        sum(a.captured for a in each) / len(each),
        max(a.residual for a in each),
        max(a.orthonormality for a in each),
    )


def refusal(found: Accuracy, results: Results) -> str | None:
    """Why a result of ours gets no speed: columns, or a residual it doesn't own up to."""
    worst = found.orthonormality
    for svd in results:
        for low, high in ((svd.U_low, svd.U), (svd.V_low, svd.V)):
            if low is not None:
                both = torch.cat([high, low], dim=-1)
                worst = max(worst, orthonormality_ratio(both))
    if not worst < ORTHONORMAL:
        return f"wrong: columns orthonormal to {worst:.3g} m·eps only, not {ORTHONORMAL:g}"
    stated = max(float(svd.residual) for svd in results)
    rounding = max(
        ROUNDING * math.sqrt(max(svd.shape)) * torch.finfo(svd.S.dtype).eps for svd in results
    )
    limit = max(rounding, HONEST * stated)
    if not found.residual <= limit:
        return f"wrong: residual {found.residual:.2g} where the result states {stated:.2g}"
    direct = {svd.method for svd in results} & {"exact", "gram"}
    if direct and not found.residual <= rounding:
        return f"wrong: residual {found.residual:.2g} of {', '.join(sorted(direct))}"
    return None


# --- one problem ---------------------------------------------------------------------------


def examine(
    problem: Problem, rank: float, contender: Contender, known: dict[str, Results] | None = None
) -> RefreshRow:
    """One run, unmeasured: its accuracy, and whether it may have a speed.

    Args:
        known: results of rankless contenders, which are taken from it and put there.
    """
    m, n = problem.matrices[0].shape
    ranks = ranks_of(problem.matrices, rank)
    row = RefreshRow(
        case=f"{problem.name}, {shown(rank)}, {problem.task}",
        source=problem.source,
        task=problem.task,
        matrices=len(problem.matrices),
        m=m,
        n=n,
        rank=shown(rank),
        device=str(problem.matrices[0].device),
        contender=contender.name,
        family=contender.family,
        setting=contender.setting,
    )
    known = {} if known is None else known
    try:
        results = known[contender.name] if contender.name in known else contender.run()
    except Exception as error:
        kind = "wrong: it raised" if contender.ours else "unavailable:"
        row.status = f"{kind} {first_line(error)}"
        return row
    if contender.rankless:
        known[contender.name] = results
    found = accuracy(problem, results, ranks)
    row.overlap, row.missing_overlap = found.overlap, max(0.0, 1.0 - found.overlap)
    row.captured, row.missing_captured = found.captured, max(0.0, 1.0 - found.captured)
    row.residual, row.orthonormality = found.residual, found.orthonormality
    row.status = "ok"
    if contender.ours:
        row.method = " + ".join(dict.fromkeys(svd.method for svd in results))
        row.iterations = max(svd.iterations for svd in results)
        row.stated_residual = max(float(svd.residual) for svd in results)
        row.status = refusal(found, results) or "ok"
    return row


def measure(
    problem: Problem,
    ranks: Sequence[float],
    rounds: int,
    *,
    curve: bool = True,
    lowrank: Sequence[int] = LOWRANK_ITERATIONS,
    memory: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> list[RefreshRow]:
    """The rows of a problem at several ranks, everyone interleaved. 0 rounds: the gate alone.

    Args:
        curve, lowrank: as in ``decompositions.contenders``.
        memory: measure what ours by method="auto" and linalg.svd allocate, in a run of its own.

    Who raises gets a row that says why: ours a wrong one, a peer one that is unavailable.
    """
    say("the truth in float64")
    problem.truths  # noqa: B018  computed once, outside of anyone's turn
    rows: list[tuple[str, RefreshRow]] = []
    timed: dict[str, Timed] = {}
    known: dict[str, Results] = {}
    allocated: dict[str, int] = {}
    for rank in ranks:
        for contender in contenders(problem, rank, curve=curve, lowrank=lowrank):
            say(f"{shown(rank)}, checking {contender.name}")
            row = examine(problem, rank, contender, known)
            key = contender.name if contender.rankless else f"{contender.name} {shown(rank)}"
            rows.append((key, row))
            if row.status != "ok":
                continue
            timed[key] = Timed(contender.run)
            if memory and contender.name in (OURS, SVD):
                if key not in allocated:
                    allocated[key] = peak_extra_bytes(contender.run, problem.matrices[0].device)
                row.extra_bytes = allocated[key]
    known.clear()
    if rounds:
        times = interleave(
            timed,
            rounds,
            Clock(problem.matrices[0].device, cold=False),
            warm_up=0,  # everyone has run once
            on_round=lambda index: say(f"round {index + 1} of {rounds}"),
        )
        fill(rows, {key: Summary.of(values) for key, values in times.items()})
    return [row for _, row in rows]


def fill(rows: Sequence[tuple[str, RefreshRow]], summaries: dict[str, Summary]) -> None:
    """Write times and ratios into the rows that were timed."""
    svd = min((s.median_ms for key, s in summaries.items() if key.startswith(SVD)), default=None)
    for key, row in rows:
        summary = summaries.get(key)
        if summary is None or row.status != "ok":
            continue
        row.rounds = summary.rounds
        row.median_ms, row.p20_ms, row.p80_ms = summary.median_ms, summary.p20_ms, summary.p80_ms
        lowrank = summaries.get(f"{LOWRANK_2} {row.rank}")
        row.times_svd = None if svd is None else svd / summary.median_ms
        row.times_lowrank = None if lowrank is None else lowrank.median_ms / summary.median_ms


def failed(row: RefreshRow) -> bool:
    """A wrong result of ours."""
    return row.status.startswith("wrong")


# --- what the rows say ---------------------------------------------------------------------


def case_table(rows: Sequence[RefreshRow]) -> str:
    """The rows of one problem as people read them, a block a rank."""
    header = (
        "contender",
        "median ms",
        "p20",
        "p80",
        "x svd",
        "x lowrank",
        "1 - overlap",
        "1 - captured",
        "residual",
        "orth.",
        "extra MiB",
        "method",
    )
    blocks = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        lines = [
            (
                row.contender,
                report.shown(row.median_ms, ".2f"),
                report.shown(row.p20_ms, ".2f"),
                report.shown(row.p80_ms, ".2f"),
                report.shown(row.times_svd, ".2f"),
                report.shown(row.times_lowrank, ".2f"),
                report.shown(row.missing_overlap, ".1e"),
                report.shown(row.missing_captured, ".1e"),
                report.shown(row.residual, ".1e"),
                report.shown(row.orthonormality, ".2g"),
                "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}",
                f"{row.method} {row.iterations}" if row.method else "-",
            )
            for row in mine
        ]
        notes = [f"{row.contender}: {row.status}" for row in mine if row.status != "ok"]
        blocks.append("\n".join([case, report.table(header, lines), *notes]))
    return "\n\n".join(blocks)


def comparisons(rows: Sequence[RefreshRow]) -> list[str]:
    """Of every case: is ours slower or less accurate than svd_lowrank, how accurate is the best of
    ours that takes no longer than that one, and is linalg.svd faster."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case and row.median_ms is not None]
        peer = next((row for row in mine if row.contender == LOWRANK_2), None)
        auto = next((row for row in mine if row.contender == OURS), None)
        if peer is None or auto is None:
            continue
        assert peer.median_ms is not None
        assert auto.median_ms is not None
        assert peer.missing_overlap is not None
        assert auto.missing_overlap is not None
        slower = auto.median_ms > peer.median_ms
        worse = auto.missing_overlap > peer.missing_overlap
        judged = f"{'' if slower else 'no '}slower and {'' if worse else 'no '}less accurate"
        in_time = [
            row
            for row in mine
            if row.contender.startswith(OURS) and (row.median_ms or math.inf) <= peer.median_ms
        ]
        best = min(in_time, key=lambda row: row.missing_overlap or 0.0, default=None)
        if best is None or best.missing_overlap is None:
            gone = "none of ours is as fast"
        else:
            share = best.missing_overlap / peer.missing_overlap if peer.missing_overlap else 1.0
            gone = (
                f"of ours that take no longer than it, {best.contender} is the most accurate, with "
                f"{share:.2f} of its 1 - overlap"
            )
        found.append(
            f"{case}: ours is {judged.upper() if slower and worse else judged} than {LOWRANK_2} "
            f"({auto.median_ms:.3g} to {peer.median_ms:.3g} ms, 1 - overlap "
            f"{auto.missing_overlap:.1e} to {peer.missing_overlap:.1e}); {gone}"
            + ("; SLOWER THAN linalg.svd" if (auto.times_svd or 1.0) < 1.0 else "")
        )
    return found
