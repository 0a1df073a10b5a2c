"""estimate: what a run would take, before it: bytes, FLOPs, collectives, time of the refresh."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from osf_kernels import SVDPlan
from osf_torch.batching import Kind, kind_of
from osf_torch.blueprint import blueprint
from osf_torch.budget import Estimate, Refreshing
from osf_torch.costs import Alike, Costs, Takes
from osf_torch.free.merging import GATHERED
from osf_torch.free.summary import MOMENTS
from osf_torch.kinds import Owners, is_conv1d, owners
from osf_torch.packing import Packed
from osf_torch.rates import Rates, measured
from osf_torch.selection import DTYPES, Filter, Ranks, Selected, listed, named_weights, select
from osf_torch.sharing import shares
from osf_torch.subspaces import Decomposition, assemble, smaller


def estimate(
    model: nn.Module | str | os.PathLike[str] | object,
    ranks: Ranks,
    *,
    tokens: int,
    world: int = 1,
    filter: Filter = None,
    rank: int | None = None,
    weights: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    architecture: str | None = None,
    device: str | None = None,
    tflops: float | None = None,
) -> Estimate:
    """What plain fine-tuning, ``protect`` and ``confine`` would take, without the weights.

    Args:
        model: a model, on the meta device or not; a config of transformers; a folder with a
            config.json, such a file, or a model type that transformers knows ("llama"); or a
            checkpoint alone, of which the headers are read: a .safetensors file, its index, or a
            folder with them and without a config.json. Nothing is loaded from the network. Of a
            config that names a quantization (bitsandbytes in 4 or 8 bits, fp8, mxfp4) the weights
            that it quantizes are counted as they will be held, and frozen: C beside them is what
            trains.
        ranks, filter: as of ``refresh``, whose selection it is; of a config or checkpoint that is
            quantized the default is the quantized weights.
        tokens: of a step, on each rank.
        world: ranks that ``fully_shard`` (FSDP2) shards over, every layer gathered again in the
            backward pass.
        rank: also of ``confine(rank=)``.
        weights: dtype of the model, in the place of its own; of a quantized one that of a model
            that is loaded dequantized.
        dtype: of the bases, as of ``refresh``.
        architecture: that projections are planned for: "cpu", "sm_80", "sm_86", "sm_90", "sm_100",
            "gfx942". None is that of ``device``; without a device "sm_90".
        device: where the rates of products and of eigendecompositions are measured, in some tenths
            of a second, for the time of the refresh; such as "cpu" or "cuda".
        tflops: a rate of products, in the place of a measured one. The time is then a lower
            bound, since eigendecompositions run at less.

    Returns:
        An :class:`Estimate`. Bytes are those that ``Subspaces.nbytes``, ``Confined.summary`` and
        the guard's state come to; beside high bases ``protect`` pins what the triplets miss, which
        isn't known before, and is taken as usual. Products are counted of the selected weights.

    Raises:
        ValueError: no model, or a config that transformers can't build one of (the message says
            what to pass), an unknown quantization, ranks or filter that ``refresh`` refuses,
            quantized weights that nothing can be trained beside, tokens, world, rank or tflops
            below 1, an unknown architecture, both a device and tflops, a device that isn't there.
        ImportError: a config, where transformers isn't installed.

    Mutates nothing; draws random numbers where rates are measured, from a generator of its own.
    """
    _require(tokens=tokens, world=world, rank=1 if rank is None else rank)
    if device is not None and tflops is not None:
        raise ValueError(
            "osf_torch.estimate: expected device or tflops, got both; leave one of them out"
        )
    if tflops is not None and not (isinstance(tflops, int | float) and tflops > 0):
        raise ValueError(f"osf_torch.estimate: expected tflops above 0, got {tflops!r}")
    if device is not None:
        _require_device(device)
    plan_of, packed, told = blueprint(model, "estimate", dequantized=weights is not None)
    sizes = _dtypes(weights)
    options: dict[str, Any] = {"operator": "estimate", "values": False, "quantized": True}
    wanted = _filter(filter, packed)
    taken = select(plan_of, ranks, wanted, **options)
    packed = {**packed, **{id(s.weight): Packed.of(s.stored) for s in taken if s.stored}}
    _require_trainable(taken, packed, sizes)
    selected = [s for s in taken if s.rank]
    if not selected:
        raise ValueError(
            "osf_torch.estimate: expected a weight that ranks leaves something free of, got "
            "weights of one row or column alone; widen filter="
        )
    named = architecture or _architecture(device)
    kind = "cpu" if named == "cpu" else "cuda"
    having = owners(plan_of)
    kinds: dict[Alike, list[Selected]] = {}
    for s in selected:
        kinds.setdefault(_alike(s, packed, sizes, having), []).append(s)
    costs = {
        alike: Costs(alike, subspace_of(members[0], alike, dtype), tokens, world, named)
        for alike, members in kinds.items()
    }
    _require_rank(rank, costs, kinds)
    methods = _methods(costs, kinds, rank)
    covered = {id(s.weight) for s in selected}
    notes = _notes(costs, kinds, packed) + told
    refreshes = {alike: cost.refresh(kind) for alike, cost in costs.items()}
    sums = sum(cost.subspace.nbytes * len(kinds[alike]) for alike, cost in costs.items())
    return Estimate(
        model=type(plan_of).__name__,
        tokens=tokens,
        world=world,
        architecture=named,
        weights=[_line(cost, refreshes[a], len(kinds[a])) for a, cost in costs.items()],
        bases=sums,
        methods=methods,
        others=_others(plan_of, covered, packed, sizes, world),
        collectives=_collectives(costs, kinds, methods, world),
        refresh=_refreshing(costs, kinds, refreshes, world, sums, device, tflops),
        notes=notes,
    )


def _require(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"osf_torch.estimate: expected {name} to be an int of at least 1, got {count!r}"
            )


def _dtypes(weights: torch.dtype | None) -> Callable[[torch.Tensor], torch.dtype]:
    def of(t: torch.Tensor) -> torch.dtype:
        return weights if weights is not None and t.is_floating_point() else t.dtype

    return of


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"osf_torch.estimate: expected device to be one that is here, got {device!r} "
            f"({str(error).splitlines()[0]}); leave it out, and pass tflops= for a time"
        ) from error


def _architecture(device: str | None) -> str:
    """Of the device that was named, else a GPU of sm_90."""
    if device is None:
        return "sm_90"
    if torch.device(device).type == "cpu":
        return "cpu"
    from osf_kernels import architecture_of

    return architecture_of(torch.device(device))


def _filter(given: Filter, packed: Mapping[int, Packed]) -> Filter:
    """The quantized weights where nothing else is said and something can train beside them."""
    beside = {key for key, one in packed.items() if not one.refusal}
    if given is not None or not beside:
        return given
    return lambda _, parameter: id(parameter) in beside


def _require_trainable(
    selected: Sequence[Selected],
    packed: Mapping[int, Packed],
    dtype_of: Callable[[torch.Tensor], torch.dtype],
) -> None:
    for s in selected:
        held, dtype = packed.get(id(s.weight)), dtype_of(s.weight)
        if held is None and dtype not in DTYPES:
            raise ValueError(
                f"osf_torch.estimate: expected weights of {listed(list(map(str, DTYPES)))}, or "
                f"quantized ones that are there, got {s.name!r} of {dtype} on "
                f"{s.weight.device.type}; pass the model's config or its checkpoint, or weights= "
                "(--dtype) for the model loaded dequantized"
            )
        if held is not None and held.refusal:
            raise ValueError(
                f"osf_torch.estimate: expected weights that something can be trained beside, got "
                f"{s.name!r} of {held.kind}, which {held.refusal}; here by weights= (--dtype)"
            )


def _alike(
    s: Selected,
    packed: Mapping[int, Packed],
    dtype_of: Callable[[torch.Tensor], torch.dtype],
    having: Owners,
) -> Alike:
    owned = having[id(s.weight)]
    module = owned[0][0]
    conv, held = is_conv1d(module), packed.get(id(s.weight))
    dtype = dtype_of(s.weight)
    if held is not None and (dtype.itemsize == 1 or not dtype.is_floating_point):
        dtype = torch.bfloat16  # codes: what is multiplied with them isn't known
    return Alike(
        shape=s.shape,
        batch=s.batch,
        dtype=dtype,
        packed=held,
        rank=s.rank,
        trained=s.weight.requires_grad and held is None,
        shared=len(owned) > 1,
        linear=conv or isinstance(module, nn.Linear),
        transposed=conv,
    )


def subspace_of(s: Selected, alike: Alike, dtype: torch.dtype | None) -> Decomposition:
    """What ``refresh`` leaves of a weight, on the meta device."""
    kind: Kind = kind_of(s, None, None, None)._replace(dtype=alike.values, computed=alike.values)
    held = dtype or kind.held_dtype
    factors = {
        part: factor if part == "S" else factor.to(held)
        for part, factor in smaller(kind.unfilled(s.matrices)).items()
    }
    facts: Mapping[str, Any] = {
        "shape": (*alike.batch, *alike.shape),
        "rank": alike.rank,
        "method": "auto",
        "iterations": 0,
        "residual": 0.0,
        "captured": 0.0,
        "converged": None,
        "seconds": 0.0,
    }
    return assemble(factors, **facts)


def _require_rank(
    rank: int | None, costs: Mapping[Alike, Costs], kinds: Mapping[Alike, list[Selected]]
) -> None:
    for alike, cost in costs.items():
        widths = [side.width for side in cost.sides]
        if rank is not None and 0 < min(widths) < rank and not alike.shared:
            raise ValueError(
                f"osf_torch.estimate: expected a free block of at least rank={rank} of "
                f"{kinds[alike][0].name!r}, got {widths[0]} by {widths[1]}; pass a smaller rank"
            )


def _methods(
    costs: Mapping[Alike, Costs], kinds: Mapping[Alike, list[Selected]], rank: int | None
) -> dict[str, Takes]:
    found: dict[str, Callable[[Costs], Takes]] = {"plain": lambda cost: cost.plain()}
    if not all(alike.packed for alike in costs):  # which nothing but C beside them trains
        found["protect"] = lambda cost: cost.protect()
        found["confine"] = lambda cost: cost.confine()
    found["beside"] = lambda cost: cost.confine(beside=True)
    if rank is not None:
        found[f"rank {rank}"] = lambda cost: cost.limited(rank)
    return {
        name: sum((of(cost).times(len(kinds[a])) for a, cost in costs.items()), Takes())
        for name, of in found.items()
    }


def _others(
    model: nn.Module,
    covered: set[int],
    packed: Mapping[int, Packed],
    dtype_of: Callable[[torch.Tensor], torch.dtype],
    world: int,
) -> Takes:
    total = Takes()
    for parameter in {id(p): p for p in named_weights(model).values()}.values():
        if id(parameter) in covered or not parameter.numel():
            continue
        if id(parameter) in packed:
            total += Takes(weights=-(-packed[id(parameter)].nbytes // world))
            continue
        size = dtype_of(parameter).itemsize
        rows = parameter.shape[0] if parameter.dim() else 1
        held = -(-rows // world) * (parameter.numel() // rows) * size
        trained = held if parameter.requires_grad else 0
        total += Takes(weights=held, gradient=trained, state=MOMENTS * trained)
    return total


def _collectives(
    costs: Mapping[Alike, Costs],
    kinds: Mapping[Alike, list[Selected]],
    methods: Mapping[str, Takes],
    world: int,
) -> dict[str, int]:
    found = dict.fromkeys(methods, 0)
    if world == 1 or "protect" not in methods:
        return found
    found["protect"] = 2 if methods["protect"].reduced else 0
    portion = gathers = 0
    for alike, cost in costs.items():  # as merging takes them, in the order of kinds
        elements = 0 if alike.shared else cost.sides[0].width * cost.sides[1].width
        if alike.batch:  # each rank has all of its experts' blocks
            elements = 0
        for _ in kinds[alike]:
            if elements and (not gathers or portion + elements > GATHERED):
                gathers, portion = gathers + 1, 0
            portion += elements
    found["confine"] = gathers
    return found


def _refreshing(
    costs: Mapping[Alike, Costs],
    kinds: Mapping[Alike, list[Selected]],
    refreshes: Mapping[Alike, SVDPlan],
    world: int,
    sums: int,
    device: str | None,
    tflops: float | None,
) -> Refreshing:
    every, weighed = [], []
    for alike, members in kinds.items():
        for s in members:
            every += [refreshes[alike]] * s.matrices
            weighed += [kind_of(s, None, None, None).cost] * s.matrices
    rates = Rates(tflops * 1e12, None) if tflops is not None else None
    if device is not None:
        largest = max(every, key=lambda one: one.eigen_flops)
        rates = measured(torch.device(device), largest.eigen_size)

    def seconds(some: list[SVDPlan]) -> float:
        assert rates is not None
        products, eigen = sum(p.flops for p in some), sum(p.eigen_flops for p in some)
        return products / rates.products + eigen / (rates.eigen or rates.products)

    taken = [[every[i] for i in share] for share in shares(weighed, world)]
    most = max(taken, key=lambda some: sum(p.flops + p.eigen_flops for p in some))
    whole = sum(
        math.prod((*alike.batch, *alike.shape)) * alike.dtype.itemsize * len(members)
        for alike, members in kinds.items()
    )
    return Refreshing(
        flops=sum(p.flops for p in most),
        eigen_flops=sum(p.eigen_flops for p in most),
        seconds=None if rates is None else max(map(seconds, taken)),
        seconds_are_least=rates is not None and rates.eigen is None,
        gathered=whole if world > 1 else 0,
        sent=sums if world > 1 else 0,
    )


def _notes(
    costs: Mapping[Alike, Costs],
    kinds: Mapping[Alike, list[Selected]],
    packed: Mapping[int, Packed],
) -> list[str]:
    notes = []
    quantized = list(dict.fromkeys(one.kind for one in packed.values()))
    if all(alike.packed for alike in costs):
        notes.append(
            f"quantized ({', '.join(quantized)}): C beside the weights is what trains, plain is "
            "the model as it is, and of a config all else is frozen, as PEFT prepares such models; "
            "protect and merging write to the weights, which takes a model that is loaded "
            "dequantized: weights= (--dtype)"
        )
    elif packed:
        notes.append(
            f"quantized weights ({', '.join(quantized)}) are counted as they are held, and frozen "
            "but for C beside those that were selected"
        )
    shared = [s.name for alike, members in kinds.items() if alike.shared for s in members]
    if shared:
        notes.append(
            f"confine refuses weights that several modules share, {listed(shared, 3)}: counted as "
            "trained plainly, as subspaces.without(name) leaves them"
        )
    full = [
        s.name
        for alike, cost in costs.items()
        if not min(side.width for side in cost.sides)
        for s in kinds[alike]
    ]
    if full:
        notes.append(f"nothing is free of {listed(full, 3)}: counted as frozen under confine")
    frozen = [
        s.name
        for alike, members in kinds.items()
        if not (alike.trained or alike.packed)
        for s in members
    ]
    if frozen:
        notes.append(f"frozen, and left out by protect and by merging: {listed(frozen, 3)}")
    experts = [s.name for alike, members in kinds.items() if alike.batch for s in members]
    if experts:
        notes.append(
            f"products with the tokens as if each took one matrix of {listed(experts, 2)}; "
            "multiply these by the number of experts that a token goes to"
        )
    notes.append(
        "not counted: activations but the inputs of these layers, and what a step allocates for a "
        "moment"
    )
    return notes


def _line(cost: Costs, refreshed: SVDPlan, count: int) -> dict[str, Any]:
    alike, s = cost.alike, cost.subspace
    step = cost.planned.matrices[0][1]
    return {
        "count": count,
        "shape": [*alike.batch, *alike.shape],
        "dtype": str(alike.dtype).removeprefix("torch."),
        "quantized": None if alike.packed is None else alike.packed.kind,
        "rank": alike.rank,
        "bases": s.nbytes,
        "held": "/".join(basis.spans for basis in (s.U, s.V)),  # type: ignore[union-attr]
        "free": [side.width for side in cost.sides],
        "free_held": "/".join(side.held for side in cost.sides),
        "refresh": refreshed.method,
        "order": cost.order,
        "form": step.label,
        "backend": cost.planned.backend,
        "tiles": list(cost.planned.notes),
    }
