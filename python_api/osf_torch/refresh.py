"""refresh: the protected subspaces of a model, decomposed batch by batch."""

from __future__ import annotations

import itertools
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from osf_kernels import TruncatedSVD, truncated_svd
from osf_torch.progress import Show, progress_bar
from osf_torch.scalars import read
from osf_torch.selection import Filter, Selected, listed, select
from osf_torch.selection import Ranks as WantedRanks
from osf_torch.sharding import Group, local, sharding_of, sum_over
from osf_torch.sharing import Ranks, whole
from osf_torch.subspaces import Decomposition, Keep, Subspaces, assemble, smaller

Method = Literal["auto", "randomized", "gram", "warm", "deflated", "exact"]

BATCH = 32  # matrices a call at most: the bar moves, and an interrupt is heeded
FACTOR_BYTES = 1 << 30  # what one call may return where no max_workspace_bytes is given


INDEXED = re.compile(r"\bA\[(\d+)\]")  # how truncated_svd names a matrix of a list


class _Kind(NamedTuple):
    """What the weights of one batch have in common."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int]
    rank: int
    complement: bool

    @property
    def cost(self) -> float:
        """FLOPs of a decomposition, up to a factor."""
        m, n = self.shape
        return float(m * n) * (min(m, n) if self.complement else self.rank)

    @property
    def factor_bytes(self) -> int:
        """Of one matrix's factors before the larger bases are let go."""
        m, n = self.shape
        width = 8 if self.dtype == torch.float64 else 4
        columns = [(m, m), (n, n)] if self.complement else [(m, self.rank), (n, self.rank)]
        return width * sum(size * count for size, count in columns)

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} r={self.rank}"


_Batch = tuple[_Kind, list[Selected]]
_Result = tuple[dict[str, Tensor], dict[str, Any]]  # factors and facts


def refresh(
    model: nn.Module,
    ranks: WantedRanks,
    *,
    previous: Subspaces | None = None,
    progress: Show = True,
    filter: Filter = None,
    method: Method = "auto",
    tol: float | None = None,
    complement: bool | None = None,
    keep: Keep = "smaller",
    seed: int = 0,
    max_workspace_bytes: int | None = None,
    offload: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    group: Group | None = None,
) -> Subspaces:
    """Decomposes a model's weights, W ≈ U diag(S) Vᵀ, into what :func:`protect` takes.

    Weights of one shape, rank, dtype and device go to ``osf_kernels.truncated_svd`` together, on
    the device where they are. Sharded weights (DTensor) are gathered a batch at a time on the rank
    that decomposes them; every rank then has the whole bases, and ``protect`` keeps its slices.

    Args:
        model: its 2-D parameters of float32, bfloat16, float16 or float64.
        ranks: r as an int, a share ρ in (0, 1] of min(m, n), or either by parameter name or shell
            pattern of names; an exact name goes first, then the first pattern that matches.
        previous: an earlier refresh of these weights, whose triplets the next one starts from;
            ``method="auto"`` then takes the warm or the deflated method, by what was kept.
        progress: True shows a bar on a terminal, "always" prints lines elsewhere too.
        filter: which weights; a function of (name, parameter), a pattern of names or several.
            By default the weights of nn.Linear modules that require grad. A weight that modules
            share is decomposed once and goes by its first name.
        method: as in truncated_svd.
        tol: relative residual of the triplets that the iterative methods reach, or warn about by
            parameter name.
        complement: whether low bases are computed; None does so where both sides' are smaller
            than the high ones (square weights: from ρ > .5 on).
        keep: "smaller" keeps S and the smaller basis of each side, at most (m² + n²)/2 elements
            a weight: what ``protect`` needs. "all" keeps every factor, (m + n)·r elements, or
            m² + n² where there are low bases: what the next deflated refresh needs.
        seed: random sketches are drawn from it, one for each shape and rank, whatever the order
            and the batching; the global generator is left alone.
        max_workspace_bytes: bounds what truncated_svd works in (a single weight that doesn't fit
            is refused) and, apart from that, the factors of one call before the larger ones are
            let go (of which a single weight's always go). Peak memory beyond the result is the
            sum of the two. Without it: truncated_svd's own default, and 1 GiB of factors.
        offload: device that the factors are moved to, batch by batch, such as "cpu".
        dtype: of the bases that are kept, as in ``Subspaces.to``; S keeps its own. None is the
            weight's for float64, else float32.
        compute_dtype: torch.float64 decomposes in double precision whatever the weights are, and
            rounds the bases once. That takes about three times as long; what leaks and drifts
            under ``protect`` in float32 falls from the residual, some 1e-6, to rounding.
        group: a process group over whose ranks the weights are shared out by cost, each rank
            calling with the same arguments; results are broadcast as tensors. None takes the
            group that the first sharded weight is sharded over, or this process alone.

    Returns:
        Subspaces by parameter name, in the model's order; ``print(_.summary())`` shows them.

    Raises:
        ValueError: nothing matches (the message lists the model's 2-D parameters), a weight
            without a rank, a rank or key that doesn't fit, NaN or Inf in a weight (all weights
            are looked at before the first is decomposed), a ``previous`` that lacks a weight, its
            shape or its triplets. All name the parameter; no partial result is left.
        TypeError: a weight of another dtype.
        RuntimeError: another rank of the group failed.

    Mutates nothing; synchronises once a batch; draws from ``seed`` alone.
    """
    if keep not in ("smaller", "all"):
        raise ValueError(f'osf_torch.refresh: expected keep to be "smaller" or "all", got {keep!r}')
    if compute_dtype not in (None, torch.float64):
        raise ValueError(
            "osf_torch.refresh: expected compute_dtype to be torch.float64 or None, got "
            f"{compute_dtype}; 16-bit weights are decomposed in float32 accuracy as they are"
        )
    selected = select(model, ranks, filter, operator="refresh", sharded=True)
    if previous is not None:
        _require_fit(previous, selected)
    sharers = Ranks.of((s.weight for s in selected), group)
    _require_finite(selected)
    kinds = [_kind(s, complement) for s in selected]
    limit_bytes = max_workspace_bytes or FACTOR_BYTES
    shares = [
        list(_batches([selected[i] for i in share], complement, limit_bytes, compute_dtype))
        for share in sharers.split([kind.cost for kind in kinds])
    ]
    options = {"tol": tol, "method": method, "max_workspace_bytes": max_workspace_bytes}
    found: dict[str, Decomposition] = {}
    shown = progress if sharers.rank == 0 else False
    with progress_bar(shown, "refresh", len(selected), sum(kind.cost for kind in kinds)) as bar:
        for at_once in itertools.zip_longest(*shares):  # a batch of every rank
            results: list[_Result] = []
            error = None
            for owner, (kind, batch) in _present(at_once):
                weights = [whole(s.weight.detach()) for s in batch]
                if owner != sharers.rank:
                    continue
                bar.begin(f"{kind} {batch[0].name}")
                try:
                    starts = None if previous is None else [_start(previous, s) for s in batch]
                    weights = [W.to(compute_dtype) for W in weights]
                    results = _decomposed(kind, batch, weights, starts, seed, **options)
                except Exception as caught:
                    error = caught
            sharers.agree(error, kinds[0].device, "refresh")
            for owner, (kind, batch) in _present(at_once):
                mine = iter(results if owner == sharers.rank else ())
                for s in batch:
                    factors, facts = next(mine, (_unfilled(kind, compute_dtype), None))
                    if keep == "smaller":
                        factors = smaller(factors)
                    held = dtype
                    if held is None:
                        held = torch.float64 if kind.dtype == torch.float64 else torch.float32
                    factors = {
                        part: factor.detach().to(held if part != "S" else None)
                        for part, factor in factors.items()
                    }
                    factors, facts = sharers.send(owner, factors, facts, s.weight.device)
                    factors = {part: _kept(factor, offload) for part, factor in factors.items()}
                    found[s.name] = assemble(factors, shape=s.shape, rank=kind.rank, **facts)
                bar.advance(len(batch), kind.cost * len(batch))
    return Subspaces({s.name: found[s.name] for s in selected}, seed=seed)


def _present(batches: Iterable[_Batch | None]) -> Iterator[tuple[int, _Batch]]:
    """The ranks that have a batch, with it."""
    return ((rank, batch) for rank, batch in enumerate(batches) if batch is not None)


def _decomposed(
    kind: _Kind,
    batch: Sequence[Selected],
    weights: Sequence[Tensor],
    starts: Sequence[TruncatedSVD | Tensor] | None,
    seed: int,
    **options: Any,  # of truncated_svd
) -> list[_Result]:
    started = time.perf_counter()
    with torch.no_grad(), _Named(batch):
        results = truncated_svd(
            weights,
            kind.rank,
            warm_start=starts,
            complement=kind.complement,
            generator=torch.Generator(kind.device).manual_seed(seed),
            **options,
        )
    figures = _figures(results)  # synchronises, so that the time is whole
    seconds = (time.perf_counter() - started) / len(batch)
    return [
        (
            _factors(result),
            figure | {"method": result.method, "iterations": result.iterations, "seconds": seconds},
        )
        for result, figure in zip(results, figures, strict=True)
    ]


def _unfilled(kind: _Kind, compute_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Factors that another rank computes, for their names and shapes, in no memory."""
    (m, n), r = kind.shape, kind.rank
    shapes = {"U": (m, r), "S": (r,), "V": (n, r)}
    if kind.complement:
        shapes |= {"U_low": (m, m - r), "V_low": (n, n - r)}
    double = torch.float64 in (kind.dtype, compute_dtype)
    dtype = torch.float64 if double else torch.float32
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def _batches(
    selected: Sequence[Selected],
    complement: bool | None,
    limit_bytes: int,
    compute_dtype: torch.dtype | None,
) -> Iterator[tuple[_Kind, list[Selected]]]:
    kinds: dict[_Kind, list[Selected]] = {}
    for s in selected:
        kinds.setdefault(_kind(s, complement), []).append(s)
    for kind, members in kinds.items():
        computed = kind._replace(dtype=compute_dtype or kind.dtype)
        size = max(1, min(BATCH, limit_bytes // max(1, computed.factor_bytes)))
        for first in range(0, len(members), size):
            yield kind, members[first : first + size]


def _kind(s: Selected, complement: bool | None) -> _Kind:
    # Low bases pay where both are the smaller ones: of a 4:1 weight the longer side's would be
    # many times the weight itself.
    low = 2 * s.rank > max(s.shape) if complement is None else complement
    return _Kind(s.weight.device, s.weight.dtype, s.shape, s.rank, low)


def _require_finite(selected: Sequence[Selected]) -> None:
    """Refuses NaN and Inf on any rank, with one synchronisation a device."""
    counts = []
    for s in selected:
        count = (~torch.isfinite(local(s.weight.detach()))).sum()
        cut = sharding_of(s.weight)
        if cut is not None:
            (count,) = sum_over(cut.group, [count])
        counts.append(count)
    found = zip(selected, read(counts), strict=True)
    bad = [f"{s.name!r} has {count}" for s, count in found if count]
    if bad:
        raise ValueError(
            f"osf_torch.refresh: expected finite weights, got NaN or Inf: {listed(bad)} such "
            "entries; repair them, or leave these weights out by filter="
        )


def _require_fit(previous: Subspaces, selected: Sequence[Selected]) -> None:
    if not isinstance(previous, Subspaces):
        raise TypeError(
            "osf_torch.refresh: expected previous to be the Subspaces of an earlier refresh, got "
            f"{type(previous).__name__}"
        )
    missing = [s.name for s in selected if s.name not in previous]
    if missing:
        raise ValueError(
            f"osf_torch.refresh: expected previous to hold every weight that is refreshed, got "
            f"none for {listed(missing)}; refresh those apart, or leave previous out"
        )
    for s in selected:
        earlier = previous[s.name]
        if earlier.shape != s.shape:
            raise ValueError(
                f"osf_torch.refresh: expected previous to hold {s.name!r} with shape {s.shape}, "
                f"got {earlier.shape}; it is another model's"
            )
    without = [s.name for s in selected if previous[s.name].svd is None]
    if without:
        raise ValueError(
            "osf_torch.refresh: expected previous to hold singular triplets, got low bases alone "
            f"for {listed(without)}; make the earlier refresh with keep='all', or leave previous "
            "out"
        )


def _start(previous: Subspaces, selected: Selected) -> TruncatedSVD | Tensor:
    """What truncated_svd starts from, on the weight's device."""
    svd = previous[selected.name].svd
    assert svd is not None
    device = selected.weight.device
    if svd.V.dtype not in (torch.float32, torch.float64):  # a sketch, but no triplets
        return svd.V.to(device, svd.S.dtype)
    moved = {name: factor.to(device) for name, factor in _factors(svd).items()}
    return TruncatedSVD(
        **moved,
        residual=svd.residual.to(device),
        captured=svd.captured.to(device),
        iterations=svd.iterations,
        method=svd.method,
        converged=svd.converged,
    )


def _factors(svd: TruncatedSVD) -> dict[str, Tensor]:
    found = {"U": svd.U, "S": svd.S, "V": svd.V, "U_low": svd.U_low, "V_low": svd.V_low}
    return {name: factor for name, factor in found.items() if factor is not None}


def _kept(factor: Tensor, device: torch.device | str | None) -> Tensor:
    """The factor where it is to stay, in memory of its own: a view would hold on to the rest."""
    moved = factor.to(device)
    return moved.clone() if moved.untyped_storage().nbytes() > moved.nbytes else moved


def _figures(results: Sequence[TruncatedSVD]) -> list[dict[str, Any]]:
    """Residual, captured and converged of each as Python numbers, by one synchronisation."""
    stacked = torch.stack([torch.stack([r.residual, r.captured]).double() for r in results])
    flags = [r.converged for r in results]
    known = (
        torch.stack([flag for flag in flags if flag is not None]).tolist()
        if any(flag is not None for flag in flags)
        else []
    )
    converged = iter(known)
    return [
        {
            "residual": residual,
            "captured": captured,
            "converged": None if flag is None else next(converged),
        }
        for (residual, captured), flag in zip(stacked.tolist(), flags, strict=True)
    ]


class _Named:
    """Errors and warnings of one batch, with parameters' names where they count matrices."""

    def __init__(self, batch: Sequence[Selected]) -> None:
        self._names = [s.name for s in batch]
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
        if isinstance(error, ValueError | TypeError | RuntimeError):
            raise type(error)(self._named(error)) from error
        for warning in self._log or ():
            warnings.warn(self._named(warning.message), warning.category, stacklevel=3)

    def _named(self, message: object) -> str:
        text, count = INDEXED.subn(lambda found: repr(self._names[int(found[1])]), str(message))
        return f"osf_torch.refresh: {text if count else f'{listed(self._names)}: {text}'}"
