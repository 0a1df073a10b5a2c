"""input_subspaces: protects what the weights do to given inputs, task after task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import Basis, extend_basis, padded
from osf_torch.activations import Forward, require_reached, watch
from osf_torch.bases import Held, columns_of, moved, spans_of
from osf_torch.coverage import coverage, log, named_in, tell
from osf_torch.kinds import owners
from osf_torch.masks import Masks
from osf_torch.progress import Show, progress_bar
from osf_torch.reads import SEEN, SIDES, Reads, Rows, Side
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

    X (n, tokens) are the rows that W (m, n) is multiplied with on the batches, W x. An update ΔW
    that is projected with V' in mode "complement" then moves the outputs for them by
    ‖ΔW X‖_F ≤ √(1 − energy)·‖ΔW‖₂·‖X‖_F at most, whatever the spectrum of W is. Call it at the
    end of a task with some of its inputs, and protect the next task with what it returns; the
    inputs themselves need not be kept. Where a product sums over the other side, Wᵀ x, it is U that
    grows, and what is said here of V holds for it: so of transformers' Conv1D and of experts whose
    matrices are (inputs, outputs). A weight that is read by both sides grows both.

    Of a convolution W is its (out, in/groups·kh·kw) matrix, and X are the patches of its input, as
    ``torch.nn.functional.unfold`` has them, over any number of dimensions, with its stride, padding
    and dilation. V is one basis of all rows, and holds the patches of all groups. A transposed
    convolution multiplies Wᵀ, of W (in, out/groups·kh·kw), with the channels at each place: there U
    grows by them, with zeros for the channels of other groups.

    Of a batch W (..., m, n) of experts each grows by the tokens routed to it alone. Its bases are
    one tensor (..., n, r') as wide as the expert needs that needs most. The others hold more than
    the energy: further directions of their own inputs, then arbitrary ones, as many as an expert
    that no token reached holds beside those of ``previous``, which is logged.

    The ranks follow from the energy. Where V' reaches n columns the weight can't move any more:
    ``energy`` is what trades room for later tasks against what earlier ones forget.

    Args:
        model: run in eval mode without gradients; a compiled one runs uncompiled.
        batches, max_batches, forward, masks: as in :func:`layer_importance`; padding is left out in
            the same way.
        energy: in (0, 1].
        previous: V by parameter name, of :func:`refresh` or of the task before, and U, which
            stays as it is. A weight that it lacks starts from no V and has no U.
        filter: which weights, as in ``refresh``. What they read is seen where torch's operators
            multiply matrices (products, grouped products, einsum, convolutions), whatever module
            does it, with the weight, parts of its rows, its experts, or a cast or scaled copy. A
            weight that a kernel of its own reads is refused. Convolutions are taken where they are
            named or matched.
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
        ``previous``, and V (..., n, r') with the columns of ``previous`` first (a low Basis stays
        low and loses directions). No S: they are no triplets of the weight. ``protect`` takes them;
        ``print(_.summary())`` shows them, and what trains without them.

    Raises:
        ValueError: energy outside (0, 1]; nothing matches; a name in ``previous`` that ``filter``
            doesn't select, or whose V doesn't fit; no batches; a weight of which no product was
            seen; a product with a part of its columns, as of a layer that tensor parallelism
            shards, or a convolution with a part of a kernel; NaN or Inf in inputs; the weight of an
            nn.Embedding.
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
    meters = {s.name: _Inputs(s, max_tokens, seed + sharers.rank) for s in selected}
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
        require_reached([name for name, meter in meters.items() if not meter.sides()], OP, SEEN)
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
    costs = [float(meters[s.name].cost) for s in selected]
    owner = {i: rank for rank, share in enumerate(sharers.split(costs)) for i in share}
    found = {}
    unread: dict[str, list[int]] = {}
    shown = progress if sharers.rank == 0 else False
    with progress_bar(shown, "bases", len(selected), sum(costs)) as bar:
        for i, s in enumerate(selected):
            bar.begin(s.name)
            device = local(s.weight).device
            before = previous.get(s.name, Subspace(None, None))
            sides: dict[Side, Held] = {"U": moved(before.U, device), "V": moved(before.V, device)}
            for side in _sides_read(meters[s.name], device, sharers):
                rows = meters[s.name].taken(side, device, sharers)
                if rows.dim() > 2:
                    missed = (rows == 0).flatten(0, -3).all(-1).all(-1).nonzero().flatten()
                    unread.update({s.name: missed.tolist()} if len(missed) else {})
                start = _start(sides[side], rows)
                grown: Tensor | None = None
                error: Exception | None = None
                if owner[i] == sharers.rank:
                    try:
                        rows = rows.to(start.columns.dtype)
                        grown = extend_basis(start, rows.mT, energy=energy).columns.flatten(0, -2)
                    except (TypeError, ValueError) as caught:
                        error = type(caught)(f"{OP}: parameter {s.name!r}: {caught}")
                sharers.agree(error, device, "input_subspaces")
                height = start.columns.shape[:-1]
                columns = sharers.columns(owner[i], grown, math.prod(height), start.columns)
                sides[side] = Basis(padded(columns.unflatten(0, height)), start.spans)
            found[s.name] = Subspace(sides["U"], sides["V"])
            bar.advance(1, costs[i])
    if unread and sharers.rank == 0:
        _log_unread(unread, meters)
    return found


def _sides_read(meter: _Inputs, device: torch.device, sharers: Ranks) -> list[Side]:
    """The sides by which a rank's batches read the weight."""
    flags = torch.tensor([[float(side in meter.sides()) for side in SIDES]], device=device)
    read_by = sharers.gather(flags).sum(0).tolist()
    return [side for side, count in zip(SIDES, read_by, strict=True) if count]


def _log_unread(unread: Mapping[str, Sequence[int]], meters: Mapping[str, _Inputs]) -> None:
    told = [
        f"{len(which)} of {meters[name].count} of {name} ({listed([str(i) for i in which], 4)})"
        for name, which in unread.items()
    ]
    log.warning(
        "%s: no token reached some experts, of which the directions of before are protected and "
        "arbitrary ones, as many as of the other experts: %s; pass more batches to hold what "
        "these experts do",
        OP,
        listed(told, 4),
    )


def _start(held: Held, rows: Tensor) -> Basis:
    """The basis in the dtype that it will have, (..., n, 0) where there is none."""
    if held is None:
        held = rows.new_empty(*rows.shape[:-2], rows.shape[-1], 0)
    columns = columns_of(held)
    dtype = torch.promote_types(columns.dtype, torch.float32)
    return Basis(padded(columns, dtype=dtype), spans_of(held))


class _Inputs:
    """Keeps rows that each matrix of a weight reads by each side: all, or as many drawn at random.

    Attributes:
        count: of matrices.
        cost: of extending their bases, in arbitrary units.
        first: which of all weights read first, second and so on.
    """

    order = itertools.count()  # of first calls, over all weights: who saw a NaN first

    def __init__(self, s: Selected, limit: int, seed: int) -> None:
        self.limit, self.dtype, self.batch = limit, s.weight.dtype, s.batch
        m, n = s.shape
        self.sizes: dict[Side, int] = {"U": m, "V": n}
        self.count = math.prod(self.batch)
        self.cost = self.count * max(self.sizes.values()) ** 2
        self.generator = torch.Generator("cpu").manual_seed(seed)
        # Of a matrix by a side the rows (tokens, n), and a random number each: the smallest stay.
        self.kept: dict[tuple[Side, int], tuple[Tensor, Tensor]] = {}
        self.first = 0

    def sides(self) -> list[Side]:
        """Those by which a matrix was read, U first."""
        return sorted({side for side, _ in self.kept})

    def add(self, side: Side, matrix: int, rows: Rows) -> None:
        if not len(rows):
            return
        if not self.kept:
            self.first = next(self.order)
        keys = torch.rand(len(rows), generator=self.generator, device="cpu")
        none = torch.zeros(0, dtype=torch.int64, device=rows.device)
        before, drawn = self.kept.get((side, matrix), (rows[none], keys[:0]))
        keys = torch.cat([drawn, keys])
        which = torch.arange(len(keys), device="cpu")
        if len(keys) > self.limit:
            keys, which = keys.topk(self.limit, largest=False)
        stay, come = which < len(drawn), which >= len(drawn)
        old = before[which[stay].to(before.device)]
        new = rows[(which[come] - len(drawn)).to(rows.device)].to(before)
        self.kept[side, matrix] = torch.cat([old, new]), torch.cat([keys[stay], keys[come]])

    def taken(self, side: Side, device: torch.device, sharers: Ranks) -> Tensor:
        """The rows (..., tokens, n) of all ranks, which are let go of here.

        Zeros fill up where a matrix read fewer tokens than another.
        """
        read = {
            matrix: self.kept.pop((side, matrix))[0]
            for matrix in range(self.count)
            if (side, matrix) in self.kept
        }
        dtype = next((rows.dtype for rows in read.values()), self.dtype)
        most = max(map(len, read.values()), default=0)
        laid = torch.zeros(most, self.count, self.sizes[side], dtype=dtype, device=device)
        for matrix, rows in read.items():
            laid[: len(rows), matrix] = rows
        gathered = sharers.gather(laid.flatten(1)).view(-1, self.count, self.sizes[side])
        return gathered.transpose(0, 1).reshape(*self.batch, -1, self.sizes[side])


def _require_products(model: nn.Module, selected: Sequence[Selected]) -> None:
    """Refuses what is looked up by number, and multiplied with nothing."""
    owned = owners(model)
    for s in selected:
        modules = [module for module, _ in owned[id(s.weight)]]
        if all(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in modules):
            raise ValueError(
                f"{OP}: expected {s.name!r} to be multiplied with activations, as the weight of "
                f"an nn.Linear is, got one of {type(modules[0]).__name__}; leave it out by filter="
            )


def _require_selected(previous: Mapping[str, Subspace], selected: Sequence[Selected]) -> None:
    known = {s.name for s in selected}
    lost = [name for name in previous if name not in known]
    if lost:
        raise ValueError(
            f"{OP}: expected the model's weights that filter selects to include those of "
            f"previous, got none for {listed(lost)}; widen filter=, or leave them out of previous"
        )


def _require_finite(meters: Mapping[str, _Inputs]) -> None:
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
