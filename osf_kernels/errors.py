"""How this library refuses: operator, argument, expected, got, remedy, before anything is written.

Imports nothing of ours.
"""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and can't serve the call; the message says why."""


def describe(op: str, argument: str, expected: str, got: object, remedy: str = "") -> str:
    """``osf_kernels.project_: expected U to be (m, r) with m=4096, got (4000, 64); pass U.mT …``"""
    text = f"osf_kernels.{op}: expected {argument} to be {expected}, got {got}"
    return f"{text}; {remedy}" if remedy else text
