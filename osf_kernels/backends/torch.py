"""The torch backend: every form of ``forms.py`` composed from torch matmuls.

It serves every device and dtype and is the only backend for float64. Matmuls run in bfloat16
where matrix and bases are bfloat16 (accumulated in float32 by the library, rounded once a
product); every other mixture is computed in float32 and rounded once on the way out. float16
always takes that way: a coefficient is as large as √m·max|g| and overflows float16 where g
itself doesn't. So does whatever pins a value or brings its own coefficients.

It is written out rather than run from ``forms.steps``: yielding a step costs 2 µs and
allocating its output from Python another 3, which a small matrix would feel.

May import: torch, ``osf_kernels.backends.forms``, ``osf_kernels._padding``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.backends.forms import Coefficients, Problem, subtract
from osf_kernels.plan import Step


def unavailable_reason(device: torch.device | None = None) -> str | None:
    return None


def coefficients(jobs: Sequence[Coefficients]) -> None:
    for x, U, V, A, B, _ in jobs:
        for out in (A, B):
            if out is not None:
                x = x.to(out.dtype)
        if U is not None and A is not None:
            torch.matmul(U.to(A.dtype).mT, x, out=A)
        if V is not None and B is not None:
            torch.matmul(x, V.to(B.dtype), out=B)


def run(problems: Sequence[Problem]) -> None:
    """One matrix after another, so that it stays in cache from product to product."""
    for problem in problems:
        _run(problem)


def _run(problem: Problem) -> None:
    x, out, U, V, step, S, addend, A, B, rest_A, rest_B = problem
    pin = None if S is None else (S, rest_A, rest_B)
    dtypes = x.dtype, None if U is None else U.dtype, None if V is None else V.dtype
    dtype = _working_dtype(*dtypes)
    if dtype == torch.bfloat16 and any(t is not None for t in (S, addend, A, B)):
        dtype = torch.float32  # what is pinned, or came in float32, is rounded once at the end
    target = out
    if x.dtype != dtype:
        x = target = x.to(dtype)
    U, V = _converted(U, dtype), _converted(V, dtype)
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        U, V = _dense(U), _dense(V)
        if _dense(x) is not x:
            x = target = x.contiguous()
    FORMS[step.form](x, target, U, V, step, pin, A, B)
    if addend is not None:
        target.add_(addend)
    if target is not out:
        out.copy_(target)


def _working_dtype(x: torch.dtype, U: torch.dtype | None, V: torch.dtype | None) -> torch.dtype:
    """float32 for 16-bit matrices, but bfloat16 where everything is."""
    if x == torch.bfloat16 and U in (x, None) and V in (x, None):
        return x
    return torch.float64 if x == torch.float64 else torch.float32


def _converted(basis: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A basis in a dtype; a copy has padded rows, of which cuBLAS too reads 16 bytes at a time."""
    if basis is None or basis.dtype == dtype:
        return basis
    return _padding.padded(basis, dtype=dtype)


def _dense(t: Tensor | None) -> Tensor | None:
    """A copy where rows are padded: torch 2.13's bfloat16 matmul on the CPU reads the padding, and
    a NaN there comes out in the product."""
    if t is None or t.is_contiguous() or t.mT.is_contiguous():
        return t
    return t.contiguous()


def needs_no_conversion(x: torch.dtype, U: torch.dtype | None, V: torch.dtype | None) -> bool:
    """Whether a matrix and its bases are, whatever their strides, multiplied as they are."""
    return x != torch.bfloat16 and {x, U or x, V or x} == {_working_dtype(x, U, V)}


def _identity(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    if out is not x:
        out.copy_(x)


def _zero(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    torch.mul(x, 0, out=out)  # not zero_(): NaN and Inf stay visible


def _left(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    _update(out, x, U, _mm(_transposed(U, x), x) if A is None else A, step)


def _right(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    _update(out, x, _mm(x, V) if B is None else B, V.mT, step)


def _dual(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    ready = A is not None
    if not ready:
        A, B = _mm(_transposed(U, x), x), _mm(x, V)
    if pin is not None:
        S, rest_A, rest_B = pin
        A.addcmul_(S.unsqueeze(-1), V.mT, value=-1.0)
        B.addcmul_(U, S.unsqueeze(-2), value=-1.0)
        subtract(A, rest_A)
        subtract(B, rest_B)
    correction = _mm(A, V)
    B = _add(B, U, correction, -1.0, None if ready else B)
    if step.joined:
        _update(out, x, torch.cat((U, B), -1), torch.cat((A, V.mT), -2), step)
    else:
        _update(out, x, U, A, step)
        _add(out, B, V.mT, step.alpha, out)


def _sequential(
    x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any
) -> None:
    if step.beta:
        _add(x, U, _mm(_transposed(U, x), x), -1.0, out)
        _add(out, _mm(out, V), V.mT, -1.0, out)
    else:
        rest = _add(x, U, _mm(_transposed(U, x), x), -1.0, None)
        torch.sub(x, _add(rest, _mm(rest, V), V.mT, -1.0, rest), out=out)


def _mixed(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    """Left: U (A − (A V) Vᵀ). Right: (B − U (Uᵀ B)) Vᵀ, with A V for Uᵀ B where A is ready."""
    if step.first == "left":
        core = _mm(_transposed(U, x), x) if A is None else A
        if A is None and _narrow(core.mT):
            core = core - _within(V, core.mT).mT
        else:
            core = _add(core, _mm(core, V), V.mT, -1.0, core if A is None else None)
        _update(out, x, U, core, step)
    else:
        ready = B is not None
        core = B if ready else _mm(x, V)
        watched = not ready and x.device.type == "cpu" and 3 * V.shape[-1] <= x.shape[-1]
        before = _norm(core) if watched else None
        if not ready and _narrow(core):
            core = core - _within(U, core)
        else:
            inner = _mm(U.mT, core) if A is None else _mm(A, V)
            core = _add(core, U, inner, -1.0, None if ready else core)
        if before is not None and _cancelled(x, before, core):
            _mixed_in_turn(x, out, U, V, step, pin, A, B)
        else:
            _update(out, x, core, V.mT, step)


def _narrow(core: Tensor) -> bool:
    """Whether x V, or xᵀ U, has so few columns that errors of U Uᵀ (x V) in float32 show.

    Of many columns they are random, and no larger than those of x V itself; a few, which BLAS
    sums one product after another, erred up to 12 times as much as eager torch.
    """
    return core.dtype == torch.float32 and core.device.type == "cpu" and core.shape[-1] <= 32


def _within(U: Tensor, core: Tensor) -> Tensor:
    """U Uᵀ core, summed in float64."""
    wide = U.double()
    return _mm(wide, _mm(wide.mT, core.double())).float()


def _cancelled(x: Tensor, before: Tensor, core: Tensor) -> bool:
    """Whether what is left of x V has the rounding errors of a sum much larger than itself.

    They show where x V is most of x, which a few free columns seldom hold, and U takes half of it:
    then the error came to 2.7 times that of eager torch, which takes U off first.
    """
    taken = _norm(core) < 0.7 * before
    return bool(taken.any()) and bool((taken & (before > 0.6 * _norm(x))).any())


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return norm


def _mixed_in_turn(
    x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any
) -> None:
    rest = _add(x, U, _mm(_transposed(U, x), x), -1.0, None)
    _update(out, x, _mm(rest, V), V.mT, step)


def _inner_in_turn(
    x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any
) -> None:
    rest = _mm(U, _mm(_transposed(U, x), x))
    _update(out, x, _mm(rest, V), V.mT, step)


def _inner(x: Tensor, out: Tensor, U: Any, V: Any, step: Step, pin: Any, A: Any, B: Any) -> None:
    left_first = step.first == "left"
    if A is None and not left_first and pin is None and _narrow(V):
        _update(out, x, _within(U, _mm(x, V)), V.mT, step)
        return
    if A is not None:
        C = _mm(A, V)
    else:
        C = _mm(_mm(_transposed(U, x), x), V) if left_first else _mm(U.mT, _mm(x, V))
    if pin is not None:
        S, _, rest_C = pin
        C.diagonal(dim1=-2, dim2=-1).sub_(S)
        subtract(C, rest_C)
    if left_first:
        _update(out, x, U, _mm(C, V.mT), step)
    else:
        _update(out, x, _mm(U, C), V.mT, step)


FORMS: dict[str, Callable[..., None]] = {
    "identity": _identity,
    "zero": _zero,
    "left": _left,
    "right": _right,
    "dual": _dual,
    "sequential": _sequential,
    "mixed": _mixed,
    "inner": _inner,
    "mixed in turn": _mixed_in_turn,
    "inner in turn": _inner_in_turn,
}


def _transposed(U: Tensor, x: Tensor) -> Tensor:
    """Uᵀ as the left factor of Uᵀ x: copied for a large bfloat16 x on the CPU, where the product
    then took 0.65 of its time at 4096² and ranks 64 to 819 (but 1.1 to 1.7 for a smaller x)."""
    large = x.dtype == torch.bfloat16 and x.numel() >= 2**23 and x.device.type == "cpu"
    return U.mT.contiguous() if large else U.mT


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cpu:  # asked here: to ask ``_padding.pads`` took a small matrix 8 % of its time
        return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)
    return _mm_in_padded_rows(a, b)


def _mm_in_padded_rows(a: Tensor, b: Tensor) -> Tensor:
    out = _padding.empty(a.shape[-2], b.shape[-1], a, batch=a.shape[:-2])
    return torch.mm(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out)


def _update(out: Tensor, x: Tensor, L: Tensor, R: Tensor, step: Step) -> None:
    """out = beta·x + alpha·L R; with beta = 0, where alpha is 1, x is not read."""
    if step.beta:
        _add(x, L, R, step.alpha, out)
    elif L.dim() == 2:
        torch.mm(L, R, out=out)
    else:
        torch.bmm(L, R, out=out)


def _add(x: Tensor, L: Tensor, R: Tensor, alpha: float, out: Tensor | None) -> Tensor:
    """x + alpha·L R into ``out``, which may be x, or into a new tensor."""
    if out is x:
        return x.addmm_(L, R, alpha=alpha) if x.dim() == 2 else x.baddbmm_(L, R, alpha=alpha)
    product = torch.addmm if x.dim() == 2 else torch.baddbmm
    return product(x, L, R, alpha=alpha) if out is None else product(x, L, R, alpha=alpha, out=out)
