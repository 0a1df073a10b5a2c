"""From validated tensors to what runs: a decision a matrix, and the route of a list."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import osf_kernels.backends.torch as torch_backend
from osf_kernels import backends
from osf_kernels.backends.forms import Coefficients, Problem
from osf_kernels.ops._validation import Choice, Decision, admit, check

Ready = Sequence[tuple[Tensor | None, Tensor | None]]  # coefficients A and B of each matrix


def decide(
    op: str,
    names: Sequence[str],
    g: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    kind: str,
    choice: Choice = "any",
) -> Decision:
    """``admit``, with the caller's own argument names in a refusal."""
    g_meta = (g.shape, g.dtype, g.device)
    u_meta = None if U is None else (U.shape, U.dtype, U.device)
    v_meta = None if V is None else (V.shape, V.dtype, V.device)
    try:
        return admit(op, g_meta, u_meta, v_meta, kind, backends.requested(), choice)
    except (TypeError, ValueError):
        check(op, names, g_meta, u_meta, v_meta, choice in ("shard", "shard pinned"))
        raise


def execute_one(
    decided: Decision, g: Tensor, out: Tensor, U: Tensor | None, V: Tensor | None
) -> None:
    """One projection; straight into torch where nothing has to be converted or unbatched."""
    if decided.direct:
        torch_backend.FORMS[decided.step.form](g, out, U, V, decided.step, None, None, None)
    else:
        backends.run(
            parts := unbatch(Problem(g, out, U, V, decided.step), decided.backend),
            [decided.backend] * len(parts),
        )


class Route:
    """What a list of problems runs on its backends: made once, run with other matrices each time.

    Args:
        problems: one a matrix, in place; their ``x`` isn't kept.
        names: the backend of each.
    """

    def __init__(self, problems: Sequence[Problem], names: Sequence[str]) -> None:
        none = torch.empty(0, device="cpu")
        self._problems = [problem._replace(x=none, out=none) for problem in problems]
        self._names = list(names)

    def run(self, xs: Sequence[Tensor], ready: Ready | None = None) -> None:
        """Each problem with its matrix of ``xs``, and with ready coefficients where given."""
        flat: list[Problem] = []
        names: list[str] = []
        for i, (x, problem, name) in enumerate(zip(xs, self._problems, self._names, strict=True)):
            A, B = (None, None) if ready is None else ready[i]
            parts = unbatch(problem._replace(x=x, out=x, A=A, B=B), name)
            flat += parts
            names += [name] * len(parts)
        backends.run(flat, names)


Item = TypeVar("Item", Problem, Coefficients)


def unbatch(item: Item, backend: str) -> list[Item]:
    """An item as the backend takes it: torch with one batch dimension, the kernels with none."""
    batch = item.x.shape[:-2]
    if not batch:
        return [item]
    lead = batch[:-1] if backend == "torch" else batch
    whole: dict[str, Any] = {
        name: t.expand(*batch, *t.shape[t.dim() - (1 if name == "S" else 2) :])
        for name, t in item._asdict().items()
        if isinstance(t, Tensor)
    }
    in_place = isinstance(item, Problem) and item.out is item.x
    parts = []
    for index in itertools.product(*map(range, lead)):
        part = {name: t[index] for name, t in whole.items()}
        if in_place:  # the same object still, or a backend would copy x onto itself
            part["out"] = part["x"]
        parts.append(item._replace(**part))
    return parts
