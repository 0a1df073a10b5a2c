"""Triton's interpreter: whole projections and lists of them. See ``interpreter.py``."""

from __future__ import annotations

import importlib.util
from concurrent.futures import Future

import pytest

from tests.triton.interpreter import ROOT, run_interpreted, slow, slow_runs

__all__ = ["slow_runs"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

FILES = (
    "interpreted_tasks",
    "interpreted_projection",
    "interpreted_prepared",
    "interpreted_traffic",
    "interpreted_autotune",
)


def test_interpreted() -> None:
    run_interpreted(ROOT, FILES, "not slow")


@pytest.mark.slow
@slow(FILES)
def test_interpreted_slow(slow_runs: dict[str, Future[None]], name: str) -> None:
    slow_runs[name].result()
