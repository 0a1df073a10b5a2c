"""Fixtures of the integrations' tests."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from types import ModuleType

import pytest

from osf_torch.integrations import peft as osf_peft


@pytest.fixture
def switched_off() -> Iterator[None]:
    yield
    osf_peft.disable()


@pytest.fixture
def peft(switched_off: None) -> ModuleType:
    """PEFT, whose import takes seconds: what uses it is slow."""
    return importlib.import_module("peft")
