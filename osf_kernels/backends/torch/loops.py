"""The forms of ``osf_kernels/forms.py`` written out in torch, each a loop over a list's matrices.

They are written out rather than run from ``jobs.steps``, and the loops call torch alone: yielding
a step costs 2 µs, allocating its output from Python 3, a transposed view 0.5 and a function 0.1,
which a small matrix would feel. A Python function runs for a matrix only in the check of ``mixed``
for sums that cancelled.

A form takes (step, products, rows), all of one working dtype. ``products`` are mm, addmm and cat
of 2-D matrices or of batches. A row is (x, out, U, Uᵀ, V, Vᵀ, pin, (A, B)): ``out`` may be x, a pin
is S, rest_A and rest_B of a problem or None, and A and B are ready coefficients or None, which are
not written; those of ``dual`` are less what pins them. With beta = 0 x is not read by the update.

May import: torch, ``osf_kernels.plan`` and below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from osf_kernels.cpu import NARROW, SUMMED, SUMMED_TO
from osf_kernels.plan import Step

Rows = Iterable[tuple[Any, ...]]


def _identity(step: Step, products: Any, rows: Rows) -> None:
    for x, out, *_ in rows:
        if out is not x:
            out.copy_(x)


def _zero(step: Step, products: Any, rows: Rows) -> None:
    for x, out, *_ in rows:
        torch.mul(x, 0, out=out)  # not zero_(): NaN and Inf stay visible


def _left(step: Step, products: Any, rows: Rows) -> None:
    (mm, addmm, _), alpha, beta = products, step.alpha, step.beta
    for x, out, U, Ut, _, _, _, (A, _) in rows:
        if A is None:
            A = mm(Ut, x)
        addmm(x, U, A, alpha=alpha, out=out) if beta else mm(U, A, out=out)


def _right(step: Step, products: Any, rows: Rows) -> None:
    (mm, addmm, _), alpha, beta = products, step.alpha, step.beta
    for x, out, _, _, V, Vt, _, (_, B) in rows:
        if B is None:
            B = mm(x, V)
        addmm(x, B, Vt, alpha=alpha, out=out) if beta else mm(B, Vt, out=out)


def _dual(step: Step, products: Any, rows: Rows) -> None:
    (mm, addmm, cat), alpha, beta = products, step.alpha, step.beta
    for x, out, U, Ut, V, Vt, pin, (A, B) in rows:
        kept = A is not None  # the caller's, less what pins them
        if not kept:
            A, B = mm(Ut, x), mm(x, V)
            if pin is not None:
                S, rest_A, rest_B = pin
                A.addcmul_(S.unsqueeze(-1), Vt, value=-1.0)
                B.addcmul_(U, S.unsqueeze(-2), value=-1.0)
                if rest_A is not None:
                    A.sub_(rest_A)
                    B.sub_(rest_B)
        B = addmm(B, U, mm(A, V), alpha=-1.0, out=None if kept else B)
        if step.joined:
            L, R = cat((U, B), -1), cat((A, Vt), -2)
            addmm(x, L, R, alpha=alpha, out=out) if beta else mm(L, R, out=out)
        else:
            addmm(x, U, A, alpha=alpha, out=out) if beta else mm(U, A, out=out)
            addmm(out, B, Vt, alpha=alpha, out=out)


def _sequential(step: Step, products: Any, rows: Rows) -> None:
    mm, addmm, _ = products
    for x, out, U, Ut, V, Vt, _, _ in rows:
        addmm(x, U, mm(Ut, x), alpha=-1.0, out=out)
        addmm(out, mm(out, V), Vt, alpha=-1.0, out=out)


def _dual_in_turn(step: Step, products: Any, rows: Rows) -> None:
    mm, addmm, _ = products
    for x, out, U, Ut, V, Vt, _, _ in rows:
        rest = addmm(x, U, mm(Ut, x), alpha=-1.0)
        torch.sub(x, addmm(rest, mm(rest, V), Vt, alpha=-1.0, out=rest), out=out)


def _mixed(step: Step, products: Any, rows: Rows) -> None:
    """Left: U (A − (A V) Vᵀ). Right: (B − U (Uᵀ B)) Vᵀ, with A V for Uᵀ B where A is ready."""
    (mm, addmm, _), alpha, beta = products, step.alpha, step.beta
    for x, out, U, Ut, V, Vt, pin, (A, B) in rows:
        if step.first == "left":
            core = mm(Ut, x) if A is None else A
            if A is None and core.shape[-2] <= NARROW and x.is_cpu and x.dtype == torch.float32:
                wide = V.double()
                core = core - mm(wide, mm(wide.mT, core.mT.double())).float().mT
            else:
                core = addmm(core, mm(core, V), Vt, alpha=-1.0, out=core if A is None else None)
            addmm(x, U, core, alpha=alpha, out=out) if beta else mm(U, core, out=out)
        elif B is not None:
            core = addmm(B, U, mm(Ut, B) if A is None else mm(A, V), alpha=-1.0)
            addmm(x, core, Vt, alpha=alpha, out=out) if beta else mm(core, Vt, out=out)
        else:
            core = mm(x, V)
            few = x.device.type == "cpu" and 3 * V.shape[-1] <= x.shape[-1]
            before = _norm(core) if few else None
            if core.shape[-1] <= NARROW and x.is_cpu and x.dtype == torch.float32:
                wide = U.double()
                core = core - mm(wide, mm(wide.mT, core.double())).float()
            else:
                core = addmm(core, U, mm(Ut, core) if A is None else mm(A, V), alpha=-1.0, out=core)
            if before is not None and _cancelled(x, before, core):
                _mixed_in_turn(step, products, ((x, out, U, Ut, V, Vt, pin, (A, B)),))
            else:
                addmm(x, core, Vt, alpha=alpha, out=out) if beta else mm(core, Vt, out=out)


def _cancelled(x: Tensor, before: Tensor, core: Tensor) -> bool:
    """Whether what is left of x V has the rounding errors of a sum much larger than itself.

    They show where x V is most of x, which a few free columns seldom hold, and U takes half of it:
    then the error came to 2.7 times that of eager torch, which takes U off first.
    """
    taken = _norm(core) < 0.7 * before
    return bool(taken.any()) and bool((taken & (before > 0.6 * _norm(x))).any())


_norm = partial(torch.linalg.vector_norm, dim=(-2, -1))


def _mixed_in_turn(step: Step, products: Any, rows: Rows) -> None:
    (mm, addmm, _), alpha, beta = products, step.alpha, step.beta
    for x, out, U, Ut, V, Vt, _, _ in rows:
        rest = addmm(x, U, mm(Ut, x), alpha=-1.0)
        core = mm(rest, V)
        addmm(x, core, Vt, alpha=alpha, out=out) if beta else mm(core, Vt, out=out)


def _inner_in_turn(step: Step, products: Any, rows: Rows) -> None:
    (mm, addmm, _), alpha, beta = products, step.alpha, step.beta
    for x, out, U, Ut, V, Vt, _, _ in rows:
        rest = mm(U, mm(Ut, x))
        core = mm(rest, V)
        addmm(x, core, Vt, alpha=alpha, out=out) if beta else mm(core, Vt, out=out)


def _inner(step: Step, products: Any, rows: Rows) -> None:
    (mm, addmm, _), alpha, beta = products, step.alpha, step.beta
    left_first = step.first == "left"
    for x, out, U, Ut, V, Vt, pin, (A, _) in rows:
        n, exact = x.shape[-1], x.is_cpu and x.dtype == torch.float32
        parts = range(SUMMED, n, SUMMED) if exact and n <= SUMMED_TO else ()
        if left_first or A is not None:
            half = mm(Ut, x) if A is None else A
        elif parts:
            half = mm(x[..., :SUMMED], V[..., :SUMMED, :])
            for i in parts:
                addmm(half, x[..., i : i + SUMMED], V[..., i : i + SUMMED, :], out=half)
        else:
            half = mm(x, V)
        few = exact and (U if left_first else V).shape[-1] <= NARROW
        if few and A is None and pin is None:
            if left_first:
                wide = V.double()
                core = mm(wide, mm(wide.mT, half.mT.double())).float().mT
                addmm(x, U, core, alpha=alpha, out=out) if beta else mm(U, core, out=out)
            else:
                wide = U.double()
                core = mm(wide, mm(wide.mT, half.double())).float()
                addmm(x, core, Vt, alpha=alpha, out=out) if beta else mm(core, Vt, out=out)
            continue
        C = mm(half, V) if left_first or A is not None else mm(Ut, half)
        if pin is not None:
            S, _, rest_C = pin
            C.diagonal(dim1=-2, dim2=-1).sub_(S)
            if rest_C is not None:
                C.sub_(rest_C)
        if left_first:
            C = mm(C, Vt)
            addmm(x, U, C, alpha=alpha, out=out) if beta else mm(U, C, out=out)
        else:
            C = mm(U, C)
            addmm(x, C, Vt, alpha=alpha, out=out) if beta else mm(C, Vt, out=out)


LOOPS: dict[str, Callable[..., None]] = {
    "identity": _identity,
    "zero": _zero,
    "left": _left,
    "right": _right,
    "dual": _dual,
    "sequential": _sequential,
    "dual in turn": _dual_in_turn,
    "mixed": _mixed,
    "inner": _inner,
    "mixed in turn": _mixed_in_turn,
    "inner in turn": _inner_in_turn,
}
