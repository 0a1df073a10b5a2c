"""truncated_svd: groups matrices by shape, runs a method on each group, says how right it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.errors import describe
from osf_kernels.linalg import auto, methods
from osf_kernels.linalg.auto import Method
from osf_kernels.linalg.complement import complement as complement_of
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.inputs import OP, Entry, WarmStart, can_deflate, check_options, entries_of
from osf_kernels.linalg.result import TruncatedSVD

# What a group may take beside its results where no cap is given. On a CPU a few matrices at a time
# stay in cache; a GPU wants as many as there is room for.
CPU_WORKSPACE_BYTES = 1 << 28
GPU_WORKSPACE_SHARE = 0.5

TENSOR_FIELDS = ("U", "S", "V", "residual", "captured", "converged", "U_low", "V_low")

# With method="auto" an earlier result is taken as it is up to this residual, relative to σ₁;
# beyond it the weight has moved where it should not have, or too far, and is decomposed anew.
WARM_LIMIT = 1e-3


@overload
def truncated_svd(
    A: Tensor,
    rank: float,
    *,
    tol: float | None = None,
    method: Method = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: WarmStart = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> TruncatedSVD: ...


@overload
def truncated_svd(
    A: Sequence[Tensor],
    rank: float | Sequence[float],
    *,
    tol: float | None = None,
    method: Method = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: WarmStart | Sequence[WarmStart] = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> list[TruncatedSVD]: ...


@torch.no_grad()
def truncated_svd(
    A: Tensor | Sequence[Tensor],
    rank: float | Sequence[float],
    *,
    tol: float | None = None,
    method: Method = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: WarmStart | Sequence[WarmStart] = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> TruncatedSVD | list[TruncatedSVD]:
    """A ≈ U diag(S) Vᵀ: the leading singular triplets of a matrix, a batch or a list.

    Matrices of one shape, dtype and device are decomposed together, with one sketch for all of
    them, and a list gives what a loop over it with equally seeded generators gives, to rounding.

    Args:
        A: (m, n), (..., m, n), or a list of matrices of any mix of shapes, dtypes and devices;
            float32, bfloat16, float16, float64. Never written.
        rank: of all, or in a list one of each: an int up to min(m, n), or a float in (0, 1], the
            fraction ρ of min(m, n).
        tol: upper bound of the residual ‖[A V − U Σ; AᵀU − V Σ]‖₂ / σ₁ of the wanted triplets, and
            so of each triplet's own. It is measured; iterative methods go on until it is met or
            ``niter`` is spent, and a matrix that misses it is named in a warning and has
            converged=False. None: a fixed number of iterations.
        method: "randomized": block Krylov, where its space fits the workspace, else subspace
            iteration. "gram": eigenvectors of the smaller Gram matrix, in float64 where the
            spectrum is steep. "warm": ``warm_start`` as the sketch; one round, and a Krylov space
            from there while ``tol`` isn't met. "deflated": the triplets of ``warm_start`` and
            those of its low block, in one order. "exact": torch.linalg.svd. "auto": by rank,
            size, device, how many matrices a batch in one tensor has, and what ``warm_start``
            holds; an earlier result that no longer fits (residual
            above 1e-3, or tol) is dropped for a cold start. The result says what ran.
        niter: products with A and Aᵀ each that an iterative method may take; default 12, or with
            ``tol`` as many as a space of min(m, n) needs. 1 and 2 take a shorter way, for those who
            come from torch.svd_lowrank(A, q, niter=2) and have no more time.
        oversample: columns beyond the rank: of the whole Krylov space, default max(48, 2·rank); of
            the block in subspace iteration, default max(8, rank/8), and in a warm start, default 0.
        warm_start: a TruncatedSVD of an earlier A, or columns V (n, k) of any k; in a list one of
            each or None. More columns than wanted are dropped, fewer are filled up at random.
        complement: also return U_low and V_low, orthonormal to rounding and orthogonal to U and V.
        generator: on A's device; the default one where None. One number is drawn from it where
            a method draws a sketch, none otherwise.
        max_workspace_bytes: the most that is allocated at a time beside the results; default
            256 MiB on a CPU, half of the free memory on a GPU. Groups that don't fit are taken in
            parts, with one warning; a single matrix that doesn't is refused.

    Returns:
        A :class:`TruncatedSVD`, batched as A is, or a list of them. U, S, V are float32 (float64
        of float64); columns are orthonormal to LAPACK's ratio ‖I − QᵀQ‖₁ / (m·eps) < 30.

    Raises:
        TypeError: A holds no tensors or others than the dtypes above.
        ValueError: rank beyond min(m, n), NaN or Inf in A (before any solver runs, with the count
            in each matrix), a generator on another device, a warm start that doesn't fit; a
            singular value that overflows the result's dtype.

    Synchronizes once for the check of A and once a group, twice with niter ≤ 2. Doesn't take part
    in autograd. Nothing is returned, and nothing written, unless every matrix was decomposed.

    Source: Musco & Musco 2015 (block Krylov), Halko, Martinsson & Tropp 2011; see
    :class:`osf_kernels.linalg.krylov.KrylovSpace`.
    """
    entries = entries_of(A, rank, warm_start)
    check_options(method, tol, niter, oversample, generator, max_workspace_bytes, entries)
    options = _Options(
        method,
        math.prod(A.shape[:-2]) if isinstance(A, Tensor) else 1,
        tol,
        niter,
        oversample,
        complement,
        _Seed(generator),
        max_workspace_bytes,
    )
    with primitives.full_precision():
        results = _decompose(entries, options)
    _warn_unconverged(entries, results, tol)
    if not isinstance(A, Tensor):
        return results
    if not results:  # an empty batch: the shapes of one matrix's factors
        one = torch.zeros(A.shape[-2:], dtype=A.dtype, device=A.device)
        results = truncated_svd([one], rank, tol=tol, method="exact", complement=complement)
    return results[0] if A.dim() == 2 else _stacked(results, A.shape[:-2])


class _Seed:
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


class _Options(NamedTuple):
    method: Method
    batch: int  # of the tensor that the matrices are of
    tol: float | None
    niter: int | None
    oversample: int | None
    complement: bool
    seed: _Seed
    max_workspace_bytes: int | None


def _method(entry: Entry, options: _Options) -> Method:
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
        warm=entry.warm is not None,
        deflatable=can_deflate(entry),
    )


def _decompose(entries: Sequence[Entry], options: _Options) -> list[TruncatedSVD]:
    """Results in the order of the entries, computed by groups of one method and shape."""
    groups: dict[tuple[object, ...], tuple[Method, list[int]]] = {}
    for i, entry in enumerate(entries):
        method, A = _method(entry, options), entry.A
        kind = (method, A.shape, A.dtype, A.device, entry.rank)
        groups.setdefault(kind, (method, []))[1].append(i)
    results: dict[int, TruncatedSVD] = {}
    for method, indices in groups.values():
        done = _decompose_group(method, [entries[i] for i in indices], options)
        results.update(zip(indices, done, strict=True))
    ordered = [results[i] for i in range(len(entries))]
    if options.method != "auto":
        return ordered
    # An earlier result that no longer fits is dropped.
    limit = WARM_LIMIT if options.tol is None else options.tol
    stale = [
        i
        for i, result in enumerate(ordered)
        if result.method in ("warm", "deflated") and not float(result.residual) <= limit
    ]
    if stale:
        anew = _decompose([entries[i]._replace(warm=None) for i in stale], options)
        for i, result in zip(stale, anew, strict=True):
            if float(result.residual) < float(ordered[i].residual):
                ordered[i] = result
    return ordered


def _decompose_group(
    method: Method, entries: Sequence[Entry], options: _Options
) -> list[TruncatedSVD]:
    """One group in parts that fit the workspace, in smaller ones where memory runs out."""
    size = _fitting(method, entries, options)
    warned = options.max_workspace_bytes is not None and size < len(entries)
    if warned:
        _warn_smaller(entries, size, "max_workspace_bytes")
    results: list[TruncatedSVD] = []
    while len(results) < len(entries):
        part = entries[len(results) : len(results) + size]
        try:
            results += _run(method, part, options)
        except RuntimeError as error:
            if not _out_of_memory(error) or len(part) == 1:
                raise
            size = max(1, len(part) // 2)
            if not warned:
                _warn_smaller(entries, size, "the memory there is")
            warned = True
    return results


def _group(entries: Sequence[Entry], options: _Options) -> methods.Group:
    A = entries[0].A
    n, device = A.shape[1], A.device
    if options.max_workspace_bytes is not None:
        workspace = float(options.max_workspace_bytes)
    elif device.type == "cuda":
        workspace = GPU_WORKSPACE_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        workspace = float(CPU_WORKSPACE_BYTES)
    return methods.Group(
        As=[entry.A for entry in entries],
        norms=[entry.norm for entry in entries],
        rank=entries[0].rank,
        complement=options.complement,
        tol=options.tol,
        niter=options.niter,
        oversample=options.oversample,
        warm=[entry.warm for entry in entries],
        generator=lambda width: options.seed.generator(n, width, device),
        workspace_bytes=workspace,
    )


def _fitting(method: Method, entries: Sequence[Entry], options: _Options) -> int:
    """How many matrices of a group fit the workspace at a time.

    Raises:
        ValueError: not even one fits a cap that was given.
    """
    group = _group(entries, options)
    each = methods.workspace_bytes(method, group)
    fitting = int(group.workspace_bytes // max(1, each))
    if fitting == 0 and options.max_workspace_bytes is not None:
        raise ValueError(
            describe(
                OP,
                "max_workspace_bytes",
                f'at least {each} for {entries[0].name} {tuple(group.shape)} with "{method}"',
                options.max_workspace_bytes,
                "raise it, or lower rank or oversample",
            )
        )
    return max(1, min(len(entries), fitting))


def _run(method: Method, entries: Sequence[Entry], options: _Options) -> list[TruncatedSVD]:
    """Decomposes matrices together; those whose fast factorizations broke down once more."""
    if entries[0].rank == 0:
        return [_empty(entry, options) for entry in entries]
    group = _group(entries, options)
    work = primitives.working_dtype(group.As[0].dtype)
    if primitives.products_backend(group.As[0]) == "torch":
        # torch multiplies matrices of one dtype only.
        group = replace(group, As=[A.to(work) for A in group.As])
    factors = methods.run(method, group, safe=False)
    broken = torch.nonzero(~factors.ok).flatten()  # synchronizes
    if len(broken):
        again = methods.run(method, group.of(broken), safe=True)
        factors = methods.merged(factors, broken, again)
    return _results(method, entries, _finished(factors, options.complement), options)


def _finished(factors: Factors, complement: bool) -> Factors:
    """Signs fixed, and the low bases that the method didn't find by itself."""
    U, V = factors.U, factors.V
    least, most = V.aminmax(dim=-2, keepdim=True)
    signs = torch.where(-least > most, -1, 1).to(V.dtype)
    U, V = _times(U, signs), _times(V, signs)
    U_low, V_low = factors.U_low, factors.V_low
    if complement:
        U_low = complement_of(U) if U_low is None else U_low
        V_low = complement_of(V) if V_low is None else V_low
    # Equal ones come from norms in any order, to rounding.
    S = factors.S.cummin(-1).values
    return factors._replace(U=U, S=S, V=V, U_low=U_low, V_low=V_low)


# Columns that lie 2048 numbers apart or so share a few lines of a CPU's cache: more at a time, and
# each number of a row is read from memory again (2048 × 1024: 12 ms at once, 3 by 64 columns).
_TRANSPOSED_AT_ONCE = 64


def _times(X: Tensor, signs: Tensor) -> Tensor:
    """X·signs in rows, whatever X was: one pass instead of a product and a copy."""
    out = torch.empty(X.shape, dtype=X.dtype, device=X.device)
    transposed = X.device.type == "cpu" and X.stride(-1) != 1
    step = _TRANSPOSED_AT_ONCE if transposed else max(1, X.shape[-1])
    parts = (x.split(step, -1) for x in (X, signs, out))
    for x, sign, y in zip(*parts, strict=True):
        torch.mul(x, sign, out=y)
    return out


def _results(
    method: str, entries: Sequence[Entry], factors: Factors, options: _Options
) -> list[TruncatedSVD]:
    residual, tol = factors.residual, options.tol
    norms = torch.tensor([entry.norm for entry in entries], dtype=torch.float64)
    norms = norms.to(residual.device, non_blocking=True)
    held = factors.S.double().square().sum(-1) / norms.square()
    captured = torch.where(norms == 0, 1, held.clamp_max(1)).to(factors.S.dtype)  # of 0 all is held
    converged = None if tol is None else residual <= tol
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
    for entry, *row in zip(entries, *columns, strict=True):
        values: dict[str, Any] = dict(zip(fields, row, strict=True))
        if entry.exponent:
            values["S"] = _scaled_back(entry, values["S"])
        result = TruncatedSVD(**values, iterations=factors.iterations, method=method)
        results.append(result)
    return results


def _scaled_back(entry: Entry, S: Tensor) -> Tensor:
    # Two factors, since one of them could itself overflow.
    half = entry.exponent // 2
    S = S * 2.0**half * 2.0 ** (entry.exponent - half)
    if entry.exponent > 0 and not bool(S.isfinite().all()):
        expected = f"small enough for its singular values to fit {S.dtype}"
        raise ValueError(describe(OP, entry.name, expected, "larger", "scale it down"))
    return S


def _own(x: Tensor) -> Tensor:
    """x in memory of its own size: a view would keep its whole group alive."""
    owns = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if owns else x.clone(memory_format=torch.contiguous_format)


def _empty(entry: Entry, options: _Options) -> TruncatedSVD:
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
        None if options.tol is None else zero <= options.tol,
        *(low if options.complement else (None, None)),
    )


def _stacked(results: Sequence[TruncatedSVD], batch: Sequence[int]) -> TruncatedSVD:
    """One result of a batch, of its matrices'."""

    def field(name: str) -> Tensor | None:
        parts = [getattr(result, name) for result in results]
        if parts[0] is None:
            return None
        return torch.stack(parts)[: math.prod(batch)].reshape(*batch, *parts[0].shape)

    tensors = {name: field(name) for name in TENSOR_FIELDS}
    return TruncatedSVD(
        **tensors,  # type: ignore[arg-type]
        iterations=max(result.iterations for result in results),
        method=" + ".join(dict.fromkeys(result.method for result in results)),
    )


def _warn_unconverged(
    entries: Sequence[Entry], results: Sequence[TruncatedSVD], tol: float | None
) -> None:
    missed = [
        f"{entry.name} has {float(result.residual):.1e} after {result.iterations}"
        for entry, result in zip(entries, results, strict=True)
        if result.converged is not None and not bool(result.converged)
    ]
    if missed:
        shown = ", ".join(missed[:8]) + (f" and {len(missed) - 8} more" if len(missed) > 8 else "")
        warnings.warn(
            f"osf_kernels.{OP}: residuals above tol={tol:g}: {shown} iterations; "
            'raise niter, or take method="gram" or "exact"',
            RuntimeWarning,
            stacklevel=4,  # the caller of truncated_svd, through no_grad
        )


def _warn_smaller(entries: Sequence[Entry], size: int, what: str) -> None:
    m, n = entries[0].A.shape
    warnings.warn(
        f"osf_kernels.{OP}: {len(entries)} matrices of {m} × {n} exceed {what}; "
        f"they are taken {size} at a time",
        RuntimeWarning,
        stacklevel=6,
    )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
