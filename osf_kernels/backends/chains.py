"""What one launch does to a matrix: the calls of its form as steps, each after the one before.

A step is a :class:`Reduction` or a ``jobs.Update``. Two things are joined that ``jobs`` leaves
apart: what pins or corrects a coefficient is taken off before it is stored, and it is stored once,
in the dtype in which the update multiplies it. With A rounded so, C = A V of that A, and
B′ = B − U C, an update removes from the right side exactly what it should, whatever A was rounded
to: (g − U A − B′ Vᵀ) V = g V − U C − B + U C = 0.

Every matrix is taken with its rows running along memory: one that runs down its columns is its
transpose, with U and V, and A and B, in each other's place.

May import: torch, ``osf_kernels.forms``, ``backends.jobs``, ``backends.operands``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch

from osf_kernels.backends.jobs import Coefficients, Matrix, New, Problem, Update
from osf_kernels.backends.operands import Arena
from osf_kernels.forms import Call, Expand, Reduce, basis_of, calls_of

Letter = Literal["A", "B", "C"]


class Reduction(NamedTuple):
    """out = x·basis + sign·initial − other·diag(S) + alpha·other·c, whichever there are.

    ``into`` says what it makes: Aᵀ = xᵀ U, B = x V, or C = A V as Cᵀ's or C's rows.
    """

    into: Letter
    out: Matrix  # (q, rank)
    x: Matrix | None = None  # (q, length)
    basis: Matrix | None = None  # (length, rank)
    initial: Matrix | None = None  # (q, rank)
    sign: int = 1
    other: Matrix | None = None  # (q, width); with S the width is the rank
    S: Matrix | None = None  # (rank,); without ``other`` diag(S) is taken off
    c: Matrix | None = None  # (width, rank) float32
    alpha: int = 0


Step = Reduction | Update


class Link(NamedTuple):
    """A step, and the places in its chain of the steps it waits for."""

    step: Step
    after: int | None = None
    c_after: int | None = None  # the step that makes ``c``; a sum may be under way before it


Chain = list[Link]


def chain_of_job(job: Coefficients | Update) -> Chain:
    """A single job of ``jobs``: both its sides at once."""
    if isinstance(job, Update):
        return [Link(_turned_update(job) if _runs_down(job.out) else job)]
    x, U, V, A, B, S, root = job
    return chain_of_halves(Problem(x, x, U, V, _NO_STEP, S, None, A, B, root=root))


def chain_of_halves(problem: Problem) -> Chain:
    """The coefficients A and B of a problem, those that there are, less what pins them."""
    x, _, U, V, _, S, _, A, B, rest_A, rest_B, root = problem
    # Of one side: name, out, what pins it.
    sides: list[tuple[Letter, Matrix | None, Matrix | None, Matrix | None]] = [
        ("A", A, S if root else None, rest_A if root else None),
        ("B", B, S, rest_B),
    ]
    if _runs_down(x):
        x, U, V = x.mT, V, U
        (_, A, *pins_A), (_, B, *pins_B) = sides
        sides = [
            ("A", _turned(B), pins_B[0], _turned(pins_B[1])),
            ("B", _turned(A), pins_A[0], _turned(pins_A[1])),
        ]
    return [
        Link(_sum(name, _as_stored(name, out), x, U, V, scale, rest))
        for name, out, scale, rest in sides
        if out is not None and out.numel()
    ]


def chains_of(
    problem: Problem, coefficient: torch.dtype, band_bytes: float
) -> Iterator[tuple[Chain, Arena]]:
    """The chains of a matrix, and the workspace of each.

    With a basis on one side alone, bands of a matrix have nothing to do with each other: one beyond
    ``band_bytes`` is so many chains that each band is still in the cache when it is read again.
    """
    for band in _bands(problem, band_bytes):
        arena = Arena(problem.x.device)
        yield chain_of(band, coefficient, arena.new), arena


_BAND = 256  # lines of a band are a multiple of them: whole tiles, and whole vectors


def _bands(problem: Problem, most_bytes: float) -> Iterator[Problem]:
    x, form = problem.x, problem.step.form
    count = math.ceil(x.numel() * x.dtype.itemsize / most_bytes)
    if form not in ("left", "right") or count < 2:
        yield problem
        return
    dim = 0 if form == "right" else 1
    lines = x.shape[dim]
    height = math.ceil(lines / count / _BAND) * _BAND
    for first in range(0, lines, height):
        length = min(height, lines - first)
        names = ("x", "out", "addend", "B" if form == "right" else "A")
        held = {name: getattr(problem, name) for name in names}
        part: dict[str, Any] = {
            name: None if t is None else t.narrow(dim, first, length) for name, t in held.items()
        }
        if problem.out is problem.x:
            part["out"] = part["x"]
        yield problem._replace(**part)


def chain_of(problem: Problem, coefficient: torch.dtype, new: New) -> Chain:
    """The steps of a projection or of what restores; ``coefficient``: the dtype A and B have in the
    update's products. ``new`` makes a matrix without values, its rows along memory."""
    return _Builder(problem, coefficient, new).chain()


_NO_STEP: Any = None


def _turned(t: Matrix | None) -> Matrix | None:
    return None if t is None else t.mT


def _runs_down(t: Matrix) -> bool:
    down, across = t.stride()
    return bool(across != 1 and (down == 1 or 0 < down < across))


def _turned_update(job: Update) -> Update:
    out, x, L1, R1, L2, R2, alpha, beta, addend = job
    left, right = (_turned(R2), _turned(L2)), (_turned(R1), _turned(L1))
    return Update(out.mT, x.mT, *left, *right, alpha, beta, _turned(addend))


def _letter(name: str) -> Letter:
    return "A" if name == "A" else "B"


def _as_stored(name: str, t: Matrix) -> Matrix:
    """A as Aᵀ (n, r), B as it is."""
    return t.mT if name == "A" else t


def _sum(
    into: Letter,
    out: Matrix,
    x: Matrix,
    U: Matrix | None,
    V: Matrix | None,
    S: Matrix | None,
    rest: Matrix | None,
) -> Reduction:
    """Aᵀ = xᵀ U less V diag(S) and restᵀ, or B = x V less U diag(S) and rest."""
    initial = None if rest is None else _as_stored(into, rest)
    if into == "A":
        return Reduction("A", out, x.mT, U, initial, -1, other=V, S=S)
    return Reduction("B", out, x, V, initial, -1, other=U, S=S)


_SWAPPED = str.maketrans("AB", "BA")


def _swapped(call: Call) -> Call:
    """The call of the transposed problem."""
    names = {"into": call.into.translate(_SWAPPED), "of": call.of.translate(_SWAPPED)}
    if isinstance(call, Expand):
        names["by"] = "".join(sorted(call.by.translate(_SWAPPED)))
    elif len(names["into"]) > 1:
        names["into"] = "".join(sorted(names["into"]))
    return call._replace(**names)  # type: ignore[arg-type]


class _Builder:
    """Turns a problem's calls into a chain."""

    def __init__(self, problem: Problem, coefficient: torch.dtype, new: New) -> None:
        x, out, U, V, step, S, addend, A, B, rest_A, rest_B, root = problem
        calls = calls_of(step.form, step.first)
        if not calls:
            raise AssertionError(f"no kernel is wanted for the form {step.form!r}")
        self.roots = {"A": root, "B": True, "C": True}
        # What is pinned beside S: of "inner" it is of C.
        inner = step.form == "inner"
        self.rests: dict[str, Matrix | None] = {
            "A": rest_A,
            "B": None if inner else rest_B,
            "C": rest_B if inner else None,
        }
        self.turned = _runs_down(x)
        if self.turned:
            x, out, U, V, addend, A, B = (
                x.mT, out.mT, V, U, _turned(addend), _turned(B), _turned(A)
            )  # fmt: skip
            calls = tuple(map(_swapped, calls))
            self.roots.update(A=self.roots["B"], B=root)
            rests = self.rests
            self.rests = {"A": rests["B"], "B": rests["A"], "C": rests["C"]}
            self.rests = {name: _turned(rest) for name, rest in self.rests.items()}
        self.step, self.calls, self.S, self.addend = step, calls, S, addend
        self.bases: dict[str, Matrix] = {"U": U, "V": V}
        self.coefficient, self.new = coefficient, new
        self.ready: dict[str, Matrix] = {
            name: t for name, t in (("A", A), ("B", B)) if t is not None
        }
        self.held: dict[str, Matrix] = {"x": x, "y": out}  # A as (r, n), B as (m, k), C as (r, k)
        self.links: Chain = []
        self.made: dict[str, int] = {}  # the place of the step that made a coefficient
        # A sum that C corrects before it is stored, and the step it follows.
        self.waiting: tuple[Reduction, int | None] | None = None

    def chain(self) -> Chain:
        for name, matrix in self.ready.items():
            self.held[name] = matrix
            # What C is made from is the result of a step, which may make C's products at its end.
            is_read = matrix.dtype != self.coefficient and self._is_multiplied(name)
            if matrix.numel() and (is_read or self._source_of_C() == name):
                made = Reduction(_letter(name), self._stored(name, self.coefficient))
                self._add(made._replace(initial=_as_stored(name, matrix)), after=None)
                self.made[name] = len(self.links) - 1
        for i, call in enumerate(self.calls):
            if isinstance(call, Expand):
                last = i == len(self.calls) - 1
                self._correct(call) if call.into in "AB" else self._update(call, last)
            elif call.into == "C":
                self._reduce_C(self._source_of_C())
            elif not self.ready:
                self._reduce(call)
        return self.links

    def _source_of_C(self) -> str | None:
        """The coefficient that C is made from."""
        source = next((c.of for c in self.calls if c.into == "C"), None)
        if source is not None and self.ready:
            # Of ready coefficients A is the whole matrix's, and B may be a part's.
            first, second = "BA" if self.turned else "AB"
            source = first if first in self.ready else second
        return source

    def _is_multiplied(self, name: str) -> bool:
        """Whether a ready coefficient meets a basis as it is."""
        for call in self.calls:
            if isinstance(call, Expand) and call.into == name:  # it is corrected, or made anew
                return False
        return any(isinstance(call, Expand) and name in call.by for call in self.calls)

    def _add(self, step: Step, c_after: int | None = None, *, after: int | None = -1) -> None:
        """After the step before, unless said otherwise."""
        if after == -1:
            after = len(self.links) - 1 if self.links else None
        self.links.append(Link(step, after, c_after))

    def _lengths(self, name: str) -> tuple[int, int, Matrix]:
        """(q, rank) of Aᵀ or B as they are stored, and the basis of the other side."""
        m, n = self.held["x"].shape
        U, V = self.bases["U"], self.bases["V"]
        if name == "A":
            return n, U.shape[-1], V
        return m, V.shape[-1], U

    def _stored(self, name: str, dtype: torch.dtype) -> Matrix:
        """Memory for Aᵀ or B, which is held from now on."""
        q, rank, _ = self._lengths(name)
        out = self.new(q, rank, dtype)
        self.held[name] = out.mT if name == "A" else out
        return out

    def _correction_of(self, name: str) -> tuple[Expand | None, bool]:
        """The call that adds to a coefficient, and whether that is done before it is stored."""
        for call in self.calls:
            if isinstance(call, Expand) and call.into == name and call.beta:
                return call, self._source_of_C() != name and not self.ready
        return None, False

    def _reduce(self, call: Reduce) -> None:
        x, begins = self.held[call.of], len(self.links) - 1 if self.links else None
        for name in call.into:
            correction, joined = self._correction_of(name)
            dtype = torch.float32 if correction is not None and not joined else self.coefficient
            out = self._stored(name, dtype)
            pinned = self.step.form == "dual" and self.roots[name]
            S, rest = (self.S, self.rests[name]) if pinned else (None, None)
            made = _sum(_letter(name), out, x, self.bases["U"], self.bases["V"], S, rest)
            if joined:
                self.waiting = made, begins
            else:
                self._add(made, after=begins)
                self.made[name] = len(self.links) - 1

    def _reduce_C(self, name: str | None) -> None:
        assert name is not None
        basis = self.bases[basis_of("C", name)]
        x = self.held[name] if name == "A" else self.held[name].mT
        out = self.new(x.shape[0], basis.shape[-1], torch.float32)
        self.held["C"] = out if name == "A" else out.mT
        made = Reduction("C", out, x, basis)
        if self.step.form == "inner" and self.S is not None:
            rest = self.rests["C"]
            if rest is not None:
                made = made._replace(initial=rest if name == "A" else rest.mT, sign=-1)
            made = made._replace(S=self.S)
        self._add(made, after=self.made.get(name))
        self.made["C"] = len(self.links) - 1

    def _correct(self, call: Expand) -> None:
        """A or B plus, or from, C and the basis of the other side."""
        name = _letter(call.into)
        alpha = int(call.alpha or 0)
        *_, other = self._lengths(name)
        c = self.held["C"]
        if name == "A":  # Aᵀ + alpha V Cᵀ
            c = c.mT
        if self.waiting is not None:
            made, begins = self.waiting
            self.waiting = None
            corrected = made._replace(other=other, c=c, alpha=alpha)
            self._add(corrected, self.made["C"], after=begins)
            return
        initial = _as_stored(name, self.held[name]) if call.beta else None
        out = self._stored(name, self.coefficient)
        made = Reduction(name, out, initial=initial, other=other, c=c, alpha=alpha)
        self._add(made, self.made["C"], after=None if initial is None else self.made.get(name))

    def _update(self, call: Expand, last: bool) -> None:
        step = self.step
        alpha = step.alpha if call.alpha is None else call.alpha
        beta = step.beta if call.beta is None else call.beta
        if call.into == "w" and "w" not in self.held:
            rows, columns = self.held["x"].shape
            self.held["w"] = self.new(rows, columns, self.held["x"].dtype)
        out = self.held[call.into]
        L1 = R1 = L2 = R2 = None
        if "A" in call.by:
            L1, R1 = self.bases["U"], self.held["A"]
        if "B" in call.by:
            L2, R2 = self.held["B"], self.bases["V"].mT
        addend = self.addend if last else None
        plus = self.held.get(call.plus)
        more = addend if plus is None else plus
        read = self.held.get(call.of, out)
        made = Update(out, read, L1, R1, L2, R2, alpha, beta, more)
        self._add(_turned_update(made) if _runs_down(out) else made)
        if plus is not None and addend is not None:
            self._add(Update(out, out, None, None, None, None, 1.0, 1.0, addend))
