"""Backend "cuda" without a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from osf_kernels import use_backend
from osf_kernels.backends import choosing, cuda, grouped
from tests.cuda.emulated import Emulated


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """Backend "cuda" is chosen, and runs in the emulator."""
    kernels = Emulated()
    monkeypatch.setattr(cuda, "coefficients", kernels.coefficients)
    monkeypatch.setattr(cuda, "update", kernels.update)
    monkeypatch.setattr(cuda, "program", kernels.program)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device=None: None)
    choosing.unavailable_reason.cache_clear()
    grouped.single.cache_clear()
    with use_backend("cuda"):
        yield kernels
    choosing.unavailable_reason.cache_clear()
    grouped.single.cache_clear()
