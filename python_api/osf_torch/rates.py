"""At which rate a device multiplies matrices and finds eigenvectors, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

SIZE = (
    1024  # of the matrices that are multiplied, and at most of those whose eigenvectors are found
)
EIGEN = 9  # n³: as osf_kernels.plan_svd counts an eigendecomposition
LONG_ENOUGH = 0.2  # seconds that products are measured for


class Rates(NamedTuple):
    """FLOPs a second, in float32.

    Attributes:
        products: of matrices.
        eigen: of eigendecompositions; None where it isn't known.
    """

    products: float
    eigen: float | None


@torch.no_grad()
def measured(device: torch.device, eigen_size: int) -> Rates:
    """By a fraction of a second of products, and an eigendecomposition four times; synchronises."""
    generator = torch.Generator("cpu").manual_seed(0)
    A = torch.randn(SIZE, SIZE, generator=generator).to(device)
    _seconds(device, torch.mm, A, A)
    # The least of several: whatever else runs meanwhile only adds to it.
    products: list[float] = []
    while len(products) < 3 or sum(products) < LONG_ENOUGH:
        products.append(_seconds(device, torch.mm, A, A))
    count = min(SIZE, max(64, eigen_size))
    G = A[:, :count].mT @ A[:, :count]
    _seconds(device, torch.linalg.eigh, G)
    spent = min(_seconds(device, torch.linalg.eigh, G) for _ in range(3))
    return Rates(2 * SIZE**3 / min(products), EIGEN * count**3 / spent)


def _seconds(device: torch.device, call: Callable[..., Any], *arguments: torch.Tensor) -> float:
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    started = time.perf_counter()
    call(*arguments)
    if synchronize is not None:
        synchronize()
    return time.perf_counter() - started
