"""Triton backend: the two grouped kernels of ``backends.forms`` for NVIDIA and AMD GPUs.

Importing this package needs no triton; :func:`unavailable_reason` says whether it can be used.
Under ``TRITON_INTERPRET=1``, set before triton is first imported, it runs on CPU tensors.

Layout: ``kernels`` holds the device code; ``configs`` the pinned tables; ``schedule`` groups
jobs into launches; ``launch`` runs them; ``dispatch`` ties these together and ``autotune``
searches where asked.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from osf_kernels.backends.forms import Coefficients, Update

from . import configs

__all__ = ["MAX_LAUNCHES", "coefficients", "unavailable_reason", "update"]

# Launches of one call whose jobs agree on dtypes, layouts and config.
MAX_LAUNCHES = {"coefficients": 2, "update": 1}


@functools.lru_cache
def _import_failure() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why this backend cannot serve a device (default: the current CUDA device), or None."""
    failure = _import_failure()
    if failure is not None:
        return failure
    interpreting = _launch().INTERPRETING
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if interpreting:
            return None
        return "no CUDA or ROCm device; on a CPU it runs only with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type} devices"
    if interpreting:
        return "TRITON_INTERPRET=1 is set: only CPU tensors are interpreted"
    if not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device"
    name = _launch().architecture(device)
    if name not in configs.ARCHITECTURES:
        return f"no configs for {name}; there are some for {', '.join(configs.ARCHITECTURES)}"
    if not _launch().ON_AMD and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def coefficients(
    jobs: Sequence[Coefficients],
    *,
    variant: str | None = None,
    config: configs.OnePass | configs.TwoPass | None = None,
    float32_precision: str | None = None,
) -> None:
    """A = Uᵀ x and B = x V, less diag(S) Vᵀ and U diag(S), for every job of the list.

    Two launches (the second adds partial sums in order) for all jobs that agree on dtypes,
    layouts and config, whatever their shapes. Writes each job's A and B entirely; never
    synchronizes; two calls agree bit for bit, and a list with a loop over it.

    Args:
        jobs: bfloat16, float16 or float32 matrices of any strides, each on one device.
        variant: "one_pass" or "two_pass" instead of the pinned rule.
        config: tile config instead of the pinned one.
        float32_precision: "tf32x3", "tf32" or "ieee" for float32 operands. Default: "tf32" where
            torch's matmul precision permits it, else "tf32x3" (on AMD "ieee", native there).

    Raises:
        TypeError: a float64 (or other) dtype. ValueError: an option that cannot be honoured.
    """
    _dispatch().coefficients(jobs, variant, config, float32_precision)


def update(
    jobs: Sequence[Update],
    *,
    config: configs.Update | None = None,
    float32_precision: str | None = None,
) -> None:
    """out = beta·x + alpha·(L1 R1 + L2 R2) + addend for every job of the list.

    One launch for all jobs that agree on dtypes, layouts and config, whatever their shapes. x is
    read once (with beta = 0 not at all) and out written once; ``out`` may be x. Sums are float32
    and rounded once. Never synchronizes; two calls agree bit for bit, and a list with a loop.

    Args and Raises: as :func:`coefficients`.
    """
    _dispatch().update(jobs, config, float32_precision)


def _dispatch() -> ModuleType:
    return importlib.import_module(f"{__name__}.dispatch")


def _launch() -> ModuleType:
    return importlib.import_module(f"{__name__}.launch")
