"""The backends, and which of them serves a call.

``forms.py`` says what runs; ``torch.py``, ``triton/`` and ``cuda.py`` run it. May import: torch,
``osf_kernels.plan`` and below; triton and the compiled extension lazily.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

from torch import device as Device  # the name torch is this package's backend
from torch import dtype as DType
from torch.cuda import is_available as is_cuda_available

from osf_kernels import env
from osf_kernels.backends import forms
from osf_kernels.errors import BackendUnavailableError, describe
from osf_kernels.plan import GROUPED_RANK_LIMIT, Matrix, Mode, Plan, Step, coefficient_bytes

NAMES = ("torch", "triton", "cuda")

_choice: ContextVar[str | None] = ContextVar("osf_kernels.backend", default=None)


@lru_cache(maxsize=8)
def module(name: str) -> ModuleType:
    """The backend's module, imported on first use."""
    return importlib.import_module(f"osf_kernels.backends.{name}")


@lru_cache(maxsize=64)
def unavailable_reason(name: str, device: Device | None = None) -> str | None:
    """None where the backend can serve a device, else why not in a few words."""
    reason: str | None = module(name).unavailable_reason(device)
    return reason


@lru_cache(maxsize=1)
def _default() -> str:
    return env.get("OSF_BACKEND")


def requested() -> str:
    """What use_backend or OSF_BACKEND (read once) asks for; "auto" when nobody did."""
    return _choice.get() or _default()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Has every operator inside the ``with`` run on one backend.

    It holds for the current thread or task, and for the backward of what ran inside, whatever
    thread that is in; it overrides OSF_BACKEND. An explicit choice works or raises: there is no
    silent fallback. "auto" lets the planner choose. Enter it outside a compiled region; a compiled
    graph asks when it runs, its backward on CUDA in autograd's own thread: there set OSF_BACKEND.

    Args:
        name: "torch", "triton", "cuda" or "auto".

    Raises:
        ValueError: the name is none of these.
        BackendUnavailableError: the backend can't run on this machine at all, with the reason.
    """
    if name != "auto" and name not in NAMES:
        expected = 'one of "torch", "triton", "cuda" and "auto"'
        raise ValueError(describe("use_backend", "name", expected, repr(name)))
    if name in NAMES:
        _require(name, None)
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def _require(name: str, device: Device | None) -> None:
    reason = unavailable_reason(name, device)
    if reason is not None:
        where = f" on {device}" if device is not None else ""
        raise BackendUnavailableError(
            f'osf_kernels: backend "{name}" was asked for but is not available{where}: {reason}; '
            'choose another with use_backend(...) or OSF_BACKEND, or "auto"'
        )


def _require_no_float64(name: str, dtype: str) -> None:
    if dtype == "float64":
        raise TypeError(
            describe(
                "use_backend",
                "a dtype this backend computes",
                "float32, float16 or bfloat16",
                f'float64 with backend "{name}"',
                'float64 runs on "torch" or "auto"',
            )
        )


def select(request: str, device: Device, x: Matrix, step: Step) -> tuple[str, str]:
    """(backend, why) for one matrix.

    Raises:
        BackendUnavailableError: an explicit choice can't serve this device.
        TypeError: an explicit triton or cuda was asked to take float64.
    """
    if step.form in ("identity", "zero"):
        return "torch", "no product to compute"
    if request != "auto":
        if request != "torch":
            _require(request, device)
            _require_no_float64(request, x.dtype)
        return request, "asked for"
    if device.type == "meta" and is_cuda_available():
        device = Device("cuda")  # planned for the machine's GPU
    if device.type != "cuda":
        return "torch", f"the backend for {device.type} tensors"
    if x.dtype == "float64":
        return "torch", "float64 is computed by torch alone"
    if step.form == "sequential" or max(x.r or 0, x.k or 0) > GROUPED_RANK_LIMIT:
        return "torch", f"FLOP-bound beyond rank {GROUPED_RANK_LIMIT}: library matmuls"
    reason = unavailable_reason("triton", device)
    if reason is not None:
        return "torch", f"triton is not available: {reason}"
    return "triton", f"bytes and launches are the bound up to rank {GROUPED_RANK_LIMIT}"


def select_products(device: Device, dtype: DType) -> str:
    """The backend of plain products (``primitives.py``): Triton on a GPU, torch elsewhere.

    Raises:
        BackendUnavailableError: an explicit choice can't serve this device.
        TypeError: an explicit triton or cuda was asked to take float64.
    """
    request, name = requested(), str(dtype).removeprefix("torch.")
    if request != "auto":
        if request != "torch":
            _require(request, device)
            _require_no_float64(request, name)
        return request
    if device.type != "cuda" or name == "float64" or unavailable_reason("triton", device):
        return "torch"
    return "triton"


def summary(
    entries: Sequence[tuple[Matrix, Step, str, str]],
    mode: Mode,
    device: str,
    grouped: tuple[int, int],
    notes: Sequence[str] = (),
) -> Plan:
    """The Plan of a list of matrices that were decided one by one.

    ``grouped`` are the calls and the bytes of workspace of the programs of grouped backends.
    """
    calls, workspace = grouped
    for x, step, name, _ in entries:
        if name == "torch":
            calls += forms.library_calls(step.form)
            workspace = max(workspace, coefficient_bytes(x, step))
    return Plan(
        form=_joined(step.label for _, step, _, _ in entries) or "nothing to do",
        flops=sum(step.flops for _, step, _, _ in entries),
        bytes=sum(step.bytes for _, step, _, _ in entries),
        launches=calls,
        workspace_bytes=workspace,
        backend=_joined(backend for _, _, backend, _ in entries) or "none",
        why="; ".join(
            dict.fromkeys(f"{step.why} ({name}: {why})" for _, step, name, why in entries)
        )
        or "an empty list",
        mode=mode,
        device=device,
        matrices=tuple((x, step, backend) for x, step, backend, _ in entries),
        notes=tuple(notes),
    )


def _joined(words: Iterable[str]) -> str:
    return " + ".join(dict.fromkeys(words))
