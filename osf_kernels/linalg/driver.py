"""The driver of truncated_svd: groups matrices, runs methods on them, says how right they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.backends import primitives
from osf_kernels.errors import describe
from osf_kernels.linalg import auto, methods
from osf_kernels.linalg.auto import Method
from osf_kernels.linalg.complement import complement as complement_of
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.inputs import (
    OP,
    Entry,
    WarmStart,
    can_deflate,
    check_options,
    entries_of,
    is_exact_enough,
    refuse_starts,
    require_finite_starts,
    times_power,
)
from osf_kernels.linalg.residual import limit
from osf_kernels.linalg.result import TruncatedSVD

# What a group may take beside its results where no cap is given. On a CPU a few matrices at a time
# stay in cache, and a large one alone has what a Krylov space of a fourth of its columns takes; a
# GPU wants as many as there is room for.
CPU_WORKSPACE_BYTES = 1 << 28
CPU_WORKSPACE_OF_ONE = 26  # times the bytes of the matrix
GPU_WORKSPACE_SHARE = 0.5

TENSOR_FIELDS = ("U", "S", "V", "residual", "captured", "converged", "U_low", "V_low")

# With method="auto" an earlier result is taken as it is up to this residual, relative to σ₁;
# beyond it the weight has moved where it should not have, or too far, and is decomposed anew.
WARM_LIMIT = 1e-3


class Seed:
    """A generator for each sketch, from one number drawn from the caller's: sketches are the same
    whichever matrices share a call."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._base: int | None = None

    def generator(self, n: int, width: int, device: torch.device) -> torch.Generator:
        if self._base is None:
            where = "cpu" if self._generator is None else self._generator.device
            drawn = torch.randint(2**62, (), generator=self._generator, device=where)
            self._base = int(drawn)
        seed = (self._base + 1_000_003 * n + width) % 2**63
        return torch.Generator(device).manual_seed(seed)


class Parted(NamedTuple):
    """A group that was taken ``size`` matrices at a time, and what it exceeded."""

    entries: Sequence[Entry]
    size: int
    what: str


@dataclass(frozen=True)
class Options:
    """What a call asks for, and what its groups leave to be said."""

    method: Method
    tol: float | None
    niter: int | None
    oversample: int | None
    complement: bool
    seed: Seed
    max_workspace_bytes: int | None
    batch: int = 1  # of the tensor that the matrices are of
    parted: list[Parted] = field(default_factory=list)
    free: dict[torch.device, int] = field(default_factory=dict)  # bytes of each GPU


def decompose(
    A: Tensor | Sequence[Tensor],
    rank: float | Sequence[float],
    warm_start: WarmStart | Sequence[WarmStart],
    generator: torch.Generator | None,
    options: Options,
) -> tuple[TruncatedSVD | list[TruncatedSVD], list[str]]:
    """The result, and what is to be warned of."""
    entries = entries_of(A, rank, warm_start)
    check_options(
        options.method,
        options.tol,
        options.niter,
        options.oversample,
        generator,
        options.max_workspace_bytes,
        entries,
    )
    if isinstance(A, Tensor):
        options = replace(options, batch=math.prod(A.shape[:-2]))
    with primitives.full_precision():
        results = _decomposed(entries, options)
    messages = _taken_in_parts(options) + _unconverged(entries, results, options)
    if not isinstance(A, Tensor):
        return results, messages
    if not results:  # an empty batch: the shapes of one matrix's factors
        one = torch.zeros(A.shape[-2:], dtype=A.dtype, device=A.device)
        results = _decomposed(entries_of([one], rank, None), replace(options, method="exact"))
    return (results[0] if A.dim() == 2 else _stacked(results, A.shape[:-2])), messages


def _method(entry: Entry, options: Options) -> Method:
    if entry.rank == 0:
        return "exact"
    if options.method != "auto":
        return options.method
    m, n = entry.A.shape
    return auto.choose(
        m,
        n,
        entry.rank,
        device=entry.A.device.type,
        batch=options.batch,
        warm=is_exact_enough(entry),
        deflatable=can_deflate(entry),
    )


def _decomposed(entries: Sequence[Entry], options: Options) -> list[TruncatedSVD]:
    """Results in the order of the entries, computed by groups of one method and shape."""
    groups: dict[tuple[object, ...], tuple[Method, list[int]]] = {}
    for i, entry in enumerate(entries):
        method, A = _method(entry, options), entry.A
        kind: tuple[object, ...]
        kind = (method, A.shape, A.dtype, A.device, entry.rank, entry.exponent == 0)
        if method == "deflated" and isinstance(entry.warm, TruncatedSVD):
            kind += (entry.warm.rank,)
        groups.setdefault(kind, (method, []))[1].append(i)
    results: dict[int, TruncatedSVD] = {}
    for method, indices in groups.values():
        done = _decompose_group(method, [entries[i] for i in indices], options)
        results.update(zip(indices, done, strict=True))
    ordered = [results[i] for i in range(len(entries))]
    if options.method != "auto":
        return ordered
    # An earlier result that no longer fits is dropped.
    fits = WARM_LIMIT if options.tol is None else options.tol
    stale = [
        i
        for i, result in enumerate(ordered)
        if result.method in ("warm", "deflated")
        and (not float(result.residual) <= fits or _lacking(result, options))
    ]
    if stale:
        anew = _decomposed([entries[i]._replace(warm=None) for i in stale], options)
        for i, result in zip(stale, anew, strict=True):
            closer = float(result.residual) < float(ordered[i].residual)
            if closer or _lacking(ordered[i], options):
                ordered[i] = result
    return ordered


def _decompose_group(
    method: Method, entries: Sequence[Entry], options: Options
) -> list[TruncatedSVD]:
    """One group in parts that fit the workspace, in smaller ones where memory runs out."""
    size = _fitting(method, entries, options)
    if size < len(entries) and options.max_workspace_bytes is not None:
        options.parted.append(Parted(entries, size, "max_workspace_bytes"))
    results: list[TruncatedSVD] = []
    while len(results) < len(entries):
        part = entries[len(results) : len(results) + size]
        try:
            results += _run(method, part, options)
        except RuntimeError as error:
            if not _out_of_memory(error) or len(part) == 1:
                raise
            size = max(1, len(part) // 2)
            options.parted.append(Parted(entries, size, "the memory there is"))
    return results


def _group(entries: Sequence[Entry], As: Sequence[Tensor], options: Options) -> methods.Group:
    A = entries[0].A
    n, device = A.shape[1], A.device
    return methods.Group(
        As=As,
        norms=[entry.norm for entry in entries],
        rank=entries[0].rank,
        complement=options.complement,
        tol=options.tol,
        niter=options.niter,
        oversample=options.oversample,
        warm=[entry.start() for entry in entries],
        generator=lambda width: options.seed.generator(n, width, device),
        workspace_bytes=_workspace_bytes(A, options),
    )


def _workspace_bytes(A: Tensor, options: Options) -> float:
    if options.max_workspace_bytes is not None:
        return float(options.max_workspace_bytes)
    device = A.device
    if device.type != "cuda":
        of_one = A.numel() * primitives.working_dtype(A.dtype).itemsize
        return float(max(CPU_WORKSPACE_BYTES, CPU_WORKSPACE_OF_ONE * of_one))
    if device not in options.free:  # once a call, so that its groups are planned alike
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        options.free[device] = torch.cuda.mem_get_info(device)[0] + cached
    return GPU_WORKSPACE_SHARE * options.free[device]


def _fitting(method: Method, entries: Sequence[Entry], options: Options) -> int:
    """How many matrices of a group fit the workspace at a time.

    Raises:
        ValueError: not even one fits a cap that was given.
    """
    group = _group(entries, [entry.A for entry in entries], options)
    each, safely = (methods.workspace_bytes(method, group, safe=safe) for safe in (False, True))
    held = methods.held_bytes(method, group)
    if any(entry.exponent for entry in entries):  # which are copied
        copy = entries[0].A.numel() * group.dtype.itemsize
        each, held = each + copy, held + copy
    most = max(each, held + safely)
    if most > group.workspace_bytes and options.max_workspace_bytes is not None:
        raise ValueError(
            describe(
                OP,
                "max_workspace_bytes",
                f'at least {most} for {entries[0].name} {tuple(group.shape)} with "{method}"',
                options.max_workspace_bytes,
                "raise it, or lower rank or oversample",
            )
        )
    fitting = min(
        group.workspace_bytes // max(1, each), (group.workspace_bytes - safely) // max(1, held)
    )
    return max(1, min(len(entries), int(fitting)))


def _run(method: Method, entries: Sequence[Entry], options: Options) -> list[TruncatedSVD]:
    """Decomposes matrices together; those whose fast factorizations broke down once more."""
    if entries[0].rank == 0:
        return [_empty(entry, options) for entry in entries]
    group = _group(entries, [entry.scaled() for entry in entries], options)
    work = primitives.working_dtype(group.As[0].dtype)
    if primitives.products_backend(group.As[0]) == "torch":
        # torch multiplies matrices of one dtype only.
        group = replace(group, As=[A.to(work) for A in group.As])
    factors = methods.run(method, group, safe=False)
    broken = torch.nonzero(~factors.ok).flatten()  # synchronizes
    if len(broken):
        each = methods.workspace_bytes(method, group, safe=True)
        room = group.workspace_bytes - len(entries) * methods.held_bytes(method, group)
        for part in broken.split(max(1, int(room // max(1, each)))):
            again = methods.run(method, group.of(part), safe=True)
            factors = methods.merged(factors, part, again)
    finite = factors.residual.isfinite()
    if method in ("warm", "deflated") and not bool(finite.all()):
        # To look before would take a tenth of the time of either.
        require_finite_starts(entries)
        if options.method == "deflated":
            refuse_starts([e for e, fine in zip(entries, finite.tolist(), strict=True) if not fine])
    return _results(method, entries, _finished(factors, options.complement), options)


def _finished(factors: Factors, complement: bool) -> Factors:
    """Signs fixed, and the low bases that the method didn't find by itself."""
    U, V = factors.U, factors.V
    signs = _signs(V)
    U, V = _times(U, signs), _times(V, signs)
    U_low, V_low = factors.U_low, factors.V_low
    if complement:
        U_low = complement_of(U) if U_low is None else U_low
        V_low = complement_of(V) if V_low is None else V_low
    # Equal ones come from norms in any order, to rounding.
    S = factors.S.cummin(-1).values
    return factors._replace(U=U, S=S, V=V, U_low=U_low, V_low=V_low)


# Elements of one column whose magnitudes differ by less, in eps of the largest, are told apart by
# rounding, or not at all.
_TIE = 512.0
_FEW_COLUMNS = 32


def _signs(V: Tensor) -> Tensor:
    """±1 for each column, (b, 1, r), by the first of its elements that is within ``_TIE`` eps of
    the largest: by the largest, where no other of the other sign comes near it."""
    tie = _TIE * torch.finfo(V.dtype).eps
    # aminmax takes five times as long as both on a CPU, but for a few columns.
    if V.shape[-1] < _FEW_COLUMNS:
        least, most = V.aminmax(dim=-2, keepdim=True)
    else:
        least, most = V.amin(dim=-2, keepdim=True), V.amax(dim=-2, keepdim=True)
    signs = torch.where(-least > most, -1, 1).to(V.dtype)
    which, column = torch.nonzero(((most + least).abs() <= tie * most).squeeze(-2), as_tuple=True)
    if len(which):
        tied = V[which, :, column]  # (k, n)
        magnitudes = tied.abs()
        near = magnitudes >= (1 - tie) * magnitudes.amax(-1, keepdim=True)
        first = tied.gather(-1, near.int().argmax(-1, keepdim=True)).squeeze(-1)
        signs[which, 0, column] = torch.where(first < 0, -1, 1).to(V.dtype)
    return signs


# Columns that lie 2048 numbers apart or so share a few lines of a CPU's cache: more at a time, and
# each number of a row is read from memory again (2048 × 1024: 12 ms at once, 3 by 64 columns).
_TRANSPOSED_AT_ONCE = 64


def _times(X: Tensor, signs: Tensor) -> Tensor:
    """X·signs in rows, whatever X was: one pass instead of a product and a copy."""
    out = _padding.empty_like(X)
    transposed = X.device.type == "cpu" and X.stride(-1) != 1
    step = _TRANSPOSED_AT_ONCE if transposed else max(1, X.shape[-1])
    parts = (x.split(step, -1) for x in (X, signs, out))
    for x, sign, y in zip(*parts, strict=True):
        torch.mul(x, sign, out=y)
    return out


def _results(
    method: str, entries: Sequence[Entry], factors: Factors, options: Options
) -> list[TruncatedSVD]:
    residual, tol = factors.residual, options.tol
    norms = torch.tensor([entry.norm for entry in entries], dtype=torch.float64, device="cpu")
    norms = norms.to(residual.device, non_blocking=True)
    held = factors.S.double().square().sum(-1) / norms.square()
    captured = torch.where(norms == 0, 1, held.clamp_max(1)).to(factors.S.dtype)  # of 0 all is held
    converged = residual <= limit(tol, factors.S.dtype, min(entries[0].A.shape))
    if method in ("exact", "gram") and tol is None:
        # A Gram matrix whose residual is above that was given up for float64, or for LAPACK's SVD.
        converged = residual.isfinite()
    if factors.leading is not None:
        converged = converged & factors.leading
    fields = {
        "U": factors.U,
        "S": factors.S,
        "V": factors.V,
        "residual": residual,
        "captured": captured,
        "converged": converged,
        "U_low": factors.U_low,
        "V_low": factors.V_low,
    }
    columns = [
        [None] * len(entries) if field is None else list(map(_own, field.unbind()))
        for field in fields.values()
    ]
    results = []
    for entry, iterations, *row in zip(entries, factors.iterations, *columns, strict=True):
        values: dict[str, Any] = dict(zip(fields, row, strict=True))
        if entry.exponent:
            values["S"] = _scaled_back(entry, values["S"])
        result = TruncatedSVD(**values, iterations=iterations, method=method)
        results.append(result)
    return results


def _scaled_back(entry: Entry, S: Tensor) -> Tensor:
    S = times_power(S, entry.exponent)
    if entry.exponent > 0 and not bool(S.isfinite().all()):
        expected = f"small enough for its singular values to fit {S.dtype}"
        raise ValueError(describe(OP, entry.name, expected, "larger", "scale it down"))
    return S


def _own(x: Tensor) -> Tensor:
    """x in memory of its own size: a view would keep its whole group alive."""
    if x.dim() == 2:
        rows = x.shape[0]
        width = _padding.leading_dimension(x.shape[1], x.device, x.dtype)
        in_rows = x.is_contiguous() if width == x.shape[1] else x.stride() == (width, 1)
        owns = in_rows and x.untyped_storage().nbytes() == rows * width * x.element_size()
        return x if owns else _padding.empty_like(x).copy_(x)
    owns = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if owns else x.clone(memory_format=torch.contiguous_format)


def _empty(entry: Entry, options: Options) -> TruncatedSVD:
    """Rank 0: no triplets, and everything is low."""
    A = entry.A
    m, n = A.shape
    zero = A.new_zeros((), dtype=primitives.working_dtype(A.dtype))
    low = [torch.eye(size, dtype=zero.dtype, device=A.device) for size in (m, n)]
    return TruncatedSVD(
        zero.new_empty(m, 0),
        zero.new_empty(0),
        zero.new_empty(n, 0),
        zero,
        zero + (entry.norm == 0),
        0,
        "exact",
        zero == 0,
        *(low if options.complement else (None, None)),
    )


def _stacked(results: Sequence[TruncatedSVD], batch: Sequence[int]) -> TruncatedSVD:
    """One result of a batch, of its matrices'."""

    def field(name: str) -> Tensor | None:
        parts = [getattr(result, name) for result in results]
        if parts[0] is None:
            return None
        whole = torch.stack(parts)[: math.prod(batch)].reshape(*batch, *parts[0].shape)
        return _padding.padded(whole) if parts[0].dim() == 2 else whole

    tensors = {name: field(name) for name in TENSOR_FIELDS}
    return TruncatedSVD(
        **tensors,  # type: ignore[arg-type]
        iterations=max(result.iterations for result in results),
        method=" + ".join(dict.fromkeys(result.method for result in results)),
    )


def _remedy(results: Sequence[TruncatedSVD], options: Options) -> str:
    """What a caller may change about results that missed the tolerance."""
    missed = {r.method for r in results if not _converged(r)}
    if missed <= {"exact"}:
        return "no method comes closer in this dtype; raise tol, or pass float64"
    if missed <= {"exact", "gram"}:
        return 'take method="exact", or raise tol'
    if options.niter is not None:
        return 'raise niter, or take method="gram" or "exact"'
    if options.max_workspace_bytes is not None:
        return 'raise max_workspace_bytes, or take method="gram" or "exact"'
    return 'take method="gram" or "exact", or raise tol'


def _converged(result: TruncatedSVD) -> bool:
    return result.converged is None or bool(result.converged)


def _lacking(result: TruncatedSVD, options: Options) -> bool:
    """Whether triplets are right that aren't the leading ones."""
    right = float(result.residual) <= limit(options.tol, result.S.dtype, min(result.shape))
    return right and not _converged(result)


def _unconverged(
    entries: Sequence[Entry], results: Sequence[TruncatedSVD], options: Options
) -> list[str]:
    if options.tol is None:  # no more was asked for than the results say
        return []
    missed = [
        f"{entry.name} has {float(result.residual):.1e} "
        + ("but lacks leading triplets " if _lacking(result, options) else "")
        + f'after {result.iterations} iterations of "{result.method}"'
        for entry, result in zip(entries, results, strict=True)
        if not _converged(result)
    ]
    if not missed:
        return []
    shown = ", ".join(missed[:8]) + (f" and {len(missed) - 8} more" if len(missed) > 8 else "")
    return [f"residuals above tol={options.tol:g}: {shown}; {_remedy(results, options)}"]


def _taken_in_parts(options: Options) -> list[str]:
    """One message for all groups that were, with the size that each came down to."""
    last = {id(part.entries): part for part in options.parted}
    shown = [
        f"{len(entries)} matrices of {entries[0].A.shape[0]} × {entries[0].A.shape[1]} exceed "
        f"{what} and were taken {size} at a time"
        for entries, size, what in last.values()
    ]
    return ["; ".join(shown)] if shown else []


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
