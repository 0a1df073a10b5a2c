"""input_subspaces: protects what the weights do to given inputs, task after task."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import Basis, extend_basis, padded
from osf_torch.activations import Forward, activations, require_reached, watch
from osf_torch.bases import Held, columns_of, moved, spans_of
from osf_torch.coverage import coverage, named_in, tell
from osf_torch.kinds import is_conv1d, is_weight, owners
from osf_torch.masks import Masks, Padding
from osf_torch.progress import Show, progress_bar
from osf_torch.scalars import read
from osf_torch.selection import Filter, Names, Selected, listed, require_seed, select
from osf_torch.sharding import Group, local
from osf_torch.sharing import Ranks
from osf_torch.subspaces import Grown, Subspace

OP = "osf_torch.input_subspaces"


def input_subspaces(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    energy: float = 0.95,
    previous: Mapping[str, Subspace] | None = None,
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
    """V' = [V, N], the narrowest with ‖V'V'ᵀX‖²_F ≥ energy·‖X‖²_F of the inputs X of each weight.

    X (n, tokens) are what W (m, n) of an nn.Linear is multiplied with on the batches. An update
    ΔW that is projected with V' in mode "complement" then moves the outputs for them by
    ‖ΔW X‖_F ≤ √(1 − energy)·‖ΔW‖₂·‖X‖_F at most, whatever the spectrum of W is. Call it at the
    end of a task with some of its inputs, and protect the next task with what it returns; the
    inputs themselves need not be kept. Of transformers' Conv1D, whose W is (inputs, outputs), it is
    U that grows, and what is said here of V holds for it.

    The ranks follow from the energy. Where V' reaches n columns the weight can't move any more:
    ``energy`` is what trades room for later tasks against what earlier ones forget.

    Args:
        model: run in eval mode without gradients; a compiled one runs uncompiled.
        batches, max_batches, forward, masks: as in :func:`layer_importance`; padding is left out in
            the same way.
        energy: in (0, 1].
        previous: V by parameter name, of :func:`refresh` or of the task before, and U, which
            stays as it is. A weight that it lacks starts from no V and has no U.
        filter: which weights, as in ``refresh``; all of them must belong to nn.Linear, Conv1D or
            nn.MultiheadAttention modules. Of in_proj_weight the inputs are queries, keys and
            values.
        leave_out: as in ``refresh``.
        max_tokens: where a weight's inputs on this rank are more, as many are drawn at random.
            Peak memory is max_tokens·n elements a weight of the activations' dtype, and a few
            matrices (n, tokens of all ranks) in float64 for the one weight that is extended.
        progress: as in ``refresh``.
        seed: of that draw.
        group: a process group over whose ranks the inputs are put together and the weights are
            shared out; each rank calls with batches of its own. None takes the group that the
            first sharded weight is sharded over, or this process alone.

    Returns:
        A dict of Subspaces by parameter name, in the model's order, on the weights' devices: U of
        ``previous``, and V (n, r') with the columns of ``previous`` first (a low Basis stays low
        and loses directions). No S: they are no triplets of the weight. ``protect`` takes them;
        ``print(_.summary())`` shows them, and what trains without them.

    Raises:
        ValueError: energy outside (0, 1]; nothing matches; a name in ``previous`` that ``filter``
            doesn't select, or whose V doesn't fit; no batches; a weight that no batch reached; NaN
            or Inf in inputs; a module of another kind; inputs sharded by tensor parallelism.
        TypeError: a batch of another type; a weight that ``refresh`` doesn't take.
        RuntimeError: another rank of the group failed.

    Changes neither the model nor torch's random generators. Synchronises for each weight.

    Source: Saha et al. 2021, "Gradient Projection Memory for Continual Learning" (arXiv
    2103.09762), equations 5 to 9, where V' is the memory of a layer.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"{OP}: expected energy in (0, 1], got {energy}; 0.95 is usual")
    if max_tokens < 1:
        raise ValueError(f"{OP}: expected max_tokens to be at least 1, got {max_tokens}")
    require_seed(seed, "input_subspaces")
    names = named_in(model, leave_out, previous, "input_subspaces")
    selected = select(model, 1, filter, operator="input_subspaces", sharded=True, leave_out=names)
    previous = previous or {}
    _require_selected(previous, selected)
    sharers = Ranks.of((s.weight for s in selected), group)
    meters = _meters(model, selected, max_tokens, seed + sharers.rank)
    device = selected[0].weight.device
    error: Exception | None = None
    try:
        watch(
            model,
            batches,
            meters.values(),
            operator=OP,
            title="inputs",
            max_batches=max_batches,
            progress=progress if sharers.rank == 0 else False,
            forward=forward,
            masks=masks,
        )
        require_reached([name for name, meter in meters.items() if meter.rows is None], OP)
        _require_finite(meters)
    except Exception as caught:
        error = caught
    sharers.agree(error, device, "input_subspaces")
    found = _extended(selected, meters, previous, energy, sharers, progress)
    told = coverage(model, {id(s.weight) for s in selected}, names)
    if sharers.rank == 0:
        tell(told, "input_subspaces")
    return Grown(found, coverage=told)


def _extended(
    selected: Sequence[Selected],
    meters: Mapping[str, _Inputs],
    previous: Mapping[str, Subspace],
    energy: float,
    sharers: Ranks,
    progress: Show,
) -> dict[str, Subspace]:
    costs = [float(meters[s.name].width) ** 2 for s in selected]
    owner = {i: rank for rank, share in enumerate(sharers.split(costs)) for i in share}
    found = {}
    shown = progress if sharers.rank == 0 else False
    with progress_bar(shown, "bases", len(selected), sum(costs)) as bar:
        for i, s in enumerate(selected):
            bar.begin(s.name)
            device = local(s.weight).device
            before = previous.get(s.name, Subspace(None, None))
            meter = meters[s.name]
            read, other = (before.U, before.V) if meter.side == "U" else (before.V, before.U)
            rows = sharers.gather(meter.taken(device))
            start = _start(moved(read, device), rows)
            grown: Tensor | None = None
            error: Exception | None = None
            if owner[i] == sharers.rank:
                try:
                    rows = rows.to(torch.promote_types(start.columns.dtype, torch.float32))
                    grown = extend_basis(start, rows.mT, energy=energy).columns
                except (TypeError, ValueError) as caught:
                    error = type(caught)(f"{OP}: parameter {s.name!r}: {caught}")
            sharers.agree(error, device, "input_subspaces")
            columns = sharers.columns(owner[i], grown, meter.width, start.columns)
            held, kept = Basis(columns, start.spans), moved(other, device)
            found[s.name] = Subspace(held, kept) if meter.side == "U" else Subspace(kept, held)
            bar.advance(1, costs[i])
    return found


def _start(V: Held, rows: Tensor) -> Basis:
    """V in the dtype that it will have, (n, 0) where there is none."""
    if V is None:
        V = rows.new_empty(rows.shape[-1], 0)
    columns = columns_of(V)
    dtype = torch.promote_types(columns.dtype, torch.float32)
    return Basis(padded(columns, dtype=dtype), spans_of(V))


class _Inputs:
    """Keeps inputs of the modules that own a weight: all, or as many drawn at random.

    Attributes:
        side: "V" where W is (outputs, inputs), "U" where it is (inputs, outputs).
        width: how many inputs there are.
    """

    order = itertools.count()  # of first calls, over all weights: who saw a NaN first

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        having: Sequence[tuple[nn.Module, str]],
        limit: int,
        seed: int,
    ) -> None:
        self.name, self.having, self.limit = name, having, limit
        self.side = "U" if is_conv1d(having[0][0]) else "V"
        self.width = shape[0] if self.side == "U" else shape[1]
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.rows: Tensor | None = None  # (tokens, n)
        self.keys = torch.empty(0, device="cpu")  # a random number a row; the smallest stay
        self.first = 0

    @contextmanager
    def watching(self, padding: Padding) -> Iterator[None]:
        def after(
            attribute: str, module: nn.Module, args: Sequence[Any], kwargs: Any, output: object
        ) -> None:
            for x in _read_by(module, attribute, args, kwargs):
                self.add(*padding.rows(self, local(x)))

        with ExitStack() as stack:
            for module, attribute in self.having:
                stack.enter_context(
                    module.register_forward_hook(
                        partial(after, attribute), with_kwargs=True, prepend=True
                    )
                )
            yield

    def add(self, rows: Tensor) -> None:
        if rows.shape[-1] != self.width:
            raise ValueError(
                f"{OP}: expected inputs of {self.name!r} to have n={self.width} features, got "
                f"{rows.shape[-1]}; of a tensor-parallel layer call this before parallelizing"
            )
        if not len(rows):
            return
        if self.rows is None:
            self.first = next(self.order)
            self.rows = rows.new_empty(0, self.width)
        keys = torch.cat([self.keys, torch.rand(len(rows), generator=self.generator, device="cpu")])
        kept = torch.cat([self.rows, rows.to(self.rows.dtype)])
        if len(kept) > self.limit:
            keys, which = keys.topk(self.limit, largest=False)
            kept = kept[which.to(kept.device)]
        self.keys, self.rows = keys, kept

    def taken(self, device: torch.device) -> Tensor:
        """The rows, which are let go of here."""
        rows, self.rows = self.rows, None
        assert rows is not None
        return rows.to(device)


def _read_by(
    module: nn.Module, attribute: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """What a call of ``module`` multiplies with its ``attribute``, each tensor once."""
    if not isinstance(module, nn.MultiheadAttention):
        return list(itertools.islice(activations([args, *kwargs.values()]), 1))
    taken = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    parts = {"q_proj_weight": ("query",), "k_proj_weight": ("key",), "v_proj_weight": ("value",)}
    read = [taken[part] for part in parts.get(attribute, ("query", "key", "value"))]
    return list({id(x): x for x in read}.values())


def _meters(
    model: nn.Module, selected: Sequence[Selected], max_tokens: int, seed: int
) -> dict[str, _Inputs]:
    owned = owners(model)
    meters = {}
    for s in selected:
        having = owned[id(s.weight)]
        reading = [
            (module, attribute) for module, attribute in having if is_weight(module, attribute)
        ]
        if not reading:
            kind = type(having[0][0]).__name__
            raise ValueError(
                f"{OP}: expected {s.name!r} to be the weight of an nn.Linear, Conv1D or "
                f"nn.MultiheadAttention, got one of {kind}; leave it out by filter="
            )
        if len({is_conv1d(module) for module, _ in reading}) > 1:
            raise ValueError(
                f"{OP}: expected {s.name!r} to lie one way, got a weight that an nn.Linear and a "
                "Conv1D share; leave it out by filter="
            )
        meters[s.name] = _Inputs(s.name, s.shape, reading, max_tokens, seed)
    return meters


def _require_selected(previous: Mapping[str, Subspace], selected: Sequence[Selected]) -> None:
    known = {s.name for s in selected}
    lost = [name for name in previous if name not in known]
    if lost:
        raise ValueError(
            f"{OP}: expected the model's weights that filter selects to include those of "
            f"previous, got none for {listed(lost)}; widen filter=, or leave them out of previous"
        )


def _require_finite(meters: Mapping[str, _Inputs]) -> None:
    seen = [(meter, meter.rows) for meter in meters.values() if meter.rows is not None]
    finite = read([rows.isfinite().all() for _, rows in seen])
    bad = [meter for (meter, _), fine in zip(seen, finite, strict=True) if not fine]
    if bad:
        first = min(bad, key=lambda meter: meter.first)
        raise ValueError(
            f"{OP}: expected finite inputs, got NaN or Inf first in {first.name!r}, and in "
            f"{len(bad)} of {len(meters)} weights' inputs; look at what runs before that layer"
        )
