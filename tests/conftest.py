"""What every test shares: the gpu marker, poisoned allocations, a seed, the source root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# cuBLAS needs a fixed workspace for deterministic results and reads this when it is loaded.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, with the reason; begin with what takes longest."""
    # Files of compiled and of interpreted kernels take minutes each: run last, they would leave
    # all but one process idle. (Needs xdist's --no-loadscope-reorder.)
    items.sort(key=lambda item: item.path.parent.name != "triton")
    if torch.cuda.is_available():
        return
    built_for = torch.version.cuda or torch.version.hip
    reason = (
        "no GPU: torch sees no CUDA device"
        if built_for
        else f"no GPU: torch {torch.__version__} is a CPU build"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def root() -> Path:
    """The source tree's root."""
    return ROOT


@pytest.fixture(autouse=True)
def poisoned_allocations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill every fresh allocation of torch with NaN, so that reading one unwritten is seen.

    torch fills while deterministic algorithms are on. They are on to warn, and a warning is an
    error here. A test marked `timing` runs without.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    poison = request.node.get_closest_marker("timing") is None
    torch.use_deterministic_algorithms(poison, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generator starts alike in every test, whatever ran before it."""
    torch.manual_seed(0)
