"""Runs the interpreted tests: Triton must see TRITON_INTERPRET=1 before it is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

FILES = (
    "interpreted_coefficients",
    "interpreted_ordered",
    "interpreted_tasks",
    "interpreted_update",
    "interpreted_padding",
    "interpreted_projection",
    "interpreted_products",
    "interpreted_prepared",
    "interpreted_traffic",
    "interpreted_autotune",
)
WITHOUT_SLOW = ("interpreted_autotune", "interpreted_padding", "interpreted_traffic")


def run_interpreted(root: Path, names: Sequence[str], marker: str) -> None:
    """The tests of some files with that marker expression, in a process of their own."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "--no-header", "-rf"),
        *("-p", "no:cacheprovider", "-m", marker),
        *(f"tests/triton/{name}.py" for name in names),
    ]
    result = subprocess.run(
        command,
        cwd=root,
        # Tiles are small: threads of numpy's BLAS would only wait for each other.
        env={**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-80:])
        pytest.fail(f"{' '.join(command)}\n{tail}", pytrace=False)
    assert " passed" in result.stdout, result.stdout


def test_interpreted() -> None:
    run_interpreted(ROOT, FILES, "not slow")


@pytest.fixture(scope="module")
def slow_runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The slow tests of every file that is asked for, two files at a time."""
    asked = (item for item in request.session.items if isinstance(item, pytest.Function))
    names = [f.callspec.params["name"] for f in asked if f.originalname == "test_interpreted_slow"]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run_interpreted, ROOT, [name], "slow") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name not in WITHOUT_SLOW])
def test_interpreted_slow(slow_runs: dict[str, Future[None]], name: str) -> None:
    slow_runs[name].result()
