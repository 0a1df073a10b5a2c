"""refresh: the protected subspaces of a model, decomposed batch by batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import padded
from osf_torch.arguments import require_show
from osf_torch.batching import Batch, Method, kind_of, shared_out
from osf_torch.coverage import coverage, named_in, tell
from osf_torch.decomposing import Result, decomposed, joined
from osf_torch.free.merging import require_current
from osf_torch.progress import Show, progress_bar
from osf_torch.quantized import LOAD_MXFP4
from osf_torch.scalars import read
from osf_torch.selection import (
    Filter,
    Names,
    Selected,
    frozen_quantized,
    listed,
    require_seed,
    select,
    unheld_weights,
)
from osf_torch.selection import Ranks as WantedRanks
from osf_torch.sharding import Group, local, sharding_of, sum_over
from osf_torch.sharing import Ranks
from osf_torch.subspaces import Decomposition, Keep, Subspaces, assemble, smaller

log = logging.getLogger("osf_torch")
FACTOR_BYTES = 1 << 30  # what one call may hold where no max_workspace_bytes is given
CHECKED_AT_ONCE = 1 << 20  # elements: what looks for NaN and Inf takes seven bytes for each


def refresh(
    model: nn.Module,
    ranks: WantedRanks,
    *,
    previous: Subspaces | None = None,
    progress: Show = True,
    filter: Filter = None,
    leave_out: Names = None,
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
    the device where they are; so do the matrices of a batch (experts, (E, m, n)), each of which is
    decomposed by itself. Sharded weights (DTensor) are gathered a batch at a time on the rank
    that decomposes them; every rank then has the whole bases, and ``protect`` keeps its slices.

    Quantized weights are dequantized for it, a batch at a time: bitsandbytes' Params4bit and
    Int8Params, torchao's tensors, weights of float8 with ``_scale_inv`` beside them (transformers'
    FP8Linear and FP8Experts), ``_blocks`` and ``_scales`` of MXFP4 experts, and tensor subclasses
    with a ``dequantize()`` of their own.

    Args:
        model: its matrices, and batches of them, of float32, bfloat16, float16 or float64.
        ranks: r as an int, a share ρ in (0, 1] of min(m, n), or either by parameter name or shell
            pattern of names; an exact name goes first, then the first pattern that matches. Note
            that 1 is one direction of each weight and 1.0 is all of them. A share below 1 leaves at
            least one direction free, so that it passes over a weight of one row or column (the
            head of a reward model). An int or 1.0 that leaves nothing free is done, and logged.
            All matrices of a batch have one rank.
        previous: an earlier refresh of these weights, whose triplets the next one starts from;
            ``method="auto"`` then takes the warm or the deflated method, by what was kept.
        progress: True shows a bar on a terminal, "always" prints lines elsewhere too.
        filter: which weights; a function of (name, parameter), a name or pattern of names, or
            several, such as "*proj*" of a model in 4 bits. A name in full goes before any pattern.
            Scales of quantized weights are none. By default the weights that require
            grad of nn.Linear modules, of nn.MultiheadAttention (its in_proj_weight as one matrix),
            of transformers' Conv1D (GPT-2's layers), whose W is (inputs, outputs), the 3-D
            parameters of modules that are called after experts, and the 2-D ``weight`` of those
            called after a router or gate; not the factors of a LoRA adapter, which
            aren't the weight that they are added to. A weight that modules share is decomposed
            once and goes by its first name; one without elements is passed over. A convolution
            that is named or matched is taken by its (out, in/groups·kh·kw) matrix, a transposed one
            by (in, out/groups·kh·kw), as ``protect`` and ``confine`` take it. Where
            none of these requires grad, the quantized weights of layers and experts are taken. What
            trains and isn't taken, nor guarded or confined already, is logged, and stands in
            ``coverage``.
        leave_out: names, or patterns of names, of what is to move freely, such as "*embed*": it
            isn't taken, and the ``verify`` of what is made of these subspaces refuses no weight
            that is named here. It refuses any other that trains and isn't covered.
        method: as in truncated_svd.
        tol: relative residual of the triplets that the iterative methods reach, or warn about by
            parameter name.
        complement: whether low bases are computed; None does so where both sides' are smaller
            than the high ones (square weights: from ρ > .5 on). Pass False up to ρ ≈ .6 for
            ``protect(mode="core")``, where high bases take fewer FLOPs until there.
        keep: "smaller" keeps S and the smaller basis of each side, at most (m² + n²)/2 elements
            a weight: what ``protect`` needs. "all" keeps every factor, (m + n)·r elements, or
            m² + n² where there are low bases: what the next deflated refresh needs.
        seed: random sketches are drawn from it, one for each shape and rank, whatever the order
            and the batching; the global generator is left alone.
        max_workspace_bytes: bounds what truncated_svd works in (a single weight that doesn't fit
            is refused) and, apart from that, what one call is given and returns: the factors
            before the larger ones are let go, copies of weights that are gathered or brought to
            ``compute_dtype``, and of a ``previous`` on another device (a single weight's always
            go). Peak memory beyond the result is the sum of the two and a few MiB. Without it:
            truncated_svd's own default, and 1 GiB.
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
        Subspaces by parameter name, in the model's order; ``print(_.summary())`` shows them, and
        what trains without them.
        Under ``torch.inference_mode`` too, factors are tensors that autograd takes.

    Raises:
        ValueError: nothing matches (the message lists the model's matrices), a name in full of
            what is none, flat parameters of FSDP1, a weight without a rank,
            a rank or key that doesn't fit, NaN or Inf in a weight (all weights are looked at
            before the first is decomposed), a ``previous`` that lacks a weight, its shape or its
            triplets. All name the parameter; no partial result is left.
        TypeError: a weight of another dtype, quantized in an unknown way, not quantized yet, or
            sparse; an argument of another type.
        RuntimeError: another rank of the group failed.

    Mutates nothing; synchronises once a batch; draws from ``seed`` alone.
    """
    _require_options(keep, compute_dtype, dtype, seed)
    require_show(progress, "osf_torch.refresh")
    workspace_bytes, stay = _bytes(max_workspace_bytes), _device(offload)
    names = named_in(model, leave_out, previous, "refresh")
    taken = select(
        model, ranks, filter, operator="refresh", sharded=True, leave_out=names, quantized=True
    )
    selected = _with_room(taken)
    require_current(model, (s.weight for s in selected), "refresh")
    if previous is not None:
        _require_fit(previous, selected)
    sharers = Ranks.of((s.weight for s in selected), group)
    _require_finite(selected)
    earlier = [None if previous is None else previous[s.name].svd for s in selected]
    kinds = [
        kind_of(s, complement, compute_dtype, svd, method)
        for s, svd in zip(selected, earlier, strict=True)
    ]
    covered = {id(s.weight) for s in selected}
    told = coverage(model, covered, names)
    if sharers.rank == 0:
        _log_extremes(ranks, selected)
        if filter is None:
            _log_quantized(model, covered)
        tell(told, "refresh")
    limit_bytes = workspace_bytes or FACTOR_BYTES
    shares = shared_out(selected, kinds, limit_bytes, sharers)
    options = {"tol": tol, "max_workspace_bytes": workspace_bytes}
    kept: dict[str, dict[int, Result]] = {s.name: {} for s in selected}
    shown = progress if sharers.rank == 0 else False
    counts = [s.matrices for s in selected]
    cost = sum(kind.cost * count for kind, count in zip(kinds, counts, strict=True))
    bar_of_all = progress_bar(shown, "refresh", sum(counts), cost)
    with torch.inference_mode(False), torch.no_grad(), bar_of_all as bar:
        for at_once in itertools.zip_longest(*shares):  # a batch of every rank
            results: list[Result] = []
            error = None
            for owner, batch in _present(at_once):
                if owner != sharers.rank:
                    batch.join()
                    continue
                bar.begin(f"{batch.kind} {batch.parts[0].name}")
                try:
                    results = decomposed(batch, previous, seed, **options)
                except Exception as caught:
                    error = caught
            sharers.agree(error, kinds[0].device, "refresh")
            for owner, batch in _present(at_once):
                kind = batch.kind
                for part in batch.parts:
                    # Taken out, so that nothing of them is left when the next batch begins.
                    factors, facts = (
                        results.pop(0)
                        if owner == sharers.rank
                        else (kind.unfilled(part.count), None)
                    )
                    factors = _rounded(factors, keep, dtype or kind.held_dtype)
                    device = part.selected.weight.device
                    factors, facts = sharers.send(owner, factors, facts, device)
                    factors = {side: _kept(factor, stay) for side, factor in factors.items()}
                    kept[part.name][part.first] = factors, facts
                bar.advance(batch.matrices, kind.cost * batch.matrices)
        found = {s.name: _whole(s, kept.pop(s.name)) for s in selected}
    return Subspaces(found, seed=seed, coverage=told)


def _rounded(factors: Mapping[str, Tensor], keep: Keep, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is kept of the factors; S keeps its dtype."""
    factors = smaller(factors) if keep == "smaller" else factors
    return {
        side: padded(factor.detach(), dtype=dtype if side != "S" else None)
        for side, factor in factors.items()
    }


def _whole(s: Selected, parts: Mapping[int, Result]) -> Decomposition:
    """Of a weight, from its parts by the first matrix of each."""
    factors, facts = joined([parts[first] for first in sorted(parts)], s.batch)
    if s.batch:
        factors = {side: padded(factor) for side, factor in factors.items()}
    return assemble(factors, shape=s.whole_shape, rank=s.rank, **facts)


def _with_room(selected: Sequence[Selected]) -> list[Selected]:
    """The weights that a share leaves something free of; all of one direction are none."""
    kept = [s for s in selected if s.rank]
    if not kept:
        raise ValueError(
            "osf_torch.refresh: expected a weight that ranks leaves something free of, got weights "
            f"of one row or column alone: {listed([s.name for s in selected])}; widen filter=, or "
            "pass ranks=1 to protect them whole"
        )
    return kept


def _log_extremes(ranks: WantedRanks, selected: Sequence[Selected]) -> None:
    """Tells one direction from all of them, which 1 and 1.0 are."""
    full = [s.name for s in selected if s.rank == min(s.shape)]
    if full:
        log.warning(
            "osf_torch.refresh: nothing of it is left to train, since its rank is min(m, n): %s; a "
            "share below 1.0 leaves something free, and passes over weights of one row or column "
            "(1.0 is every direction, 1 is one)",
            listed(full),
        )
    given: list[Any] = list(ranks.values()) if isinstance(ranks, Mapping) else [ranks]
    if len(full) < len(selected) and all(isinstance(r, Integral) and r == 1 for r in given):
        log.warning(
            "osf_torch.refresh: one direction of each weight is protected, since ranks is the int "
            "1; 1.0 would be every direction, and 0.5 half of them"
        )


def _log_quantized(model: nn.Module, covered: Collection[int]) -> None:
    """Tells of quantized weights beside those that train."""
    others = [name for key, name in frozen_quantized(model).items() if key not in covered]
    if others:
        log.warning(
            "osf_torch.refresh: quantized weights are frozen and weren't taken: %s; filter= takes "
            'them, for confine(..., update="beside")',
            listed(others, 3),
        )
    apart = unheld_weights(model)
    if apart:
        log.warning(
            "osf_torch.refresh: experts of Mxfp4GptOssExperts are frozen and weren't taken, since "
            "they are packed for kernels that nothing can be added to: %s; %s",
            listed(apart, 3),
            LOAD_MXFP4,
        )


def _present(at_once: Iterable[Batch | None]) -> Iterator[tuple[int, Batch]]:
    """The ranks that have a batch, with it."""
    return ((rank, batch) for rank, batch in enumerate(at_once) if batch is not None)


def _require_options(keep: object, compute_dtype: object, dtype: object, seed: object) -> None:
    require_seed(seed, "refresh")
    if keep not in ("smaller", "all"):
        raise ValueError(f'osf_torch.refresh: expected keep to be "smaller" or "all", got {keep!r}')
    if compute_dtype not in (None, torch.float64):
        raise ValueError(
            "osf_torch.refresh: expected compute_dtype to be torch.float64 or None, got "
            f"{compute_dtype}; 16-bit weights are decomposed in float32 accuracy as they are"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            "osf_torch.refresh: expected dtype to be a floating-point torch.dtype or None, got "
            f"{dtype!r}"
        )


def _bytes(max_workspace_bytes: object) -> int | None:
    given = max_workspace_bytes
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(
            "osf_torch.refresh: expected max_workspace_bytes to be an int or None, got "
            f"{given!r}; 1 GiB is 1 << 30"
        )
    if int(given) < 1:
        raise ValueError(
            f"osf_torch.refresh: expected max_workspace_bytes to be at least 1, got {given}; None "
            "is the default"
        )
    return int(given)


def _device(offload: object) -> torch.device | None:
    if offload is None or isinstance(offload, torch.device):
        return offload
    if not isinstance(offload, str):
        raise TypeError(
            "osf_torch.refresh: expected offload to be a torch.device, its name or None, got "
            f"{type(offload).__name__}"
        )
    try:
        return torch.device(offload)
    except RuntimeError:
        raise ValueError(
            f'osf_torch.refresh: expected offload to name a device, such as "cpu", got {offload!r}'
        ) from None


def _require_finite(selected: Sequence[Selected]) -> None:
    """Refuses NaN and Inf on any rank, with one synchronisation a device."""
    counts = []
    for s in selected:
        packed, cut = s.stored, None
        if packed is not None:  # one of them at a time
            matrices = (packed.matrix(s.name, i, "refresh") for i in range(s.matrices))
            count = torch.stack([_not_finite(W) for W in matrices]).sum()
        else:
            count = _not_finite(local(s.weight.detach()).flatten(0, -2))  # as rows
            cut = sharding_of(s.weight)
        if cut is not None:
            (count,) = sum_over(cut.groups, [count])
        counts.append(count)
    found = zip(selected, read(counts), strict=True)
    bad = [f"{s.name!r} has {count}" for s, count in found if count]
    if bad:
        raise ValueError(
            f"osf_torch.refresh: expected finite weights, got NaN or Inf: {listed(bad)} such "
            "entries; repair them, or leave these weights out by filter="
        )


def _not_finite(rows: Tensor) -> Tensor:
    pieces = rows.split(max(1, CHECKED_AT_ONCE // max(1, rows.shape[1])))
    return torch.stack([(~torch.isfinite(piece)).sum() for piece in pieces]).sum()


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
        if earlier.shape != s.whole_shape:
            raise ValueError(
                f"osf_torch.refresh: expected previous to hold {s.name!r} with shape "
                f"{s.whole_shape}, got {earlier.shape}; it is another model's"
            )
    without = [s.name for s in selected if previous[s.name].svd is None]
    if without:
        raise ValueError(
            "osf_torch.refresh: expected previous to hold singular triplets, got low bases alone "
            f"for {listed(without)}; make the earlier refresh with keep='all', or leave previous "
            "out"
        )


def _kept(factor: Tensor, device: torch.device | None) -> Tensor:
    """The factor where it is to stay, in memory of its own: a view would hold on to the rest."""
    moved = factor.to(device)
    shared = moved.untyped_storage().nbytes() > moved.nbytes
    return padded(moved.clone() if shared or moved.is_inference() else moved)
