"""One side of a subspace: a tensor of columns, a Basis or None, and what is asked of all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from osf_kernels import Basis, padded
from osf_torch.sharding import is_dtensor

Held = Tensor | Basis | None


def columns_of(basis: Held) -> Tensor:
    """The columns of a basis that is there."""
    assert basis is not None
    return basis.columns if isinstance(basis, Basis) else basis


def spans_of(basis: Held) -> Literal["high", "low"]:
    """Which side of the split the columns span; of no basis "high"."""
    return basis.spans if isinstance(basis, Basis) else "high"


def is_high(basis: Held) -> bool:
    """Whether there is a basis, and its columns span what is protected."""
    return basis is not None and spans_of(basis) == "high"


def of_shard(basis: Held, size: int) -> Held:
    """A rank's rows of a basis, whose whole side has ``size`` rows: where its columns span all of
    that side, which some of its rows don't show, a low basis without columns says the same."""
    if is_high(basis) and columns_of(basis).shape[-1] == size:
        return Basis(columns_of(basis)[..., :0], "low")
    return basis


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
