"""The arguments of truncated_svd, checked before any solver runs and brought to one form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.errors import Index, TypeRefusal, ValueRefusal
from osf_kernels.linalg.primitives import working_dtype
from osf_kernels.linalg.svd.methods import METHODS, Method
from osf_kernels.linalg.svd.result import TruncatedSVD
from osf_kernels.ops._validation import DTYPES

OP = "truncated_svd"
# Norms within these bounds square to float32 numbers with room for sums and quotients of them.
_SAFE_NORM = (1e-9, 1e9)

WarmStart = TruncatedSVD | Tensor | None


@dataclass(frozen=True)
class Options:
    """The arguments of a call that hold for all of its matrices."""

    method: Method
    tol: float | None
    niter: int | None
    oversample: int | None
    complement: bool
    generator: torch.Generator | None
    max_workspace_bytes: int | None


@dataclass(frozen=True)
class Entry:
    """One matrix of a call."""

    index: Index  # in the list or the batch
    A: Tensor  # (m, n)
    rank: int
    norm: float  # ‖A‖_F of scaled()
    exponent: int
    warm: WarmStart

    def scaled(self) -> Tensor:
        """A, by 2**-exponent where it is near overflow or underflow."""
        if not self.exponent:
            return self.A
        return times_power(self.A.to(working_dtype(self.A.dtype)), -self.exponent)

    def start(self) -> WarmStart:
        """The warm start, scaled as the matrix is."""
        if not self.exponent or not isinstance(self.warm, TruncatedSVD):
            return self.warm
        S = self.warm.S.to(working_dtype(self.A.dtype))
        return replace(self.warm, S=times_power(S, -self.exponent))

    @property
    def exact_enough(self) -> bool:
        """Whether the warm start has the dtype that is computed in, or a wider one: the rounding of
        a narrower one would limit the result."""
        work = working_dtype(self.A.dtype)
        factors = _factors(self.warm).values()
        fits = all(torch.promote_types(x.dtype, work) == x.dtype for x in factors)
        return self.warm is not None and fits

    @property
    def deflatable(self) -> bool:
        """Whether the warm start has triplets and both low bases, as exact as the result's."""
        return len(_factors(self.warm)) == 5 and self.exact_enough


def times_power(X: Tensor, exponent: int) -> Tensor:
    """X · 2**exponent, in two factors, since one of them could itself overflow."""
    half = exponent // 2
    return X * 2.0**half * 2.0 ** (exponent - half)


def entries_of(
    A: Tensor | Sequence[Tensor],
    rank: float | Sequence[float],
    warm_start: WarmStart | Sequence[WarmStart],
) -> list[Entry]:
    """The matrices of a tensor, a batch or a list, each with its rank and warm start.

    Raises:
        Refusal: as :func:`truncated_svd` says.
    """
    matrices = _matrices(A)
    if isinstance(A, Tensor) and isinstance(rank, list | tuple):
        remedy = "pass a list of matrices, A.unbind(), for a rank of each"
        raise TypeRefusal.of(OP, "rank", "one for all of a tensor", "a sequence", remedy)
    ranks = _spread("rank", rank, len(matrices), (Integral, Real))
    if isinstance(A, Tensor) and A.dim() > 2 and isinstance(warm_start, TruncatedSVD | Tensor):
        warm_start = _unbatched(warm_start, A)
    warm = _spread("warm_start", warm_start, len(matrices), (TruncatedSVD, Tensor, type(None)))
    chosen = [_rank(i, matrix, r) for (i, matrix), r in zip(matrices.items(), ranks, strict=True)]
    for (i, matrix), start in zip(matrices.items(), warm, strict=True):
        _check_warm(i, matrix, start)
    detached = {i: matrix.detach() for i, matrix in matrices.items()}
    norms = _finite_norms("A", list(detached.items()), "mend the weight first")
    return [
        _entry(i, matrix, r, norm, start)
        for (i, matrix), r, norm, start in zip(detached.items(), chosen, norms, warm, strict=True)
    ]


def check_options(options: Options, entries: Sequence[Entry]) -> None:
    """Raises a Refusal for options that can't be honoured."""
    method: object = options.method
    tol: Any = options.tol
    generator: Any = options.generator
    if method not in METHODS:
        expected = "one of " + ", ".join(f'"{name}"' for name in METHODS)
        raise ValueRefusal.of(OP, "method", expected, repr(method))
    if tol is not None and not (isinstance(tol, Real) and 0 < float(tol) < math.inf):
        refusal = ValueRefusal if isinstance(tol, Real) else TypeRefusal
        raise refusal.of(OP, "tol", "a positive number or None", repr(tol))
    for name, least in (("niter", 1), ("oversample", 0), ("max_workspace_bytes", 1)):
        value = getattr(options, name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeRefusal.of(OP, name, "an int or None", repr(value))
        if value < least:
            raise ValueRefusal.of(OP, name, f"at least {least}", value)
    if generator is not None and not isinstance(generator, torch.Generator):
        kind = type(generator).__name__
        raise TypeRefusal.of(OP, "generator", "a torch.Generator or None", kind)
    for entry in entries:
        i, device, start = entry.index, entry.A.device, "warm_start of A"
        if generator is not None and not _same_device(generator.device, device):
            got, remedy = generator.device, f"pass torch.Generator({str(device)!r})"
            raise ValueRefusal.of(OP, "generator for A", f"on {device}", got, remedy, index=i)
        if method in ("warm", "deflated") and entry.warm is None:
            expected, remedy = f'given with method="{method}"', "pass an earlier result, or another"
            raise ValueRefusal.of(OP, start, expected, None, f"{remedy} method", index=i)
        if method == "deflated" and not entry.deflatable:
            raise ValueRefusal.of(OP, start, *_undeflatable(entry), index=i)


def _undeflatable(entry: Entry) -> tuple[str, str, str]:
    """(expected, got, remedy) of a start that method="deflated" can't take."""
    expected, factors = 'a TruncatedSVD with low bases with method="deflated"', _factors(entry.warm)
    if len(factors) < 5:
        return expected, "one without", "have the earlier result made with complement=True"
    dtypes = ", ".join(dict.fromkeys(str(factor.dtype) for factor in factors.values()))
    remedy = "make the earlier result in that dtype, or take another method"
    return f"{expected}, of {working_dtype(entry.A.dtype)}", dtypes, remedy


def _matrices(A: Tensor | Sequence[Tensor]) -> dict[Index, Tensor]:
    given: object = A
    found: dict[Index, Any]
    if isinstance(given, Tensor):
        if given.dim() < 2:
            expected = "a matrix, a batch (..., m, n) or a list"
            raise ValueRefusal.of(OP, "A", expected, tuple(given.shape))
        if given.dim() == 2:
            found = {None: given}
        else:
            m, n = given.shape[-2:]
            places = itertools.product(*map(range, given.shape[:-2]))
            batch = given.reshape(math.prod(given.shape[:-2]), m, n)
            found = dict(zip(places, batch, strict=True))
    elif isinstance(given, Sequence):
        found = dict(enumerate(given))
    else:
        raise TypeRefusal.of(OP, "A", "a tensor or a list of tensors", type(given).__name__)
    for i, matrix in found.items():
        if not isinstance(matrix, Tensor):
            raise TypeRefusal.of(OP, "A", "a tensor", type(matrix).__name__, index=i)
        if matrix.dim() != 2:
            shape, remedy = tuple(matrix.shape), "unbind a batch within a list"
            raise ValueRefusal.of(OP, "A", "a matrix (m, n)", shape, remedy, index=i)
        if matrix.dtype not in DTYPES or matrix.layout is not torch.strided:
            expected = "a dense float32, bfloat16, float16 or float64 tensor"
            got = f"{matrix.dtype}, {matrix.layout}"
            raise TypeRefusal.of(OP, "A", expected, got, "convert it first", index=i)
        if matrix.is_meta:
            expected, got = "a tensor with values", "a meta tensor"
            raise ValueRefusal.of(OP, "A", expected, got, "materialize it", index=i)
    return found


_KINDS = {type(None): "None", Integral: "int", Real: "float"}


def _spread(argument: str, value: Any, count: int, kinds: tuple[type, ...]) -> list[Any]:
    """One value for each matrix, of one for all or a sequence."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != count:
            expected = f"one or a value for each of {count} matrices"
            raise ValueRefusal.of(OP, argument, expected, len(values))
    else:
        values = [value] * count
    for one in values:
        if not isinstance(one, kinds) or isinstance(one, bool):
            kind = " or ".join(_KINDS.get(k, k.__name__) for k in kinds)
            raise TypeRefusal.of(OP, argument, kind, type(one).__name__)
    return [int(one) if isinstance(one, Integral) else one for one in values]


def _rank(index: Index, A: Tensor, rank: float) -> int:
    m, n = A.shape
    most, argument = min(m, n), "rank of A"
    if isinstance(rank, int):
        if not 0 <= rank <= most:
            expected = f"between 0 and min(m, n) = {most} of a {m} × {n} matrix"
            remedy = "a float is a fraction of min(m, n)"
            raise ValueRefusal.of(OP, argument, expected, rank, remedy, index=index)
        return rank
    if not 0 < rank <= 1:
        expected = "in (0, 1] as a fraction of min(m, n)"
        raise ValueRefusal.of(OP, argument, expected, rank, index=index)
    return min(most, max(1, round(rank * most)))


def _unbatched(warm: TruncatedSVD | Tensor, A: Tensor) -> list[WarmStart]:
    """The warm starts of a batch's matrices, from one result or bases of the same batch."""
    V = warm if isinstance(warm, Tensor) else warm.V
    if V.shape[:-2] != A.shape[:-2]:
        expected = f"of the batch {tuple(A.shape[:-2])}"
        raise ValueRefusal.of(OP, "warm_start", expected, tuple(V.shape[:-2]))
    if isinstance(warm, Tensor):
        return list(warm.reshape(math.prod(A.shape[:-2]), *warm.shape[-2:]))
    return list(warm.unbind())


def _check_warm(index: Index, A: Tensor, warm: WarmStart) -> None:
    """Raises a Refusal for a start that isn't one of a matrix like A."""
    if warm is None:
        return
    argument = "warm_start of A"
    m, n = A.shape
    factors = _factors(warm)
    V = factors["V"]
    if V.dim() != 2 or V.shape[0] != n or V.shape[1] > n:
        expected, remedy = f"columns V (n, k) with n = {n}", "pass Vh.mT if it holds rows"
        raise ValueRefusal.of(OP, argument, expected, tuple(V.shape), remedy, index=index)
    if isinstance(warm, TruncatedSVD) and (warm.U.dim() != 2 or warm.U.shape[0] != m):
        expected = f"a result of a {m} × {n} matrix"
        raise ValueRefusal.of(OP, argument, expected, warm.shape, index=index)
    r = V.shape[1]
    fitting = {"U": (m, r), "S": (r,), "V": (n, r), "U_low": (m, m - r), "V_low": (n, n - r)}
    for field, factor in factors.items():
        if factor.shape != fitting[field]:
            expected = f"{field} {fitting[field]}, as its V {(n, r)} asks for"
            raise ValueRefusal.of(OP, argument, expected, tuple(factor.shape), index=index)
    for factor in factors.values():
        if factor.device != A.device or factor.is_meta:
            expected, remedy = f"on {A.device}", "move it there"
            raise ValueRefusal.of(OP, argument, expected, factor.device, remedy, index=index)
        if factor.dtype not in DTYPES or factor.layout is not torch.strided:
            raise TypeRefusal.of(OP, argument, "of a real dtype, dense", factor.dtype, index=index)


def require_finite_starts(entries: Sequence[Entry]) -> None:
    """Raises a Refusal for NaN or Inf in any factor that a method may start from."""
    given = [(entry.index, x) for entry in entries for x in _factors(entry.warm).values()]
    _finite_norms("warm_start of A", given, "leave it out, or make it anew")


def _factors(start: WarmStart) -> dict[str, Tensor]:
    """The factors that a start has: none, V alone, or those of a result."""
    if isinstance(start, Tensor):
        return {"V": start.detach()}
    given = {field: getattr(start, field, None) for field in ("U", "S", "V", "U_low", "V_low")}
    return {field: factor.detach() for field, factor in given.items() if factor is not None}


def _finite_norms(
    argument: str, matrices: Sequence[tuple[Index, Tensor]], remedy: str
) -> list[float]:
    """‖A‖_F of each, by one pass over it; one synchronization a device.

    Raises:
        Refusal: NaN or Inf, naming each matrix and how many entries.
    """
    norms = [_frobenius_norm(A) for _, A in matrices]
    values = [0.0] * len(norms)
    for device in dict.fromkeys(norm.device for norm in norms):
        mine = [i for i, norm in enumerate(norms) if norm.device == device]
        together = torch.stack([norms[i].double() for i in mine]).tolist()
        for i, value in zip(mine, together, strict=True):
            values[i] = value
    wrong: dict[Index, str] = {}
    for (index, A), value in zip(matrices, values, strict=True):
        if not math.isfinite(value):  # so is the norm of a finite matrix near overflow
            count = int(A.isfinite().logical_not().sum())
            if count:
                has = f"{count} of {A.numel()}"
                wrong[index] = f"{wrong[index]} and {has}" if index in wrong else f"has {has}"
    if wrong:
        raise ValueRefusal.of(OP, argument, "finite", "NaN or Inf", remedy, each=wrong)
    return values


def _frobenius_norm(A: Tensor) -> Tensor:
    """‖A‖_F, without dimensions, of at least float32; on a CPU summed in float64."""
    dtype = working_dtype(A.dtype)
    if A.device.type == "cpu" and A.dim() == 2:
        A = A.mT if A.stride(0) == 1 else A
        pieces = A.split(cpu.SUMMED_AT_ONCE, 1) if A.shape[1] > cpu.SUMMED_AT_ONCE else [A]
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=dtype) for x in pieces]
        A = norms[0] if len(norms) == 1 else torch.cat(norms)
        dtype = torch.float64
    norm: Tensor = torch.linalg.vector_norm(A, dtype=dtype)
    return norm


def _entry(index: Index, A: Tensor, rank: int, norm: float, warm: WarmStart) -> Entry:
    if norm == 0 and A.numel():  # or below the least that its squares can hold
        norm = 0.0 if not bool(A.any()) else math.nan
    if norm == 0 or _SAFE_NORM[0] < norm < _SAFE_NORM[1]:
        return Entry(index, A, rank, norm, 0, warm)
    exponent = math.frexp(float(A.abs().max()))[1]
    entry = Entry(index, A, rank, math.nan, exponent, warm)
    return replace(entry, norm=float(_frobenius_norm(entry.scaled())))


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)
