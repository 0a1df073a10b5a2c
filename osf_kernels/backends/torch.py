"""The torch backend: the two kernels of ``forms.py`` composed from torch matmuls.

It serves every device and dtype and is the only backend for float64. Matmuls run in the dtype
of the coefficients where all operands have it, which for bfloat16 matrices with bfloat16
bases is bfloat16 (accumulated in float32 by the library, rounded once a product); every other
mixture is computed in float32 and rounded once on the way out. float16 always takes that way:
a coefficient is as large as √m·max|g| and overflows float16 where g itself doesn't.

May import: torch, ``osf_kernels.backends.forms``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels.backends.forms import Coefficients, Problem, Update, coefficient_dtype, steps

# Two updates joined into one cost a copy of their factors and save a read and a write of the
# matrix: worth it while the joined rank is under this part of the smaller side.
JOIN_LIMIT = 0.25


def unavailable_reason(device: torch.device | None = None) -> str | None:
    return None


def working_dtype(problem: Problem) -> torch.dtype:
    """bfloat16 where everything is bfloat16 and nothing is pinned, else float32 (or float64)."""
    x, U, V = problem.x, problem.U, problem.V
    if (
        x.dtype == torch.bfloat16
        and (U is None or U.dtype == torch.bfloat16)
        and (V is None or V.dtype == torch.bfloat16)
        and problem.S is None
        and problem.addend is None
        and problem.A is None
        and problem.B is None
    ):
        return torch.bfloat16
    return coefficient_dtype(problem)


def run(problems: Sequence[Problem]) -> None:
    """One matrix after another, so that it stays in cache from step to step."""
    for problem in problems:
        for job in steps(problem, working_dtype(problem)):
            if type(job) is Coefficients:
                _coefficients(job)
            else:
                _update(job)


def coefficients(jobs: Sequence[Coefficients]) -> None:
    for job in jobs:
        _coefficients(job)


def update(jobs: Sequence[Update]) -> None:
    for job in jobs:
        _update(job)


def _coefficients(job: Coefficients) -> None:
    x, U, V, A, B, S = job
    dtype = (B if A is None else A).dtype  # type: ignore[union-attr]  # one side is present
    if x.dtype != dtype:
        x = x.to(dtype)
    if U is not None:
        torch.matmul(_as(U, dtype).mT, x, out=A)
    if V is not None:
        torch.matmul(x, _as(V, dtype), out=B)
    if S is not None:
        assert U is not None and V is not None and A is not None and B is not None
        A.sub_(S.to(dtype).unsqueeze(-1) * V.mT)
        B.sub_(U * S.to(dtype).unsqueeze(-2))


def _update(job: Update) -> None:
    out, x, L1, R1, L2, R2, alpha, beta, addend = job
    factors = [t for t in (L1, R1, L2, R2) if t is not None]
    if addend is not None or any(t.dtype != out.dtype for t in factors):
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        result = out if out.dtype == dtype and addend is None else None
        value = _sum(
            x.to(dtype) if beta else None,
            _as(L1, dtype),
            _as(R1, dtype),
            _as(L2, dtype),
            _as(R2, dtype),
            alpha,
            result,
        )
        if addend is not None:
            value = value.add_(addend)
        if value is not out:
            out.copy_(value)
    else:
        _sum(x if beta else None, L1, R1, L2, R2, alpha, out)


def _as(factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return factor if factor is None or factor.dtype == dtype else factor.to(dtype)


def _sum(
    x: Tensor | None,
    L1: Tensor | None,
    R1: Tensor | None,
    L2: Tensor | None,
    R2: Tensor | None,
    alpha: float,
    out: Tensor | None,
) -> Tensor:
    """x + alpha·(L1 R1 + L2 R2) with every operand of one dtype; x may be ``out`` or missing."""
    if L1 is None or R1 is None:
        assert L2 is not None and R2 is not None
        return _add(x, L2, R2, alpha, out)
    if L2 is None or R2 is None:
        return _add(x, L1, R1, alpha, out)
    rank = L1.shape[-1] + L2.shape[-1]
    if rank <= JOIN_LIMIT * min(L1.shape[-2], R1.shape[-1]):
        return _add(x, torch.cat((L1, L2), -1), torch.cat((R1, R2), -2), alpha, out)
    out = _add(x, L1, R1, alpha, out)
    return _add(out, L2, R2, alpha, out)


def _add(x: Tensor | None, L: Tensor, R: Tensor, alpha: float, out: Tensor | None) -> Tensor:
    """x + alpha·L R, for matrices or for batches of them."""
    if x is None:
        assert alpha == 1.0
        return torch.matmul(L, R) if out is None else torch.matmul(L, R, out=out)
    product = torch.addmm if L.dim() == 2 else torch.baddbmm
    return product(x, L, R, alpha=alpha) if out is None else product(x, L, R, alpha=alpha, out=out)
