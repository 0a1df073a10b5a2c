"""What tests of refresh share: layers with a well defined top subspace, and a record of calls."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from osf_kernels.testing import matrix_with_spectrum
from tests.helpers import generator_for

REFRESH = importlib.import_module("osf_torch.refresh")
DECOMPOSING = importlib.import_module("osf_torch.decomposing")


def power_law(count: int) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -0.5


def linear(m: int, n: int, *key: object, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer whose weight has the spectrum i^-1/2, whose top subspace is well defined."""
    layer = nn.Linear(n, m, bias=False, dtype=dtype)
    A, _, _ = matrix_with_spectrum(m, n, power_law(min(m, n)), generator=generator_for(m, n, *key))
    layer.weight.data.copy_(A)
    return layer


def small_model() -> nn.Sequential:
    return nn.Sequential(linear(24, 16, 0), nn.Tanh(), linear(16, 24, 1), linear(24, 16, 2))


class Recorder:
    """truncated_svd, with a record of what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict] = []
        self._run = DECOMPOSING.truncated_svd
        monkeypatch.setattr(DECOMPOSING, "truncated_svd", self)

    def __call__(self, A, rank, **options):
        self.calls.append({"A": A, "rank": rank} | options)
        return self._run(A, rank, **options)
