"""Fixtures of the integrations' tests."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from osf_torch import lists
from osf_torch.integrations import peft as osf_peft


@pytest.fixture
def switched_off() -> Iterator[None]:
    yield
    osf_peft.disable()


@pytest.fixture
def peft(switched_off: None) -> ModuleType:
    """PEFT, whose import takes seconds: what uses it is slow."""
    return importlib.import_module("peft")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each list had that was made to be kept."""
    counts: list[int] = []

    class Counted(lists.MatrixList):
        def __init__(self, like: Any, entries: Any, mode: Any) -> None:
            counts.append(len(entries))
            super().__init__(like, entries, mode)

    monkeypatch.setattr(lists, "MatrixList", Counted)
    return counts
