"""What grouped kernels are asked for: the forms of ``osf_kernels/forms.py`` as jobs of two kinds.

``coefficients``  A = Uᵀ x and/or B = x V  (optionally less S Vᵀ and U S), one read of x
``update``        out = beta·x + alpha·(L1 R1 + L2 R2) + addend, one read of x and one write

The CUDA backend has a kernel for each. A form yields its jobs one after another (:func:`steps`),
and :func:`in_stages` gathers the same job of every matrix of a list, so that a whole model takes
one call of a kernel a job. The Triton backend joins them in chains (``chains.py``), a list of
which is one launch. Restoring is projecting with an offset on the coefficients (S) or with a dense
addend.

May import: torch, ``osf_kernels.forms``, ``osf_kernels.plan``, ``backends.operands``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels.backends.operands import Operand
from osf_kernels.forms import Reduce, basis_of, calls_of
from osf_kernels.plan import Step

# A tensor, or an ``Operand`` that stands for one of which the address comes later.
Matrix = Any
New = Callable[[int, int, torch.dtype], Matrix]


class Coefficients(NamedTuple):
    """A = Uᵀ x and B = x V; with S: A −= diag(S) Vᵀ, B −= U diag(S).

    Either side may be absent (its basis and its output are None together). With S both sides
    are present and r = k; without ``root`` S is taken off B alone. Any strides; A and B are written
    entirely, and overlap nothing that a job of the same list reads: one job's may be written while
    another is read.
    """

    x: Matrix  # (m, n)
    U: Matrix | None  # (m, r)
    V: Matrix | None  # (n, k)
    A: Matrix | None  # (r, n), float32 (float64 for float64 x), or x's dtype
    B: Matrix | None  # (m, k), the same dtype as A
    S: Matrix | None = None  # (r,) float32
    root: bool = True


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
Stage = Sequence[Job]  # of one kernel, none of which reads what another writes


class Problem(NamedTuple):
    """One matrix to project or to restore, with the form that was chosen for it."""

    x: Matrix  # (m, n), read
    out: Matrix  # (m, n), written; may be x
    U: Matrix | None  # (m, r) columns as held
    V: Matrix | None  # (n, k)
    step: Step
    S: Tensor | None = None  # (r,): the protected part to pin, from singular values
    addend: Tensor | None = None  # (m, n): the protected part to pin, dense
    # Ready coefficients, so that the first call is skipped; of "dual" they are less what pins them.
    A: Matrix | None = None  # (r, n)
    B: Matrix | None = None  # (m, k)
    # Beside S: UᵀW is pinned to S Vᵀ + rest_A, W V to U S + rest_B; of "inner" UᵀWV to S + rest_B.
    rest_A: Tensor | None = None  # (r, n)
    rest_B: Tensor | None = None  # (m, k); of "inner" (r, k)
    root: bool = True  # of the shards that sum A, the one that takes S Vᵀ + rest_A off


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


def steps(problem: Problem, dtype: torch.dtype, new: New) -> Iterator[Stage]:
    """The jobs of one matrix in order, its coefficients held in ``dtype``.

    ``new(rows, columns, dtype)`` makes a matrix without values. A stage's outputs hold values when
    the next stage is asked for. "identity" and "zero" multiply nothing: torch runs them.
    """
    x, out, U, V, step, S, addend, A, B, _, rest_B, _ = problem
    calls = calls_of(step.form, step.first)
    if not calls:
        raise AssertionError(f"no kernel is wanted for the form {step.form!r}")
    m, n = x.shape
    r = 0 if U is None else U.shape[-1]
    k = 0 if V is None else V.shape[-1]
    Vt = None if V is None else V.mT
    shapes = {"A": (r, n), "B": (m, k), "C": (r, k), "w": (m, n)}
    ready = {name: t for name, t in (("A", A), ("B", B)) if t is not None}  # the caller's to keep
    held: dict[str, Matrix] = {"x": x, "y": out, **ready}

    def made(name: str) -> Matrix:
        """The operand of that letter, to be written."""
        if name not in held or held[name] is ready.get(name):
            held[name] = new(*shapes[name], x.dtype if name == "w" else dtype)
        return held[name]

    for call in calls:
        if isinstance(call, Reduce) and call.into == "C":
            C = made("C")
            # Of ready coefficients A is the whole matrix's, and B may be a part's.
            if "A" in held:
                yield [Coefficients(held["A"], None, V, None, C)]
            else:
                yield [Coefficients(held["B"], U, None, C, None)]
            if S is not None and step.form == "inner":
                diagonal = C.diagonal().unsqueeze(0)
                yield [less(diagonal, diagonal, S.unsqueeze(0))]
                if rest_B is not None:
                    yield [less(C, C, rest_B)]
        elif isinstance(call, Reduce):
            if not ready:
                own = {name: made(name) for name in call.into}
                offset = S if step.form == "dual" else None
                yield from reduced(problem._replace(x=held[call.of], S=offset, **own))
        else:
            alpha = step.alpha if call.alpha is None else call.alpha
            beta = step.beta if call.beta is None else call.beta
            read, written = held.get(call.of), made(call.into)
            left: tuple[Matrix, Matrix] = (None, None)
            right: tuple[Matrix, Matrix] = (None, None)
            for name in call.by:
                if basis_of(name, call.into) == "U":
                    left = U, held[name]
                else:
                    right = held[name], Vt
            more = held.get(call.plus, addend if call is calls[-1] else None)
            read = written if read is None else read
            (L1, R1), (L2, R2) = left, right
            yield [Update(written, read, L1, R1, L2, R2, alpha, beta, more)]
            if call.plus and addend is not None:
                yield [plus(out, out, addend)]


def reduced(problem: Problem) -> Iterator[Stage]:
    """The jobs of the problem's A and B, those that there are, less what pins them."""
    x, _, U, V, _, S, _, A, B, rest_A, rest_B, root = problem
    left, right = (None if A is None else U), (None if B is None else V)
    yield [Coefficients(x, left, right, A, B, S, root)]
    if S is not None:
        rests = (A, rest_A if root else None), (B, rest_B)
        if taken := [less(t, t, rest) for t, rest in rests if rest is not None]:
            yield taken


def plus(out: Matrix, x: Matrix, y: Matrix) -> Update:
    """out = x + y; out may be either."""
    return Update(out, x, None, None, None, None, 1.0, 1.0, y)


def less(out: Matrix, x: Matrix, y: Matrix) -> Update:
    """out = x − y; out may be either."""
    return Update(out, y, None, None, None, None, 1.0, -1.0, x)


def in_stages(generators: Iterable[Iterator[Stage]]) -> Iterator[list[Any]]:
    """The jobs of many matrices side by side, each kernel for as many of them at once as can be.

    Updates wait until no matrix wants coefficients, so that short forms share the launches of
    long ones: a list takes as many launches as its longest form, one more with sequential ones. A
    stage must have run before the next is asked for.
    """
    wanting = [(stages, jobs) for stages in generators if (jobs := next(stages, None))]
    while wanting:
        reductions = [job for _, jobs in wanting for job in jobs if isinstance(job, Coefficients)]
        yield reductions or [job for _, jobs in wanting for job in jobs]
        ran = Coefficients if reductions else Update
        wanting = [
            (stages, following)
            for stages, jobs in wanting
            if (following := next(stages, None) if isinstance(jobs[0], ran) else jobs)
        ]
