"""One matrix with its bases, and the float64 truth of everything that is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """A Gaussian matrix and high bases, all of one dtype."""

    x: Tensor  # (m, n)
    U: Tensor  # (m, r)
    V: Tensor  # (n, r)


def draw(
    m: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    leading: int | None = None,
    seed: int = 0,
) -> Matrix:
    """A matrix drawn from ``seed``; ``leading`` is the stride of the bases' rows (default: r)."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def basis(size: int) -> Tensor:
        gaussian = torch.randn(size, rank, generator=generator, device=device)
        return led(torch.linalg.qr(gaussian).Q.to(dtype), leading or rank)

    x = torch.randn(m, n, generator=generator, device=device).to(dtype)
    return Matrix(x, basis(m), basis(n))


def led(columns: Tensor, leading: int) -> Tensor:
    """A copy whose rows start ``leading`` elements apart, with zeros between them.

    torch 2.13's bfloat16 products on a CPU read what lies between rows: a NaN there comes out.
    """
    rows, width = columns.shape
    return columns.new_zeros(rows, leading)[:, :width].copy_(columns)


def projected(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """(I − UUᵀ) x (I − VVᵀ) in float64."""
    x64, U64, V64 = x.double(), U.double(), V.double()
    rest = x64 - U64 @ (U64.mT @ x64)
    return rest - (rest @ V64) @ V64.mT


def worst(
    results: Sequence[Tensor], truths: Sequence[Tensor], scale: Tensor | None = None
) -> float:
    """The largest ‖result − truth‖ over the norm of ``scale``, by default of the truth itself."""
    distances = [
        float(
            (result.double() - truth).norm() / (truth if scale is None else scale).double().norm()
        )
        for result, truth in zip(results, truths, strict=True)
    ]
    return max(distances) if all(d == d for d in distances) else float("inf")
