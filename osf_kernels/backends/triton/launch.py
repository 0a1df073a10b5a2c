"""Runs launches: their records on the device, partial sums, grids.

Imports triton (through the kernels), so import it only from code that has asked
``unavailable_reason``.
"""

from __future__ import annotations

import functools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from osf_kernels.backends import choosing
from osf_kernels.backends.operands import Placed

from . import configs
from .kernels.gram import gram_kernel
from .kernels.multiply import multiply_kernel
from .kernels.projection import projection_kernel
from .launches import Launch

__all__ = [
    "INTERPRETING",
    "ON_AMD",
    "Executable",
    "architecture",
    "compile_options",
    "constexprs",
    "kernel_of",
]

INTERPRETING: bool = bool(triton.knobs.runtime.interpret)

ON_AMD: bool = getattr(torch.version, "hip", None) is not None

_KERNELS: dict[str, Any] = {
    "projection": projection_kernel,
    "multiply": multiply_kernel,
    "gram": gram_kernel,
}
_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
# Enough programs for the interpreter to step a scheduler loop more than once.
_INTERPRETED_PROGRAMS = 3


def architecture(device: torch.device) -> str:
    """The row of the config table that serves a device; sm_80 in the interpreter."""
    return _architecture(index_of(device)) if device.type == "cuda" else "sm_80"


def index_of(device: torch.device) -> int:
    """A CUDA device's index; the current one's where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache
def _architecture(index: int) -> str:
    return choosing.architecture(torch.device("cuda", index))


@functools.lru_cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def kernel_of(launch: Launch) -> Any:
    return _KERNELS[launch.kernel]


def constexprs(launch: Launch, amd: bool = ON_AMD) -> dict[str, Any]:
    """Every constexpr argument of a launch's kernel, for a GPU of AMD's or NVIDIA's."""
    names = set(_KERNELS[launch.kernel].arg_names)
    values = {name: value for name, value in launch.constants.items() if name in names}
    values |= {
        field.upper(): value
        for field, value in launch.config._asdict().items()
        if field.upper() in names
    }
    values["INTERPRET"] = INTERPRETING
    values["AMD"] = amd and not INTERPRETING
    if values.get("EXACT") == "tf32x3" and values["AMD"]:
        values["EXACT"] = "ieee"  # AMD's matrix cores multiply float32 as it is
    if not isinstance(launch.config, configs.Projection):
        values["SUM_BLOCK"] = configs.sum_block(launch.config)
    return {
        name: _TRITON_DTYPES.get(value, value) if isinstance(value, torch.dtype) else value
        for name, value in values.items()
    }


def compile_options(config: configs.Config, amd: bool = ON_AMD) -> dict[str, Any]:
    """Compiler options of a config, for a GPU of AMD's or NVIDIA's.

    Multiplies and adds may fuse: sums are float32 either way.
    """
    stages = (
        config.reduction_stages if isinstance(config, configs.Projection) else config.num_stages
    )
    options = {"num_warps": config.num_warps, "num_stages": stages, "enable_fp_fusion": True}
    if not amd:
        # Left to itself ptxas keeps some kernels to 128 registers a thread, and spills for it, so
        # that more programs would fit a processor than are ever launched.
        options["maxnreg"] = configs.registers(config)
    return options


class Driver:
    """What an executable asks of the device; another one stands in for it in a test."""

    def stream(self, device: torch.device) -> tuple[int, bool]:
        """The current stream, and whether it is being captured."""
        if device.type != "cuda":
            return 0, False
        stream = torch.cuda.current_stream(device).cuda_stream
        return stream, torch.cuda.is_current_stream_capturing()

    def upload(self, records: array[int], device: torch.device, capturing: bool) -> Tensor:
        """The records in device memory, ordered by the current stream."""
        if capturing:
            # A graph would read host memory at each replay. Numbers travel in kernel parameters,
            # which it owns.
            memory = torch.zeros(len(records), dtype=torch.int64, device=device)
            torch._foreach_add_(list(memory.unbind()), records.tolist())
            return memory
        host = torch.frombuffer(records, dtype=torch.int64)
        if device.type != "cuda":
            return host.clone()
        return host.pin_memory().to(device, non_blocking=True)

    def upload_constant(self, numbers: array[int], device: torch.device, capturing: bool) -> Tensor:
        """The same of what is made once."""
        return Driver.upload(self, numbers, device, capturing)

    def recorded(self, device: torch.device) -> torch.cuda.Event | None:
        """An event behind what the current stream has been given; None where there are none."""
        if device.type != "cuda":
            return None
        # External: a graph waits for it when it is replayed.
        event = torch.cuda.Event(external=not ON_AMD)
        event.record()
        return event

    def follow(self, memory: Tensor, event: torch.cuda.Event | None, capturing: bool) -> None:
        """Lets the current stream use memory that another one has filled before an event."""
        if event is None:
            return
        event.wait()
        if not capturing:
            memory.record_stream(torch.cuda.current_stream(memory.device))

    def parts(self, elements: int, device: torch.device) -> Tensor:
        """Memory for partial sums."""
        return torch.empty(elements, dtype=torch.float32, device=device)

    def launch(self, kernel: Any, grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
        kernel[grid](*args, **options)


driver = Driver()


class _Resident(NamedTuple):
    """A constant array on the device, the event behind its upload, and the stream of that."""

    memory: Tensor
    arrived: torch.cuda.Event | None
    stream: int


_OF_GRAPHS: dict[int, _Resident] = {}  # what captured calls read, kept for good


class _Ready(NamedTuple):
    """A launch but for its records and its memory."""

    kernel: Any
    grid: tuple[int, int, int]
    start: int  # of its metadata
    constant: tuple[int, int]  # where its constant array starts and ends, empty where it has none
    counts: tuple[int, ...]  # what the kernel is told beside its records
    arguments: dict[str, Any]
    has_parts: bool  # in memory of their own


class Executable:
    """Launches in order, and their records, in which addresses of arguments are still to be added.

    What is the same in every call lies on the device once. What is a call's own (addresses, and
    counters, so that calls in flight on several streams share none) lies there as long as calls
    come with the same addresses on the same stream; a call in a CUDA graph makes what is the
    graph's. Never synchronizes.

    Args:
        kept: for how many sets of addresses and streams.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device, *, kept: int) -> None:
        self.device = device
        self._most_kept = kept
        records: list[int] = []
        constant: list[int] = []
        self._launches = []
        for launch in launches:
            own = len(constant), len(constant) + len(launch.constant)
            self._launches.append(_ready(launch, device, len(records), own))
            records += launch.metadata
            records += [0] * (len(records) % 2)  # each launch's on a 16-byte boundary
            constant += launch.constant
            constant += [0] * (len(constant) % 2)
        constant = constant or [0]  # of no element there would be no memory
        self._constant = array("q", constant)
        self._resident: _Resident | None = None
        self._records = array("q", records)
        self._placed = [(i, v, v.argument) for i, v in enumerate(records) if type(v) is Placed]
        self._used = sorted({argument for _, _, argument in self._placed})
        self._parts_elements = max([4, *(launch.workspace_elements for launch in launches)])
        self._kept: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, addresses: Sequence[int] = ()) -> None:
        """Launches on the current stream of the current device."""
        stream, capturing = driver.stream(self.device)
        key = (stream, *[addresses[i] for i in self._used])
        with self._lock:
            records = None if capturing else self._kept.get(key)
            if records is None:
                records = self._uploaded(addresses, capturing)
                if not capturing:
                    self._kept[key] = records
                    if len(self._kept) > self._most_kept:
                        self._kept.popitem(last=False)
            elif len(self._kept) > 1:
                self._kept.move_to_end(key)
            constant = self._constant_on_device(stream, capturing)
        parts = driver.parts(self._parts_elements, self.device)
        for ready, mine in zip(self._launches, records, strict=True):
            memory = (mine, parts if ready.has_parts else constant[slice(*ready.constant)])
            driver.launch(ready.kernel, ready.grid, *memory, *ready.counts, **ready.arguments)

    def _constant_on_device(self, stream: int, capturing: bool) -> Tensor:
        """What is the same in every call, uploaded by the first one.

        A graph goes on reading it when this executable is gone, so that a call which is captured
        leaves it there for good. One captured before any other call has an array of its own.
        """
        resident = self._resident
        # Events of AMD's can't be waited for in a graph that they aren't recorded in.
        if resident is None or (capturing and ON_AMD):
            made = driver.upload_constant(self._constant, self.device, capturing)
            if not capturing:
                self._resident = _Resident(made, driver.recorded(self.device), stream)
            return made
        if stream != resident.stream:
            driver.follow(resident.memory, resident.arrived, capturing)
        if capturing:
            _OF_GRAPHS[id(resident)] = resident
        return resident.memory

    def _uploaded(self, addresses: Sequence[int], capturing: bool) -> list[Tensor]:
        """The records of each launch."""
        if not self._launches:
            return []
        records = array("q", self._records)
        for i, offset, argument in self._placed:
            records[i] = addresses[argument] + offset
        memory = driver.upload(records, self.device, capturing)
        return [memory[launch.start :] for launch in self._launches]


def _ready(launch: Launch, device: torch.device, start: int, constant: tuple[int, int]) -> _Ready:
    programs = _INTERPRETED_PROGRAMS
    if device.type == "cuda":
        programs = _processors(index_of(device)) * launch.config.programs_per_sm
    grid = (min(launch.tasks, programs), 1, 1)
    arguments = constexprs(launch) | compile_options(launch.config)
    has_parts = launch.kernel != "projection"
    return _Ready(kernel_of(launch), grid, start, constant, launch.counts, arguments, has_parts)
