"""What truncated_svd is given, checked before any solver runs and brought to one form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from osf_kernels.backends.primitives import working_dtype
from osf_kernels.errors import describe
from osf_kernels.linalg.auto import Method
from osf_kernels.linalg.result import TruncatedSVD

OP = "truncated_svd"
METHODS = get_args(Method)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Norms within these bounds square to float32 numbers with room for sums and quotients of them.
_SAFE_NORM = (1e-9, 1e9)

WarmStart = TruncatedSVD | Tensor | None


class Entry(NamedTuple):
    """One matrix: its name in messages, its rank, and what is known of it."""

    name: str
    A: Tensor  # (m, n)
    rank: int
    norm: float  # ‖A‖_F of scaled()
    exponent: int
    warm: WarmStart

    def scaled(self) -> Tensor:
        """A, by 2**-exponent where it is near overflow or underflow."""
        if not self.exponent:
            return self.A
        dtype = torch.float64 if self.A.dtype == torch.float64 else torch.float32
        return times_power(self.A.to(dtype), -self.exponent)

    def start(self) -> WarmStart:
        """The warm start of that matrix."""
        if not self.exponent or not isinstance(self.warm, TruncatedSVD):
            return self.warm
        S = self.warm.S.to(working_dtype(self.A.dtype))
        return replace(self.warm, S=times_power(S, -self.exponent))


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
        TypeError, ValueError: as :func:`truncated_svd` says.
    """
    matrices = _matrices(A)
    if isinstance(A, Tensor) and isinstance(rank, list | tuple):
        remedy = "pass a list of matrices, A.unbind(), for a rank of each"
        raise TypeError(describe(OP, "rank", "one for all of a tensor", "a sequence", remedy))
    ranks = _spread("rank", rank, len(matrices), (Integral, Real))
    if isinstance(A, Tensor) and A.dim() > 2 and isinstance(warm_start, TruncatedSVD | Tensor):
        warm_start = _unbatched(warm_start, A)
    warm = _spread("warm_start", warm_start, len(matrices), (TruncatedSVD, Tensor, type(None)))
    names = [name for name, _ in matrices]
    chosen = [_rank(name, matrix, r) for (name, matrix), r in zip(matrices, ranks, strict=True)]
    for (name, matrix), start in zip(matrices, warm, strict=True):
        _check_warm(name, matrix, start)
    detached = [matrix.detach() for _, matrix in matrices]
    norms = _finite_norms(names, detached)
    return [
        _entry(name, matrix, r, norm, start)
        for name, matrix, r, norm, start in zip(names, detached, chosen, norms, warm, strict=True)
    ]


def check_options(
    method: str,
    tol: float | None,
    niter: int | None,
    oversample: int | None,
    generator: torch.Generator | None,
    max_workspace_bytes: int | None,
    entries: Sequence[Entry],
) -> None:
    """Raises ValueError or TypeError for options that can't be honoured."""
    if method not in METHODS:
        expected = "one of " + ", ".join(f'"{name}"' for name in METHODS)
        raise ValueError(describe(OP, "method", expected, repr(method)))
    given: object = tol
    if not isinstance(given, Real | None):
        raise TypeError(describe(OP, "tol", "a positive number or None", repr(tol)))
    if tol is not None and not 0 < tol < math.inf:
        raise ValueError(describe(OP, "tol", "a positive number or None", repr(tol)))
    for name, value, least in (
        ("niter", niter, 1),
        ("oversample", oversample, 0),
        ("max_workspace_bytes", max_workspace_bytes, 1),
    ):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(describe(OP, name, "an int or None", repr(value)))
        if value < least:
            raise ValueError(describe(OP, name, f"at least {least}", value))
    source: object = generator
    if not isinstance(source, torch.Generator | None):
        kind = type(generator).__name__
        raise TypeError(describe(OP, "generator", "a torch.Generator or None", kind))
    if generator is not None:
        for entry in entries:
            if not _same_device(generator.device, entry.A.device):
                raise ValueError(
                    describe(
                        OP,
                        f"generator on the device of {entry.name}, {entry.A.device}",
                        "there",
                        generator.device,
                        f"pass torch.Generator({str(entry.A.device)!r})",
                    )
                )
    if method in ("warm", "deflated"):
        for entry in entries:
            if entry.warm is None:
                raise ValueError(
                    describe(
                        OP,
                        "warm_start",
                        f'given for {entry.name} with method="{method}"',
                        "None",
                        "pass an earlier result, or another method",
                    )
                )
            if method == "deflated" and not can_deflate(entry):
                raise ValueError(describe(OP, f"warm_start of {entry.name}", *_undeflatable(entry)))


def can_deflate(entry: Entry) -> bool:
    """Whether the warm start holds the whole split, triplets and both low bases, as exactly as the
    result is to be."""
    warm = entry.warm
    whole = isinstance(warm, TruncatedSVD) and warm.U_low is not None and warm.V_low is not None
    return whole and is_exact_enough(entry)


def is_exact_enough(entry: Entry) -> bool:
    """Whether the warm start's factors are of the dtype that is computed in, or a wider one: what
    narrower ones were rounded by would limit the result."""
    if entry.warm is None:
        return False
    work = working_dtype(entry.A.dtype)
    factors = (
        [entry.warm] if isinstance(entry.warm, Tensor) else list(_factors(entry.warm).values())
    )
    return all(torch.promote_types(factor.dtype, work) == factor.dtype for factor in factors)


def _undeflatable(entry: Entry) -> tuple[str, str, str]:
    """(expected, got, remedy) of a start that method="deflated" can't take."""
    expected = 'a TruncatedSVD with low bases with method="deflated"'
    warm = entry.warm
    if isinstance(warm, Tensor) or warm is None or warm.U_low is None or warm.V_low is None:
        return expected, "one without", "have the earlier result made with complement=True"
    work = working_dtype(entry.A.dtype)
    dtypes = {str(factor.dtype): None for factor in _factors(warm).values()}
    remedy = "make the earlier result in that dtype, or take another method"
    return f"{expected}, of {work}", ", ".join(dtypes), remedy


def _matrices(A: Tensor | Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    given: object = A
    if isinstance(given, Tensor):
        if given.dim() < 2:
            raise ValueError(
                describe(OP, "A", "a matrix, a batch (..., m, n) or a list", tuple(given.shape))
            )
        if given.dim() == 2:
            named = [("A", given)]
        else:
            m, n = given.shape[-2:]
            places = itertools.product(*map(range, given.shape[:-2]))
            batch = given.reshape(math.prod(given.shape[:-2]), m, n)
            named = [
                (f"A[{', '.join(map(str, place))}]", matrix)
                for place, matrix in zip(places, batch, strict=True)
            ]
    elif isinstance(given, Sequence):
        named = [(f"A[{i}]", matrix) for i, matrix in enumerate(given)]
    else:
        raise TypeError(describe(OP, "A", "a tensor or a list of tensors", type(given).__name__))
    for name, matrix in named:
        if not isinstance(matrix, Tensor):
            raise TypeError(describe(OP, name, "a tensor", type(matrix).__name__))
        if matrix.dim() != 2:
            raise ValueError(
                describe(
                    OP,
                    name,
                    "a matrix (m, n)",
                    tuple(matrix.shape),
                    "unbind a batch within a list",
                )
            )
        if matrix.dtype not in DTYPES or matrix.layout is not torch.strided:
            raise TypeError(
                describe(
                    OP,
                    name,
                    "a dense float32, bfloat16, float16 or float64 tensor",
                    f"{matrix.dtype}, {matrix.layout}",
                    "convert it first",
                )
            )
        if matrix.is_meta:
            raise ValueError(
                describe(OP, name, "a tensor with values", "a meta tensor", "materialize it")
            )
    return named


_KINDS = {type(None): "None", Integral: "int", Real: "float"}


def _spread(argument: str, value: Any, count: int, kinds: tuple[type, ...]) -> list[Any]:
    """One value for each matrix, of one for all or a sequence."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
        if len(values) != count:
            raise ValueError(
                describe(OP, argument, f"one or a value for each of {count} matrices", len(values))
            )
    else:
        values = [value] * count
    for one in values:
        if not isinstance(one, kinds) or isinstance(one, bool):
            kind = " or ".join(_KINDS.get(k, k.__name__) for k in kinds)
            raise TypeError(describe(OP, argument, kind, type(one).__name__))
    return [int(one) if isinstance(one, Integral) else one for one in values]


def _rank(name: str, A: Tensor, rank: float) -> int:
    m, n = A.shape
    most = min(m, n)
    if not isinstance(rank, int):
        if not 0 < rank <= 1:
            raise ValueError(
                describe(OP, f"rank of {name}", "in (0, 1] as a fraction of min(m, n)", rank)
            )
        return min(most, max(1, round(rank * most)))
    if not 0 <= rank <= most:
        raise ValueError(
            describe(
                OP,
                f"rank of {name}",
                f"between 0 and min(m, n) = {most} of a {m} × {n} matrix",
                rank,
                "a float is a fraction of min(m, n)",
            )
        )
    return rank


def _unbatched(warm: TruncatedSVD | Tensor, A: Tensor) -> list[WarmStart]:
    """The warm starts of a batch's matrices, from one result or bases of the same batch."""
    count = math.prod(A.shape[:-2])
    V = warm if isinstance(warm, Tensor) else warm.V
    if V.shape[:-2] != A.shape[:-2]:
        expected = f"of the batch {tuple(A.shape[:-2])}"
        raise ValueError(describe(OP, "warm_start", expected, tuple(V.shape[:-2])))
    if isinstance(warm, Tensor):
        return list(warm.reshape(count, *warm.shape[-2:]))
    return list(warm.unbind())


def _check_warm(name: str, A: Tensor, warm: WarmStart) -> None:
    """Raises ValueError or TypeError for a start that isn't one of a matrix like A."""
    if warm is None:
        return
    place = f"warm_start of {name}"
    m, n = A.shape
    V = warm if isinstance(warm, Tensor) else warm.V
    if V.dim() != 2 or V.shape[0] != n or V.shape[1] > n:
        expected = f"columns V (n, k) with n = {n}"
        remedy = "pass Vh.mT if it holds rows"
        raise ValueError(describe(OP, place, expected, tuple(V.shape), remedy))
    factors = {"V": warm} if isinstance(warm, Tensor) else _factors(warm)
    if isinstance(warm, TruncatedSVD):
        if warm.U.dim() != 2 or warm.U.shape[0] != m:
            raise ValueError(describe(OP, place, f"a result of a {m} × {n} matrix", warm.shape))
        r = V.shape[1]
        fitting = {"U": (m, r), "S": (r,), "V": (n, r), "U_low": (m, m - r), "V_low": (n, n - r)}
        for field, factor in factors.items():
            if factor.shape != fitting[field]:
                expected = f"{field} {fitting[field]}, as its V {(n, r)} asks for"
                raise ValueError(describe(OP, place, expected, tuple(factor.shape)))
    for factor in factors.values():
        if factor.device != A.device or factor.is_meta:
            remedy = "move it there"
            raise ValueError(describe(OP, place, f"on {A.device}", factor.device, remedy))
        if factor.dtype not in DTYPES or factor.layout is not torch.strided:
            raise TypeError(describe(OP, place, "of a real dtype, dense", factor.dtype))


def require_finite_starts(entries: Sequence[Entry]) -> None:
    """Raises ValueError for NaN or Inf in any factor that a method may start from."""
    given: list[tuple[str, Tensor]] = []
    for entry in entries:
        name, start = f"that of {entry.name}", entry.warm
        if isinstance(start, Tensor):
            given.append((name, start))
        elif start is not None:
            given += [(name, factor) for factor in _factors(start).values()]
    if given:
        places, tensors = zip(*given, strict=True)
        _finite_norms(places, tensors, "warm_start", "leave it out, or make it anew")


def refuse_starts(entries: Sequence[Entry]) -> NoReturn:
    """Raises ValueError for starts that method="deflated" found not to be orthonormal."""
    names = ", ".join(entry.name for entry in entries)
    expected = "orthonormal to rounding, U with U_low and V with V_low"
    remedy = "make the earlier result anew, or take another method"
    raise ValueError(describe(OP, f"warm_start of {names}", expected, "less", remedy))


def _factors(start: TruncatedSVD) -> dict[str, Tensor]:
    fields = ("U", "S", "V", "U_low", "V_low")
    given = {field: getattr(start, field) for field in fields}
    return {field: factor.detach() for field, factor in given.items() if factor is not None}


def _finite_norms(
    names: Sequence[str],
    matrices: Sequence[Tensor],
    argument: str = "A",
    remedy: str = "mend the weight first",
) -> list[float]:
    """‖A‖_F of each, by one pass over it; one synchronization a device.

    Raises:
        ValueError: NaN or Inf, naming each matrix and how many entries.
    """
    norms = [_frobenius_norm(A) for A in matrices]
    values = [0.0] * len(norms)
    for device in dict.fromkeys(norm.device for norm in norms):
        mine = [i for i, norm in enumerate(norms) if norm.device == device]
        together = torch.stack([norms[i].double() for i in mine]).tolist()
        for i, value in zip(mine, together, strict=True):
            values[i] = value
    wrong = []
    for i, value in enumerate(values):
        if not math.isfinite(value):  # so is the norm of a finite matrix near overflow
            count = int(matrices[i].isfinite().logical_not().sum())
            if count:
                wrong.append(f"{names[i]} has {count} of {matrices[i].numel()}")
    if wrong:
        raise ValueError(
            describe(OP, argument, "finite", "NaN or Inf: " + ", ".join(wrong), remedy)
        )
    return values


_SUMMED_AT_ONCE = 4096  # numbers


def _frobenius_norm(A: Tensor) -> Tensor:
    """‖A‖_F, without dimensions, of at least float32.

    torch's float32 norm of 4096² numbers on a CPU is off by 7e-4, which ``captured`` would be too;
    norms of pieces of its lines, summed in float64, by 4e-9, in a half of the time (of equal
    numbers, the worst case, by 2e-6).
    """
    dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    if A.device.type == "cpu" and A.dim() == 2:
        A = A.mT if A.stride(0) == 1 else A
        pieces = A.split(_SUMMED_AT_ONCE, 1) if A.shape[1] > _SUMMED_AT_ONCE else [A]
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=dtype) for x in pieces]
        A = norms[0] if len(norms) == 1 else torch.cat(norms)
        dtype = torch.float64
    norm: Tensor = torch.linalg.vector_norm(A, dtype=dtype)
    return norm


def _entry(name: str, A: Tensor, rank: int, norm: float, warm: WarmStart) -> Entry:
    if norm == 0 and A.numel():  # or below what its squares can say
        norm = 0.0 if not bool(A.any()) else math.nan
    if norm == 0 or _SAFE_NORM[0] < norm < _SAFE_NORM[1]:
        return Entry(name, A, rank, norm, 0, warm)
    exponent = math.frexp(float(A.abs().max()))[1]
    entry = Entry(name, A, rank, math.nan, exponent, warm)
    return entry._replace(norm=float(_frobenius_norm(entry.scaled())))


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index or 0) == (b.index or 0)
