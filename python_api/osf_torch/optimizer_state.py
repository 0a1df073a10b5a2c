"""What a guard does to the state of its optimizer where the next task begins.

A step moves a weight by averages of earlier gradients too. These were projected onto what the
bases of their own time left free, of which the new bases protect some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from osf_kernels import Mode
from osf_torch.lists import Entry, Key, Lists
from osf_torch.protected import Protected, matrices_of, put_back
from osf_torch.selection import listed
from osf_torch.sharding import is_dtensor

OptimizerState = Literal["keep", "project", "clear"]

# Averages of gradients, by which a step moves the weight.
MOMENTA = frozenset({"exp_avg", "momentum_buffer"})
# Of torch and transformers: what steps divide by, entry by entry or row by row, for which a
# projection has no meaning and makes some of it negative; and ASGD's average, which none uses.
OTHERS = frozenset(
    {
        *("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum", "acc_delta"),
        *("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col", "ax"),
    }
)


def require_renewable(
    optimizer: torch.optim.Optimizer | None, items: Sequence[Protected], choice: object
) -> None:
    """Refuses a choice that the optimizer's state doesn't allow.

    Raises:
        ValueError: as ``Guard.next_task``.
    """
    operator = "osf_torch.Guard.next_task"
    if choice not in ("keep", "project", "clear"):
        raise ValueError(
            f'{operator}: expected optimizer_state to be "keep", "project" or "clear", got '
            f"{choice!r}"
        )
    if choice == "keep":
        return
    if optimizer is None:
        raise ValueError(
            f"{operator}: expected protect(..., optimizer=) with optimizer_state={choice!r}, got "
            'no optimizer; pass "keep", and make a new optimizer'
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{operator}: expected an optimizer with a state for each weight with "
            f'optimizer_state={choice!r}, got LBFGS, which has one for all; pass "keep", make a '
            "new optimizer and protect the model again"
        )
    if choice == "clear":
        return
    strange = [
        f"{name!r} of {item.name}"
        for item in items
        for name, value in optimizer.state.get(item.weight, {}).items()
        if not _is_known(item.weight, name, value)
    ]
    if strange:
        raise ValueError(
            f"{operator}: expected a state of averages {listed(sorted(MOMENTA))} in the shape of "
            f'the weight with optimizer_state="project", got {listed(strange)} of '
            f'{type(optimizer).__name__}, of which a projection isn\'t known; pass "clear"'
        )


@torch.no_grad()
def renew_state(
    optimizer: torch.optim.Optimizer | None,
    items: Sequence[Protected],
    mode: Mode,
    choice: OptimizerState,
) -> None:
    """M ← P(M) for the momenta M of the items by their bases, or their weights' states emptied, in
    place; see ``Guard.next_task``. After ``require_renewable``.

    Of sharded weights a collective where projecting their gradients is one.
    """
    if optimizer is None or choice == "keep":
        return
    if choice == "clear":
        for item in items:
            optimizer.state.pop(item.weight, None)
        return
    found = [
        (item, name, value)
        for item in items
        for name, value in optimizer.state.get(item.weight, {}).items()
        if name in MOMENTA and isinstance(value, Tensor)
    ]
    keys: list[Key] = [(*item.key, name) for item, name, _ in found]

    def entries() -> list[Entry]:
        return [item.entry(mode, pinned=False) for item, *_ in found]

    taken, values = [item for item, *_ in found], [value for *_, value in found]
    xs = matrices_of(taken, values)
    Lists(mode).run_(keys, xs, entries)
    put_back(taken, values, xs)


def _is_known(weight: Tensor, name: str, value: Any) -> bool:
    """Whether it is known what an entry of a weight's state is to a step."""
    if not isinstance(value, Tensor):
        return not isinstance(value, list | tuple | dict)
    if math.prod(value.shape) <= 1 and value.shape != weight.shape:
        return True  # a count of steps, a scale
    if name in MOMENTA:
        plain = is_dtensor(weight) if is_dtensor(value) else type(value) is Tensor
        return plain and value.shape == weight.shape and value.is_floating_point()
    return name in OTHERS
