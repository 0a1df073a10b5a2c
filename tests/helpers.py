"""Draws shared by the operator tests, and what runs the steps of a form over tensors."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from osf_kernels import Basis
from osf_kernels.backends import torch as torch_backend
from osf_kernels.backends.jobs import (
    Coefficients,
    Job,
    Problem,
    Stage,
    Update,
    coefficient_dtype,
    in_stages,
    steps,
)
from osf_kernels.backends.operands import ALIGNMENT, Operand
from osf_kernels.forms import Name, Reduce, calls_of
from osf_kernels.testing import random_basis

KINDS = (None, "high", "low")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw_basis(
    size: int, rank: int, kind: str | None, dtype: torch.dtype, generator: torch.Generator
) -> Basis | None:
    """A Basis protecting ``rank`` directions, or None for a side left alone."""
    if kind is None:
        return None
    return random_basis(size, rank, spans=kind, dtype=dtype, generator=generator)  # type: ignore[arg-type]


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def generator_for(*key: object) -> torch.Generator:
    """A generator of its own for every combination of parameters, the same in every run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


class EagerKernels(Protocol):
    """The two kernels over tensors."""

    def coefficients(self, jobs: Sequence[Coefficients]) -> None: ...
    def update(self, jobs: Sequence[Update]) -> None: ...


def run_eagerly(problems: Iterable[Problem], kernels: EagerKernels) -> None:
    """Runs problems of CPU tensors stage by stage; what a form makes without values is NaN.

    Forms without kernels run in torch, where the operators run them too.
    """

    def new(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.full((rows, columns), torch.nan, dtype=dtype)

    calls: list[Iterator[Stage]] = []
    for problem in problems:
        if problem.step.form in ("identity", "zero"):
            torch_backend.run([problem])
        else:
            calls.append(steps(problem, coefficient_dtype(problem.x), new))
    for stage in in_stages(calls):
        sums = isinstance(stage[0], Coefficients)
        assert all(isinstance(job, Coefficients) == sums for job in stage)
        (kernels.coefficients if sums else kernels.update)(stage)


JobT = TypeVar("JobT", Coefficients, Update)


class Memory:
    """Where the arguments of a program lie in host memory, and the tensors that its jobs name.

    Operands of one argument share one storage, from its address to the end of the furthest operand
    of ``jobs``.
    """

    def __init__(self, jobs: Iterable[Job], addresses: Sequence[int]) -> None:
        ends: dict[int, int] = {}
        for operand in (t for job in jobs for t in job if isinstance(t, Operand)):
            place = operand.data_ptr()
            end = place + _extent_bytes(operand)
            ends[place.argument] = max(end, ends.get(place.argument, 0))
        self._storages = {}
        for argument, end in ends.items():
            assert addresses[argument] % ALIGNMENT == 0
            held = (ctypes.c_byte * max(end, 1)).from_address(addresses[argument])
            whole = torch.frombuffer(held, dtype=torch.uint8)
            self._storages[argument] = whole.untyped_storage()

    def tensors(self, job: JobT) -> JobT:
        """The job over tensors."""
        return type(job)(*(self._tensor(t) if isinstance(t, Operand) else t for t in job))

    def _tensor(self, operand: Operand) -> Tensor:
        place = operand.data_ptr()
        offset, beyond = divmod(place, operand.element_size())
        assert beyond == 0
        return torch.empty(0, dtype=operand.dtype).set_(
            self._storages[place.argument], offset, operand.shape, operand.stride()
        )


def _extent_bytes(operand: Operand) -> int:
    """From the first byte of an operand to the end of its last element."""
    if operand.numel() == 0:
        return 0
    steps = zip(operand.shape, operand.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * operand.element_size()


def kernels_of(form: Name) -> str:
    """The kernels of a form in order, C for coefficients and U for update."""
    return "".join("C" if isinstance(call, Reduce) else "U" for call in calls_of(form))


def launches(chosen: Iterable[Name]) -> int:
    """How many stages ``jobs.in_stages`` makes of a list of these forms."""
    wanting = [kernels_of(form) for form in chosen]
    count = 0
    while wanting := [rest for rest in wanting if rest]:
        ran = "C" if any(rest[0] == "C" for rest in wanting) else "U"
        wanting = [rest[1:] if rest[0] == ran else rest for rest in wanting]
        count += 1
    return count


def grown(subspace: Any, side: str = "V") -> Tensor:
    """The directions (..., n, r) of a side that ``input_subspaces`` made, however it is held."""
    directions: Tensor = subspace.spectra[side].directions
    return directions
