"""``python -m bench.integrations_stiefel``: steps over orthonormal columns, ours and by the SVD.

Two tasks on factors of the size that LoRA has: ``retract``, polar factors of X + step, against
torch.linalg.svd of the batch and U Vᵀ; and ``step``, a whole StiefelAdamW step, against the same
formulas composed as EBLoRA's optimizer composes them: batched torch matmuls for the projections
around a step of torch.optim.AdamW, and the SVD.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import integrations
from bench.contenders import OURS
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from osf_torch.integrations.stiefel import StiefelAdamW, retract

PEER = "EBLoRA's formulas, torch.linalg.svd"
# How many matrices, m, r: a model's factors at LoRA's usual ranks, and at large ones.
CASES = ((48, 768, 16), (24, 1024, 64), (4, 2048, 256))
LR = 1e-3


@dataclass
class Row:
    """One contender of one case."""

    case: str
    task: str
    matrices: int
    m: int
    r: int
    device: str
    contender: str
    status: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    times_peer: float | None = None
    deviation: float | None = None  # ‖XᵀX − I‖_F, the largest
    extra_bytes: int | None = None


def svd_polar(Y: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(Y, full_matrices=False)
    Q: Tensor = U @ Vh
    return Q


def canonical(G: Tensor, X: Tensor) -> Tensor:
    return G - X @ (G.mT @ X)


class Formulas:
    """EBLoRA's step over matrices of one shape, with canonical projections and no frame."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.adamw = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0)

    @torch.no_grad()
    def step(self) -> None:
        raw = [p.grad for p in self.parameters if p.grad is not None]
        X = torch.stack([p.detach() for p in self.parameters])
        for p, g in zip(self.parameters, canonical(torch.stack(raw), X), strict=True):
            p.grad = g
        self.adamw.step()
        step = torch.stack([p.detach() for p in self.parameters]) - X
        for p, point, g in zip(
            self.parameters, svd_polar(X + canonical(step, X)), raw, strict=True
        ):
            p.copy_(point)
            p.grad = g


def deviation(X: Tensor) -> float:
    X = X.detach().double()
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    return float(torch.linalg.matrix_norm(X.mT @ X - eye).max())


def parameters(X: Tensor, G: Tensor) -> list[nn.Parameter]:
    made = [nn.Parameter(x.clone()) for x in X]
    for p, g in zip(made, G, strict=True):
        p.grad = g.clone()
    return made


def measure(count: int, m: int, r: int, device: torch.device, rounds: int) -> list[Row]:
    """Rows of one case, both tasks, the peer first."""
    generator = torch.Generator().manual_seed(m + r)
    X = torch.linalg.qr(torch.randn(count, m, r, generator=generator)).Q.to(device)
    G = torch.randn(count, m, r, generator=generator).to(device)
    D = -LR * G
    steppers = {PEER: parameters(X, G), OURS: parameters(X, G)}
    theirs, ours = Formulas(steppers[PEER]), StiefelAdamW(steppers[OURS], lr=LR)
    tasks: dict[str, dict[str, Callable[[], object]]] = {
        "retract": {PEER: lambda: svd_polar(X + D), OURS: lambda: retract(X, D)},
        "step": {PEER: theirs.step, OURS: ours.step},
    }
    rows = []
    for task, calls in tasks.items():
        times = interleave({c: Timed(call) for c, call in calls.items()}, rounds, Clock(device))
        first: float | None = None
        for contender, samples in times.items():
            result = calls[contender]()
            points = result if isinstance(result, Tensor) else torch.stack([*steppers[contender]])
            row = Row(f"{count} x {m}x{r}", task, count, m, r, str(device), contender, "ok")
            row.deviation = deviation(points)
            summary = Summary.of(samples)
            row.median_ms, row.rounds = summary.median_ms, summary.rounds
            row.p20_ms, row.p80_ms = summary.p20_ms, summary.p80_ms
            first = first or row.median_ms
            row.times_peer = first / row.median_ms
            row.extra_bytes = peak_extra_bytes(calls[contender], device)
            rows.append(row)
        limit = 10 * r**0.5 * torch.finfo(torch.float32).eps
        if not (rows[-1].deviation or 0.0) <= limit:
            rows[-1].status = f"wrong: |X'X - I| = {rows[-1].deviation:.1e}"
    apart = max(
        float((p - q).detach().abs().max())
        for p, q in zip(steppers[PEER], steppers[OURS], strict=True)
    )
    if apart > 1e-4:  # after as many steps from the same point
        rows[-1].status = f"wrong: {apart:.1e} from the formulas' point"
    return rows


COLUMNS = (
    ("task", "task", ""),
    ("case", "case", ""),
    ("contender", "contender", ""),
    ("median ms", "median_ms", ".2f"),
    ("x peer", "times_peer", ".2f"),
    ("deviation", "deviation", ".1e"),
    ("extra MiB", "extra_bytes", "MiB"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where a result is wrong."""
    return integrations.run(
        "bench.integrations_stiefel",
        arguments,
        lambda chosen, device: [
            (f"{count} of {m}x{r}", functools.partial(measure, count, m, r, device, chosen.rounds))
            for count, m, r in CASES
        ],
        COLUMNS,
        rounds=7,
        rounds_help="of each contender",
    )


if __name__ == "__main__":
    sys.exit(main())
