"""One side of a subspace: a tensor of columns, a Basis or None, and what is asked of all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from osf_kernels import Basis, padded
from osf_torch.sharding import is_dtensor

Held = Tensor | Basis | None


def columns_of(basis: Held) -> Tensor:
    """The columns of a basis that is there."""
    assert basis is not None
    return basis.columns if isinstance(basis, Basis) else basis


def is_high(basis: Held) -> bool:
    """Whether the columns span what is protected."""
    return basis is not None and (not isinstance(basis, Basis) or basis.spans == "high")


def mapped(basis: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """The same side with other columns."""
    if isinstance(basis, Basis):
        return replace(basis, columns=change(basis.columns))
    return None if basis is None else change(basis)


def moved(basis: Held, device: torch.device) -> Held:
    """The basis on a device; itself where it is there."""

    def move(columns: Tensor) -> Tensor:
        if columns.device == device or is_dtensor(columns):
            return columns.to(device)
        return padded(columns, device)

    return mapped(basis, move)


def double(basis: Held) -> Held:
    """The basis in float64."""
    return mapped(basis, Tensor.double)


def fitting(basis: Held, dtype: torch.dtype) -> Held:
    """The basis in float64 for a float64 matrix, else in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return mapped(basis, lambda columns: padded(columns, dtype=wide))


def constant(basis: Held) -> Held:
    """The basis without what autograd follows: the very same where there is nothing."""
    if basis is None or not columns_of(basis).requires_grad:
        return basis
    return mapped(basis, Tensor.detach)
