"""input_subspaces: protects what the weights do to given inputs, task after task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import nn

from osf_torch.activations import Forward, require_reached, watch
from osf_torch.arguments import require_count, require_forward, require_show
from osf_torch.coverage import coverage, log, named_in, tell
from osf_torch.growing import OP, Kept, grow
from osf_torch.grown import Grown
from osf_torch.kinds import owners
from osf_torch.masks import Masks
from osf_torch.progress import Show
from osf_torch.reads import SEEN, Reads
from osf_torch.scalars import read
from osf_torch.selection import Filter, Names, Selected, listed, require_seed, select
from osf_torch.sharding import Group
from osf_torch.sharing import Ranks
from osf_torch.subspaces import Subspace

_LOOKUPS = nn.Embedding, nn.EmbeddingBag


def input_subspaces(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    energy: float = 0.9,
    previous: Mapping[str, Subspace] | None = None,
    min_free: int | float = 0.1,
    filter: Filter = None,
    leave_out: Names = None,
    max_tokens: int = 4096,
    max_batches: int | None = None,
    progress: Show = True,
    forward: Forward | None = None,
    seed: int = 0,
    group: Group | None = None,
    masks: Masks = "auto",
) -> Grown:
    """V' of the span of [V, N], the narrowest with ‖V'V'ᵀX‖²_F ≥ energy·‖X‖²_F of the inputs X of
    each weight, as long as ``min_free`` directions stay free.

    X (n, tokens) are the rows that W (m, n) is multiplied with on the batches, W x. An update ΔW
    that is projected with V' in mode "complement" then moves the outputs for them by
    ‖ΔW X‖_F ≤ √(1 − energy)·‖ΔW‖₂·‖X‖_F at most, whatever the spectrum of W is. Call it at the
    end of a task with some of its inputs, and protect the next task with what it returns; the
    inputs themselves need not be kept. Where a product sums over the other side, Wᵀ x, it is U that
    grows, and what is said here of V holds for it: so of transformers' Conv1D and of experts whose
    matrices are (inputs, outputs). A weight that is read by both sides grows both. Of one that an
    embedding is tied to what is looked up isn't protected, which is logged.

    Of a convolution W is its (out, in/groups·kh·kw) matrix, and X are the patches of its input, as
    ``torch.nn.functional.unfold`` has them, over any number of dimensions, with its stride, padding
    and dilation. V is one basis of all rows, and holds the patches of all groups. A transposed
    convolution multiplies Wᵀ, of W (in, out/groups·kh·kw), with the channels at each place: there U
    grows by them, with zeros for the channels of other groups.

    Of a batch W (..., m, n) of experts each grows by the tokens routed to it alone. Its bases are
    one tensor (..., n, r') as wide as the expert needs that needs most. The others hold more than
    the energy: further directions of their own inputs, then arbitrary ones, as many as an expert
    that no token reached holds beside those of ``previous``, which is logged. Arbitrary ones have
    no energy, and are the first to be released.

    The ranks follow from the energy, as far as ``min_free`` leaves room. A grown side carries,
    beside V (n, r), the energies e (r,) of its directions: within its span V diag(e) Vᵀ is the sum
    over tasks of XXᵀ/‖X‖²_F, in which each task counts alike, whatever the size of its activations.
    A task adds N to V by the energy, then its own share is merged,

        M = diag(e) ⊕ 0 + [V, N]ᵀ (XXᵀ/‖X‖²_F) [V, N] = R diag(e') Rᵀ,    V' = [V, N] R,

    whose columns are principal directions of all tasks so far in order of their energies e'. Where
    these are more than n − min_free, those with the least energy are released. Until then V' holds
    ``energy`` of the inputs of each earlier task too, as it held it at its own time; from then on
    ``released`` says how much was let go of, and a log line does.

    So ``energy`` and ``min_free`` trade room for later tasks against what earlier ones forget.

    Args:
        model: run in eval mode without gradients; a compiled one runs uncompiled.
        batches, max_batches, forward, masks: as in :func:`layer_importance`; padding is left out in
            the same way.
        energy: in (0, 1]. Of .8, .9 and .95 the default ended highest on validation examples, over
            streams of 14 and of 42 tasks (bench/README.md).
        previous: V by parameter name, of :func:`refresh` or of the task before, and U, which
            stays as it is. A weight that it lacks starts from no V and has no U. One that it has
            and that no batch reaches, such as an earlier task's head, stays as it is, which is
            logged. A side without energies, as of ``refresh``, counts as one task that read its r
            directions alike, 1/r each: a direction gives way where later tasks read more than that
            along others.
        min_free: how many directions of a grown side stay free: a count (int), or a share of its n
            (float in [0, 1), rounded up to whole directions, of which one at least is protected).
            With 0 nothing is released, and where V' reaches n columns the weight can't move any
            more.
        filter: which weights, as in ``refresh``. What they read is seen where torch's operators
            multiply matrices (products, grouped products, einsum, convolutions), whatever module
            does it, with the weight, parts of its rows, its experts, or a cast or scaled copy. A
            weight that a kernel of its own reads is refused. Where such products aren't all that a
            weight is used by (tanh(W), W[rows], W - W.mean() beside W x), what the other use reads
            isn't seen, and isn't held. Convolutions are taken where they are named or matched.
        leave_out: as in ``refresh``.
        max_tokens: where a weight's inputs on this rank, or an expert's, are more, as many are
            drawn at random. Peak memory is max_tokens·n elements a weight and expert of the
            activations' dtype; and for the one weight that is extended a few matrices (n, tokens
            of all ranks) in float64, of experts each as large as that of the busiest one. A
            convolution's patches are laid out as they are drawn, beside its padded input.
        progress: as in ``refresh``.
        seed: of that draw.
        group: a process group over whose ranks the inputs are put together and the weights are
            shared out; each rank calls with batches of its own. None takes the group that the
            first sharded weight is sharded over, or this process alone.

    Returns:
        A dict of Subspaces by parameter name, in the model's order, on the weights' devices: U of
        ``previous``, and V (..., n, r'), a high Basis of the directions, with their energies, and
        beyond n/2 the low basis beside them; files and states keep them all. No S: they are no
        triplets of the weight. ``protect`` and ``confine`` take them; ``released`` is the share of
        the energy of the tasks so far that each weight let go of; ``print(_.summary())`` shows
        them, and what trains without them.

    Raises:
        ValueError: energy outside (0, 1]; min_free below 0, or no less than a side's directions;
            nothing matches; a name in ``previous`` that ``filter`` doesn't select, or whose V
            doesn't fit; no batches; a weight of which no product was seen and that ``previous``
            lacks, or none of any weight; a product with a part of its columns, as of a layer that
            tensor parallelism shards, or a convolution with a part of a kernel; NaN or Inf in
            inputs; the weight of an nn.Embedding.
        TypeError: energy, min_free, max_tokens, max_batches, progress or forward of another type;
            one batch in the place of batches; a batch of another type; a weight that ``refresh``
            doesn't take.
        RuntimeError: another rank of the group failed.

    Changes neither the model nor torch's random generators. Synchronises for each weight.

    Source: Saha et al. 2021, "Gradient Projection Memory for Continual Learning" (arXiv
    2103.09762), equations 5 to 9, where V' is the memory of a layer; the merge is
    ``osf_kernels.merge_basis``'s.
    """
    _require_energy(energy)
    require_count("max_tokens", max_tokens, OP)
    if max_batches is not None:
        require_count("max_batches", max_batches, OP)
    require_show(progress, OP)
    require_forward(forward, OP)
    _require_min_free(min_free)
    require_seed(seed, "input_subspaces")
    names = named_in(model, leave_out, previous, "input_subspaces")
    selected = select(
        model,
        1,
        filter,
        operator="input_subspaces",
        sharded=True,
        leave_out=names,
    )
    previous = previous or {}
    _require_selected(previous, selected)
    _require_products(model, selected)
    sharers = Ranks.of((s.weight for s in selected), group)
    meters = {s.name: Kept(s, max_tokens, seed + sharers.rank) for s in selected}
    weights = {s.name: s.weight for s in selected}
    device = selected[0].weight.device
    error: Exception | None = None
    try:
        watch(
            model,
            batches,
            [Reads(model, weights, meters, OP)],
            operator=OP,
            title="inputs",
            max_batches=max_batches,
            progress=progress if sharers.rank == 0 else False,
            forward=forward,
            masks=masks,
        )
        missed = [name for name, meter in meters.items() if not meter.sides()]
        held = [] if len(missed) == len(meters) else previous  # of these nothing is to be added
        require_reached([name for name in missed if name not in held], OP, SEEN)
        _require_finite(meters)
    except Exception as caught:
        error = caught
    sharers.agree(error, device, "input_subspaces")
    turn = grow(selected, meters, previous, energy, min_free, sharers, progress)
    told = coverage(model, {id(s.weight) for s in selected}, names)
    if sharers.rank == 0:
        tell(told, "input_subspaces")
        _tell_lookups(model, selected)
    return Grown(turn.found, coverage=told, released=turn.released)


def _require_energy(energy: object) -> None:
    if isinstance(energy, bool) or not isinstance(energy, Real):
        raise TypeError(
            f"{OP}: expected energy to be a number in (0, 1], got {energy!r}; 0.9 is the default"
        )
    if not 0 < float(energy) <= 1:
        raise ValueError(f"{OP}: expected energy in (0, 1], got {energy}; 0.9 is the default")


def _require_min_free(min_free: object) -> None:
    """Refuses what is no count of directions and no share of them."""
    if isinstance(min_free, bool) or not isinstance(min_free, int | float):
        raise TypeError(
            f"{OP}: expected min_free to be an int or a float in [0, 1), got {min_free!r}"
        )
    if not 0 <= min_free < (math.inf if isinstance(min_free, int) else 1):
        raise ValueError(
            f"{OP}: expected min_free to be an int of at least 0 or a float in [0, 1), got "
            f"{min_free!r}; 0.1 is usual"
        )


def _require_products(model: nn.Module, selected: Sequence[Selected]) -> None:
    """Refuses what is looked up by number, and multiplied with nothing."""
    owned = owners(model)
    for s in selected:
        modules = [module for module, _ in owned[id(s.weight)]]
        if all(isinstance(module, _LOOKUPS) for module in modules):
            raise ValueError(
                f"{OP}: expected {s.name!r} to be multiplied with activations, as the weight of "
                f"an nn.Linear is, got one of {type(modules[0]).__name__}; call {OP} with "
                f"leave_out={s.name!r} and protect the model with what that returns, and freeze "
                "this weight where it is to stay as it is"
            )


def _tell_lookups(model: nn.Module, selected: Sequence[Selected]) -> None:
    """Says which weights are looked up by row too, as of tied embeddings: bases of what multiplies
    them protect nothing of that."""
    owned = owners(model)
    tied = [
        s.name
        for s in selected
        if any(isinstance(module, _LOOKUPS) for module, _ in owned[id(s.weight)])
    ]
    if tied:
        log.warning(
            "%s: %s is looked up by row too, as tied embeddings are, and what is looked up isn't "
            "protected: rows may move along all directions that are free; freeze the weight to "
            "keep them",
            OP,
            listed(tied),
        )


def _require_selected(previous: Mapping[str, Subspace], selected: Sequence[Selected]) -> None:
    known = {s.name for s in selected}
    lost = [name for name in previous if name not in known]
    if lost:
        raise ValueError(
            f"{OP}: expected the model's weights that filter selects to include those of "
            f"previous, got none for {listed(lost)}; widen filter=, or leave them out of previous"
        )


def _require_finite(meters: Mapping[str, Kept]) -> None:
    seen = [(meter, rows) for meter in meters.values() for rows, _ in meter.kept.values()]
    finite = read([rows.isfinite().all() for _, rows in seen])
    bad = {id(meter): meter for (meter, _), fine in zip(seen, finite, strict=True) if not fine}
    if bad:
        first = min(bad.values(), key=lambda meter: meter.first)
        name = next(name for name, meter in meters.items() if meter is first)
        raise ValueError(
            f"{OP}: expected finite inputs, got NaN or Inf first in {name!r}, and in "
            f"{len(bad)} of {len(meters)} weights' inputs; look at what runs before that layer"
        )
