"""Programs of the grouped backends, Triton and CUDA: made once, run with other matrices each time.

A program holds the launches of a list of problems with everything that they need but the addresses
of the matrices and of the workspace, which a call writes into their records.

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
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.operands import ALIGNMENT, WORKSPACE, Lie, Operand
from osf_kernels.plan import Step

# Of coefficients and partial sums of the matrices of a list that run side by side.
WORKSPACE_BYTES = 256 << 20

Ready = tuple[Tensor | None, Tensor | None]  # coefficients A and B


class Runnable(Protocol):
    """Launches in order, over matrices whose addresses a call brings.

    Attributes:
        calls: how many launches, or groups of them of one kernel.
        workspace_bytes: of memory that a call brings.
    """

    calls: int
    workspace_bytes: int

    def run(self, addresses: Sequence[int]) -> None:
        """``addresses``: of each argument, the workspace first, cut to multiples of 16 bytes."""


class Kernels(Protocol):
    """What the module of a grouped backend provides."""

    def program(
        self, problems: Sequence[Problem], limit: int, *, kept: int, halves: bool
    ) -> Runnable:
        """What runs problems whose operands may be of arguments to come.

        Args:
            limit: bytes of the workspace; a single matrix that takes more gets more.
            kept: for how many sets of addresses records may stay on the device.
            halves: compute A and B of the problems, and no more.
        """


class Program:
    """What a list of problems runs on one device; arguments as of ``Kernels.program``."""

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
        self._made = kernels.program(problems, limit, kept=kept, halves=halves)
        self.calls, self.workspace_bytes = self._made.calls, self._made.workspace_bytes

    def run(self, addresses: Sequence[int]) -> None:
        """``addresses`` of the arguments in their order; their lowest bits aren't looked at.

        Meta tensors have none, and nothing to compute.
        """
        if self.device.type == "meta":
            return
        if self.device.type != "cuda":
            self._run(addresses)
            return
        with torch.cuda.device(self.device):
            self._run(addresses)

    def _run(self, addresses: Sequence[int]) -> None:
        memory = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        self._made.run([memory.data_ptr(), *[address & -ALIGNMENT for address in addresses]])


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
