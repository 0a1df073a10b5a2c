"""How factors lie on this rank: shards, DTensors, and what it takes to have the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from osf_torch.sharding import is_dtensor

SVDDict = Mapping[str, Any]


def rank_of_shards(svd_dict: SVDDict) -> int | None:
    """rank_high where the factors are shards that aren't DTensors, as V_high's missing rows tell.

    Only the default group can be theirs.
    """
    V_high, rank = svd_dict["V_high"], svd_dict.get("rank_high")
    if rank is None or is_dtensor(V_high):
        return None
    rows = held_here(V_high).shape[0]
    if rows >= int(rank):
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        raise ValueError(
            f"osf_torch.integrations.mini_trainer: expected V_high to have rank_high={int(rank)} "
            f"rows, got {rows} and no other ranks that hold the others"
        )
    return int(rank)


def held_here(factor: Any) -> Tensor:
    """A factor as it is, or what ``to_local()`` gives where a wrapper that is no DTensor has it.

    mini_trainer asks every factor for ``to_local`` and so takes wrappers that are no tensors.
    """
    if is_dtensor(factor):
        whole_or_sharded: Tensor = factor
        return whole_or_sharded
    shard: Tensor = getattr(factor, "to_local", lambda: factor)()
    return shard


def gathered(shard: Tensor, rows: int) -> Tensor:
    """All rows of a matrix whose rows the default group's ranks hold as torch.chunk cuts them."""
    ranks = dist.get_world_size()
    each = -(-rows // ranks)
    padded = shard.new_zeros(each, shard.shape[1])
    padded[: shard.shape[0]] = shard
    together = shard.new_empty(each * ranks, shard.shape[1])
    dist.all_gather_into_tensor(together, padded)
    return together[:rows]


def aligned(
    x: Tensor, basis: Tensor, dim: int, letter: str
) -> tuple[Tensor, Tensor, tuple[dist.ProcessGroup, ...]]:
    """x and its basis as local tensors that fit each other, and the groups to sum over.

    Where x is sharded along ``dim`` the basis is sharded alike and the coefficients are partial
    sums; elsewhere the basis has to be whole.
    """
    if not is_dtensor(x):
        return x, whole(basis), ()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(x, DTensor)
    mesh = x.device_mesh
    wanted: list[Replicate | Shard] = []
    groups = []
    for i, placement in enumerate(x.placements):
        if type(placement) not in (Replicate, Shard):
            raise ValueError(
                f"osf_torch.integrations.mini_trainer: expected {letter}_low and its gradient to "
                f"be replicated or sharded evenly, got {x.placements}; redistribute it first"
            )
        wanted.append(Shard(dim) if placement == Shard(dim) else Replicate())
        if placement == Shard(dim) and mesh.size(i) > 1:
            groups.append(mesh.get_group(i))
    if not isinstance(basis, DTensor):
        replicated = [Replicate()] * mesh.ndim
        basis = DTensor.from_local(basis, mesh, replicated, run_check=False)
    elif basis.device_mesh != mesh:
        raise ValueError(
            f"osf_torch.integrations.mini_trainer: expected {letter}_high on the mesh of "
            f"{letter}_low, {mesh}, got {basis.device_mesh}; shard both alike"
        )
    return x.to_local(), basis.redistribute(mesh, wanted).to_local(), tuple(groups)


def whole(x: Any) -> Tensor:
    full: Tensor = x.full_tensor() if is_dtensor(x) else x
    return full
