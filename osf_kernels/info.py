"""What this installation consists of and what it can run: versions, devices, backends, variables.

Top layer: asks the backends themselves why they are not available, so that what is printed is
what an operator would meet.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TypedDict

import torch

from osf_kernels import env
from osf_kernels._version import __version__
from osf_kernels.backends import cuda
from osf_kernels.backends.choosing import (
    NAMES,
    WORKS,
    Verdict,
    Work,
    architecture,
    choose,
    requested,
    unavailable_reason,
    verdict,
)
from osf_kernels.errors import BackendUnavailableError
from osf_kernels.gpu import rank_limit

__all__ = ["Info", "collect", "render"]


class Device(TypedDict):
    device: str
    name: str
    detail: str


class Backend(TypedDict):
    backend: str
    device: str
    available: bool
    reason: str | None


class Choice(TypedDict):
    """Which backend serves a kind of work in float32; bases beyond some rank are apart."""

    device: str
    work: str
    backend: str
    why: str


class Setting(TypedDict):
    name: str
    value: str
    is_set: bool
    problem: str | None
    expected: str
    default: str
    meaning: str
    read: str


class Info(TypedDict):
    versions: dict[str, str | None]
    devices: list[Device]
    backends: list[Backend]
    choices: list[Choice]
    environment: list[Setting]


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> str | None:
    """What the compiled extension was built with, or None where it was not built."""
    built = cuda.build_info()
    if built is None:
        return None
    return f"nvcc {built['nvcc_version']} for {', '.join(built['architectures'])}"


def _versions() -> dict[str, str | None]:
    return {
        "osf-kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "ROCm of torch": torch.version.hip,
        "triton": _installed("triton"),
        "CUDA extension": _extension(),
    }


def _devices() -> list[Device]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[Device] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "detail": f"{cores} cores, {torch.get_num_threads()} threads in torch",
        }
    ]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": card.name,
                "detail": f"capability {card.major}.{card.minor}, "
                f"{card.multi_processor_count} multiprocessors, "
                f"{card.total_memory / 2**30:.1f} GiB",
            }
        )
    return found


def _backends(devices: list[Device]) -> list[Backend]:
    found: list[Backend] = []
    for entry in devices:
        device = torch.device(entry["device"])
        reasons = {backend: unavailable_reason(backend, device) for backend in NAMES}
        found += [
            {
                "backend": backend,
                "device": entry["device"],
                "available": reason is None,
                "reason": reason,
            }
            for backend, reason in reasons.items()
        ]
    return found


def _choices(devices: list[Device]) -> list[Choice]:
    found: list[Choice] = []
    for entry in devices:
        for work in WORKS:
            for dtype in ("float32", "bfloat16") if work == "projection" else ("float32",):
                found += _choices_of(entry["device"], work, dtype)
    return found


def _choices_of(name: str, work: Work, dtype: str) -> list[Choice]:
    """Who runs a piece of work; of projections on both sides of the rank where that changes."""
    device = torch.device(name)
    words: list[tuple[str, Verdict | None]] = [(work, None)]
    if work == "projection":
        limit = rank_limit(architecture(device), dtype, 2).rank
        words = [
            (f"{dtype} projection up to rank {limit}", verdict(device, dtype, 2, limit)),
            (f"{dtype} projection beyond it", verdict(device, dtype, 2, limit + 1)),
        ]
    found: list[Choice] = []
    for word, fused in words:
        try:
            backend, why = choose(work, requested(), device, dtype, fused=fused)
        except (BackendUnavailableError, ValueError) as error:
            backend, why = "none", str(error)
        found.append({"device": name, "work": word, "backend": backend, "why": why})
    return found


def _settings() -> list[Setting]:
    found: list[Setting] = []
    for name, variable in env.VARIABLES.items():
        raw = os.environ.get(name, "").strip()
        try:
            value, problem = env.get(name), None
        except ValueError:
            value, problem = raw, f"not {variable.expected}"
        found.append(
            {
                "name": name,
                "value": value,
                "is_set": bool(raw),
                "problem": problem,
                "expected": variable.expected,
                "default": variable.default,
                "meaning": variable.meaning,
                "read": variable.read,
            }
        )
    return found


def collect() -> Info:
    """Everything :func:`render` prints, as plain values that JSON can hold."""
    devices = _devices()
    return {
        "versions": _versions(),
        "devices": devices,
        "backends": _backends(devices),
        "choices": _choices(devices),
        "environment": _settings(),
    }


def _table(rows: list[list[str]]) -> list[str]:
    """Left-aligned columns, indented; the last column runs free."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def render(found: Info) -> str:
    """`found` as aligned text, one block a topic."""
    versions = [[name, version or "none"] for name, version in found["versions"].items()]
    devices = [[entry["device"], entry["name"], entry["detail"]] for entry in found["devices"]]
    backends = [
        [b["device"], b["backend"], f"unavailable: {b['reason']}" if b["reason"] else "available"]
        for b in found["backends"]
    ]
    choices = [[c["device"], c["work"], c["backend"], c["why"]] for c in found["choices"]]
    settings = [
        [
            s["name"],
            s["value"] or "unset",
            "set" if s["is_set"] else "default",
            f"PROBLEM: {s['problem']}" if s["problem"] else f"{s['meaning']} ({s['read']})",
        ]
        for s in found["environment"]
    ]
    blocks = {
        "Versions": versions,
        "Devices": devices,
        "Backends": backends,
        "Who runs what": choices,
        "Environment": settings,
    }
    lines: list[str] = []
    for title, rows in blocks.items():
        lines += [title, *_table(rows), ""]
    return "\n".join(lines[:-1])
