"""``python -m bench rounding``: what rounding does to confined weights of bfloat16.

MiniLM is trained on sentence pairs as in ``bench protect``, its linear weights confined at ρ and
all else frozen, with C in float32 and AdamW. What a step adds to a weight is far below the rounding
of bfloat16, so that it matters how C gets into W:

* "float32": nothing is rounded;
* "kept base": W = round(W₀ + U_l C V_lᵀ) of one W₀ that is kept, which ``confine`` does;
* "beside": W stays W₀, and the layer adds what C makes of its inputs;
* "added": W ← round(W + U_l δC V_lᵀ), as if W were float32;
* "stochastic": likewise, rounded up or down by chance, in proportion to what is lost.

"lost" is ‖U_lᵀ (W − W₀) V_l − C‖ / ‖C‖, the part of what was trained that W hasn't got. "drift" is
how far what is protected has moved, relative to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import osf_torch
from bench import report
from bench.training import Batch, batches, contrastive_loss, minilm_and_pairs
from osf_kernels import free_block, free_matrix
from osf_torch.free import merging
from osf_torch.free.spec import Spec

FLOAT32, KEPT, BESIDE, ADDED, STOCHASTIC = (
    "float32",
    "kept base",
    "beside",
    "added",
    "stochastic",
)
POLICIES = (FLOAT32, KEPT, BESIDE, ADDED, STOCHASTIC)
LAST = 20  # steps whose losses are averaged
WEIGHT_DECAY = 0.01


@dataclass
class Row:
    """One policy's run; the worst of all weights."""

    policy: str
    rho: float
    learning_rate: float
    steps: int
    loss: float
    lost: float
    drift: float


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down by chance, so that the mean is x."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


@contextlib.contextmanager
def merged_by(policy: str, generator: torch.Generator) -> Iterator[None]:
    """Has merges of half precision done in another way."""
    if policy not in (ADDED, STOCHASTIC):
        yield
        return

    def merge(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
        wanted = W.float() + free_matrix(C - merged, spec.left, spec.right)
        rounded = policy == ADDED
        W.copy_(wanted if rounded else stochastically_rounded(wanted, generator))
        merged.copy_(C)

    with mock.patch.object(merging, "_merge_whole", merge):
        yield


def run_policy(
    policy: str,
    model: nn.Module,
    subspaces: osf_torch.Subspaces,
    todo: list[Batch],
    learning_rate: float,
    rho: float,
    say: Callable[[str], object],
) -> Row:
    model = copy.deepcopy(model).to(torch.float32 if policy == FLOAT32 else torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in subspaces)
    before = {name: model.get_parameter(name).detach().clone() for name in subspaces}
    update = "beside" if policy == BESIDE else "merge"
    confined = osf_torch.confine(model, subspaces, update=update)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        confined.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY
    )
    losses = []
    with merged_by(policy, torch.Generator().manual_seed(0)):
        for index, batch in enumerate(todo):
            optimizer.zero_grad()
            loss = contrastive_loss(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            say(f"{policy}: step {index + 1} of {len(todo)}")
        drift = max(confined.drift().values())
    lost = 0.0
    if policy != BESIDE:  # where W has nothing of C, and the layer all
        for place in confined.places:
            moved = place.weight.detach().double() - before[place.name].double()
            left, right = (s.to(dtype=torch.float64) for s in (place.spec.left, place.spec.right))
            C = place.block.detach().double()
            lost = max(lost, float((free_block(moved, left, right) - C).norm() / C.norm()))
    last = losses[-LAST:]
    return Row(policy, rho, learning_rate, len(todo), sum(last) / len(last), lost, drift)


def run(arguments: argparse.Namespace) -> int:
    """Print a table, and write the rows where a file is named."""
    if not 0.0 < arguments.rho < 1.0 or min(arguments.batch, arguments.steps) < 1:
        raise ValueError("bench: expected 0 < --rho < 1, --batch and --steps of at least 1")
    say = report.progress()
    torch.manual_seed(0)
    model, encoded = minilm_and_pairs()
    say("refreshing")
    subspaces = osf_torch.refresh(model, arguments.rho, progress=False)
    todo = batches(encoded, arguments.batch, arguments.steps, torch.Generator().manual_seed(0))
    rows = [
        run_policy(policy, model, subspaces, todo, arguments.lr, arguments.rho, say)
        for policy in POLICIES
    ]
    say("")
    print(table(rows))
    if arguments.csv is not None:
        arguments.csv.unlink(missing_ok=True)
        report.append_csv(arguments.csv, rows, report.environment(torch.device("cpu")), Row)
    return 0


def table(rows: list[Row]) -> str:
    first = rows[0]
    text = (
        f"MiniLM at rho={first.rho:g}, {first.steps} AdamW steps at {first.learning_rate:g}, C in "
        f"float32; loss: mean of the last {min(LAST, first.steps)} steps\n"
    )
    lines = [(row.policy, f"{row.loss:.4f}", f"{row.lost:.1e}", f"{row.drift:.1e}") for row in rows]
    return text + report.table(("C gets into W", "loss", "lost of C", "drift"), lines)
