"""Draws shared by the operator tests."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from osf_kernels import Basis
from osf_kernels.testing import random_basis

KINDS = (None, "high", "low")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw_basis(
    size: int, rank: int, kind: str | None, dtype: torch.dtype, generator: torch.Generator
) -> Basis | None:
    """A Basis protecting ``rank`` directions, or None for a side left alone."""
    if kind is None:
        return None
    return random_basis(size, rank, spans=kind, dtype=dtype, generator=generator)  # type: ignore[arg-type]


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def generator_for(*key: object) -> torch.Generator:
    """A generator of its own for every combination of parameters, the same in every run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
