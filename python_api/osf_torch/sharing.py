"""Ranks that share out work on a model: who does what, and how results travel, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import padded
from osf_torch.sharding import (
    Group,
    groups_of,
    is_dtensor,
    is_first,
    local,
    sharding_of,
    sum_over_,
)

METHODS = ("randomized", "gram", "warm", "deflated", "exact")
UNKNOWN = -1.0  # what converged of None is among numbers


class Ranks:
    """The ranks of a group, or this process alone.

    Attributes:
        group: None alone.
        beside: groups whose ranks do the same, each within its ``group``, and are to have the same.
        rank, count: of this process, and of all.
    """

    def __init__(self, group: Group | None, beside: Sequence[Group] = ()) -> None:
        self.group, self.rank, self.count = group, 0, 1
        self.beside = list(beside)
        if group is not None:
            import torch.distributed as dist

            self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one to do what is to be done once."""
        return self.rank == 0 and is_first(self.beside)

    @classmethod
    def of(cls, tensors: Iterable[Tensor], group: Group | None) -> Ranks:
        """Those of ``group``, else those that the first sharded tensor is sharded over."""
        if group is not None:
            return cls(group)
        first, *others = groups_of(map(sharding_of, tensors)) or [None]
        return cls(first, others)

    def split(self, costs: Sequence[float]) -> list[list[int]]:
        """Which items each rank takes: the costliest first, each to whoever has least to do."""
        return shares(costs, self.count)

    def agree(self, error: Exception | None, device: torch.device, operator: str) -> None:
        """Raises on every rank where one has an error, so that no rank waits for its result."""
        failed = error is not None
        if self.group is not None:
            import torch.distributed as dist

            flags = torch.zeros(self.count, device=device)
            flags[self.rank] = float(failed)
            for group in (self.group, *self.beside):
                dist.all_reduce(flags, group=group)
            if error is None and flags.any():
                who = flags.nonzero().flatten().tolist()
                raise RuntimeError(
                    f"osf_torch.{operator}: expected every rank to do its share, got an error on "
                    f"rank {who[0]} of the group; see what it raised"
                )
        if error is not None:
            raise error

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (count, n) of all ranks in one; zeros where a rank has fewer than another."""
        if self.group is None:
            return rows
        import torch.distributed as dist

        most = torch.tensor(len(rows), device=rows.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        padded = rows.new_zeros(int(most), rows.shape[-1])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat(found)

    def _broadcast(self, t: Tensor, owner: int) -> None:
        """The owner's values, from there to whom else is to have the same."""
        import torch.distributed as dist

        dist.broadcast(t, group_src=owner, group=self.group)
        for group in self.beside:
            dist.broadcast(t, group_src=0, group=group)

    def columns(self, owner: int, columns: Tensor | None, height: int, like: Tensor) -> Tensor:
        """The owner's columns (height, r), r known to it alone, on every rank; of ``like``'s dtype.

        Args:
            columns: None elsewhere.
        """
        if self.group is None:
            assert columns is not None
            return columns

        width = torch.tensor(0 if columns is None else columns.shape[-1], device=like.device)
        self._broadcast(width, owner)
        sent = like.new_empty(height, int(width))
        if columns is not None:
            sent.copy_(columns)
        self._broadcast(sent, owner)
        return padded(sent)

    def send(
        self,
        owner: int,
        factors: Mapping[str, Tensor],
        facts: Mapping[str, Any] | None,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The owner's factors and facts, on every rank.

        Args:
            factors: the owner's values; elsewhere meta tensors of the same names, shapes, dtypes.
            facts: residual, captured, converged, iterations, seconds and method; None elsewhere.
            device: where both are to be.
        """
        if self.group is None:
            assert facts is not None
            return dict(factors), dict(facts)

        sent = {
            name: torch.empty_like(t, device=device) if t.is_meta else t.contiguous()
            for name, t in factors.items()
        }
        figures = torch.empty(6, dtype=torch.float64, device=device)
        if facts is not None:
            converged = UNKNOWN if facts["converged"] is None else float(facts["converged"])
            numbers = [facts[key] for key in ("residual", "captured", "iterations", "seconds")]
            numbers += [converged, METHODS.index(facts["method"])]
            figures.copy_(torch.tensor(numbers, dtype=figures.dtype, device="cpu"))
        for t in (figures, *sent.values()):
            self._broadcast(t, owner)
        residual, captured, iterations, seconds, flag, method = figures.tolist()
        return sent, {
            "residual": residual,
            "captured": captured,
            "converged": None if flag == UNKNOWN else bool(flag),
            "iterations": int(iterations),
            "seconds": seconds,
            "method": METHODS[int(method)],
        }


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Which items each of ``count`` ranks takes: the costliest first, each to whoever has least."""
    loads = [0.0] * count
    taken: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        taken[least].append(i)
    return [sorted(items) for items in taken]


def whole(t: Tensor) -> Tensor:
    """All of a tensor; of a sharded one gathered, which every rank of its mesh must join."""
    if not is_dtensor(t):
        return t
    gathered: Tensor = t.full_tensor()  # type: ignore[attr-defined]
    return gathered


def matrices(weight: Tensor, first: int, count: int) -> Tensor:
    """(count, m, n) of the matrices of a weight (b, m, n), from the ``first`` on.

    Where these are sharded every rank of the mesh must join; what is sent and held is of these
    matrices alone: each rank's slice among zeros, summed.
    """
    sharding = sharding_of(weight)
    if sharding is None:
        return local(weight).narrow(0, first, count)
    held = local(weight)
    found = held.new_zeros(count, *weight.shape[-2:])
    cut = sharding.of(-3)
    start, size = (0, len(weight)) if cut is None else (cut.start, cut.size)
    begin, end = max(first, start), min(first + count, start + size)
    if begin < end:
        own = found[begin - first : end - first]
        for cut in (sharding.of(-2), sharding.of(-1)):
            own = own if cut is None else own.narrow(cut.dim, cut.start, cut.size)
        own.copy_(held[begin - start : end - start])
    sum_over_(sharding.groups, [found.view(-1)])
    return found
