"""Python calls of one optimizer step under a guard: a count that no machine's speed changes.

A call is a 'call' event of ``sys.setprofile``: a Python function, property, generator or (before
Python 3.12) comprehension. A guard makes as many for any number of weights.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

import osf_torch

WEIGHTS, SIZE, RANK = 39, 16, 8
MOST = {"projecting": 400, "projecting and restoring": 600}  # of WEIGHTS, in ``optimizer.step()``
_RESTORE = {"bare": None, "projecting": False, "projecting and restoring": True}
CASES = tuple(_RESTORE)


def python_calls(call: Callable[[], object]) -> list[str]:
    """The file of every Python function that is called, by no collection of garbage: what another
    model leaves behind calls functions when it goes."""
    files: list[str] = []

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.append(frame.f_code.co_filename)

    gc.collect()
    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return files


def calls_of_a_step(case: str, weights: int = WEIGHTS) -> list[str]:
    """Of ``optimizer.step()`` of SGD, once two others are done: what they decide is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(weights)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    restore = _RESTORE[case]
    if restore is not None:
        ranks = {f"{i}.weight": RANK for i in range(weights)}
        subspaces = osf_torch.refresh(model, ranks, progress=False)
        osf_torch.protect(model, subspaces, optimizer=optimizer, restore=restore)
    x = torch.randn(4, SIZE)
    for step in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step < 2:
            optimizer.step()
    return python_calls(optimizer.step)


def table() -> tuple[str, list[str]]:
    """A line to print, and which cases make more calls than they are to."""
    counts = {case: len(calls_of_a_step(case)) for case in CASES}
    shown = [
        f"{case} {count}" + (f" (at most {MOST[case]})" if case in MOST else "")
        for case, count in counts.items()
    ]
    over = [case for case, most in MOST.items() if counts[case] > most]
    line = f"Python calls of an SGD step of {WEIGHTS} Linears of {SIZE}x{SIZE}: {', '.join(shown)}"
    return line, [f"Python calls: {case}" for case in over]
