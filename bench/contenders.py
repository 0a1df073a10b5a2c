"""The formula as users of plain PyTorch write it: what the library is measured against.

All of them hold the protected directions (high bases), as today's training code does. Bases
are U (m, r) and V (n, k) with orthonormal columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["complement", "core"]
Matrices = Sequence[Tensor]


def naive(g: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """g − UUᵀg − gVVᵀ + UUᵀgVVᵀ as written, term by term, nothing reused; g is left alone."""
    return g - U @ (U.mT @ g) - (g @ V) @ V.mT + U @ (U.mT @ g @ V) @ V.mT


def naive_core(g: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """g − UUᵀgVVᵀ as written; g is left alone."""
    return g - U @ (U.mT @ g @ V) @ V.mT


def hand_ordered_(g: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The complement as a careful user orders it: one side after the other, in place."""
    g.addmm_(U, U.mT @ g, alpha=-1)
    return g.addmm_(g @ V, V.mT, alpha=-1)


def hand_ordered_core_(g: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The core as a careful user orders it: small products first, in place."""
    return g.addmm_(U @ (U.mT @ g @ V), V.mT, alpha=-1)


FORMULAS: dict[Mode, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "complement": naive,
    "core": naive_core,
}
HAND_ORDERED: dict[Mode, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "complement": hand_ordered_,
    "core": hand_ordered_core_,
}

NAIVE, HAND, COMPILED, OURS = "naive eager", "hand-ordered", "torch.compile", "osf-kernels"


def loop(
    formula: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Matrices, Matrices, Matrices], list[Tensor]]:
    """A formula for one matrix as one for a list: the per-matrix loop users write."""

    def over_list(grads: Matrices, Us: Matrices, Vs: Matrices) -> list[Tensor]:
        return [formula(g, U, V) for g, U, V in zip(grads, Us, Vs, strict=True)]

    return over_list


def compiled(mode: Mode = "complement") -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``torch.compile`` of the formula as written, one specialisation a shape.

    Compilation happens at the first call of each shape and raises there where no C++ or Triton
    compiler works.
    """
    # Without room for every shape of a model dynamo would fall back to eager, silently.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(FORMULAS[mode], dynamic=False, fullgraph=True)


def first_line(error: BaseException) -> str:
    """An exception's first line that says something, for a table cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
