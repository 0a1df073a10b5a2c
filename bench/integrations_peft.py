"""``python -m bench.integrations_peft``: PEFT's OSF tuner as it is, and with ours switched in.

What is timed is making the adapter, ``get_peft_model`` with half of every weight's triplets frozen,
whose decomposition is PEFT's own either way, and a training step: forward, backward with projected
gradients, AdamW. Weights are initialised as torch initialises them. A speed is reported of what
trains as PEFT does: the gradients of one step from the same factors agree, and none lies in the
protected span.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import integrations, report
from bench.contenders import OURS
from bench.timing import Clock, Summary, Timed, interleave, peak_extra_bytes
from osf_torch.integrations import peft as osf_peft

RATIO = 0.5
# Layers of a case and the tokens of a step.
CASES: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "2 x 1024x1024": (lambda: nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)), 512),
    "3072x768 and 768x3072": (
        lambda: nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)),
        512,
    ),
    "4 x 384x384": (lambda: nn.Sequential(*(nn.Linear(384, 384) for _ in range(4))), 2048),
}
RESTORED = f"{OURS}, restored"
LEAK = 1e-4  # σ_k and σ_{k+1} are close: a float32 decomposition turns their vectors by 1e-5
DIFFERENCE = 1e-4  # of gradients of the same factors, which PEFT subtracts in another order


@dataclass
class Row:
    """One contender at one task of a case."""

    case: str
    task: str
    tokens: int | None
    device: str
    contender: str
    status: str = "ok"
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    times_peer: float | None = None
    extra_bytes: int | None = None
    leak: float | None = None


@contextlib.contextmanager
def switched(contender: str) -> Iterator[None]:
    """With ours enabled, as that contender has it, or PEFT as it is."""
    osf_peft.disable()
    if contender.startswith(OURS):
        osf_peft.enable(restore=contender == RESTORED)
    try:
        yield
    finally:
        osf_peft.disable()


def wrap(model: nn.Module) -> Any:
    peft = importlib.import_module("peft")
    config = peft.OSFConfig(effective_rank=RATIO, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "osf_svd_params")]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def protected(W: Tensor) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of a weight in float64, as columns."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    k = int(RATIO * len(S))
    return U[:, :k], Vh[:k].mT


def leak(model: nn.Module, spans: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest share of a gradient in the protected span."""
    worst = 0.0
    for layer, (U, V) in zip(layers(model), spans, strict=True):
        params = layer.osf_svd_params["default"]
        for basis, g in ((U, params["U_low"].grad), (V, params["V_low"].grad.mT)):
            worst = max(worst, float((basis.mT @ g.double()).norm() / g.double().norm()))
    return worst


def difference(model: nn.Module, other: nn.Module) -> float:
    """Of the weights' gradients ΔW = dU S V + U dS V + U S dV, which signs of factors don't change,
    relative."""

    def steps(of: nn.Module) -> list[Tensor]:
        found = []
        for layer in layers(of):
            f = {name: p.detach().double() for name, p in layer.osf_svd_params["default"].items()}
            g = {name: p.grad.double() for name, p in layer.osf_svd_params["default"].items()}
            U, S, V = f["U_low"], f["S_low"], f["V_low"]
            found.append((g["U_low"] * S) @ V + (U * g["S_low"]) @ V + (U * S) @ g["V_low"])
        return found

    pairs = zip(steps(model), steps(other), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def summarised(row: Row, samples: Sequence[float], peer_ms: float) -> None:
    summary = Summary.of(samples)
    row.median_ms, row.rounds = summary.median_ms, summary.rounds
    row.p20_ms, row.p80_ms = summary.p20_ms, summary.p80_ms
    row.times_peer = peer_ms / summary.median_ms


def measure(case: str, device: torch.device, rounds: int) -> list[Row]:
    """Rows of one case: PEFT first at each task."""
    make, tokens = CASES[case]
    theirs = f"peft {report.version('peft')}"
    clock = Clock(device)
    torch.manual_seed(0)
    base = make().to(device)
    spans = [protected(m.weight.detach()) for m in base if isinstance(m, nn.Linear)]
    x = torch.randn(tokens, spans[0][1].shape[0], device=device)
    rows: list[Row] = []

    fresh: dict[str, nn.Module] = {}
    models: dict[str, Any] = {}

    def wrapping(contender: str) -> Timed:
        def prepare() -> None:
            fresh[contender] = copy.deepcopy(base)

        def call() -> None:
            models[contender] = wrap(fresh[contender])

        return Timed(call, prepare, lambda: switched(contender))

    # Decompositions take seconds and vary by little.
    times = interleave({c: wrapping(c) for c in (theirs, OURS)}, max(1, rounds // 5), clock)
    medians = {c: Summary.of(samples).median_ms for c, samples in times.items()}
    for contender, samples in times.items():
        row = Row(case, "wrap", None, str(device), contender)
        summarised(row, samples, medians[theirs])
        with switched(contender):
            again = copy.deepcopy(base)
            row.extra_bytes = peak_extra_bytes(lambda m=again: wrap(m), device)  # type: ignore[misc]
        rows.append(row)

    models = {theirs: models[theirs], OURS: models[OURS], RESTORED: copy.deepcopy(models[OURS])}
    figures = {}
    for contender, model in models.items():
        with switched(contender):
            model(x).square().mean().backward()
        figures[contender] = leak(model, spans), difference(model, models[theirs])

    optimizers = {
        c: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-5)
        for c, m in models.items()
    }

    def stepping(contender: str) -> Timed:
        model, optimizer = models[contender], optimizers[contender]
        return Timed(lambda: step(model, optimizer, x), None, lambda: switched(contender))

    times = interleave({c: stepping(c) for c in models}, rounds, clock)
    medians = {c: Summary.of(samples).median_ms for c, samples in times.items()}
    for contender, samples in times.items():
        row = Row(case, "step", tokens, str(device), contender)
        row.leak, off = figures[contender]
        if row.leak > LEAK:
            row.status = f"wrong: {row.leak:.1e} of a gradient is in the protected span"
        elif off > DIFFERENCE:
            row.status = f"wrong: gradients differ from PEFT's by {off:.1e}"
        else:
            summarised(row, samples, medians[theirs])
        with switched(contender):
            row.extra_bytes = peak_extra_bytes(stepping(contender).call, device)
        rows.append(row)
    return rows


COLUMNS = (
    ("case", "case", ""),
    ("task", "task", ""),
    ("contender", "contender", ""),
    ("median ms", "median_ms", ".1f"),
    ("p20", "p20_ms", ".1f"),
    ("p80", "p80_ms", ".1f"),
    ("x peft", "times_peer", ".2f"),
    ("extra MiB", "extra_bytes", "MiB"),
    ("leak", "leak", ".1e"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where gradients are wrong."""
    return integrations.run(
        "bench.integrations_peft",
        arguments,
        lambda chosen, device: [
            (case, functools.partial(measure, case, device, chosen.rounds))
            for case in chosen.case or CASES
        ],
        COLUMNS,
        rounds=10,
        rounds_help="of steps; a fifth of wraps",
        cases=list(CASES),
    )


if __name__ == "__main__":
    sys.exit(main())
