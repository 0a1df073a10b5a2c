"""Programs of the grouped backends, Triton and CUDA: made once, run with other matrices each time.

A program holds the launches of a list of problems with everything that they need but the addresses
of the matrices and of the workspace, which a call writes into their records. The list is cut into
slices whose coefficients and partial sums fit the workspace; they run one after another in the same
memory.

May import: torch, ``backends.jobs``, ``backends.operands`` and the module of a backend.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.backends.jobs import (
    Coefficients,
    Job,
    Problem,
    Stage,
    coefficient_dtype,
    each_of_batch,
    in_stages,
    reduced,
    steps,
)
from osf_kernels.backends.operands import ALIGNMENT, WORKSPACE, Arena, Lie, Operand
from osf_kernels.plan import Step

# Of coefficients and partial sums of the matrices of a list that run side by side.
WORKSPACE_BYTES = 256 << 20

Ready = tuple[Tensor | None, Tensor | None]  # coefficients A and B


class Executable(Protocol):
    """Launches in order.

    ``parts_bytes`` is what their partial sums take.
    """

    parts_bytes: int

    def run(self, addresses: Sequence[int]) -> None:
        """``addresses``: of each argument, the workspace first, cut to multiples of 16 bytes."""


class Kernels(Protocol):
    """What the module of a grouped backend provides."""

    def compiled(
        self, stages: Sequence[Sequence[Job]], device: torch.device, *, kept: int
    ) -> Executable:
        """The launches of stages of jobs, whose operands may be of arguments to come; ``kept`` says
        for how many sets of addresses their records may stay on the device."""

    def parts_bytes(self, job: Coefficients) -> int:
        """What the partial sums of a job take at least, however many jobs share a launch."""

    def spare_bytes(self, device: torch.device) -> int:
        """The most that the partial sums of a launch take beyond those of its jobs."""


class Program:
    """What a list of problems runs on one device.

    Args:
        problems: with an ``Operand`` for whatever a call brings.
        limit: bytes of the workspace; a single matrix that takes more has a slice of its own.
        kept: as in ``Kernels.compiled``.
        halves: compute A and B of the problems, and no more.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        kernels: Kernels,
        limit: int = WORKSPACE_BYTES,
        *,
        kept: int = 4,
        halves: bool = False,
    ) -> None:
        self.device = problems[0].x.device
        slices = sliced(problems, kernels, limit, halves=halves)
        stages = [list(in_stages(map(iter, calls))) for _, calls in slices]
        self.calls = sum(map(len, stages))
        self._arena_bytes = max(arena.bytes for arena, _ in slices)
        self._slices = [kernels.compiled(each, self.device, kept=kept) for each in stages]
        self.workspace_bytes = max(
            arena.bytes + executable.parts_bytes
            for (arena, _), executable in zip(slices, self._slices, strict=True)
        )

    def run(self, addresses: Sequence[int]) -> None:
        """``addresses`` of the arguments in their order; their lowest bits aren't looked at."""
        if self.device.type != "cuda":
            self._run(addresses)
            return
        with torch.cuda.device(self.device):
            self._run(addresses)

    def _run(self, addresses: Sequence[int]) -> None:
        memory = torch.empty(self._arena_bytes, dtype=torch.uint8, device=self.device)
        cut = [memory.data_ptr(), *[address & -ALIGNMENT for address in addresses]]
        for executable in self._slices:
            executable.run(cut)


class ListProgram:
    """A program of lists of matrices in place; made anew where they lie otherwise than before.

    Args:
        problems: of x, and of A and B where coefficients are given, the layouts alone count.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        kernels: Kernels,
        limit: int = WORKSPACE_BYTES,
        *,
        halves: bool = False,
    ) -> None:
        self._kernels, self._limit, self._halves = kernels, limit, halves
        self._problems, self._made = self._make(problems)

    @property
    def calls(self) -> int:
        """Of the two kernels."""
        return self._made.program.calls

    @property
    def workspace_bytes(self) -> int:
        return self._made.program.workspace_bytes

    def run(self, xs: Sequence[Tensor], ready: Sequence[Ready] | None = None) -> None:
        """``ready`` are A and B of each, where it was made with coefficients."""
        tensors = list(xs)
        if ready is not None:
            tensors = [
                t for x, pair in zip(xs, ready, strict=True) for t in (x, *pair) if t is not None
            ]
        addresses = [t.data_ptr() for t in tensors]
        made = self._made
        if not made.serves(tensors):
            pairs = ready or [(None, None)] * len(xs)
            problems = [
                problem._replace(x=x, A=A, B=B)
                for problem, x, (A, B) in zip(self._problems, xs, pairs, strict=True)
            ]
            _, made = self._make(problems)
            self._made = made
        made.program.run(addresses)
        if not self._halves:
            torch.autograd.graph.increment_version(xs)

    def _make(self, given: Sequence[Problem]) -> tuple[list[Problem], _Made]:
        """The problems without the tensors that a call brings, and what is made for these."""
        problems: list[Problem] = []
        tensors: list[Tensor] = []
        for problem in given:
            places: dict[str, Any] = {}
            for name in ("x", "A", "B"):
                t = getattr(problem, name)
                if t is not None:
                    tensors.append(t)
                    places[name] = Operand.like(t, WORKSPACE + len(tensors))
            problems.append(problem._replace(**places, out=places["x"]))
        program = Program(problems, self._kernels, self._limit, halves=self._halves)
        return problems, _Made(tensors, program)


class _Made:
    """A program, and how tensors of known shapes and dtypes have to lie for it."""

    def __init__(self, tensors: Sequence[Tensor], program: Program) -> None:
        self.program = program
        self._lies = [(t.stride(), t.data_ptr() % ALIGNMENT) for t in tensors]
        # The places of tensors whose last line has padding, which kernels read.
        self._padded = [i for i, t in enumerate(tensors) if _padding.is_padded(t)]

    def serves(self, tensors: Sequence[Tensor]) -> bool:
        if [(t.stride(), t.data_ptr() % ALIGNMENT) for t in tensors] != self._lies:
            return False
        return all(_padding.is_padded(tensors[i]) for i in self._padded)


@functools.lru_cache(maxsize=512)
def single(
    kernels: Kernels,
    device: torch.device,
    step: Step,
    x: Lie,
    out: Lie | None,
    U: Lie | None,
    V: Lie | None,
) -> Program:
    """The program of one projection of tensors that lie so; ``out`` is None in place.

    Its arguments are x, out, U and V, those that are there.
    """
    numbers = itertools.count(WORKSPACE + 1)
    places = [
        None if t is None else Operand.lying(t, device, next(numbers)) for t in (x, out, U, V)
    ]
    problem = Problem(places[0], places[1] or places[0], places[2], places[3], step)
    return Program([problem], kernels, kept=256)


def sliced(
    problems: Sequence[Problem], kernels: Kernels, limit: int, *, halves: bool = False
) -> list[tuple[Arena, list[list[Stage]]]]:
    """The kernel calls of each matrix, in slices as large as the workspace holds."""
    calls_of = _halves if halves else _calls
    arena = Arena(problems[0].x.device)
    slices: list[tuple[Arena, list[list[Stage]]]] = [(arena, [])]
    parts = 0
    limit -= kernels.spare_bytes(arena.device)
    for matrix in itertools.chain.from_iterable(map(each_of_batch, problems)):
        before = arena.bytes
        calls = calls_of(matrix, arena)
        jobs = itertools.chain.from_iterable(calls)
        own = sum(kernels.parts_bytes(job) for job in jobs if isinstance(job, Coefficients))
        if slices[-1][1] and arena.bytes + parts + own > limit:
            arena.bytes, parts = before, 0
            arena = Arena(arena.device)
            slices.append((arena, []))
            calls = calls_of(matrix, arena)
        parts += own
        slices[-1][1].append(calls)
    return slices


def _calls(problem: Problem, arena: Arena) -> list[Stage]:
    return list(steps(problem, coefficient_dtype(problem.x), arena.new))


def _halves(problem: Problem, arena: Arena) -> list[Stage]:
    if problem.S is None:
        A, B = (t if t is not None and t.numel() else None for t in (problem.A, problem.B))
        problem = problem._replace(A=A, B=B)
    return list(reduced(problem))
