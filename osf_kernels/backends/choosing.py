"""Which backend serves a piece of work: one policy for projections, products and factorizations.

``plan`` prints what it says of projections, ``python -m osf_kernels info`` what it says of each.

May import: torch, ``osf_kernels.plan`` and below; triton and the compiled extension lazily.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Literal, NamedTuple

from torch import device as Device  # the name torch is this package's backend
from torch import version as torch_version
from torch.cuda import get_device_properties
from torch.cuda import is_available as is_cuda_available

from osf_kernels import env, gpu
from osf_kernels.errors import BackendUnavailableError, TypeRefusal, ValueRefusal
from osf_kernels.plan import Matrix, Step

# "projection": the forms of ``plan.py``, grouped. "products": those of ``primitives.py`` with a
# sketch, and Gram matrices. "factorization": Cholesky and small SVDs, which exist in torch and
# cuda alone.
Work = Literal["projection", "products", "factorization"]
WORKS: tuple[Work, ...] = ("projection", "products", "factorization")

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
        raise ValueRefusal.of("use_backend", "name", expected, repr(name))
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
        raise TypeRefusal.of(
            "use_backend",
            "a dtype this backend computes",
            "float32, float16 or bfloat16",
            f'float64 with backend "{name}"',
            'float64 runs on "torch" or "auto"',
        )


class Verdict(NamedTuple):
    """Whether fused kernels are ahead of library products, and why."""

    ahead: bool
    why: str


def architecture(device: Device) -> str:
    """The row of the tables of ``gpu.py`` for a device; sm_90's where it is no GPU."""
    if device.type != "cuda":
        return "sm_90"
    properties = get_device_properties(device)
    if torch_version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return gpu.architecture_of_capability(properties.major, properties.minor)


def choose(
    work: Work,
    request: str,
    device: Device,
    dtype: str,
    *,
    fused: Verdict | None = None,
) -> tuple[str, str]:
    """(backend, why) for one piece of work.

    Args:
        request: "auto", or the backend that was asked for by name.
        dtype: of the matrices, without "torch.".
        fused: of a projection, whether the fused kernels are to be ahead of library products.

    Raises:
        BackendUnavailableError: an explicit choice can't serve this device.
        TypeError: an explicit triton or cuda was asked to take float64.
    """
    if work == "factorization" and (
        request in ("torch", "triton") or device.type != "cuda" or dtype != "float32"
    ):
        return "torch", "triton factorizes nothing, cuda float32 on CUDA devices"
    if request != "auto":
        if request != "torch":
            # What is planned on meta tensors runs on a device of the machine.
            _require(request, None if device.type == "meta" else device)
            _require_no_float64(request, dtype)
        return request, "asked for"
    if device.type == "meta" and is_cuda_available():
        device = Device("cuda")  # planned for the machine's GPU
    if device.type != "cuda":
        return "torch", f"the backend for {device.type} tensors"
    if dtype == "float64":
        return "torch", "float64 is computed by torch alone"
    if fused is not None and not fused.ahead:
        return "torch", fused.why
    name = "cuda" if work == "factorization" else "triton"
    reason = unavailable_reason(name, device)
    if reason is not None:
        return "torch", f"{name} is not available: {reason}"
    if fused is not None:
        return name, fused.why
    return name, "fewer launches, a matrix read once"


def choose_for(request: str, device: Device, x: Matrix, step: Step) -> tuple[str, str]:
    """:func:`choose` for the projection of one matrix; raises as that does."""
    if step.form in ("identity", "zero"):
        return "torch", "no product to compute"
    fused = _fused(architecture(device), x, step)
    return choose("projection", request, device, x.dtype, fused=fused)


def choose_named(named: str, x: Matrix, step: Step) -> tuple[str, str]:
    """What "auto" takes where the device is of a named architecture, and Triton is installed."""
    if step.form in ("identity", "zero"):
        return "torch", "no product to compute"
    if named == "cpu":
        return "torch", "the backend for cpu tensors"
    if x.dtype == "float64":
        return "torch", "float64 is computed by torch alone"
    fused = _fused(named, x, step)
    return "triton" if fused.ahead else "torch", fused.why


def _fused(named: str, x: Matrix, step: Step) -> Verdict:
    if step.form in ("sequential", "dual in turn"):
        return Verdict(False, "one side after the other: library matmuls")
    sides = (x.r is not None) + (x.k is not None)
    return _verdict(named, x.dtype, sides, max(x.r or 0, x.k or 0))


def verdict(device: Device, dtype: str, sides: int, rank: int) -> Verdict:
    """Whether a fused kernel is to be ahead at a rank, by ``gpu.rank_limit``."""
    return _verdict(architecture(device), dtype, sides, rank)


def _verdict(named: str, dtype: str, sides: int, rank: int) -> Verdict:
    limit = gpu.rank_limit(named, dtype, sides)
    if rank > limit.rank:
        return Verdict(False, f"library matmuls beyond rank {limit.rank}: {limit.source}")
    return Verdict(True, f"one launch, up to rank {limit.rank}: {limit.source}")
