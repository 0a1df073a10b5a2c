"""Lists in slices whose coefficients and partial sums fit the workspace.

The slices run one after another in the same memory, each in as many calls of the two kernels as its
longest form takes.

May import: torch, ``backends.jobs``, ``backends.operands``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from osf_kernels.backends.jobs import (
    Coefficients,
    Problem,
    Stage,
    coefficient_dtype,
    each_of_batch,
    in_stages,
    reduced,
    steps,
)
from osf_kernels.backends.operands import Arena


class Executable(Protocol):
    """Calls of the two kernels in order; ``parts_bytes`` is what their partial sums take."""

    parts_bytes: int

    def run(self, addresses: Sequence[int]) -> None: ...


class SlicedProgram:
    """``grouped.Runnable``: of problems, and of what makes the calls of stages of jobs."""

    def __init__(
        self,
        problems: Sequence[Problem],
        limit: int,
        compiled: Callable[[Sequence[Stage]], Executable],
        parts_bytes: Callable[[Coefficients], int],
        *,
        halves: bool,
    ) -> None:
        slices = sliced(problems, limit, parts_bytes, halves=halves)
        stages = [list(in_stages(map(iter, calls))) for _, calls in slices]
        self.calls = sum(map(len, stages))
        self.workspace_bytes = max(arena.bytes for arena, _ in slices)
        self._slices = [compiled(each) for each in stages]

    def run(self, addresses: Sequence[int]) -> None:
        for executable in self._slices:
            executable.run(addresses)


def sliced(
    problems: Sequence[Problem],
    limit: int,
    parts_bytes: Callable[[Coefficients], int],
    *,
    halves: bool = False,
) -> list[tuple[Arena, list[list[Stage]]]]:
    """The kernel calls of each matrix, in slices as large as the workspace holds."""
    calls_of = _halves if halves else _calls
    arena = Arena(problems[0].x.device)
    slices: list[tuple[Arena, list[list[Stage]]]] = [(arena, [])]
    parts = 0
    for matrix in itertools.chain.from_iterable(map(each_of_batch, problems)):
        before = arena.bytes
        calls = calls_of(matrix, arena)
        jobs = itertools.chain.from_iterable(calls)
        own = sum(parts_bytes(job) for job in jobs if isinstance(job, Coefficients))
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
