"""From validated tensors to what runs: a decision a matrix, and the route of a list."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import osf_kernels.backends.torch as torch_backend
from osf_kernels.backends import choosing, grouped
from osf_kernels.backends.grouped import ListProgram, Ready
from osf_kernels.backends.jobs import Problem, each_of_batch
from osf_kernels.backends.operands import Lie
from osf_kernels.ops._coefficient_list import CoefficientList
from osf_kernels.ops._pins import Pin
from osf_kernels.ops._validation import Choice, Decision, admit, check, of_shard


def decide(
    op: str,
    names: Sequence[str],
    g: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    kind: str,
    choice: Choice = "any",
    request: str | None = None,
    architecture: str | None = None,
) -> Decision:
    """``admit``, with the caller's own argument names in a refusal.

    ``request``: the backend; without, the one that ``use_backend`` names now.
    """
    g_meta = (g.shape, g.dtype, g.device)
    u_meta = None if U is None else (U.shape, U.dtype, U.device)
    v_meta = None if V is None else (V.shape, V.dtype, V.device)
    try:
        chosen = request or choosing.requested()
        return admit(op, g_meta, u_meta, v_meta, kind, chosen, choice, architecture)
    except (TypeError, ValueError):
        check(op, names, g_meta, u_meta, v_meta, of_shard(choice))
        raise


def execute_one(
    decided: Decision, g: Tensor, out: Tensor, U: Tensor | None, V: Tensor | None
) -> None:
    """One projection; straight into torch where nothing has to be converted or unbatched."""
    step, backend = decided.step, decided.backend
    if decided.direct:
        torch_backend.run_one(step, g, out, U, V)
    elif backend == "torch":
        torch_backend.run(list(each_of_batch(Problem(g, out, U, V, step), kept=1)))
    else:
        in_place = out is g
        if g.dim() > 2:
            U, V = (t if t is None else t.expand(*g.shape[:-2], *t.shape[-2:]) for t in (U, V))
        tensors = [t for t in (g, None if in_place else out, U, V) if t is not None]
        program = grouped.single(
            choosing.module(backend),
            g.device,
            step,
            Lie.of(g),
            None if in_place else Lie.of(out),
            None if U is None else Lie.of(U),
            None if V is None else Lie.of(V),
        )
        program.run([t.data_ptr() for t in tensors])
        torch.autograd.graph.increment_version(out)


class Route:
    """What a list of problems runs on its backends: made once, run with other matrices each time.

    Args:
        problems: one a matrix, in place; of x, and of A and B where coefficients are given, the
            layouts alone count.
        names: the backend of each.
        limit: bytes of workspace on grouped backends.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        names: Sequence[str],
        limit: int = grouped.WORKSPACE_BYTES,
    ) -> None:
        members = _members([problem.x for problem in problems], names)
        self._parts = [
            (mine, _program([problems[i] for i in mine], name, limit))
            for (name, _), mine in members.items()
        ]

    @property
    def grouped(self) -> tuple[int, int]:
        """How often the kernels of grouped backends are called, and the bytes of workspace."""
        return _calls_and_workspace(self._parts)

    def run(self, xs: Sequence[Tensor], ready: Sequence[Ready] | None = None) -> None:
        """Each problem with its matrix of ``xs``, and with ready coefficients where given."""
        if len(self._parts) == 1:
            self._parts[0][1].run(xs, ready)
            return
        for mine, program in self._parts:
            chosen = [xs[i] for i in mine]
            program.run(chosen, None if ready is None else [ready[i] for i in mine])


def _calls_and_workspace(parts: Sequence[tuple[list[int], Any]]) -> tuple[int, int]:
    programs = [program for _, program in parts if isinstance(program, ListProgram)]
    workspace = max((program.workspace_bytes for program in programs), default=0)
    return sum(program.calls for program in programs), workspace


class CoefficientRoute:
    """What the coefficients of a list take: made once, run with other matrices each time.

    Args:
        pins: what each matrix is pinned to. Where that is S it is taken off B, and off A on the
            ``root`` of the shards alone.
    """

    def __init__(
        self,
        xs: Sequence[Tensor],
        Us: Sequence[Tensor | None],
        Vs: Sequence[Tensor | None],
        found: CoefficientList,
        names: Sequence[str],
        limit: int = grouped.WORKSPACE_BYTES,
        pins: Sequence[Pin] | None = None,
        *,
        root: bool = True,
    ) -> None:
        self._root = root
        self._on_torch: list[tuple[list[int], list[list[Any]]]] = []
        self._parts: list[tuple[list[int], ListProgram]] = []
        taken = pins or [Pin()] * len(xs)
        for (name, _), mine in _members(xs, names).items():
            if name == "torch":
                rows = [_row(xs[i], Us[i], Vs[i], taken[i]) for i in mine]
                self._on_torch.append((mine, [list(column) for column in zip(*rows, strict=True)]))
                continue
            mine = [i for i in mine if found.A[i].numel() or found.B[i].numel()]
            problems = []
            for i in mine:
                x, A, B, pin = xs[i], found.A[i], found.B[i], taken[i]._asdict()
                problem = Problem(x, x, Us[i], Vs[i], _NO_STEP, A=A, B=B, root=root, **pin)
                problems.append(problem)
            if problems:
                kernels = choosing.module(name)
                self._parts.append((mine, ListProgram(problems, kernels, limit, halves=True)))

    @property
    def grouped(self) -> tuple[int, int]:
        """As ``Route.grouped``."""
        return _calls_and_workspace(self._parts)

    def run(self, xs: Sequence[Tensor], found: CoefficientList) -> None:
        """Writes the coefficients of ``xs``, which lie as those it was made for."""
        for mine, (Us, Vs, *pins) in self._on_torch:
            As, Bs = [found.A[i] for i in mine], [found.B[i] for i in mine]
            chosen = [xs[i] for i in mine]
            chosen, Us, Vs, As, Bs, *pins = _of_one_batch(chosen, Us, Vs, As, Bs, *pins)
            offsets = zip(*pins, strict=True)
            torch_backend.coefficients_of(chosen, Us, Vs, As, Bs, offsets, root=self._root)
        for mine, program in self._parts:
            program.run([xs[i] for i in mine], [(found.A[i], found.B[i]) for i in mine])


def _row(x: Tensor, U: Tensor | None, V: Tensor | None, pin: Pin) -> list[Tensor | None]:
    """U, V, S and what else is pinned, with as many batch dimensions as x has."""
    batch = x.shape[:-2]
    S = None if pin.S is None else pin.S.expand(*batch, pin.S.shape[-1])
    U, V, rest_A, rest_B = (
        t if t is None else t.expand(*batch, *t.shape[-2:]) for t in (U, V, pin.rest_A, pin.rest_B)
    )
    return [U, V, S, rest_A, rest_B]


_NO_STEP: Any = None


def _of_one_batch(*lists: list[Any]) -> tuple[list[Any], ...]:
    """The entries of lists with the batches of several dimensions, the first list's, unrolled."""
    if all(x.dim() <= 3 for x in lists[0]):
        return lists
    entries = []
    for entry in zip(*lists, strict=True):
        for index in itertools.product(*map(range, entry[0].shape[:-3])):
            entries.append([None if t is None else t[index] for t in entry])
    return tuple(map(list, zip(*entries, strict=True)))


def _members(xs: Sequence[Any], names: Sequence[str]) -> dict[tuple[str, torch.device], list[int]]:
    """The places in a list of those that run on one backend and device."""
    members: dict[tuple[str, torch.device], list[int]] = {}
    for i, (x, name) in enumerate(zip(xs, names, strict=True)):
        members.setdefault((name, x.device), []).append(i)
    return members


def _program(
    problems: Sequence[Problem], name: str, limit: int
) -> ListProgram | torch_backend.Program | _Unrolled:
    if name != "torch":
        return ListProgram(problems, choosing.module(name), limit)
    if any(problem.x.dim() > 3 for problem in problems):
        return _Unrolled(problems)
    # With as many batch dimensions of the bases as x has.
    return torch_backend.Program([next(each_of_batch(problem, kept=1)) for problem in problems])


class _Unrolled:
    """Problems of several batch dimensions, of which torch multiplies one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = [p._replace(x=None, out=None, A=None, B=None) for p in problems]

    def run(self, xs: Sequence[Tensor], ready: Sequence[Ready] | None = None) -> None:
        for i, (x, problem) in enumerate(zip(xs, self._problems, strict=True)):
            A, B = (None, None) if ready is None else ready[i]
            problem = problem._replace(x=x, out=x, A=A, B=B)
            torch_backend.run(list(each_of_batch(problem, kept=1)))
