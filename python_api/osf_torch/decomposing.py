"""One batch of refresh: its decompositions, what is said of each weight, errors by its name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from osf_kernels import ConvergenceWarning, Refusal, TruncatedSVD, truncated_svd
from osf_torch.batching import Batch, Part, factors_of
from osf_torch.selection import listed
from osf_torch.sharing import UNKNOWN
from osf_torch.subspaces import Subspaces

# Remedies in refresh's own arguments, by truncated_svd's argument and by methods that miss tol.
ROOM = {"max_workspace_bytes for A": "raise it, or lower ranks"}
CLOSER = {
    (
        "exact",
    ): "no method comes closer in this dtype; raise tol, or take compute_dtype=torch.float64"
}

Result = tuple[dict[str, Tensor], dict[str, Any]]  # factors and facts, of a part of a weight


def decomposed(
    batch: Batch,
    previous: Subspaces | None,
    seed: int,
    **options: Any,  # of truncated_svd
) -> list[Result]:
    """Of each part of the batch."""
    kind, parts = batch
    starts: Any = None
    if previous is not None:
        starts = [_start(previous, part) for part in parts]
        starts = _together(starts) if kind.is_stacked else starts
    started = time.perf_counter()
    with _Named(batch):
        found = truncated_svd(
            batch.values(),  # one tensor, or a list
            kind.rank,
            warm_start=starts,
            complement=kind.complement,
            method=kind.method,
            generator=torch.Generator(kind.device).manual_seed(seed),
            **options,
        )
    results = _apart(found, parts) if isinstance(found, TruncatedSVD) else found
    figures = _figures(results)  # synchronises, so that the time is whole
    seconds = (time.perf_counter() - started) / batch.matrices
    return [
        (
            factors_of(result),
            figure
            | {
                "method": result.method,
                "iterations": result.iterations,
                "seconds": seconds * part.count,
            },
        )
        for part, result, figure in zip(parts, results, figures, strict=True)
    ]


def joined(parts: Sequence[Result], lead: Sequence[int]) -> Result:
    """The factors and facts of a weight from those of its parts, of which the worst is told.

    Args:
        lead: the weight's batch dimensions.
    """
    if not lead:
        (result,) = parts
        return result
    all_factors, all_facts = zip(*parts, strict=True)
    factors = {
        name: torch.cat([factors[name] for factors in all_factors]).unflatten(0, tuple(lead))
        for name in all_factors[0]
    }
    worst = max(all_facts, key=lambda facts: facts["residual"])
    flags = [facts["converged"] for facts in all_facts]
    return factors, {
        "residual": worst["residual"],
        "method": worst["method"],
        "captured": min(facts["captured"] for facts in all_facts),
        "converged": None if None in flags else all(flags),
        "iterations": max(facts["iterations"] for facts in all_facts),
        "seconds": sum(facts["seconds"] for facts in all_facts),
    }


# --- one tensor of several parts ---


def _apart(found: TruncatedSVD, parts: Sequence[Part]) -> list[TruncatedSVD]:
    """The results of the parts that one tensor was put together from."""
    counts = [part.count for part in parts]
    rows = {name: t.split(counts) for name, t in _tensors(found).items()}
    return [
        TruncatedSVD(
            **{name: pieces[i] for name, pieces in rows.items()},
            iterations=found.iterations,
            method=found.method,
        )
        for i in range(len(parts))
    ]


def _together(starts: Sequence[TruncatedSVD | Tensor]) -> TruncatedSVD | Tensor:
    """The other way round; of columns alone, or of the results of one earlier refresh."""
    columns = [start for start in starts if isinstance(start, Tensor)]
    if columns:
        return torch.cat([s if isinstance(s, Tensor) else s.V for s in starts])
    results = [start for start in starts if isinstance(start, TruncatedSVD)]
    named = [_tensors(result) for result in results]
    kept = [name for name in named[0] if all(name in tensors for tensors in named)]
    return TruncatedSVD(
        **{name: torch.cat([tensors[name] for tensors in named]) for name in kept},
        iterations=max(result.iterations for result in results),
        method=results[0].method,
    )


def _tensors(svd: TruncatedSVD) -> dict[str, Tensor]:
    figures = {"residual": svd.residual, "captured": svd.captured, "converged": svd.converged}
    return factors_of(svd) | {name: t for name, t in figures.items() if t is not None}


def _start(previous: Subspaces, part: Part) -> TruncatedSVD | Tensor:
    """What truncated_svd starts from, on the weight's device."""
    svd = previous[part.name].svd
    assert svd is not None
    device = part.selected.weight.device
    if svd.V.dtype not in (torch.float32, torch.float64):  # a sketch, but no triplets
        return part.of(svd.V).to(device, svd.S.dtype)
    moved = {name: part.of(factor).to(device) for name, factor in factors_of(svd).items()}
    lead = moved["S"].shape[:-1]  # of which each has the figures of the worst
    figures = {"residual": svd.residual, "captured": svd.captured, "converged": svd.converged}
    spread = {k: None if t is None else t.to(device).expand(lead) for k, t in figures.items()}
    return TruncatedSVD(**moved, **spread, iterations=svd.iterations, method=svd.method)  # type: ignore[arg-type]


# --- what is said of them ---


def _figures(results: Sequence[TruncatedSVD]) -> list[dict[str, Any]]:
    """Residual, captured and converged of each as Python numbers, by one synchronisation; of
    several matrices the worst."""
    rows = [
        torch.stack(
            [
                r.residual.double().max(),
                r.captured.double().min(),
                torch.full((), UNKNOWN, dtype=torch.float64, device=r.residual.device)
                if r.converged is None
                else torch.as_tensor(r.converged, device=r.residual.device).double().min(),
            ]
        )
        for r in results
    ]
    return [
        {
            "residual": residual,
            "captured": captured,
            "converged": None if flag == UNKNOWN else bool(flag),
        }
        for residual, captured, flag in torch.stack(rows).tolist()
    ]


class _Named:
    """Errors and warnings of one batch, with the names of its parameters and refresh's remedies."""

    def __init__(self, batch: Batch) -> None:
        # By the index of each matrix, which of a batch of them is told beside its name.
        self._of = [
            f"{part.name!r}" + (f"[{part.first + i}]" if part.selected.batch else "")
            for part in batch.parts
            for i in range(part.count)
        ]
        self._names = list(dict.fromkeys(part.name for part in batch.parts))
        self._caught = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self._log = self._caught.__enter__()
        warnings.simplefilter("always")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._caught.__exit__(kind, error, trace)
        if isinstance(error, Refusal):
            remedy = ROOM.get(error.argument, "")
            raise error.renamed(self._label, op="osf_torch.refresh", remedy=remedy) from error
        if isinstance(error, ValueError | TypeError | RuntimeError):
            raise type(error)(self._named(error)) from error
        for warning in self._log or ():
            # Past this method and decomposed, to the caller of refresh.
            warnings.warn(self._renamed(warning.message), warning.category, stacklevel=4)

    def _renamed(self, warning: Warning | str) -> Warning | str:
        if not isinstance(warning, ConvergenceWarning):
            return self._named(warning)
        remedy = CLOSER.get(tuple({one.method for one in warning.missed.values()}), "")
        return warning.renamed(self._label, op="osf_torch.refresh", remedy=remedy)

    def _label(self, argument: str, index: Any) -> str:
        """``rank of A`` of what truncated_svd was given, as ``rank of '0.weight'``."""
        argument = argument.replace("warm_start", "previous")
        if isinstance(index, tuple):  # of a batch in one tensor
            (index,) = index
        return argument if index is None else argument.removesuffix("A") + self._of[index]

    def _named(self, message: object) -> str:
        return f"osf_torch.refresh: {listed(self._names)}: {message}"
