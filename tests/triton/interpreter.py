"""Runs files of interpreted tests: Triton must see TRITON_INTERPRET=1 before it is imported.

A file of tests names those that it runs, and imports the tests from here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT_SLOW = ("interpreted_autotune", "interpreted_padding")


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


def slow(names: Sequence[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name in names if name not in WITHOUT_SLOW])


@pytest.fixture(scope="module")
def slow_runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The slow tests of every file that is asked for, two files at a time."""
    asked = (item for item in request.session.items if isinstance(item, pytest.Function))
    names = [
        f.callspec.params["name"]
        for f in asked
        if f.originalname == "test_interpreted_slow" and f.module is request.module
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run_interpreted, ROOT, [name], "slow") for name in names}
