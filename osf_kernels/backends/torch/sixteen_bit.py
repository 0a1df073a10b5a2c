"""16-bit matrices on a GPU, where something beside them is float32: products of 16-bit operands.

A float32 product runs on no tensor core: an H100 does 67 TFLOP/s of those and 990 of bfloat16 ones
(NVIDIA's data sheet of the SXM5). A product of two 16-bit numbers is exact in float32, and is
summed there. A float32 operand, which is a coefficient or a basis, becomes a sum of 16-bit parts:
its rounded value and what that misses, which keep 16 of its 24 bits in bfloat16 and 22 in float16.

On a CPU, where tests alone come here, ``product32`` multiplies the same operands as float32.

May import: torch, ``osf_kernels.plan``, ``osf_kernels._padding``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.plan import Step

DTYPES = frozenset((torch.bfloat16, torch.float16))
DEVICES = frozenset(("cuda",))  # torch's products of 16-bit operands have float32 results there

# The largest entry of what is split into float16 parts becomes this power of two or half of it. It
# leaves the lower part 24 bits above the smallest number of float16.
_LARGEST = 15
_SMALLEST = 110  # of exponents: the power of two and its inverse are float32 numbers


class Parts(NamedTuple):
    """The sum of ``parts``, times 2^exponent."""

    parts: tuple[Tensor, ...]  # in descending size
    exponent: Tensor | None = None  # (..., 1, 1) int32

    def high(self) -> Parts:
        return Parts(self.parts[:1], self.exponent)

    @property
    def mT(self) -> Parts:
        return Parts(tuple(part.mT for part in self.parts), self.exponent)


def split(t: Tensor, dtype: torch.dtype, count: int = 2) -> Parts:
    """t in 16-bit parts: one where it is of that dtype, else ``count``.

    A coefficient is as large as √m·max|g|, which overflows float16 where g doesn't; so float16
    parts are scaled by a power of two, found on the device. NaN and Inf stay, as NaN.
    """
    if t.dtype == dtype:
        return Parts((t,))
    rest, exponent = t.float(), None
    if dtype == torch.float16:
        largest = torch.nan_to_num(rest, 0.0, 0.0, 0.0).abs().amax((-2, -1), keepdim=True)
        exponent = torch.frexp(largest).exponent.clamp(min=-_SMALLEST) - _LARGEST
        rest = torch.ldexp(rest, -exponent)
    parts = [_padding.padded(rest, dtype=dtype)]
    while len(parts) < count:
        rest = rest - parts[-1]
        parts.append(_padding.padded(rest, dtype=dtype))
    return Parts(tuple(parts), exponent)


def product32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of two tensors of one 16-bit dtype, summed and returned in float32."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.device.type == "cpu":
        return multiply(a.float(), b.float(), out=out)
    if out is None:
        batch = a.shape[:-2]
        out = _padding.empty(a.shape[-2], b.shape[-1], a, dtype=torch.float32, batch=batch)
    return multiply(a, b, out_dtype=torch.float32, out=out)


def _pairs(a: Parts, b: Parts) -> list[tuple[Tensor, Tensor]]:
    """The products that a b is the sum of, less those that are below its last bit."""
    depth = max(len(a.parts), len(b.parts))
    return [
        (left, right)
        for i, left in enumerate(a.parts)
        for j, right in enumerate(b.parts)
        if i + j < depth
    ]


def _scaled(total: Tensor, a: Parts, b: Parts) -> Tensor:
    for exponent in (a.exponent, b.exponent):
        if exponent is not None:
            torch.ldexp(total, exponent, out=total)
    return total


def product(a: Parts, b: Parts, out: Tensor | None = None) -> Tensor:
    """a b in float32: of few columns or rows, so that each pair has a product of its own."""
    (left, right), *others = _pairs(a, b)
    total = product32(left, right, out)
    for left, right in others:
        total.add_(product32(left, right))
    return _scaled(total, a, b)


def coefficients(
    x: Tensor, U: Tensor | None, V: Tensor | None, A: Tensor | None, B: Tensor | None
) -> None:
    """A = Uᵀ x and B = x V in float32, with all the bits of a float32 basis."""
    whole = Parts((x,))
    count = 3 if x.dtype == torch.bfloat16 else 2
    if U is not None and A is not None:
        product(split(U, x.dtype, count).mT, whole, A)
    if V is not None and B is not None:
        product(whole, split(V, x.dtype, count), B)


def run(
    step: Step,
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    Us: Sequence[Any],
    Vs: Sequence[Any],
    pins: Iterable[Any],
    ready: Iterable[Any],
    addends: Iterable[Tensor | None],
) -> None:
    """The form of one list, each result rounded once; only ``xs`` and the bases need have an end.

    What other forms do in turn is done at once, as by ``dual``: between two updates g would be
    rounded, or take float32's memory.
    """
    rows = zip(xs, outs, Us, Vs, pins, ready, addends, strict=False)
    for x, out, U, V, pin, (A, B), addend in rows:
        if step.form in ("identity", "zero"):
            total = x if step.form == "identity" else x * 0  # NaN and Inf stay visible
            out.copy_(total if addend is None else total + addend)
            continue
        terms = _terms(step, x, U, V, pin, A, B)
        if pin is not None:
            # What is taken off is small, and high parts err by no more than 2^-8 of it, in float16
            # 2^-11: nothing beside a weight that moved by 2 % (1.00 of one rounding's error), 1.04
            # to 1.7 beside one that moved by all of itself (512×384, ranks 10 to 90 %). Without a
            # pin high parts alone err up to 16 times as much as one rounding, with low ones 1.00.
            terms = [(left.high(), right.high()) for left, right in terms]
        _update(step, x, out, terms, addend)


def _terms(
    step: Step, x: Tensor, U: Any, V: Any, pin: Any, A: Any, B: Any
) -> list[tuple[Parts, Parts]]:
    """The products whose sum is X of the form; see ``osf_kernels/forms.py``."""
    form, left_first, dtype = step.form, step.first == "left", x.dtype
    both = form in ("dual", "sequential", "dual in turn")
    whole, ready = Parts((x,)), A is not None
    left: Any = None if form == "right" else split(U, dtype)
    right: Any = None if form == "left" else split(V, dtype)
    if A is None and (both or (left_first and form != "right")):
        A = product(left.mT, whole)
    if B is None and (both or form == "right" or (not left_first and A is None)):
        B = product(whole, right)
    if both and pin is not None and not ready:  # ready ones are less what pins them
        S, rest_A, rest_B = pin
        A.addcmul_(S.unsqueeze(-1), V.mT, value=-1.0)
        B.addcmul_(U, S.unsqueeze(-2), value=-1.0)
        if rest_A is not None:
            A.sub_(rest_A)
            B.sub_(rest_B)
    if form == "left":
        return [(left, split(A, dtype))]
    if form == "right":
        return [(split(B, dtype), right.mT)]

    inside: Any = None if A is None else split(A, dtype)
    C = product(left.mT, split(B, dtype)) if inside is None else product(inside, right)
    if form == "inner":
        if pin is not None:
            S, _, rest_C = pin
            C.diagonal(dim1=-2, dim2=-1).sub_(S)
            if rest_C is not None:
                C.sub_(rest_C)
        core = split(C, dtype)
        if left_first:
            return [(left, split(product(core, right.mT), dtype))]
        return [(split(product(left, core), dtype), right.mT)]
    core = split(C, dtype)
    if form == "mixed" and left_first:
        return [(left, split(A - product(core, right.mT), dtype))]
    rest = split(B - product(left, core), dtype), right.mT
    return [(left, inside), rest] if both else [rest]


def _join(terms: Sequence[tuple[Parts, Parts]]) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the sum of the terms, but for their exponents."""
    pairs = [pair for left, right in terms for pair in _pairs(left, right)]
    if len(pairs) == 1:
        return pairs[0]
    lefts, rights = zip(*pairs, strict=True)
    return _padding.cat(lefts, -1), _padding.cat(rights, -2)


def _update(
    step: Step,
    x: Tensor,
    out: Tensor,
    terms: Sequence[tuple[Parts, Parts]],
    addend: Tensor | None,
) -> None:
    """out = beta·x + alpha·(the sum of the terms) + addend, rounded once.

    In bfloat16 without an addend that is one product, whose parts cuBLAS may sum in bfloat16 where
    torch's ``allow_bf16_reduced_precision_reduction`` lets it. Else a float32 sum takes memory, in
    float16 once a term, as each has a scale of its own.
    """
    if x.dtype == torch.bfloat16:
        L, R = _join(terms)
        if addend is None and x.device.type != "cpu":
            add = torch.addmm if x.dim() == 2 else torch.baddbmm
            add(x, L, R, beta=step.beta, alpha=step.alpha, out=out)
            return
        total = product32(L, R)
    else:
        total, *others = (_scaled(product32(*_join([term])), *term) for term in terms)
        for other in others:
            total.add_(other)
    if step.beta:
        torch.add(x, total, alpha=step.alpha, out=total)
    if addend is not None:
        total.add_(addend)
    out.copy_(total)
