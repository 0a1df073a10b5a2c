"""Runs launches: metadata on the device, workspace, grid, and the cache of both.

Imports triton (through the kernels), so import it only from code that has asked
``unavailable_reason``.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, schedule
from .kernels.coefficients import one_pass_kernel, two_pass_kernel
from .kernels.gram import gram_kernel
from .kernels.update import update_kernel

__all__ = [
    "INTERPRETING",
    "ON_AMD",
    "architecture",
    "compile_options",
    "constexprs",
    "kernel_of",
    "run",
]

INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

ON_AMD: bool = getattr(torch.version, "hip", None) is not None

_KERNELS: dict[str, Any] = {
    "one_pass": one_pass_kernel,
    "two_pass": two_pass_kernel,
    "update": update_kernel,
    "gram": gram_kernel,
}
_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
# Enough programs for the interpreter to step a scheduler loop more than once.
_INTERPRETED_PROGRAMS = 3
_CACHED_CALLS = 64
_CAPTURE_RESERVE_ELEMENTS = 1 << 17


def architecture(device: torch.device) -> str:
    """The row of the config table that serves a device; sm_80 in the interpreter."""
    return _architecture(index_of(device)) if device.type == "cuda" else "sm_80"


def index_of(device: torch.device) -> int:
    """A CUDA device's index; the current one's where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if ON_AMD:
        return str(properties.gcnArchName).split(":")[0]
    return configs.architecture_of_capability(properties.major, properties.minor)


@functools.lru_cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def kernel_of(launch: schedule.Launch) -> Any:
    return _KERNELS[launch.kernel]


def constexprs(launch: schedule.Launch, amd: bool = ON_AMD) -> dict[str, Any]:
    """Every constexpr argument of a launch's kernel, for a GPU of AMD's or NVIDIA's."""
    names = set(_KERNELS[launch.kernel].arg_names)
    values = {name: value for name, value in launch.constants.items() if name in names}
    values |= {
        field.upper(): value
        for field, value in launch.config._asdict().items()
        if field.startswith(("block", "group"))
    }
    values["INTERPRET"] = INTERPRETING
    if "SUM_BLOCK" in names:
        values["SUM_BLOCK"] = configs.sum_block(launch.config)
        values["AMD"] = amd and not INTERPRETING
    return {
        name: _TRITON_DTYPES.get(value, value) if isinstance(value, torch.dtype) else value
        for name, value in values.items()
    }


def compile_options(config: configs.Config) -> dict[str, Any]:
    """Compiler options of a config. Multiplies and adds may fuse: sums are float32 either way."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


class _Ready(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    metadata: Tensor  # int64, on the device
    counts: tuple[int, ...]  # problems, tiles and sums
    workspace_elements: int
    arguments: dict[str, Any]

    def __call__(self, device: torch.device) -> None:
        pointers = [self.metadata]
        if self.kernel is not update_kernel:
            # Fresh from the caching allocator: safe on any stream and under graph capture.
            elements = max(4, self.workspace_elements)
            pointers.append(torch.empty(elements, dtype=torch.float32, device=device))
        self.kernel[self.grid](*pointers, *self.counts, **self.arguments)


class _Call(NamedTuple):
    """Everything but the workspace of a call on one device."""

    launches: list[_Ready]

    def __call__(self, device: torch.device) -> None:
        for launch in self.launches:
            launch(device)


class _Uploads:
    """Metadata arrays on one device."""

    def __init__(self) -> None:
        # Pinned memory cannot be had while a stream is captured, so some is kept for then. What
        # a graph copies from must never change again.
        self.reserve = torch.empty(_CAPTURE_RESERVE_ELEMENTS, dtype=torch.int64, pin_memory=True)
        self.reserved = 0

    def upload(self, metadata: list[int], device: torch.device, capturing: bool) -> Tensor:
        host = torch.tensor(metadata, dtype=torch.int64)
        if capturing:
            end = self.reserved + host.numel()
            if end > self.reserve.numel():
                raise RuntimeError(
                    "osf_kernels.backends.triton: no pinned memory left for launches first seen "
                    "while a CUDA graph is captured; run the same call once before the capture"
                )
            staging = self.reserve[self.reserved : end].copy_(host)
            self.reserved = end
        else:
            staging = host.pin_memory()
        return staging.to(device, non_blocking=True)


# Reentrant: under OSF_AUTOTUNE=1 a build runs launches of its own, the candidates'.
_lock = threading.RLock()
_uploads: dict[torch.device, _Uploads] = {}
_calls: OrderedDict[tuple[object, ...], _Call] = OrderedDict()
_captured: list[_Call] = []


def run(
    key: tuple[object, ...],
    device: torch.device,
    build: Callable[[], Sequence[schedule.Launch]],
) -> None:
    """Run the launches that ``build`` returns, or those kept from a call with the same key.

    The key must hold everything the launches depend on: addresses, shapes, strides, dtypes and
    options. A repeated key copies nothing to the device, so a call that ran once can be
    captured in a CUDA graph. Launches on the current stream of ``device``; never synchronizes.
    """
    if device.type != "cuda":
        _Call(_ready(build(), device, lambda data: torch.tensor(data, dtype=torch.int64)))(device)
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        capturing = torch.cuda.is_current_stream_capturing()
        # By stream, since a copy is ordered before its launches by the stream alone.
        key = (device, stream.cuda_stream, *key)
        with _lock:
            call = _calls.get(key)
            if call is None:
                if device not in _uploads:
                    _uploads[device] = _Uploads()
                uploads = _uploads[device]
                call = _Call(
                    _ready(build(), device, lambda data: uploads.upload(data, device, capturing))
                )
                # What was uploaded in a capture is there only once the graph has run.
                if not capturing:
                    _calls[key] = call
                    if len(_calls) > _CACHED_CALLS:
                        _calls.popitem(last=False)
            else:
                _calls.move_to_end(key)
            if capturing and not any(call is kept for kept in _captured):
                _captured.append(call)
        call(device)


def _ready(
    launches: Sequence[schedule.Launch],
    device: torch.device,
    upload: Callable[[list[int]], Tensor],
) -> list[_Ready]:
    # One copy a call: launches read slices of it, each on a 16-byte boundary.
    data: list[int] = []
    offsets = []
    for launch in launches:
        offsets.append(len(data))
        data += launch.metadata
        data += [0] * (len(data) % 2)
    if not data:
        return []
    metadata = upload(data)
    return [
        _launch(metadata[offset:], launch, device)
        for offset, launch in zip(offsets, launches, strict=True)
    ]


def _launch(metadata: Tensor, launch: schedule.Launch, device: torch.device) -> _Ready:
    counts: tuple[int, ...] = (launch.problems, launch.tiles)
    programs = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        programs = _processors(index_of(device)) * launch.config.programs_per_sm
    programs = min(launch.tiles + launch.sum_tiles, programs)
    if launch.kernel != "update":
        counts += (launch.sums,)
    return _Ready(
        kernel_of(launch),
        (programs, 1, 1),
        metadata,
        counts,
        launch.workspace_elements,
        constexprs(launch) | compile_options(launch.config),
    )
