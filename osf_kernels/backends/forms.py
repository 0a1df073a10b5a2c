"""Every form of the projection as at most four steps of two grouped kernels.

The two kernels are the only thing a backend implements:

``coefficients``  A = Uᵀ x and/or B = x V  (optionally less S Vᵀ and U S), one read of x
``update``        out = beta·x + alpha·(L1 R1 + L2 R2) + addend, one read of x and one write

A form yields its steps one after another; :func:`run` gathers the same step of every
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

May import: torch and ``osf_kernels.plan``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from osf_kernels.plan import Step


class Coefficients(NamedTuple):
    """A = Uᵀ x and B = x V; with S: A −= diag(S) Vᵀ, B −= U diag(S).

    Either side may be absent (its basis and its output are None together). With S both sides
    are present and r = k. Any strides; A and B are written entirely, and overlap nothing that a
    job of the same list reads: one job's may be written while another is read.
    """

    x: Tensor  # (m, n)
    U: Tensor | None  # (m, r)
    V: Tensor | None  # (n, k)
    A: Tensor | None  # (r, n), float32 (float64 for float64 x), or x's dtype
    B: Tensor | None  # (m, k), the same dtype as A
    S: Tensor | None = None  # (r,) float32


class Update(NamedTuple):
    """out = beta·x + alpha·(L1 R1 + L2 R2) + addend.

    A basis stands left in the first term and right in the second; the other factor of a term
    is a coefficient (R1 and L2). ``out`` may be x. beta is 0 or 1, and with beta = 0 x is
    not read (it may hold NaN). A term's two factors are absent together; with both absent the
    sum is zero.
    """

    out: Tensor  # (m, n)
    x: Tensor  # (m, n)
    L1: Tensor | None  # (m, r) basis U
    R1: Tensor | None  # (r, n) coefficient A
    L2: Tensor | None  # (m, k) coefficient B
    R2: Tensor | None  # (k, n) basis Vᵀ
    alpha: float
    beta: float
    addend: Tensor | None = None  # (m, n)


class Kernels(Protocol):
    """What a grouped backend provides; both take lists of any mix of shapes and dtypes."""

    def coefficients(self, jobs: Sequence[Coefficients]) -> None: ...

    def update(self, jobs: Sequence[Update]) -> None: ...


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

    x: Tensor  # (m, n), read
    out: Tensor  # (m, n), written; may be x
    U: Tensor | None  # (m, r) columns as held
    V: Tensor | None  # (n, k)
    step: Step
    S: Tensor | None = None  # (r,): the protected part to pin, from singular values
    addend: Tensor | None = None  # (m, n): the protected part to pin, dense
    A: Tensor | None = None  # (r, n) ready-made coefficients of apply_: the first step is skipped
    B: Tensor | None = None  # (m, k)
    # Beside S: UᵀW is pinned to S Vᵀ + rest_A, W V to U S + rest_B; of "inner" UᵀWV to S + rest_B.
    rest_A: Tensor | None = None  # (r, n)
    rest_B: Tensor | None = None  # (m, k); of "inner" (r, k)


def coefficient_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 matrix: a coefficient sums m or n products."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def steps(problem: Problem, dtype: torch.dtype) -> Iterator[Coefficients | Update]:
    """The kernel calls of one matrix in order, its coefficients held in ``dtype``.

    A step's outputs are allocated when it is yielded and hold values when the next is asked for.
    """
    x, out, U, V, step, S, addend, A, B, rest_A, rest_B = problem
    form, left_first = step.form, step.first == "left"
    ready = A is not None or B is not None  # apply_: the caller's, so not to be written

    if form == "identity":
        if addend is not None:
            torch.add(x, addend, out=out)
        elif out is not x:
            out.copy_(x)
        return
    if form == "zero":  # 0·x rather than 0, so that NaN and Inf stay visible
        torch.mul(x, 0, out=out)
        if addend is not None:
            out.add_(addend)
        return

    m, n = x.shape[-2:]
    r = 0 if U is None else U.shape[-1]
    k = 0 if V is None else V.shape[-1]
    Vt = None if V is None else V.mT

    def new(rows: int, columns: int) -> Tensor:
        return x.new_empty((*x.shape[:-2], rows, columns), dtype=dtype)

    if form == "sequential":
        rest = out if step.beta else torch.empty_like(x)
        A, B = new(r, n), new(m, k)
        yield Coefficients(x, U, None, A, None)
        yield Update(rest, x, U, A, None, None, -1.0, 1.0)
        yield Coefficients(rest, None, V, None, B)
        yield Update(rest, rest, None, None, B, Vt, -1.0, 1.0, addend if step.beta else None)
        if not step.beta:
            torch.sub(x, rest, out=out)
            if addend is not None:
                out.add_(addend)
        return

    if form in ("mixed in turn", "inner in turn"):
        rest = torch.empty_like(x)
        A, B = new(r, n), new(m, k)
        yield Coefficients(x, U, None, A, None)
        outside = (-1.0, 1.0) if form == "mixed in turn" else (1.0, 0.0)
        yield Update(rest, x, U, A, None, None, *outside)
        yield Coefficients(rest, None, V, None, B)
        yield Update(out, x, None, None, B, Vt, step.alpha, step.beta, addend)
        return

    two_sided = form in ("dual", "mixed", "inner")
    uses_A = form in ("dual", "left") or (two_sided and left_first)
    uses_B = form in ("dual", "right") or (two_sided and not left_first)
    if not ready:
        A = new(r, n) if uses_A else None
        B = new(m, k) if uses_B else None
        offset = S if form == "dual" else None
        yield Coefficients(x, U if uses_A else None, V if uses_B else None, A, B, offset)
        if form == "dual":
            subtract(A, rest_A)
            subtract(B, rest_B)
    elif form == "dual" and S is not None:
        assert A is not None
        assert B is not None
        assert U is not None
        assert V is not None
        A.addcmul_(S.unsqueeze(-1), V.mT.to(dtype), value=-1.0)
        B.addcmul_(U.to(dtype), S.unsqueeze(-2), value=-1.0)
        subtract(A, rest_A)
        subtract(B, rest_B)

    if two_sided:
        C = new(r, k)  # Uᵀ g V, from whichever coefficient is whole
        if A is not None:
            yield Coefficients(A, None, V, None, C)
        else:
            assert B is not None
            yield Coefficients(B, U, None, C, None)
        if S is not None and form == "inner":
            C.diagonal(dim1=-2, dim2=-1).sub_(S)
            subtract(C, rest_B)
        sign, keep = (1.0, 0.0) if form == "inner" else (-1.0, 1.0)
        if uses_B:
            before = B
            B = new(m, k) if ready or before is None else before
            yield Update(B, B if before is None else before, U, C, None, None, sign, keep)
        else:
            before = A
            A = new(r, n) if ready or before is None else before
            yield Update(A, A if before is None else before, None, None, C, Vt, sign, keep)

    left = (U, A) if uses_A else (None, None)
    right = (B, Vt) if uses_B else (None, None)
    yield Update(out, x, *left, *right, step.alpha, step.beta, addend)


def subtract(coefficient: Tensor | None, rest: Tensor | None) -> None:
    """What is pinned beside S, which may be held in fewer bits than the coefficient."""
    if coefficient is not None and rest is not None:
        coefficient.sub_(rest)


def run(problems: Sequence[Problem], kernels: Kernels) -> None:
    """Runs all problems side by side, each kernel for as many of them at once as can be.

    Updates wait until no matrix wants coefficients, so that short forms share the launches of
    long ones: a list takes as many launches as its longest form, one more with sequential ones.
    """
    generators = [steps(problem, coefficient_dtype(problem.x)) for problem in problems]
    wanting = [(steps_, job) for steps_ in generators if (job := next(steps_, None))]
    while wanting:
        reductions = [job for _, job in wanting if isinstance(job, Coefficients)]
        updates = [job for _, job in wanting if isinstance(job, Update)]
        if reductions:
            kernels.coefficients(reductions)
        else:
            kernels.update(updates)
        ran = Coefficients if reductions else Update
        wanting = [
            (steps_, following)
            for steps_, job in wanting
            if (following := next(steps_, None) if isinstance(job, ran) else job)
        ]


def launches(forms: Iterable[str]) -> int:
    """How many kernel calls :func:`run` makes for a list of these forms."""
    wanting = [SEQUENCES[form] for form in forms]
    count = 0
    while wanting := [rest for rest in wanting if rest]:
        ran = "C" if any(rest[0] == "C" for rest in wanting) else "U"
        wanting = [rest[1:] if rest[0] == ran else rest for rest in wanting]
        count += 1
    return count


def library_calls(form: str) -> int:
    """How many library calls the torch backend makes for one matrix of this form."""
    return len(SEQUENCES[form]) or (form == "zero")
