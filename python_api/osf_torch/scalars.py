"""Numbers brought to the host together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read(scalars: Sequence[Tensor]) -> list[float]:
    """The values of 0-dimensional tensors on any devices, with one synchronisation a device."""
    together: dict[torch.device, list[int]] = {}
    for i, scalar in enumerate(scalars):
        together.setdefault(scalar.device, []).append(i)
    found = [0.0] * len(scalars)
    for places in together.values():
        values = torch.stack([scalars[i] for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return found
