"""``python -m bench host``: what the host does for a call, apart from any device.

Of a GPU: the public operators on backend "triton", over CPU tensors that nobody touches, with a
driver that launches nothing (``backends.triton.launch.Driver``). Of the CPU: many small matrices,
prepared against the loop by hand, with all of their products. Of a guard: the Python calls of a
step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import guarded_calls, report
from bench.models import shapes_of
from bench.overhead import bare_sequential
from bench.timing import Summary, rotation

RANK = 128
MODEL = "llama-2-7b"
SMALL, SIZE, SMALL_RANK = 39, 16, 4

Call = Callable[[], object]


class Target:
    """A call whose median is to be at most so many milliseconds, or times another's."""

    def __init__(self, call: Call, most_ms: float | None = None, most_times: float | None = None):
        self.call, self.most_ms, self.most_times = call, most_ms, most_times


def _empty(*shape: int) -> Tensor:
    made: Tensor = torch.empty(*shape, dtype=torch.bfloat16)
    return made


def without_a_device() -> None:
    """Has Triton's backend serve CPU tensors and launch nothing.

    Raises:
        RuntimeError: triton was imported before this could have it interpret.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("bench: expected triton not to be imported yet; run host by itself")
    os.environ["TRITON_INTERPRET"] = "1"
    from osf_kernels.backends.triton import launch

    class NoDevice(launch.Driver):
        def launch(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
            pass

    launch.driver = NoDevice()


def gpu_cases(layers: int | None) -> dict[str, dict[str, Target]]:
    import osf_kernels

    shapes = shapes_of(MODEL, layers=layers)
    Us = [_empty(s.m, RANK) for s in shapes]
    Vs = [_empty(s.n, RANK) for s in shapes]
    grads = [_empty(s.m, s.n) for s in shapes]
    prepared = osf_kernels.prepare(grads, Us, Vs)
    pool = _empty(sum(g.numel() for g in grads) + (1 << 15))
    moves = iter(range(1, 1 << 12))

    def fresh(like: Sequence[Tensor]) -> list[Tensor]:
        """Gradients at addresses that no call has had."""
        start, found = 8 * next(moves), []
        for g in like:
            found.append(pool.as_strided(g.shape, g.stride(), start))
            start += g.numel()
        return found

    views = [fresh(grads) for _ in range(200)]
    single = [fresh(grads[:1])[0] for _ in range(2000)]
    remaining, one = iter(views), iter(single)
    return {
        f"host {MODEL} r={RANK}, {len(shapes)} matrices": {
            "prepare": Target(lambda: osf_kernels.prepare(grads, Us, Vs)),
            "prepared, g as before": Target(lambda: prepared.project_(grads), most_ms=1.0),
            "prepared, g elsewhere": Target(lambda: prepared.project_(next(remaining)), 1.5),
        },
        f"host {shapes[0].m}x{shapes[0].n} r={RANK}": {
            "project_, g as before": Target(
                lambda: osf_kernels.project_(grads[0], Us[0], Vs[0]), most_ms=0.03
            ),
            "project_, g elsewhere": Target(
                lambda: osf_kernels.project_(next(one), Us[0], Vs[0]), most_ms=0.06
            ),
        },
    }


def small_case() -> dict[str, Target]:
    import osf_kernels

    generator = torch.Generator().manual_seed(0)

    def orthonormal() -> Tensor:
        made: Tensor = torch.linalg.qr(torch.randn(SIZE, SMALL_RANK, generator=generator)).Q
        return made.contiguous()

    grads = [torch.randn(SIZE, SIZE, generator=generator) for _ in range(SMALL)]
    Us, Vs = ([orthonormal() for _ in grads] for _ in range(2))
    prepared = osf_kernels.prepare(grads, Us, Vs)

    def naive() -> None:
        for g, U, V in zip(grads, Us, Vs, strict=True):
            g -= U @ (U.mT @ g)
            g -= (g @ V) @ V.mT

    def fused() -> None:
        for g, U, V in zip(grads, Us, Vs, strict=True):
            bare_sequential(g, U, V, g)

    return {
        "loop by hand": Target(naive),
        "loop by hand, addmm": Target(fused),
        "prepared": Target(lambda: prepared.project_(grads), most_times=1.1),
        "project_many_": Target(lambda: osf_kernels.project_many_(grads, Us, Vs)),
    }


def measured(calls: dict[str, Target], rounds: int) -> dict[str, Summary]:
    """Interleaved; the first rounds aren't counted."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-3, rounds):
        for position in rotation(len(names), index % len(names)):
            name = names[position]
            start = time.perf_counter_ns()
            calls[name].call()
            elapsed = (time.perf_counter_ns() - start) / 1e6
            if index >= 0:
                samples[name].append(elapsed)
    return {name: Summary.of(values) for name, values in samples.items()}


def run(rounds: int, layers: int | None, csv: Path | None) -> int:
    """Prints a table; exit status 1 where a median is above what it is to be."""
    if rounds < 1:
        raise ValueError(f"bench: expected --rounds to be at least 1, got {rounds}")
    without_a_device()
    import osf_kernels

    torch.set_num_threads(1)
    rows: list[report.Row] = []
    lines: list[Sequence[str]] = []
    missed = []

    def add(case: str, calls: dict[str, Target], device: str, dtype: str, rank: int) -> None:
        summaries = measured(calls, rounds)
        first = next(iter(summaries.values())).median_ms
        for name, target in calls.items():
            summary = summaries[name]
            most = target.most_ms
            if target.most_times is not None:
                most = target.most_times * first
            if most is not None and summary.median_ms > most:
                missed.append(f"{case}: {name}")
            row = report.Row(case=case, contender=name, status="ok", device=device, dtype=dtype)
            row.rank, row.rounds, row.median_ms = f"r={rank}", summary.rounds, summary.median_ms
            row.p20_ms, row.p80_ms = summary.p20_ms, summary.p80_ms
            rows.append(row)
            shown = (summary.median_ms, summary.p20_ms, summary.p80_ms, most)
            lines.append((case, name, *("-" if ms is None else f"{1e3 * ms:.0f}" for ms in shown)))

    with osf_kernels.use_backend("triton"):
        for case, calls in gpu_cases(layers).items():
            add(case, calls, "none", "bfloat16", RANK)
    add(f"{SMALL} matrices of {SIZE}x{SIZE}", small_case(), "cpu", "float32", SMALL_RANK)
    print(f"host time in us, medians of {rounds} rounds, one thread")
    print(report.table(("case", "call", "us", "p20", "p80", "at most"), lines))
    line, over = guarded_calls.table()
    print(line)
    for name in (*missed, *over):
        print(f"above what it is to be: {name}")
    if csv is not None:
        csv.unlink(missing_ok=True)
        report.append_csv(csv, rows, report.environment(torch.device("cpu")))
    return 1 if missed or over else 0
