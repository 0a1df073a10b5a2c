"""The driver of truncated_svd: groups matrices, and runs methods on them in the memory there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.errors import ConvergenceWarning, Index, ValueRefusal
from osf_kernels.linalg import primitives
from osf_kernels.linalg.svd import arguments, auto, finish, methods
from osf_kernels.linalg.svd.arguments import OP, Entry, Options, WarmStart
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import Method
from osf_kernels.linalg.svd.residual import limit
from osf_kernels.linalg.svd.result import TruncatedSVD

# The share of a GPU's free memory that a group may take beside its results where no cap is given: a
# GPU wants as many matrices at a time as there is room for.
GPU_WORKSPACE_SHARE = 0.5
# With method="auto" an earlier result is taken as it is up to this residual, relative to σ₁. Above
# it the weight has moved inside the protected span, or too far, and takes a cold start.
WARM_LIMIT = 1e-3


def decompose(
    A: Tensor | Sequence[Tensor],
    rank: float | Sequence[float],
    warm_start: WarmStart | Sequence[WarmStart],
    options: Options,
) -> tuple[TruncatedSVD | list[TruncatedSVD], list[RuntimeWarning]]:
    """The result, and the warnings that go with it."""
    entries = arguments.entries_of(A, rank, warm_start)
    arguments.check_options(options, entries)
    call = _Call(options, math.prod(A.shape[:-2]) if isinstance(A, Tensor) else 1)
    with primitives.full_precision():
        results = call.decomposed(entries)
    warnings = call.warnings(entries, results)
    if not isinstance(A, Tensor):
        return results, warnings
    if not results:  # an empty batch: the shapes of one matrix's factors
        one = torch.zeros(A.shape[-2:], dtype=A.dtype, device=A.device)
        exactly = _Call(replace(options, method="exact"), 1)
        results = exactly.decomposed(arguments.entries_of([one], rank, None))
    return (results[0] if A.dim() == 2 else finish.stacked_result(results, A.shape[:-2])), warnings


class Missed(NamedTuple):
    """A matrix that missed the tolerance."""

    residual: float
    lacking: bool  # larger triplets, though these are right
    iterations: int
    method: str

    def __str__(self) -> str:
        lacking = " but lacks leading triplets" if self.lacking else ""
        after = f'after {self.iterations} iterations of "{self.method}"'
        return f"has {self.residual:.1e}{lacking} {after}"


class _Call:
    """One call of truncated_svd: its seed, and what happened to its groups.

    Args:
        batch: how many matrices there are in the tensor; 1 for a list.
    """

    def __init__(self, options: Options, batch: int) -> None:
        self._options, self._batch = options, batch
        self._seed: int | None = None
        # Of groups that were taken ``size`` matrices at a time: entries, size, the limit exceeded.
        self._parted: dict[int, tuple[Sequence[Entry], int, str]] = {}
        self._free: dict[torch.device, int] = {}  # bytes of each GPU

    def decomposed(self, entries: Sequence[Entry]) -> list[TruncatedSVD]:
        """Results in the order of the entries, computed by groups of one method and shape."""
        groups: dict[tuple[object, ...], tuple[Method, list[int]]] = {}
        for i, entry in enumerate(entries):
            method, A = self._method(entry), entry.A
            kind: tuple[object, ...]
            kind = (method, A.shape, A.dtype, A.device, entry.rank, entry.exponent == 0)
            if method == "deflated" and isinstance(entry.warm, TruncatedSVD):
                kind += (entry.warm.rank,)
            groups.setdefault(kind, (method, []))[1].append(i)
        results: dict[int, TruncatedSVD] = {}
        for method, indices in groups.values():
            done = self._in_parts(method, [entries[i] for i in indices])
            results.update(zip(indices, done, strict=True))
        ordered = [results[i] for i in range(len(entries))]
        return self._refreshed(entries, ordered) if self._options.method == "auto" else ordered

    def _method(self, entry: Entry) -> Method:
        if entry.rank == 0:
            return "exact"
        if self._options.method != "auto":
            return self._options.method
        m, n = entry.A.shape
        return auto.choose(
            m,
            n,
            entry.rank,
            device=entry.A.device.type,
            batch=self._batch,
            warm=entry.exact_enough,
            deflatable=entry.deflatable,
        )

    def _refreshed(
        self, entries: Sequence[Entry], results: list[TruncatedSVD]
    ) -> list[TruncatedSVD]:
        """The results, those anew whose warm start no longer fits."""
        fits = WARM_LIMIT if self._options.tol is None else self._options.tol
        stale = [
            i
            for i, result in enumerate(results)
            if result.method in ("warm", "deflated")
            and (not float(result.residual) <= fits or self._lacking(result))
        ]
        if stale:
            anew = self.decomposed([replace(entries[i], warm=None) for i in stale])
            for i, result in zip(stale, anew, strict=True):
                closer = float(result.residual) < float(results[i].residual)
                if closer or self._lacking(results[i]):
                    results[i] = result
        return results

    def _in_parts(self, method: Method, entries: Sequence[Entry]) -> list[TruncatedSVD]:
        """One group in parts that fit the workspace, in smaller ones where memory runs out."""
        size = self._fitting(method, entries)
        if size < len(entries) and self._options.max_workspace_bytes is not None:
            self._parted[id(entries)] = entries, size, "max_workspace_bytes"
        results: list[TruncatedSVD] = []
        while len(results) < len(entries):
            part = entries[len(results) : len(results) + size]
            try:
                results += self._run(method, part)
            except RuntimeError as error:
                if not _out_of_memory(error) or len(part) == 1:
                    raise
                size = max(1, len(part) // 2)
                self._parted[id(entries)] = entries, size, "the memory there is"
        return results

    def _fitting(self, method: Method, entries: Sequence[Entry]) -> int:
        """How many matrices of a group fit the workspace at a time.

        Raises:
            Refusal: not even one fits a cap that was given.
        """
        group = self._group(entries, [entry.A for entry in entries])
        each, safely = (methods.workspace_bytes(method, group, safe=s) for s in (False, True))
        held = methods.held_bytes(method, group)
        if any(entry.exponent for entry in entries):  # which are copied
            copy = entries[0].A.numel() * group.dtype.itemsize
            each, held = each + copy, held + copy
        most, cap = max(each, held + safely), self._options.max_workspace_bytes
        if cap is not None and most > cap:
            (m, n), i = group.shape, entries[0].index
            expected = f'at least {most} ({m} × {n}, "{method}")'
            remedy = "raise it, or lower rank or oversample"
            raise ValueRefusal.of(OP, "max_workspace_bytes for A", expected, cap, remedy, index=i)
        room = group.workspace_bytes
        fitting = min(room // max(1, each), (room - safely) // max(1, held))
        return max(1, min(len(entries), int(fitting)))

    def _run(self, method: Method, entries: Sequence[Entry]) -> list[TruncatedSVD]:
        """Decomposes matrices together; those whose fast factorizations broke down once more."""
        options = self._options
        group = self._group(entries, [entry.scaled() for entry in entries])
        if group.rank == 0:
            return finish.results_of(method, entries, group.no_factors(), options)
        if primitives.products_backend(group.As[0]) == "torch":
            # torch multiplies matrices of one dtype only.
            group = replace(group, As=[A.to(group.dtype) for A in group.As])
        factors = methods.run(method, group, safe=False)
        broken = torch.nonzero(~factors.ok).flatten()  # synchronizes
        if len(broken):
            each = methods.workspace_bytes(method, group, safe=True)
            room = group.workspace_bytes - len(entries) * methods.held_bytes(method, group)
            for part in broken.split(max(1, int(room // max(1, each)))):
                factors = factors.merged(part, methods.run(method, group.of(part), safe=True))
        finite = factors.residual.isfinite()
        if method in ("warm", "deflated") and not bool(finite.all()):
            # A look beforehand would take a tenth of the time of either method.
            arguments.require_finite_starts(entries)
            if options.method == "deflated":
                wrong = {
                    e.index: "" for e, f in zip(entries, finite.tolist(), strict=True) if not f
                }
                expected = "orthonormal to rounding, U with U_low and V with V_low"
                remedy = "make the earlier result anew, or take another method"
                raise ValueRefusal.of(OP, "warm_start of A", expected, "less", remedy, each=wrong)
        return finish.results_of(method, entries, factors, options)

    def _group(self, entries: Sequence[Entry], As: Sequence[Tensor]) -> Group:
        options, (n, device) = self._options, (As[0].shape[1], As[0].device)
        return Group(
            As=As,
            norms=[entry.norm for entry in entries],
            rank=entries[0].rank,
            generator=lambda width: self._generator(n, width, device),
            complement=options.complement,
            tol=options.tol,
            niter=options.niter,
            oversample=options.oversample,
            warm=[entry.start() for entry in entries],
            workspace_bytes=self._workspace_bytes(As[0]),
        )

    def _generator(self, n: int, width: int, device: torch.device) -> torch.Generator:
        """A generator for each sketch, from one number drawn from the caller's: sketches are the
        same whichever matrices share a call."""
        if self._seed is None:
            given = self._options.generator
            where = "cpu" if given is None else given.device
            self._seed = int(torch.randint(2**62, (), generator=given, device=where))
        seed = (self._seed + 1_000_003 * n + width) % 2**63
        return torch.Generator(device).manual_seed(seed)

    def _workspace_bytes(self, A: Tensor) -> float:
        if self._options.max_workspace_bytes is not None:
            return float(self._options.max_workspace_bytes)
        device = A.device
        if device.type != "cuda":
            of_one = A.numel() * primitives.working_dtype(A.dtype).itemsize
            return float(max(cpu.WORKSPACE_BYTES, cpu.WORKSPACE_OF_ONE * of_one))
        if device not in self._free:  # once a call, so that its groups are planned alike
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            self._free[device] = torch.cuda.mem_get_info(device)[0] + cached
        return GPU_WORKSPACE_SHARE * self._free[device]

    # --- warnings --------------------------------------------------------------------------

    def _lacking(self, result: TruncatedSVD) -> bool:
        """Whether triplets are right that aren't the leading ones."""
        right = limit(self._options.tol, result.S.dtype, min(result.shape))
        return float(result.residual) <= right and not _converged(result)

    def warnings(
        self, entries: Sequence[Entry], results: Sequence[TruncatedSVD]
    ) -> list[RuntimeWarning]:
        """One for all groups that were taken in parts, one for all results that missed ``tol``."""
        found: list[RuntimeWarning] = []
        parts = [
            f"{len(entries)} matrices of {entries[0].A.shape[0]} × {entries[0].A.shape[1]} exceed "
            f"{exceeded} and were taken {size} at a time"
            for entries, size, exceeded in self._parted.values()
        ]
        if parts:
            found.append(RuntimeWarning(f"osf_kernels.{OP}: {'; '.join(parts)}"))
        tol = self._options.tol
        if tol is None:  # ``converged`` is enough
            return found
        missed: dict[Index, Missed] = {
            entry.index: Missed(float(r.residual), self._lacking(r), r.iterations, r.method)
            for entry, r in zip(entries, results, strict=True)
            if not _converged(r)
        }
        if missed:
            remedy = self._remedy({one.method for one in missed.values()})
            found.append(ConvergenceWarning.of(OP, tol, missed, remedy))
        return found

    def _remedy(self, missed: set[str]) -> str:
        """Advice where results of these methods missed the tolerance."""
        if missed <= {"exact"}:
            return "no method comes closer in this dtype; raise tol, or pass float64"
        if missed <= {"exact", "gram"}:
            return 'take method="exact", or raise tol'
        if self._options.niter is not None:
            return 'raise niter, or take method="gram" or "exact"'
        if self._options.max_workspace_bytes is not None:
            return 'raise max_workspace_bytes, or take method="gram" or "exact"'
        return 'take method="gram" or "exact", or raise tol'


def _converged(result: TruncatedSVD) -> bool:
    return result.converged is None or bool(result.converged)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
