"""``python -m bench overhead``: what a call costs beyond its own matmuls, on the CPU.

The bare computation is what a user would type for the form that the plan names: the same
matmuls, called directly, no validation, no planning, no dispatcher entry of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import report
from bench.timing import Summary, rotation

BATCH = 50  # calls a sample: a single call is near the clock's own noise
M, N, R = 96, 64, 8
TARGET_US = 10.0


def bare_dual(g: Tensor, U: Tensor, V: Tensor, out: Tensor) -> Tensor:
    A = U.mT @ g  # (r, n)
    B = g @ V  # (m, r)
    B.addmm_(U, A @ V, alpha=-1)
    torch.addmm(g, U, A, alpha=-1, out=out)
    return out.addmm_(B, V.mT, alpha=-1)


def bare_sequential(g: Tensor, U: Tensor, V: Tensor, out: Tensor) -> Tensor:
    torch.addmm(g, U, U.mT @ g, alpha=-1, out=out)
    return out.addmm_(out @ V, V.mT, alpha=-1)


def bare_low_left_first(g: Tensor, P: Tensor, Q: Tensor, out: Tensor) -> Tensor:
    return torch.mm(P, P.mT @ g @ Q @ Q.mT, out=out)


def bare_low_right_first(g: Tensor, P: Tensor, Q: Tensor, out: Tensor) -> Tensor:
    return torch.mm(P @ (P.mT @ (g @ Q)), Q.mT, out=out)


def bare_low_in_turn(g: Tensor, P: Tensor, Q: Tensor, out: Tensor) -> Tensor:
    return torch.mm(P @ (P.mT @ g) @ Q, Q.mT, out=out)


BARE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "dual": bare_dual,
    "sequential": bare_sequential,
    "low/low, left first": bare_low_left_first,
    "low/low, right first": bare_low_right_first,
    "low/low in turn": bare_low_in_turn,
}


def calls(spans: str, generator: torch.Generator) -> tuple[str, dict[str, Callable[[], object]]]:
    """The form planned for one small matrix, and the four calls to compare."""
    import osf_kernels

    g = torch.randn(M, N, generator=generator)
    q_left = torch.linalg.qr(torch.randn(M, M, generator=generator)).Q
    q_right = torch.linalg.qr(torch.randn(N, N, generator=generator)).Q
    U, V = q_left[:, :R].contiguous(), q_right[:, :R].contiguous()
    left: Tensor | osf_kernels.Basis = U
    right: Tensor | osf_kernels.Basis = V
    if spans == "low":
        U, V = q_left[:, M - R :].contiguous(), q_right[:, N - R :].contiguous()
        left, right = osf_kernels.Basis(U, spans="low"), osf_kernels.Basis(V, spans="low")
    form = osf_kernels.plan(g, left, right).form
    if form not in BARE:
        raise ValueError(f"bench: no bare computation is written for the planned form {form!r}")
    bare, inside = BARE[form], g.clone()
    return form, {
        "bare": lambda: bare(g, U, V, torch.empty_like(g)),
        "project": lambda: osf_kernels.project(g, left, right),
        "bare, in place": lambda: bare(inside, U, V, inside),
        "project_": lambda: osf_kernels.project_(inside, left, right),
    }


def per_call(contenders: dict[str, Callable[[], object]], batches: int) -> dict[str, Summary]:
    """Mean time of a call over ``BATCH`` calls, summarised over interleaved batches."""
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-5, batches):
        for position in rotation(len(names), index % len(names)):
            call = contenders[names[position]]
            start = time.perf_counter_ns()
            for _ in range(BATCH):
                call()
            elapsed = (time.perf_counter_ns() - start) / 1e6 / BATCH
            if index >= 0:
                samples[names[position]].append(elapsed)
    return {name: Summary.of(values) for name, values in samples.items()}


def run(batches: int, csv: Path | None) -> int:
    """Print a table; exit status 1 where the median overhead is not under the target."""
    if batches < 1:
        raise ValueError(f"bench: expected --batches to be at least 1, got {batches}")
    lines: list[Sequence[str]] = []
    rows = []
    over = False
    for spans in ("high", "low"):
        form, contenders = calls(spans, torch.Generator().manual_seed(0))
        summaries = per_call(contenders, batches)
        for name, bare in (("project", "bare"), ("project_", "bare, in place")):
            ours, direct = summaries[name], summaries[bare]
            extra_us = 1e3 * (ours.median_ms - direct.median_ms)
            over |= extra_us >= TARGET_US
            lines.append(
                (
                    f"{name}, {spans}",
                    form,
                    f"{1e3 * direct.median_ms:.1f}",
                    f"{1e3 * ours.median_ms:.1f}",
                    f"{extra_us:.1f}",
                )
            )
        for contender, summary in summaries.items():
            row = report.Row(contender=contender, form=form, backend="torch", status="ok")
            case = f"overhead {M}x{N} fp32 r={R}"
            row.describe(case, f"{M}x{N}", None, "fp32", "complement", "cpu")
            row.matrices, row.elements, row.rank, row.spans = 1, M * N, f"r={R}", f"{spans}/{spans}"
            row.rounds = summary.rounds
            row.median_ms = summary.median_ms
            row.p20_ms, row.p80_ms = summary.p20_ms, summary.p80_ms
            rows.append(row)
    print(f"one {M}x{N} float32 matrix, {R} columns a side, us a call, median of {batches} batches")
    print(report.table(("call", "form", "bare us", "ours us", "overhead us"), lines))
    print(f"overhead {'is not' if over else 'is'} under {TARGET_US:g} us everywhere")
    if csv is not None:
        csv.unlink(missing_ok=True)
        report.append_csv(csv, rows, report.environment(torch.device("cpu")))
    return 1 if over else 0
