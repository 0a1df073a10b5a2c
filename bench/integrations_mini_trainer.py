"""``python -m bench.integrations_mini_trainer``: OSFT's decomposition and projection, both ways.

Two tasks: ``decompose``, ``create_svd_dict`` of a float32 weight with σᵢ = i^-½ computed in float32
or float64, and ``project``, ``project_gradient_to_orthogonal_space`` of both factors' gradients.
mini_trainer's own functions run where it imports; elsewhere its formulas do, and the contender's
name says so. Ours projects with the smaller basis, which its first projection after a decomposition
computes (a row of its own), and once more with the high ones alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import integrations, report
from bench.contenders import OURS
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from osf_kernels.testing import matrix_with_spectrum, svd_ratio
from osf_torch.integrations import mini_trainer

SHAPES = ((1024, 1024), (2048, 768))
RATIOS = (0.5, 0.75)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PROJECTIONS_PER_ROUND = 5  # of a decomposition: they take a hundredth of its time
LEAK_LIMIT = 1e-5  # ‖U_highᵀ dU‖ / ‖dU‖ in float32 from bases orthonormal to rounding


@dataclass
class Row:
    """One contender of one case."""

    case: str
    task: str
    m: int
    n: int
    rank: int
    dtype: str
    device: str
    contender: str
    status: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    times_peer: float | None = None
    error: float | None = None  # LAPACK's ratio of a decomposition, leak of a projection
    extra_bytes: int | None = None


def create_by_formula(weight: Tensor, top_k: int, upcast_dtype: torch.dtype) -> dict[str, Any]:
    k = top_k
    U, S, Vh = torch.linalg.svd(weight.to(upcast_dtype), full_matrices=False)
    return {
        "U_high": U[:, :k].contiguous(),
        "S_high": S[:k].contiguous(),
        "V_high": Vh[:k].contiguous(),
        "U_low": nn.Parameter(U[:, k:].contiguous()),
        "S_low": nn.Parameter(S[k:].contiguous()),
        "V_low": nn.Parameter(Vh[k:].contiguous()),
        "rank_high": k,
    }


def project_by_formula(svd_dict: dict[str, Any], cache_holder: nn.Module | None = None) -> None:
    del cache_holder
    U, V = svd_dict["U_high"], svd_dict["V_high"]
    dU, dV = svd_dict["U_low"].grad, svd_dict["V_low"].grad
    dU.addmm_(U, U.mT @ dU, alpha=-1)
    dV.addmm_(dV @ V.mT, V, alpha=-1)


def peer() -> tuple[str, Callable[..., Any], Callable[..., Any]]:
    """mini_trainer's name, decomposition and projection, or the formulas and what they are."""
    with contextlib.suppress(ImportError):
        module = importlib.import_module("mini_trainer.osft_utils")
        name = f"mini_trainer {report.version(mini_trainer.DISTRIBUTION)}"
        return name, module.create_svd_dict, module.project_gradient_to_orthogonal_space
    return "mini_trainer's formulas", create_by_formula, project_by_formula


def factors(svd_dict: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    U = torch.cat([svd_dict["U_high"], svd_dict["U_low"].detach()], 1)
    S = torch.cat([svd_dict["S_high"], svd_dict["S_low"].detach()])
    return U, S, torch.cat([svd_dict["V_high"], svd_dict["V_low"].detach()]).mT


def decompose(W: Tensor, rank: int, dtype: str, rounds: int) -> list[Row]:
    name, theirs, _ = peer()
    calls = {
        contender: lambda create=create: create(W, rank, upcast_dtype=DTYPES[dtype])
        for contender, create in ((name, theirs), (OURS, mini_trainer.create_svd_dict))
    }
    rows = []
    for contender, call in calls.items():
        row = _row("decompose", W, rank, dtype, contender)
        row.error = svd_ratio(W.to(DTYPES[dtype]), *factors(call()))
        row.status = "ok" if row.error < 30 else f"wrong: ratio {row.error:.1f}, 30 is allowed"
        row.extra_bytes = peak_extra_bytes(call, W.device)
        rows.append(row)
    _time(rows, {contender: Timed(call) for contender, call in calls.items()}, W.device, rounds)
    return rows


def project(W: Tensor, rank: int, rounds: int) -> list[Row]:
    svd_dict = create_by_formula(W, rank, torch.float32)
    low = [svd_dict["U_low"], svd_dict["V_low"]]
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(p.shape, generator=generator).to(W.device) for p in low]
    for p in low:
        p.grad = torch.empty_like(p)
    name, _, theirs = peer()
    holder, ours = nn.Module(), mini_trainer.project_gradient_to_orthogonal_space

    def fresh() -> None:
        for p, g in zip(low, drawn, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)

    def first() -> None:
        fresh()
        mini_trainer.drop_low_bases()

    def known() -> None:
        first()
        ours(svd_dict, cache_holder=holder)
        fresh()

    timed = {
        name: Timed(lambda: theirs(svd_dict, cache_holder=holder), fresh),
        OURS: Timed(lambda: ours(svd_dict, cache_holder=holder), known),
        f"{OURS}, high bases": Timed(lambda: ours(svd_dict), fresh),
        f"{OURS}, first": Timed(lambda: ours(svd_dict, cache_holder=holder), first),
    }
    rows = []
    for contender, each in timed.items():
        row = _row("project", W, rank, "float32", contender)
        assert each.prepare is not None
        each.prepare()
        row.extra_bytes = peak_extra_bytes(each.call, W.device)
        row.error = leak(svd_dict, drawn)
        row.status = "ok" if row.error < LEAK_LIMIT else f"wrong: leak {row.error:.1e}"
        rows.append(row)
    _time(rows, timed, W.device, rounds * PROJECTIONS_PER_ROUND)
    return rows


def leak(svd_dict: dict[str, Any], drawn: Sequence[Tensor]) -> float:
    """The larger share of a gradient that is protected, 1 where a free part was touched."""
    U, V = svd_dict["U_high"].double(), svd_dict["V_high"].double().mT
    shares = []
    for basis, grad, raw in (
        (U, svd_dict["U_low"].grad, drawn[0]),
        (V, svd_dict["V_low"].grad.mT, drawn[1].mT),
    ):
        removed = raw.double() - grad.double()
        free = removed - basis @ (basis.mT @ removed)
        shares += [float((basis.mT @ grad.double()).norm() / grad.norm())]
        shares += [float(free.norm() / raw.norm())]
    return max(shares)


def _row(task: str, W: Tensor, rank: int, dtype: str, contender: str) -> Row:
    m, n = W.shape
    case = f"{task} {m}x{n} k={rank} {dtype}"
    return Row(case, task, m, n, rank, dtype, str(W.device), contender, "ok")


def _time(rows: list[Row], timed: dict[str, Timed], device: torch.device, rounds: int) -> None:
    times = interleave(timed, rounds, Clock(device))
    for row in rows:
        if row.status != "ok":
            continue
        summary = Summary.of(times[row.contender])
        row.median_ms, row.rounds = summary.median_ms, summary.rounds
        row.p20_ms, row.p80_ms = summary.p20_ms, summary.p80_ms
        if rows[0].median_ms is not None:
            row.times_peer = rows[0].median_ms / summary.median_ms


def measure(m: int, n: int, ratio: float, device: torch.device, rounds: int) -> list[Row]:
    """Rows of one shape and rank: in each case mini_trainer first."""
    rank = int(ratio * min(m, n))
    spectrum = torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.5
    generator = torch.Generator().manual_seed(m + n)
    W = matrix_with_spectrum(m, n, spectrum, generator=generator)[0].to(device)
    rows = [row for dtype in DTYPES for row in decompose(W, rank, dtype, rounds)]
    return rows + project(W, rank, rounds)


COLUMNS = (
    ("case", "case", ""),
    ("contender", "contender", ""),
    ("median ms", "median_ms", ".1f"),
    ("x peer", "times_peer", ".2f"),
    ("error", "error", ".1e"),
    ("extra MiB", "extra_bytes", "MiB"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where a result is wrong."""
    return integrations.run(
        "bench.integrations_mini_trainer",
        arguments,
        lambda chosen, device: [
            (
                f"{m}x{n}, rho={ratio:g}",
                functools.partial(measure, m, n, ratio, device, chosen.rounds),
            )
            for m, n in SHAPES
            for ratio in RATIOS
        ],
        COLUMNS,
        rounds=3,
        rounds_help="decompositions of each contender",
    )


if __name__ == "__main__":
    sys.exit(main())
