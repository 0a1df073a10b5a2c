"""How a weight lies on this rank, and what a sum over the ranks that share it takes.

torch.distributed and DTensor do the work; a plain tensor is whole, and so is a DTensor that is
replicated on every mesh dimension: their gradients are everywhere the same and are never reduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import padded

Group = Any  # torch.distributed.ProcessGroup, which a build without distributed lacks


@dataclass(frozen=True)
class Cut:
    """The slice of one dimension of a weight that this rank holds.

    Attributes:
        dim: the dimension, from the end: -2 for rows, -1 for columns, below for a batch's.
        start, size: the slice; the size may be 0 on the last ranks.
        groups: of the ranks that hold the other slices, one a mesh dimension that cuts this one.
    """

    dim: int
    start: int
    size: int
    groups: tuple[Group, ...]

    def slice(self, t: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        part = t.narrow(dim, self.start, self.size)
        return padded(part.clone(memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class Sharding:
    """How a weight is shared out among ranks.

    Attributes:
        cuts: one a dimension that is cut, in the order of the mesh dimensions that cut them.
    """

    cuts: tuple[Cut, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Of all mesh dimensions that cut something: a sum over one after the other is over all
        parts of the weight."""
        return tuple(group for cut in self.cuts for group in cut.groups)

    def of(self, dim: int) -> Cut | None:
        """The cut of a dimension, counted from the end."""
        return next((cut for cut in self.cuts if cut.dim == dim), None)


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
        ValueError: it has parts that are sums, or a rank's part isn't one slice of each dimension.
    """
    if not is_dtensor(weight):
        return None
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = weight.placements  # type: ignore[attr-defined]
    cuts: dict[int, list[int]] = {}
    for mesh_dim, placement in enumerate(placements):
        if is_cut(placement):
            cuts.setdefault(placement.dim % weight.dim() - weight.dim(), []).append(mesh_dim)
        elif not placement.is_replicate():
            raise ValueError(
                "expected it to be sharded or replicated on every mesh dimension, got placements "
                f"{tuple(placements)}"
            )
    if not cuts:
        return None
    found = []
    for dim, mesh_dims in cuts.items():
        steps = tuple(
            (getattr(placements[d], "split_factor", 1), mesh.size(d), mesh.get_local_rank(d))
            for d in mesh_dims
        )
        start, size, is_one = _slice(weight.shape[dim], steps)
        held = local(weight).shape[dim]
        if held != size or not is_one:
            raise ValueError(
                f"expected this rank to hold one slice, of {size} of {weight.shape[dim]} along "
                f"dimension {dim}, got {held} by placements {tuple(placements)}"
            )
        found.append(Cut(dim, start, size, tuple(mesh.get_group(d) for d in mesh_dims)))
    return Sharding(tuple(found))


def is_cut(placement: Any) -> bool:
    """Whether a placement is a Shard, or the strided one that FSDP makes of tensor-parallel rows,
    which isn't a subclass in every release."""
    return hasattr(placement, "dim") and "Shard" in type(placement).__name__


@lru_cache(maxsize=1024)
def _slice(whole: int, steps: tuple[tuple[int, int, int], ...]) -> tuple[int, int, bool]:
    """Start and size of what a rank has of a dimension, and whether that is one slice.

    Args:
        steps: one a mesh dimension that cuts it: into how many parts later ones do, 1 but of a
            strided shard; how many ranks it has; which of them this one is.
    """
    at = torch.arange(whole, device="cpu")
    for factor, ranks, rank in steps:
        parts = []
        for piece in at.chunk(factor):
            size = -(-len(piece) // ranks)  # as torch.chunk cuts
            parts.append(piece[size * rank : size * (rank + 1)])
        at = torch.cat(parts)
    if not len(at):
        return 0, 0, True
    start, last = int(at[0]), int(at[-1])
    return start, len(at), last - start == len(at) - 1


def _placed(like: Tensor, dims: int, follows: Mapping[int, int]) -> list[Any]:
    """Placements of a tensor of ``dims`` dimensions, of which some are sharded as those of ``like``
    that they follow; both counted from the end."""
    from torch.distributed.tensor import Replicate, Shard

    own = {theirs: mine for mine, theirs in follows.items()}
    found: list[Any] = []
    for p in like.placements:  # type: ignore[attr-defined]
        dim = own.get(p.dim % like.dim() - like.dim()) if is_cut(p) else None
        if dim is None:
            found.append(Replicate())
        elif hasattr(p, "split_factor"):
            found.append(type(p)(dims + dim, split_factor=p.split_factor))
        else:
            found.append(Shard(dims + dim))
    return found


def as_dtensor(t: Tensor, like: Tensor, follows: Mapping[int, int]) -> Tensor:
    """The ranks' parts of a tensor as one DTensor on the mesh of ``like``.

    Args:
        follows: which of its dimensions are cut as which of ``like``, both counted from the end.
    """
    from torch.distributed.tensor import DTensor

    t = t.contiguous()
    shape = list(t.shape)
    for mine, theirs in follows.items():
        shape[mine] = like.shape[theirs]
    stride = torch.empty(shape, device="meta").stride()
    mesh = like.device_mesh  # type: ignore[attr-defined]
    placements = _placed(like, t.dim(), follows)
    made: Tensor = DTensor.from_local(
        t, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def part_like(t: Any, like: Tensor, follows: Mapping[int, int]) -> Tensor:
    """What this rank holds of a tensor whose dimensions are cut as those of ``like``.

    Args:
        t: all of it, the same on every rank; or a DTensor, which is gathered where it lies
            otherwise: a collective of the ranks of its mesh.
        follows: as in ``as_dtensor``.
    """
    if is_dtensor(t):
        placements = _placed(like, t.dim(), follows) if is_dtensor(like) else None
        mesh = getattr(like, "device_mesh", None)
        if t.device_mesh == mesh and list(t.placements) == placements:
            return local(t)
        t = t.full_tensor()
    cuts = sharding_of(like)
    for mine, theirs in follows.items():
        cut = None if cuts is None else cuts.of(theirs)
        if cut is not None:
            t = cut.slice(t, mine)
    part: Tensor = t
    return part


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The whole of sharded tensors on every rank, by one collective a group and dtype; of those
    that several mesh dimensions cut by some for each."""
    import torch.distributed as dist

    # Its name up to torch 2.12.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    found: dict[int, Tensor] = {}
    together: dict[tuple[Any, ...], list[tuple[int, Cut]]] = {}
    for i, t in enumerate(tensors):
        sharding = sharding_of(t)
        if sharding is None:
            found[i] = local(t)
        elif len(sharding.groups) > 1:
            found[i] = t.full_tensor()  # type: ignore[attr-defined]
        else:
            (cut,) = sharding.cuts
            key = (cut.groups[0], t.dtype, t.device)
            together.setdefault(key, []).append((i, cut))
    for (group, *_), members in together.items():
        ranks = dist.get_world_size(group)
        # Every rank sends as much as the one with the most, slice after slice.
        sizes = [
            [_shard_shape(tensors[i], cut.dim, ranks, rank) for rank in range(ranks)]
            for i, cut in members
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


def _shard_shape(t: Tensor, dim: int, ranks: int, rank: int) -> list[int]:
    """What a rank holds of a tensor that is cut as torch.chunk cuts."""
    shape = list(t.shape)
    chunk = -(-shape[dim] // ranks)
    start = min(shape[dim], chunk * rank)
    shape[dim] = min(shape[dim], start + chunk) - start
    return shape


def sum_over(groups: Sequence[Group], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the ranks of all groups of tensors of one dtype and device, by one collective a
    group; the tensors themselves without a group."""
    if not groups:
        return list(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    sum_over_(groups, [flat])
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


def any_rank(groups: Iterable[Group], flag: Tensor) -> bool:
    """Whether ``flag`` is set here or on any of the groups' ranks; synchronises."""
    flag = flag.clone()
    for group in groups:
        import torch.distributed as dist  # which a build without it never comes to

        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def groups_of(shardings: Iterable[Sharding | None]) -> list[Group]:
    """Each group over which something is shared out, once, in the order in which they come."""
    return list(dict.fromkeys(group for s in shardings if s is not None for group in s.groups))


def step_left_out(optimizer: torch.optim.Optimizer, shardings: Iterable[Sharding | None]) -> bool:
    """Whether GradScaler found Inf or NaN, and leaves it to a fused optimizer to skip the step."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    return any_rank(groups_of(shardings), found)
