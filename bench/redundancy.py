"""``python -m bench redundancy``: how much of a trained encoder its singular directions carry.

Zeroes a share of the singular directions of every nn.Linear weight of MiniLM, from the bottom of
the spectrum or from its top, and looks at what is left: the agreement of sentence vectors with the
whole model's, and the accuracy of linear classifiers that were fitted to the whole model's.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import osf_torch
from bench import report
from bench.continual import opened
from bench.continual_methods import linear_weights
from bench.continual_run import EVALUATION_BATCH, Encoded, EncodedTask, Setting

End = Literal["bottom", "top"]
CUTS: tuple[tuple[End, float], ...] = (
    ("bottom", 0.0),
    ("bottom", 0.25),
    ("bottom", 0.5),
    ("bottom", 0.75),
    ("bottom", 0.9),
    ("top", 0.1),
    ("top", 0.25),
    ("top", 0.5),
)
RIDGE = 1.0


@dataclass
class Row:
    """What zeroing a share of every Linear's singular directions leaves."""

    zeroed: str = ""  # "bottom" or "top" of the spectrum
    share: float = 0.0
    energy: float = 0.0  # of all weights together: ‖W'‖² / ‖W‖²
    agreement: float = 0.0  # mean cosine with the whole model's vector of the same sentence
    accuracy: float = 0.0  # mean over the tasks
    by_task: str = ""
    text: str = ""


@torch.no_grad()
def cut(encoder: nn.Module, end: End, share: float) -> tuple[nn.Module, float]:
    """A copy with ``share`` of each Linear's singular directions zeroed, and the energy it keeps.

    Raises ValueError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"bench redundancy: expected a share in [0, 1), got {share:g}")
    copied = copy.deepcopy(encoder)
    weights = linear_weights(copied)
    whole = sum(float(weight.double().square().sum()) for weight in weights.values())
    ranks = {}
    for name, weight in weights.items():
        size = min(weight.shape)
        zeroed = round(share * size)
        ranks[name] = size - zeroed if end == "bottom" else zeroed
    # Refused by name where a weight is too small for the share.
    split = {name: rank for name, rank in ranks.items() if 0 < rank < min(weights[name].shape)}
    if split:
        subspaces = osf_torch.refresh(
            copied, split, filter=list(split), keep="all", complement=False, progress=False
        )
        for name, entry in subspaces.items():
            svd = entry.svd
            assert svd is not None
            top = (svd.U * svd.S) @ svd.V.mT  # (m, n)
            weights[name].copy_(top if end == "bottom" else weights[name] - top)
    kept = sum(float(weight.double().square().sum()) for weight in weights.values())
    return copied, kept / whole


@torch.no_grad()
def vectors(encoder: nn.Module, examples: Encoded) -> Tensor:
    """Sentence vectors (count, hidden), in the examples' order."""
    order = examples.mask.sum(1).argsort()
    found = torch.cat([encoder(*examples.batch(i)) for i in order.split(EVALUATION_BATCH)])
    return found[order.argsort()]


def classifier(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Least squares to ±1 targets with a ridge: (hidden + 1, classes), in float64."""
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    targets = 2.0 * F.one_hot(labels, classes).double() - 1.0
    gram = x.mT @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weight: Tensor = torch.linalg.solve(gram, x.mT @ targets)
    return weight


def accuracy(features: Tensor, labels: Tensor, weight: Tensor) -> float:
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    return float(((x @ weight).argmax(1) == labels).double().mean())


def measure(
    encoder: nn.Module,
    tasks: Sequence[EncodedTask],
    cuts: Sequence[tuple[End, float]] = CUTS,
    *,
    text: str = "",
    say: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """A row a cut: classifiers are fitted to the whole encoder's vectors of the training split."""
    fitted, reference = [], []
    for task in tasks:
        say(f"whole model: {task.name}")
        train, test = task.splits["train"], task.splits["test"]
        fitted.append(classifier(vectors(encoder, train), train.labels, task.classes))
        reference.append(vectors(encoder, test))
    rows = []
    for end, share in cuts:
        say(f"{share:.0%} from the {end}")
        model, energy = cut(encoder, end, share)
        found = [vectors(model, task.splits["test"]) for task in tasks]
        cosines = [
            torch.nn.functional.cosine_similarity(a, b)
            for a, b in zip(found, reference, strict=True)
        ]
        scores = [
            accuracy(features, task.splits["test"].labels, weight)
            for features, task, weight in zip(found, tasks, fitted, strict=True)
        ]
        named = zip(tasks, scores, strict=True)
        rows.append(
            Row(
                end,
                share,
                energy,
                float(torch.cat(cosines).mean()),
                statistics.fmean(scores),
                " ".join(f"{task.name}={score:.3f}" for task, score in named),
                text,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    header = ("zeroed", "share", "energy kept", "cosine", "accuracy")
    return report.table(
        header,
        [
            (
                "nothing" if row.share == 0 else row.zeroed,
                f"{row.share:.0%}",
                f"{row.energy:.3f}",
                f"{row.agreement:.3f}",
                f"{100 * row.accuracy:.1f}",
            )
            for row in rows
        ],
    )


def sentence(rows: Sequence[Row]) -> str:
    """What the halves say, from the figures; empty where one of the three rows is missing."""
    by_cut = {(row.zeroed, row.share): row for row in rows}
    whole = next((row for row in rows if row.share == 0), None)
    bottom, top = by_cut.get(("bottom", 0.5)), by_cut.get(("top", 0.5))
    if whole is None or bottom is None or top is None:
        return ""
    return (
        f"Without the bottom half of the singular directions the classifiers reach "
        f"{100 * bottom.accuracy:.1f}% where the whole model's reach {100 * whole.accuracy:.1f}%, "
        f"and sentence vectors agree to a cosine of {bottom.agreement:.2f}; without the top half "
        f"{100 * top.accuracy:.1f}% and {top.agreement:.2f}."
    )


def run(arguments: argparse.Namespace) -> int:
    from bench.bar import bar_on
    from bench.continual_show import console_of

    console = console_of()
    with bar_on(console) as progress:
        bar = progress.add_task("reading", total=None)

        def say(text: str) -> None:
            progress.update(bar, description=text)

        sequences, _ = opened(Setting(), say)
        progress.update(bar, total=len(sequences.tasks) + len(CUTS))
        rows = measure(
            sequences.encoder,
            sequences.tasks,
            text=sequences.text,
            say=lambda text: progress.update(bar, description=text, advance=1),
        )
    arguments.csv.unlink(missing_ok=True)
    report.append_csv(arguments.csv, rows, report.environment(torch.device("cpu")), Row)
    console.print(table(rows), markup=False, highlight=False)
    console.print(f"rows in {arguments.csv}", soft_wrap=True)
    console.print(sentence(rows), markup=False, highlight=False, soft_wrap=True)
    return 0
