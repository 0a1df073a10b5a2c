"""Jobs drawn fresh, their float64 truth, and what eager torch makes of them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from osf_kernels.backends.jobs import Coefficients, Update

JobT = TypeVar("JobT", Coefficients, Update)

NAN = float("nan")
LAYOUTS = ("rows", "columns", "padded", "unaligned", "strided")


def lay_out(a: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout; what lies between them is NaN."""
    m, n = a.shape
    if layout == "rows":
        view = torch.empty_like(a)
    elif layout == "columns":
        view = torch.empty(n, m, dtype=a.dtype).mT
    elif layout == "padded":  # lines of a multiple of 16 bytes, whatever n is
        view = torch.full((m, -(-n // 8) * 8 + 8), NAN, dtype=a.dtype)[:, :n]
    elif layout == "unaligned":  # no line starts at more than the element's own alignment
        line = n | 1
        view = torch.full((1 + m * line,), NAN, dtype=a.dtype).as_strided((m, n), (line, 1), 1)
    elif layout == "strided":
        view = torch.full((2 * m, 3 * n), NAN, dtype=a.dtype)[::2, ::3]
    else:
        raise ValueError(layout)
    view.copy_(a)
    return view


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def columns(n: int, r: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(n, r) orthonormal columns, rounded to dtype."""
    assert r <= n
    q: Tensor = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64, generator=generator))[0]
    return q.to(dtype).contiguous()


def dense(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous: torch's bfloat16 products on a CPU may read the NaNs between a view's lines."""
    return a.to(dtype).contiguous()


def coefficients_job(
    m: int,
    n: int,
    r: int | None,
    k: int | None,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    basis_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype = torch.float32,
    layouts: tuple[str, str, str] = ("rows", "rows", "rows"),
    out_layout: str = "rows",
    offset: bool = False,
    root: bool = True,
) -> Coefficients:
    """A job with outputs full of NaN; a rank of None leaves its side out."""
    basis_dtype = basis_dtype or dtype
    x = lay_out(randn(m, n, dtype=dtype, generator=generator), layouts[0])
    U = V = A = B = S = None
    if r is not None:
        U = lay_out(columns(m, r, basis_dtype, generator), layouts[1])
        A = lay_out(torch.full((r, n), NAN, dtype=out_dtype), out_layout)
    if k is not None:
        V = lay_out(columns(n, k, basis_dtype, generator), layouts[2])
        B = lay_out(torch.full((m, k), NAN, dtype=out_dtype), out_layout)
    if offset:
        S = randn(r or 0, dtype=torch.float32, generator=generator).abs()
    return Coefficients(x, U, V, A, B, S, root)


def true_coefficients(job: Coefficients, dtype: torch.dtype) -> list[Tensor]:
    """A and B (where present) computed in another dtype."""
    x = dense(job.x, dtype)
    found = []
    if job.U is not None:
        A = dense(job.U, dtype).mT @ x
        if job.S is not None and job.V is not None and job.root:
            A = A - dense(job.S, dtype)[:, None] * dense(job.V, dtype).mT
        found.append(A)
    if job.V is not None:
        B = x @ dense(job.V, dtype)
        if job.S is not None and job.U is not None:
            B = B - dense(job.U, dtype) * dense(job.S, dtype)
        found.append(B)
    return found


def update_job(
    m: int,
    n: int,
    r: int | None,
    k: int | None,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    basis_dtype: torch.dtype | None = None,
    coefficient_dtype: torch.dtype = torch.float32,
    layouts: tuple[str, str, str] = ("rows", "rows", "rows"),
    out_layout: str | None = None,
    alpha: float = -1.0,
    beta: float = 1.0,
    addend: torch.dtype | None = None,
) -> Update:
    """In place where ``out_layout`` is None; layouts are those of x, of the bases and of R1, L2."""
    basis_dtype = basis_dtype or dtype
    x = lay_out(randn(m, n, dtype=dtype, generator=generator), layouts[0])
    out = x
    if out_layout is not None:
        out = lay_out(torch.full((m, n), NAN, dtype=dtype), out_layout)
    L1 = R1 = L2 = R2 = None
    if r is not None:
        L1 = lay_out(columns(m, r, basis_dtype, generator), layouts[1])
        R1 = lay_out(randn(r, n, dtype=coefficient_dtype, generator=generator), layouts[2])
    if k is not None:
        L2 = lay_out(randn(m, k, dtype=coefficient_dtype, generator=generator), layouts[2])
        R2 = lay_out(columns(n, k, basis_dtype, generator), layouts[1]).mT
    more = None if addend is None else randn(m, n, dtype=addend, generator=generator)
    return Update(out, x, L1, R1, L2, R2, alpha, beta, more)


def true_update(job: Update, dtype: torch.dtype) -> Tensor:
    """out computed in another dtype."""
    out = torch.zeros(job.out.shape, dtype=dtype)
    if job.beta:
        out = out + job.beta * dense(job.x, dtype)
    if job.L1 is not None and job.R1 is not None:
        out = out + job.alpha * (dense(job.L1, dtype) @ dense(job.R1, dtype))
    if job.L2 is not None and job.R2 is not None:
        out = out + job.alpha * (dense(job.L2, dtype) @ dense(job.R2, dtype))
    if job.addend is not None:
        out = out + dense(job.addend, dtype)
    return out


def magnitude(job: JobT) -> JobT:
    """The job whose result bounds every partial sum: all terms positive."""
    positive: list[Any] = [a.abs() if isinstance(a, Tensor) else a for a in job]
    if isinstance(job, Coefficients):
        positive[5] = None if job.S is None else -job.S.abs()
    else:
        positive[6:8] = abs(job.alpha), abs(job.beta)
    return type(job)(*positive)


def assert_as_accurate(
    actual: Tensor, truth: Tensor, eager: Tensor, terms: Tensor, roundings: float = 1.0
) -> None:
    """The error in norm is at most twice eager's in the same dtype.

    Allowed beside it: the rounding of the result, and ``roundings`` of float32 sums as large as
    their ``terms`` (eager may be exact by luck where few numbers cancel).
    """
    truth = truth.double()
    error = float((actual.double() - truth).norm())
    allowed = 2 * float((eager.double() - truth).norm())
    allowed += torch.finfo(actual.dtype).eps * float(truth.norm())
    allowed += roundings * torch.finfo(torch.float32).eps * float(terms.norm())
    assert error <= allowed, f"{tuple(truth.shape)}: error {error:.3e}, allowed {allowed:.3e}"
