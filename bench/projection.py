"""One case of ``python -m bench projection``: gate, interleaved rounds, roofline, rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import check, contenders, roofline
from bench.check import Side, Slabs
from bench.contenders import COMPILED, HAND, NAIVE, OURS, Mode
from bench.models import Rank, Shape
from bench.problem import Problem, SpansChoice, draw
from bench.report import Row
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """What to measure."""

    model: str
    shapes: Sequence[Shape]
    rank: Rank
    dtype: str
    device: torch.device
    spans: SpansChoice = "auto"
    mode: Mode = "complement"
    backends: Sequence[str] = ("auto",)
    peers: bool = True
    layers: int | None = None

    @property
    def name(self) -> str:
        layers = "" if self.layers is None else f" ({self.layers} layers)"
        mode = "" if self.mode == "complement" else f" {self.mode}"
        return f"{self.model}{layers} {self.dtype} {self.rank}{mode}"


@dataclass
class Entry:
    """One contender of a case: ``call`` works on ``problem.grads`` and returns its results."""

    call: Callable[[], Sequence[Tensor]]
    sides: Sequence[tuple[Side, Side]]  # the bases it was given
    ours: bool = False
    form: str = ""
    backend: str = ""
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    unavailable: str = ""


def entries(case: Case, problem: Problem) -> dict[str, Entry]:
    """Ours first, one entry a backend asked for, then the peers."""
    import osf_kernels

    def basis(side: Side) -> Tensor | osf_kernels.Basis:
        return (
            side.columns if side.spans == "high" else osf_kernels.Basis(side.columns, spans="low")
        )

    grads = problem.grads
    Us = [basis(left) for left, _ in problem.held]
    Vs = [basis(right) for _, right in problem.held]
    found: dict[str, Entry] = {}
    for backend in case.backends:

        def ours() -> Sequence[Tensor]:
            osf_kernels.project_many_(grads, Us, Vs, mode=case.mode)
            return grads

        def context(backend: str = backend) -> AbstractContextManager[object]:
            return nullcontext() if backend == "auto" else osf_kernels.use_backend(backend)

        name = OURS if backend == "auto" else f"{OURS} [{backend}]"
        try:
            with context():
                plan = osf_kernels.plan(grads, Us, Vs, mode=case.mode)
        except osf_kernels.BackendUnavailableError as error:
            found[name] = Entry(ours, problem.held, True, backend=backend, unavailable=str(error))
            continue
        found[name] = Entry(ours, problem.held, True, plan.form, plan.backend, context)
    if not case.peers:
        return found
    high = [
        (Side(U, "high"), Side(V, "high"))
        for U, V in zip(problem.high_U, problem.high_V, strict=True)
    ]
    for name, formula in (
        (HAND, contenders.HAND_ORDERED[case.mode]),
        (NAIVE, contenders.FORMULAS[case.mode]),
        (COMPILED, contenders.compiled(case.mode)),
    ):
        over_list = contenders.loop(formula)

        def peer(run: Callable[..., list[Tensor]] = over_list) -> Sequence[Tensor]:
            return run(grads, problem.high_U, problem.high_V)

        found[name] = Entry(peer, high, form=name, backend="torch")
    return found


class Gate:
    """Float64 truths of a problem, drawn once for each set of bases."""

    def __init__(self, case: Case, problem: Problem) -> None:
        self._case = case
        self._problem = problem
        self._slabs: dict[int, list[Slabs]] = {}
        self._eager_error: float | None = None

    def truths(self, sides: Sequence[tuple[Side, Side]]) -> list[Slabs]:
        if id(sides) not in self._slabs:
            generator = torch.Generator().manual_seed(1)
            self._slabs[id(sides)] = [
                check.slabs(g, left, right, self._case.mode, generator)
                for g, (left, right) in zip(self._problem.pristine, sides, strict=True)
            ]
        return self._slabs[id(sides)]

    def error(self, results: Sequence[Tensor], sides: Sequence[tuple[Side, Side]]) -> float:
        """The worst matrix's error relative to ‖g‖."""
        return max(map(check.error, results, self.truths(sides)), default=0.0)

    def leak(self, results: Sequence[Tensor], sides: Sequence[tuple[Side, Side]]) -> float:
        leaks = [
            check.leak(result, g, U, V, truth)
            for result, g, (U, V), truth in zip(
                results,
                self._problem.pristine,
                self._problem.exact,
                self.truths(sides),
                strict=True,
            )
        ]
        return max(leaks, default=0.0)

    def eager_error(self) -> float:
        """Of the same formula over the same bases as ours, in the same dtype and eager torch."""
        if self._eager_error is None:
            held = self._problem.held
            truths = self.truths(held)
            self._eager_error = max(
                check.error(check.eager(g, left, right, self._case.mode), truth)
                for g, (left, right), truth in zip(
                    self._problem.pristine, held, truths, strict=True
                )
            )
        return self._eager_error

    def limit(self, entry: Entry) -> float:
        """The absolute bound for every contender; for ours also twice the eager error."""
        limit = check.bound(DTYPES[self._case.dtype])
        return min(limit, 2.0 * self.eager_error()) if entry.ours else limit


def examine(case: Case, problem: Problem, gate: Gate, name: str, entry: Entry) -> Row:
    """Run a contender once or twice on scratch copies: its row, without a speed."""
    row = Row(contender=name, form=entry.form, backend=entry.backend)
    if entry.unavailable:
        row.status = f"unavailable: {entry.unavailable}"
        return row
    results: list[Sequence[Tensor]] = []

    def once() -> None:
        problem.restore()
        with entry.context():
            results.append(entry.call())

    try:
        once()
    except Exception as error:
        kind = "wrong: it raised" if entry.ours else "unavailable:"
        row.status = f"{kind} {contenders.first_line(error)}"
        return row
    row.error = gate.error(results[0], entry.sides)
    row.error_bound = gate.limit(entry)
    if case.mode == "complement":  # the core keeps what crosses the spans, by definition
        row.leak = gate.leak(results[0], entry.sides)

    def reproducible() -> bool:
        before = [result.clone() for result in results.pop()]
        once()
        return all(map(torch.equal, before, results[0]))

    reason = check.refusal(
        row.error, row.error_bound, reproducible=reproducible if entry.ours else None
    )
    row.status = "ok" if reason is None else reason
    results.clear()
    if reason is None:
        problem.restore()
        with entry.context():
            row.extra_bytes = peak_extra_bytes(entry.call, case.device)
    return row


def measure(
    case: Case,
    rounds: int,
    *,
    cold: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """The rows of a case, one a contender. With ``rounds`` 0 the gate alone.

    Who raises gets a row that says why: ours a wrong one, a peer one that is unavailable.
    """
    dtype = DTYPES[case.dtype]
    say("drawing bases")
    problem = draw(case.shapes, case.rank, dtype, case.device, case.spans)
    found = entries(case, problem)
    gate = Gate(case, problem)
    rows: dict[str, Row] = {}
    for name, entry in found.items():
        say(f"checking {name}")
        row = examine(case, problem, gate, name, entry)
        row.describe(case.name, case.model, case.layers, case.dtype, case.mode, str(case.device))
        row.matrices = len(case.shapes)
        row.elements = sum(m * n for m, n in case.shapes)
        row.rank = str(case.rank)
        row.spans = problem.spans if entry.ours else "high/high"
        rows[name] = row
    if rounds == 0:
        return list(rows.values())
    timed = {
        name: Timed(entry.call, problem.restore, entry.context)
        for name, entry in found.items()
        if rows[name].status == "ok"
    }
    timed |= roofline.ceiling_contenders(dtype, case.device)
    times = interleave(
        timed,
        rounds,
        Clock(case.device, cold=cold),
        on_round=lambda index: say(f"round {index + 1} of {rounds}"),
    )
    summaries = {name: Summary.of(values) for name, values in times.items()}
    fill(rows, summaries, case, problem)
    return list(rows.values())


def fill(rows: dict[str, Row], summaries: dict[str, Summary], case: Case, problem: Problem) -> None:
    """Write times, ratios and roofline figures into the rows that were timed."""
    ceilings = roofline.ceilings(summaries[roofline.COPY], summaries[roofline.GEMM], case.device)
    itemsize = DTYPES[case.dtype].itemsize
    sizes = [(m, n, r) for (m, n), r in zip(case.shapes, problem.ranks, strict=True)]
    limit = roofline.bound(sizes, itemsize, ceilings)
    for name, row in rows.items():
        row.copy_gb_per_s = ceilings.copy_bytes_per_s / 1e9
        row.gemm_tflop_per_s = ceilings.gemm_flops_per_s / 1e12
        row.bound = limit.kind
        row.bound_ms = limit.ms
        if name not in summaries:
            continue
        summary = summaries[name]
        row.rounds = summary.rounds
        row.median_ms, row.p20_ms, row.p80_ms = summary.median_ms, summary.p20_ms, summary.p80_ms
        row.roofline_fraction = limit.ms / summary.median_ms
        if NAIVE in summaries:
            row.times_naive = summaries[NAIVE].median_ms / summary.median_ms
        if HAND in summaries:
            row.times_hand_ordered = summaries[HAND].median_ms / summary.median_ms
        if COMPILED in summaries:
            row.times_compiled = summaries[COMPILED].median_ms / summary.median_ms
