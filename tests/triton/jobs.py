"""Jobs for the two kernels, their float64 truth, and how far from it a result may be.

The bounds are forward error bounds of the sums the kernels promise: float32 accumulation of
products of operands rounded as ``views.dot_rule`` says, then one rounding to the output's
dtype. They scale with |U|ᵀ|x| and the like, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from osf_kernels.backends.jobs import Coefficients, Update
from osf_kernels.backends.triton.views import dot_rule

FLOAT32_UNIT = 2.0**-24
# Relative error of one product, by how it is taken (tf32x3 drops the product of the two tails).
PRODUCT_UNIT = {"ieee": 0.0, "tf32x3": 2.0**-21, "tf32": 2.0**-10}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: _inside(t, (2, 3)),
    "unaligned": lambda t: _unaligned(t),
}


def _inside(t: Tensor, step: tuple[int, int]) -> Tensor:
    """A copy of t on every step-th row and column of a larger matrix."""
    rows, columns = t.shape
    big = torch.full((rows * step[0] + 1, columns * step[1] + 1), torch.nan, dtype=t.dtype)
    view = big[: rows * step[0] : step[0], : columns * step[1] : step[1]]
    return view.copy_(t)


def _unaligned(t: Tensor) -> Tensor:
    """A copy of t whose rows are contiguous but start off a 16-byte boundary."""
    rows, columns = t.shape
    big = torch.full((rows, columns + 3), torch.nan, dtype=t.dtype)
    return big[:, 1 : columns + 1].copy_(t)


def guarded(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A NaN matrix inside a frame of sevens, which ``assert_frame_kept`` looks at afterwards."""
    frame = torch.full((rows + 4, columns + 8), 7.0, dtype=dtype, device=device)
    inner = frame[2 : rows + 2, 4 : columns + 4]
    return inner.fill_(torch.nan)


def assert_frame_kept(inner: Tensor) -> None:
    """Nothing around a ``guarded`` matrix was written."""
    rows, columns = inner.shape
    width = columns + 8
    frame = inner.as_strided((rows + 4, width), (width, 1), 0).clone()
    frame[2 : rows + 2, 4 : columns + 4] = 7.0
    assert bool((frame == 7.0).all()), "wrote outside of its output"


def draw(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, layout: str = "rows"
) -> Tensor:
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return LAYOUTS[layout](values.to(dtype))


def draw_coefficients(
    shape: tuple[int, int],
    ranks: tuple[int | None, int | None],
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    basis: torch.dtype | None = None,
    out: torch.dtype = torch.float32,
    x_layout: str = "rows",
    basis_layout: str = "rows",
    offset: bool = False,
    root: bool = True,
) -> Coefficients:
    """A job with guarded, NaN-filled outputs; a rank of None leaves its side out."""
    (m, n), (r, k) = shape, ranks
    basis = basis or dtype
    x = draw(m, n, dtype, generator, x_layout)
    U = None if r is None else draw(m, r, basis, generator, basis_layout)
    V = None if k is None else draw(n, k, basis, generator, basis_layout)
    A = None if r is None else guarded(r, n, out)
    B = None if k is None else guarded(m, k, out)
    S = torch.rand(r, generator=generator) + 0.5 if offset and r is not None else None
    return Coefficients(x, U, V, A, B, S, root)


def _distance(actual: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    unit = torch.finfo(actual.dtype).eps / 2
    tiny = torch.finfo(actual.dtype).smallest_normal * unit * 2
    bound = bound * (1 + unit) + unit * truth.abs() + tiny
    error = (actual.double() - truth).abs()
    bad = ~(error <= bound)  # NaN is bad
    assert not bool(bad.any()), (
        f"{what}: {int(bad.sum())} of {bad.numel()} beyond the bound, the worst "
        f"{float((error / bound).nan_to_num(torch.inf).max()):.3g} times it"
    )


def assert_coefficients(job: Coefficients, float32_precision: str = "ieee") -> None:
    """A and B against float64, and nothing else written."""
    x, U, V, A, B, S, root = job
    bases = [t.dtype for t in (U, V) if t is not None]
    dot, precision = dot_rule(x.dtype, bases, (), float32_precision)
    product = 0.0 if torch.float32 not in (x.dtype, *bases) else PRODUCT_UNIT[precision]
    for name, out, basis, left, other in (("A", A, U, True, V), ("B", B, V, False, U)):
        if out is None or basis is None:
            continue
        wide, q = x.double(), basis.double()
        truth = q.mT @ wide if left else wide @ q
        size = q.abs().mT @ wide.abs() if left else wide.abs() @ q.abs()
        if S is not None and (root or not left):
            assert other is not None
            scale, w = S.double(), other.double()
            truth = truth - (scale[:, None] * w.mT if left else w * scale)
            size = size + (scale[:, None] * w.abs().mT if left else w.abs() * scale)
        unit = (basis.shape[0] + 8) * FLOAT32_UNIT + product
        _distance(out, truth, unit * size, f"{name} ({dot})")
        if out.storage_offset():
            assert_frame_kept(out)


def expected_update(job: Update, x: Tensor) -> tuple[Tensor, Tensor]:
    """(out in float64, the sum of the terms' absolute values), from x as it was before."""
    truth = torch.zeros(job.out.shape, dtype=torch.float64, device=x.device)
    products = truth.clone()
    for left, right in ((job.L1, job.R1), (job.L2, job.R2)):
        if left is not None and right is not None:
            truth = truth + left.double() @ right.double()
            products = products + left.double().abs() @ right.double().abs()
    truth, products = job.alpha * truth, abs(job.alpha) * products
    if job.beta:
        truth = truth + job.beta * x.double()
    if job.addend is not None:
        truth = truth + job.addend.double()
    return truth, products


def assert_update(job: Update, x: Tensor, float32_precision: str = "ieee") -> None:
    """out against float64, given x as it was before."""
    truth, products = expected_update(job, x)
    pairs = ((job.L1, job.R1), (job.R2, job.L2))
    bases = [basis.dtype for basis, _ in pairs if basis is not None]
    coefficients = [other.dtype for _, other in pairs if other is not None]
    source = x.dtype if job.beta else job.out.dtype
    dot, precision = dot_rule(
        source, bases or (source,), coefficients or (source,), float32_precision
    )
    rounding = torch.finfo(dot).eps / 2 if dot != torch.float32 else PRODUCT_UNIT[precision]
    rank = sum(left.shape[1] for left in (job.L1, job.L2) if left is not None)
    unit = (rank + 8) * FLOAT32_UNIT + rounding
    extra = x.double().abs() if job.beta else 0
    addend = job.addend.double().abs() if job.addend is not None else 0
    bound = unit * products + 4 * FLOAT32_UNIT * (extra + addend + truth.abs())
    _distance(job.out, truth, bound, f"update ({dot})")


def assert_multiply(
    As: Sequence[Tensor], Q: Tensor, out: Tensor, transpose: bool, float32_precision: str = "ieee"
) -> None:
    """A Q, or Aᵀ Q, of every matrix against float64 with exact products of 16-bit A."""
    for A, q, result in zip(As, Q.expand(len(As), -1, -1), out, strict=True):
        left = A.double().mT if transpose else A.double()
        _assert_product(left, q.double(), result, A.dtype, float32_precision)


def assert_gram(
    As: Sequence[Tensor], out: Tensor, side: str, float32_precision: str = "ieee"
) -> None:
    """Aᵀ A, or A Aᵀ, of every matrix against float64, symmetric to the bit."""
    for A, result in zip(As, out, strict=True):
        left = A.double().mT if side == "right" else A.double()
        _assert_product(left, left.mT, result, A.dtype, float32_precision)
        assert torch.equal(result, result.mT)


def _assert_product(
    left: Tensor, right: Tensor, out: Tensor, dtype: torch.dtype, float32_precision: str
) -> None:
    product = PRODUCT_UNIT[float32_precision] if dtype == torch.float32 else 0.0
    unit = (right.shape[0] + 8) * FLOAT32_UNIT + product
    _distance(out, left @ right, unit * (left.abs() @ right.abs()), f"product of {dtype}")
