"""Every form of the projection as at most four steps of two grouped kernels.

The two kernels are the only thing a backend implements:

``coefficients``  A = Uᵀ x and/or B = x V  (optionally less S Vᵀ and U S), one read of x
``update``        out = beta·x + alpha·(L1 R1 + L2 R2) + addend, one read of x and one write

A form yields its steps one after another; :func:`in_stages` gathers the same step of every
matrix of a list, so that a whole model takes one call of a kernel a step.

With E = U Uᵀ and F = V Vᵀ of the columns a caller passed, whatever they span:

=============  ================================  ===================================
form           value X                           steps
=============  ================================  ===================================
dual           E g + g F − E g F                 A, B | C = A V | B −= U C | U A + B Vᵀ
sequential     the same, one side at a time      A | g −= U A | B | g −= B Vᵀ  (see below)
mixed, left    E g (I − F)                       A | C = A V | A −= C Vᵀ | U A
mixed, right   (I − E) g F                       B | C = Uᵀ B | B −= U C | B Vᵀ
inner, left    E g F                             A | C = A V | A = C Vᵀ | U A
inner, right   E g F                             B | C = Uᵀ B | B = U C | B Vᵀ
in turn        (I − E) g F, or E g F             A | g − U A, or U A | B | B Vᵀ  (see below)
left / right   E g  /  g F                       A | U A   /   B | B Vᵀ
=============  ================================  ===================================

and the result is beta·g + alpha·X + addend. Sequential with beta = 0 does its steps on a
workspace and subtracts that from g; mixed and inner in turn keep their left side in one, which
errs least where both sides hold most of g. Complement and core, high and low bases are
choices of form, alpha and beta (see ``osf_kernels/plan.py``); restoring is the same with an
offset on the coefficients (S) or a dense addend.

May import: torch, ``osf_kernels.plan`` and ``osf_kernels._padding``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels.backends.operands import Operand
from osf_kernels.plan import Step

# A tensor, or an ``Operand`` that stands for one of which the address comes later.
Matrix = Any
New = Callable[[int, int, torch.dtype], Matrix]


class Coefficients(NamedTuple):
    """A = Uᵀ x and B = x V; with S: A −= diag(S) Vᵀ, B −= U diag(S).

    Either side may be absent (its basis and its output are None together). With S both sides
    are present and r = k. Any strides; A and B are written entirely, and overlap nothing that a
    job of the same list reads: one job's may be written while another is read.
    """

    x: Matrix  # (m, n)
    U: Matrix | None  # (m, r)
    V: Matrix | None  # (n, k)
    A: Matrix | None  # (r, n), float32 (float64 for float64 x), or x's dtype
    B: Matrix | None  # (m, k), the same dtype as A
    S: Matrix | None = None  # (r,) float32


class Update(NamedTuple):
    """out = beta·x + alpha·(L1 R1 + L2 R2) + addend.

    A basis stands left in the first term and right in the second; the other factor of a term
    is a coefficient (R1 and L2). ``out`` may be x or addend. beta is 0, 1 or −1, and with
    beta = 0 x is not read (it may hold NaN). A term's two factors are absent together; with both
    absent the sum is zero.
    """

    out: Matrix  # (m, n)
    x: Matrix  # (m, n)
    L1: Matrix | None  # (m, r) basis U
    R1: Matrix | None  # (r, n) coefficient A
    L2: Matrix | None  # (m, k) coefficient B
    R2: Matrix | None  # (k, n) basis Vᵀ
    alpha: float
    beta: float
    addend: Matrix | None = None  # (m, n)


Job = Coefficients | Update

# The kernels of each form in order, C for coefficients and U for update: what steps() yields.
SEQUENCES = {
    "identity": "",
    "zero": "",
    "left": "CU",
    "right": "CU",
    "dual": "CCUU",
    "sequential": "CUCU",
    "mixed": "CCUU",
    "inner": "CCUU",
    "mixed in turn": "CUCU",
    "inner in turn": "CUCU",
}


class Problem(NamedTuple):
    """One matrix to project or to restore, with the form that was chosen for it."""

    x: Matrix  # (m, n), read
    out: Matrix  # (m, n), written; may be x
    U: Matrix | None  # (m, r) columns as held
    V: Matrix | None  # (n, k)
    step: Step
    S: Tensor | None = None  # (r,): the protected part to pin, from singular values
    addend: Tensor | None = None  # (m, n): the protected part to pin, dense
    A: Matrix | None = None  # (r, n) ready-made coefficients of apply_: the first step is skipped
    B: Matrix | None = None  # (m, k)
    # Beside S: UᵀW is pinned to S Vᵀ + rest_A, W V to U S + rest_B; of "inner" UᵀWV to S + rest_B.
    rest_A: Tensor | None = None  # (r, n)
    rest_B: Tensor | None = None  # (m, k); of "inner" (r, k)


def each_of_batch(problem: Problem, kept: int = 0) -> Iterator[Problem]:
    """The problems of a batch: of matrices, or of batches of the last ``kept`` dimensions."""
    batch = problem.x.shape[:-2]
    if not batch:
        yield problem
        return
    whole: dict[str, Any] = {}
    for name, t in problem._asdict().items():
        if isinstance(t, Tensor):
            whole[name] = t.expand(*batch, *t.shape[t.dim() - (1 if name == "S" else 2) :])
        elif isinstance(t, Operand):
            whole[name] = t
    for index in itertools.product(*map(range, batch[: len(batch) - kept])):
        part = {name: t[index] for name, t in whole.items()}
        if problem.out is problem.x:  # the same object still, or torch would copy x onto itself
            part["out"] = part["x"]
        yield problem._replace(**part)


def coefficient_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 matrix: a coefficient sums m or n products."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def steps(problem: Problem, dtype: torch.dtype, new: New) -> Iterator[Coefficients | Update]:
    """The kernel calls of one matrix in order, its coefficients held in ``dtype``.

    ``new(rows, columns, dtype)`` makes a matrix without values. A call's outputs hold values when
    the next call is asked for. "identity" and "zero" multiply nothing: torch runs them.
    """
    x, out, U, V, step, S, addend, A, B, rest_A, rest_B = problem
    form, left_first = step.form, step.first == "left"
    if form in ("identity", "zero"):
        raise AssertionError(f"no kernel is wanted for the form {form!r}")
    ready = A is not None or B is not None  # apply_: the caller's, so not to be written

    m, n = x.shape
    r = 0 if U is None else U.shape[-1]
    k = 0 if V is None else V.shape[-1]
    Vt = None if V is None else V.mT

    if form == "sequential":
        rest = out if step.beta else new(m, n, x.dtype)
        A, B = new(r, n, dtype), new(m, k, dtype)
        yield Coefficients(x, U, None, A, None)
        yield Update(rest, x, U, A, None, None, -1.0, 1.0)
        yield Coefficients(rest, None, V, None, B)
        if step.beta:
            yield Update(out, out, None, None, B, Vt, -1.0, 1.0, addend)
            return
        yield Update(out, rest, None, None, B, Vt, 1.0, -1.0, x)
        if addend is not None:
            yield plus(out, out, addend)
        return

    if form in ("mixed in turn", "inner in turn"):
        rest = new(m, n, x.dtype)
        A, B = new(r, n, dtype), new(m, k, dtype)
        yield Coefficients(x, U, None, A, None)
        outside = (-1.0, 1.0) if form == "mixed in turn" else (1.0, 0.0)
        yield Update(rest, x, U, A, None, None, *outside)
        yield Coefficients(rest, None, V, None, B)
        yield Update(out, x, None, None, B, Vt, step.alpha, step.beta, addend)
        return

    two_sided = form in ("dual", "mixed", "inner")
    uses_A = form in ("dual", "left") or (two_sided and left_first)
    uses_B = form in ("dual", "right") or (two_sided and not left_first)
    offset = S if form == "dual" else None
    if not ready:
        A = new(r, n, dtype) if uses_A else None
        B = new(m, k, dtype) if uses_B else None
        yield Coefficients(x, U if uses_A else None, V if uses_B else None, A, B, offset)
    elif offset is not None:
        # A sum of no products has the offset alone: −S Vᵀ and −U S.
        given_A, given_B, A, B = A, B, new(r, n, dtype), new(m, k, dtype)
        assert U is not None
        assert V is not None
        yield Coefficients(new(0, n, dtype), U[:0], V, A, new(0, k, dtype), offset)
        yield Coefficients(new(m, 0, dtype), U, V[:0], new(r, 0, dtype), B, offset)
        yield plus(A, given_A, A)
        yield plus(B, given_B, B)
        ready = False
    if form == "dual":
        for coefficient, rest in ((A, rest_A), (B, rest_B)):
            if rest is not None:
                yield less(coefficient, coefficient, rest)

    if two_sided:
        C = new(r, k, dtype)  # Uᵀ g V, from whichever coefficient is whole
        if A is not None:
            yield Coefficients(A, None, V, None, C)
        else:
            yield Coefficients(B, U, None, C, None)
        if S is not None and form == "inner":
            diagonal = C.diagonal().unsqueeze(0)
            yield less(diagonal, diagonal, S.unsqueeze(0))
            if rest_B is not None:
                yield less(C, C, rest_B)
        sign, keep = (1.0, 0.0) if form == "inner" else (-1.0, 1.0)
        if uses_B:
            before = B
            B = new(m, k, dtype) if ready or before is None else before
            yield Update(B, B if before is None else before, U, C, None, None, sign, keep)
        else:
            before = A
            A = new(r, n, dtype) if ready or before is None else before
            yield Update(A, A if before is None else before, None, None, C, Vt, sign, keep)

    left = (U, A) if uses_A else (None, None)
    right = (B, Vt) if uses_B else (None, None)
    yield Update(out, x, *left, *right, step.alpha, step.beta, addend)


def plus(out: Matrix, x: Matrix, y: Matrix) -> Update:
    """out = x + y; out may be either."""
    return Update(out, x, None, None, None, None, 1.0, 1.0, y)


def less(out: Matrix, x: Matrix, y: Matrix) -> Update:
    """out = x − y; out may be either."""
    return Update(out, y, None, None, None, None, 1.0, -1.0, x)


def in_stages(generators: Iterable[Iterator[Job]]) -> Iterator[list[Any]]:
    """The calls of many matrices side by side, each kernel for as many of them at once as can be.

    Updates wait until no matrix wants coefficients, so that short forms share the launches of
    long ones: a list takes as many launches as its longest form, one more with sequential ones. A
    stage must have run before the next is asked for.
    """
    wanting = [(steps_, job) for steps_ in generators if (job := next(steps_, None))]
    while wanting:
        reductions = [job for _, job in wanting if isinstance(job, Coefficients)]
        yield reductions or [job for _, job in wanting]
        ran = Coefficients if reductions else Update
        wanting = [
            (steps_, following)
            for steps_, job in wanting
            if (following := next(steps_, None) if isinstance(job, ran) else job)
        ]


def library_calls(form: str) -> int:
    """How many library calls the torch backend makes for one matrix of this form."""
    return len(SEQUENCES[form]) or (form == "zero")
