"""The torch backend: every form of ``osf_kernels/forms.py`` composed from torch matmuls.

It serves every device and dtype and is the only backend for float64. Matmuls run in bfloat16
where matrix and bases are bfloat16 (accumulated in float32 by the library, rounded once a
product). Every other mixture, float16, whatever pins a value and whatever brings its own
coefficients is rounded once, on the way out: on a GPU ``sixteen_bit.py`` multiplies 16-bit
operands of a 16-bit matrix, elsewhere all is computed in float32. A coefficient in float16 would
overflow where g itself doesn't: it is as large as √m·max|g|.

A form is a function of ``loops.py`` over a list; here is what each list runs and in what dtype.

May import: torch, ``osf_kernels.backends.jobs`` and below.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import _padding, cpu
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.torch import sixteen_bit
from osf_kernels.backends.torch.loops import LOOPS
from osf_kernels.plan import Matrix, Step

Ready = tuple[Tensor | None, Tensor | None]  # the coefficients A and B of apply_
Pin = tuple[Tensor, Tensor | None, Tensor | None]  # S, rest_A and rest_B of restore_

_NOT_READY: Iterable[Ready] = itertools.repeat((None, None))
_NO_PINS: Iterable[Pin | None] = itertools.repeat(None)
_NO_OFFSETS: Iterable[tuple[None, None, None]] = itertools.repeat((None, None, None))
_NO_ADDENDS: Iterable[Tensor | None] = itertools.repeat(None)


def unavailable_reason(device: torch.device | None = None) -> str | None:
    return None


def coefficient_reads(x: Matrix) -> int:
    """How often x is read for both coefficients."""
    return 2


def keeps(x: Matrix, device: torch.device) -> bool:
    """Whether x is in a cache whenever it is read again: not known of library products."""
    return False


def coefficients_of(
    xs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    pins: Iterable[tuple[Tensor | None, ...]] = _NO_OFFSETS,
    *,
    root: bool = True,
) -> None:
    """A = Uᵀ x and B = x V of every matrix, into the outputs that aren't None, of one dtype.

    Where there is an S, B is less U S + rest_B, and A less S Vᵀ + rest_A on the ``root`` of the
    shards that sum it.
    """
    for x, U, V, A, B, (S, rest_A, rest_B) in zip(xs, Us, Vs, As, Bs, pins, strict=False):
        out = B if A is None else A
        if out is None:
            continue
        dtype = out.dtype
        served = x.dtype in sixteen_bit.DTYPES and x.device.type in sixteen_bit.DEVICES
        if served and dtype == torch.float32:
            sixteen_bit.coefficients(x, U, V, A, B)
        else:
            x = x.to(dtype)
            if U is not None and A is not None:
                torch.matmul(U.to(dtype).mT, x, out=A)
            if V is not None and B is not None:
                torch.matmul(x, V.to(dtype), out=B)
        if S is None:
            continue
        assert U is not None
        assert V is not None
        assert A is not None
        assert B is not None
        B.addcmul_(U, S.unsqueeze(-2), value=-1.0)
        if rest_B is not None:
            B.sub_(rest_B)
        if root:
            A.addcmul_(S.unsqueeze(-1), V.mT, value=-1.0)
            if rest_A is not None:
                A.sub_(rest_A)


def run(problems: Sequence[Problem]) -> None:
    """One matrix after another; a :class:`Program` has less to do for each."""
    for x, out, U, V, step, S, addend, A, B, rest_A, rest_B, _ in problems:
        working = _working_dtype(x.dtype, U, V)
        ready: Iterable[Ready] = _NOT_READY
        pins: Iterable[Pin | None] = _NO_PINS
        if A is not None or B is not None:
            working, ready = _rounded_once(working), ((A, B),)
        if S is not None:
            working, pins = _rounded_once(working), ((S, rest_A, rest_B),)
        addends = None if addend is None else (addend,)
        if addend is not None:
            working = _rounded_once(working)
        _run(step, working, (x,), (out,), (U,), (V,), pins, ready, addends)


class Program:
    """A list of problems with all decided that shapes, dtypes and bases decide.

    It keeps the bases, views of them and what is pinned, so that their values may change but not
    their memory. It holds no workspace: any number of threads and streams may run it at once.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Of x and out only shape, dtype and device are read, A and B not at all."""
        members: list[list[int]] = []
        latest: dict[tuple[Any, ...], tuple[list[int], int]] = {}
        for i, (x, _, U, V, step, S, addend, *_) in enumerate(problems):
            key = (
                *(step.form, step.first, step.alpha, step.beta, step.joined),
                *(x.dim(), x.dtype, x.device, S is None, addend is None),
                *(None if U is None else U.dtype, None if V is None else V.dtype),
            )
            group, size = latest.get(key, ([], 0))
            size += x.numel()
            if not group or size > cpu.GROUP_ELEMENTS:
                group, size = [], x.numel()
                members.append(group)
            group.append(i)
            latest[key] = group, size
        self._groups = [(group, _Group([problems[i] for i in group])) for group in members]

    def run(self, xs: Sequence[Tensor], ready: Sequence[Ready] | None = None) -> None:
        """Runs the problems in place on ``xs``, from the coefficients of each where given."""
        if len(self._groups) == 1:
            self._groups[0][1].run(xs, ready)
            return
        for members, group in self._groups:
            mine = [xs[i] for i in members]
            group.run(mine, None if ready is None else [ready[i] for i in members])


class _Group:
    """Problems of one form, one number of dimensions and the same dtypes."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        x, _, U, V, self.step, S, addend, *_ = problems[0]
        self.Us, self.Vs = [p.U for p in problems], [p.V for p in problems]
        self.pins: Iterable[Pin | None] = _NO_PINS
        if S is not None:
            self.pins = [(p.S, p.rest_A, p.rest_B) for p in problems if p.S is not None]
        self.addends = (
            None if addend is None else [p.addend for p in problems if p.addend is not None]
        )
        self.working = _working_dtype(x.dtype, U, V)
        if S is not None or addend is not None:
            self.working = _rounded_once(self.working)
        dtypes = x.dtype, None if U is None else U.dtype, None if V is None else V.dtype
        self.direct = needs_no_conversion(*dtypes) and addend is None
        self.Uts, self.Vts = _transposed(self.Us), _transposed(self.Vs)

    def run(self, xs: Sequence[Tensor], ready: Sequence[Ready] | None) -> None:
        step, working = self.step, self.working
        if self.direct:
            sides = self.Us, self.Uts, self.Vs, self.Vts
            rows = zip(xs, xs, *sides, self.pins, ready or _NOT_READY, strict=False)
            LOOPS[step.form](step, _products(xs[0]), rows)
            return
        if ready is not None:
            working = _rounded_once(working)
        _run(step, working, xs, xs, self.Us, self.Vs, self.pins, ready or _NOT_READY, self.addends)


def run_one(step: Step, x: Tensor, out: Tensor, U: Tensor | None, V: Tensor | None) -> None:
    """One matrix of which :func:`needs_no_conversion` holds."""
    Ut, Vt = None if U is None else U.mT, None if V is None else V.mT
    products = _OF_MATRICES if x.is_cpu else _products(x)
    LOOPS[step.form](step, products, ((x, out, U, Ut, V, Vt, None, (None, None)),))


def _run(
    step: Step,
    working: torch.dtype,
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    pins: Iterable[Pin | None],
    ready: Iterable[Ready],
    addends: Sequence[Tensor] | None,
) -> None:
    """One form in the working dtype, for matrices that agree on what they lack and on dtypes."""
    x, targets = xs[0], outs
    served = x.dtype in sixteen_bit.DTYPES and x.device.type in sixteen_bit.DEVICES
    if x.dtype != working and served:
        sixteen_bit.run(step, xs, outs, Us, Vs, pins, ready, addends or _NO_ADDENDS)
        return
    Us, Vs = _converted(Us, working), _converted(Vs, working)
    if x.dtype != working:
        xs = targets = [x.to(working) for x in xs]
    large = False
    if working == torch.bfloat16 and x.device.type == "cpu":
        # torch 2.13's bfloat16 matmul on the CPU reads what lies between padded rows, and a NaN
        # there comes out in the product.
        Us, Vs, dense = _dense(Us), _dense(Vs), _dense(xs)
        pairs = zip(xs, dense, outs, strict=True)
        targets = [out if held is x else held for x, held, out in pairs]
        xs = dense
        # A large matrix is the only one of its list.
        large = x.numel() >= cpu.COPIED_FROM and step.first == "left"
    Uts = [U.contiguous() for U in _transposed(Us)] if large else _transposed(Us)
    sides = Us, Uts, Vs, _transposed(Vs)
    # Pins and ready coefficients that aren't there repeat without an end.
    rows = zip(xs, targets, *sides, pins, ready, strict=False)
    LOOPS[step.form](step, _products(x), rows)
    if addends is not None:
        for target, addend in zip(targets, addends, strict=True):
            target.add_(addend)
    if targets is not outs:
        for target, out in zip(targets, outs, strict=True):
            if target is not out:
                out.copy_(target)


def _working_dtype(x: torch.dtype, U: Tensor | None, V: Tensor | None) -> torch.dtype:
    """float32 for 16-bit matrices, but bfloat16 where everything is."""
    if x == torch.float64:
        return x
    if x == torch.bfloat16 and (U is None or U.dtype == x) and (V is None or V.dtype == x):
        return x
    return torch.float32


def _rounded_once(working: torch.dtype) -> torch.dtype:
    """The dtype in which something is computed that came in float32, as S, addends, A and B do."""
    return torch.float32 if working == torch.bfloat16 else working


def needs_no_conversion(x: torch.dtype, U: torch.dtype | None, V: torch.dtype | None) -> bool:
    """Whether a matrix and its bases are, whatever their strides, multiplied as they are."""
    return x in (torch.float32, torch.float64) and U in (x, None) and V in (x, None)


def _converted(held: Sequence[Tensor | None], dtype: torch.dtype) -> Sequence[Any]:
    if held[0] is None or held[0].dtype == dtype:
        return held
    if not _padding.pads(held[0].device):
        return [t.to(dtype) for t in held if t is not None]
    return [_padding.padded(t, dtype=dtype) for t in held if t is not None]


def _dense(held: Sequence[Any]) -> Sequence[Any]:
    """Copies where rows are padded."""
    if held[0] is None:
        return held
    return [t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous() for t in held]


def _transposed(held: Sequence[Any]) -> Sequence[Any]:
    return held if held[0] is None else [t.mT for t in held]


def _products(x: Tensor) -> tuple[Any, Any, Any]:
    """a b and x + alpha·a b of matrices or of batches, and a concatenation; with padded rows where
    those of cuBLAS gain by it."""
    if not _padding.pads(x.device):
        return _OF_MATRICES if x.dim() == 2 else (torch.bmm, torch.baddbmm, torch.cat)
    return _padding.matmul, torch.addmm if x.dim() == 2 else torch.baddbmm, _padding.cat


_OF_MATRICES = (torch.mm, torch.addmm, torch.cat)
