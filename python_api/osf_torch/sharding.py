"""How a weight lies on this rank, and what a sum over the ranks that share it takes.

torch.distributed and DTensor do the work; a plain tensor is whole, and so is a DTensor that is
replicated on every mesh dimension: their gradients are everywhere the same and are never reduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import padded

Group = Any  # torch.distributed.ProcessGroup, which a build without distributed lacks


@dataclass(frozen=True)
class Sharding:
    """The slice of one dimension of a weight that this rank holds.

    Attributes:
        dim: the dimension, from the end: -2 for rows, -1 for columns, below for a batch's.
        start, size: the slice; the size may be 0 on the last ranks.
        group: of the ranks that hold the other slices.
        ranks: how many they are.
    """

    dim: int
    start: int
    size: int
    group: Group
    ranks: int

    def slice(self, t: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        part = t.narrow(dim, self.start, self.size)
        return padded(part.clone(memory_format=torch.contiguous_format))


def is_dtensor(t: Tensor) -> bool:
    return hasattr(t, "placements")


def local(t: Tensor) -> Tensor:
    """What this rank holds of a tensor; writing to it writes to the tensor."""
    if not is_dtensor(t):
        return t
    held: Tensor = t.to_local()  # type: ignore[attr-defined]
    return held


def resharded(model: nn.Module) -> None:
    """Has FSDP2 put back the parameters of modules that an evaluation left gathered.

    Until then they are other tensors than those that an optimizer trains.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard) and callable(getattr(module, "unshard", None)):
            reshard()


def sharding_of(weight: Tensor) -> Sharding | None:
    """How ``weight`` is sharded; None where it is whole on this rank.

    Raises:
        ValueError: sharded on two mesh dimensions, or in a way that isn't a plain Shard.
    """
    if not is_dtensor(weight):
        return None
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = weight.placements  # type: ignore[attr-defined]
    sharded = [(i, p) for i, p in enumerate(placements) if not p.is_replicate()]
    if not sharded:
        return None
    mesh_dim, placement = sharded[0]
    # FSDP over tensor-parallel rows gives a strided shard, a subclass whose rows aren't one slice.
    if len(sharded) > 1 or type(placement).__name__ != "Shard":
        raise ValueError(
            "expected it to be sharded by Shard on one mesh dimension, replicated on the others, "
            f"got placements {tuple(placements)}"
        )
    dim = placement.dim % weight.dim()
    ranks, rank = mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim)
    whole = weight.shape[dim]
    chunk = -(-whole // ranks)  # as torch.chunk cuts
    start = min(whole, chunk * rank)
    size = min(whole, start + chunk) - start
    held = local(weight).shape[dim]
    if held != size:
        raise ValueError(
            f"expected this rank to hold {size} of {whole} along dimension {dim}, got {held}"
        )
    return Sharding(dim - weight.dim(), start, size, mesh.get_group(mesh_dim), ranks)


def _placed(like: Tensor, dims: int, dim: int) -> list[Any]:
    """Placements of a tensor whose dimension ``dim``, from the end, is sharded as ``like`` is."""
    from torch.distributed.tensor import Replicate, Shard

    placements: Sequence[Any] = like.placements  # type: ignore[attr-defined]
    return [Replicate() if p.is_replicate() else Shard(dims + dim) for p in placements]


def as_dtensor(t: Tensor, like: Tensor, dim: int) -> Tensor:
    """The ranks' slices of a tensor as one DTensor, sharded by ``dim`` as ``like`` by its own."""
    from torch.distributed.tensor import DTensor

    cut = sharding_of(like)
    assert cut is not None
    t = t.contiguous()
    shape = list(t.shape)
    shape[dim] = like.shape[cut.dim]
    stride = torch.empty(shape, device="meta").stride()
    mesh = like.device_mesh  # type: ignore[attr-defined]
    placements = _placed(like, t.dim(), dim)
    made: Tensor = DTensor.from_local(
        t, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def lies_as(t: Any, like: Tensor, dim: int) -> bool:
    """Whether a DTensor is sharded by ``dim`` as ``like`` is by its own."""
    cut = sharding_of(like)
    return (
        cut is not None
        and t.device_mesh == like.device_mesh  # type: ignore[attr-defined]
        and list(t.placements) == _placed(like, t.dim(), dim)
        and t.shape[dim] == like.shape[cut.dim]
    )


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The whole of sharded tensors on every rank, by one collective a group and dtype."""
    import torch.distributed as dist

    # Its name up to torch 2.12.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    found: dict[int, Tensor] = {}
    together: dict[tuple[Any, ...], list[tuple[int, Sharding]]] = {}
    for i, t in enumerate(tensors):
        cut = sharding_of(t)
        if cut is None:
            found[i] = local(t)
        else:
            key = (cut.group, cut.ranks, t.dtype, t.device)
            together.setdefault(key, []).append((i, cut))
    for (group, ranks, *_), members in together.items():
        # Every rank sends as much as the one with the most, slice after slice.
        sizes = [
            [_shard_shape(tensors[i], cut, rank) for rank in range(ranks)] for i, cut in members
        ]
        most = max(sum(math.prod(size[rank]) for size in sizes) for rank in range(ranks))
        sent = local(tensors[members[0][0]]).new_zeros(most)
        flat = torch.cat([local(tensors[i]).reshape(-1) for i, _ in members])
        sent[: len(flat)] = flat
        everything = sent.new_empty(ranks * most)
        all_gather(everything, sent, group=group)
        received = everything.split(most) if most else [sent] * ranks
        offsets = [0] * ranks
        for (i, cut), size in zip(members, sizes, strict=True):
            parts = []
            for rank in range(ranks):
                count = math.prod(size[rank])
                part = received[rank][offsets[rank] : offsets[rank] + count]
                parts.append(part.view(size[rank]))
                offsets[rank] += count
            found[i] = torch.cat(parts, cut.dim)
    return [found[i] for i in range(len(tensors))]


def _shard_shape(t: Tensor, cut: Sharding, rank: int) -> list[int]:
    """What a rank holds of a tensor that is cut as torch.chunk cuts."""
    shape = list(t.shape)
    chunk = -(-shape[cut.dim] // cut.ranks)
    start = min(shape[cut.dim], chunk * rank)
    shape[cut.dim] = min(shape[cut.dim], start + chunk) - start
    return shape


def sum_over(group: Group, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the group's ranks of tensors of one dtype and device, by one collective."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    sum_over_([group], [flat])
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def sum_over_(groups: Sequence[Group], flats: Sequence[Tensor]) -> None:
    """Sums flat tensors of one dtype and device over the ranks of every group, in place.

    One collective a group; several tensors are copied into one and back.
    """
    import torch.distributed as dist

    together = flats[0] if len(flats) == 1 else torch.cat(list(flats))
    if together.numel():
        for group in groups:
            dist.all_reduce(together, group=group)
        if len(flats) > 1:
            parts = together.split([flat.numel() for flat in flats])
            torch._foreach_copy_(list(flats), list(parts))


def is_first(groups: Sequence[Group]) -> bool:
    """Whether this rank is the first of every group: one of all that sum over them."""
    import torch.distributed as dist

    return all(dist.get_rank(group) == 0 for group in groups)


def any_rank(group: Group | None, flag: Tensor) -> bool:
    """Whether ``flag`` is set here or, with a group, on any of its ranks; synchronises."""
    if group is not None:
        import torch.distributed as dist

        flag = flag.clone()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def step_left_out(optimizer: torch.optim.Optimizer, shardings: Iterable[Sharding | None]) -> bool:
    """Whether GradScaler found Inf or NaN, and leaves it to a fused optimizer to skip the step."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    return any_rank(next((s.group for s in shardings if s is not None), None), found)
