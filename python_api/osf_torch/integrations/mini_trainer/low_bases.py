"""What is kept from one projection to the next: complements of high bases, where they are smaller,
and lists that are ready to run."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from osf_kernels import orthonormalize, padded, project_
from osf_torch.integrations.mini_trainer.layout import whole
from osf_torch.lists import Lists
from osf_torch.sharding import is_dtensor, local

Stamp = tuple[int, int, int]


class _Low(NamedTuple):
    stamp: Stamp  # of the high basis it was computed from
    basis: Tensor


def _stamp(high: Tensor) -> Stamp:
    """Where a tensor lies and how often it was written to, the same on all ranks or other on all.

    An operator on a DTensor counts on the DTensor alone, one on its local tensor there alone. What
    is in it tells more, and would take a synchronization and a collective at every projection: the
    ranks have to agree on who computes anew, and not every shard has changed.
    """
    shard = local(high)
    own, held = (0 if t.is_inference() else t._version for t in (high, shard))
    return shard.data_ptr(), own, held


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lists: weakref.WeakKeyDictionary[nn.Module, Lists] = weakref.WeakKeyDictionary()
_keeps = True


def keep_low_bases(keep: bool) -> None:
    """Whether :func:`low_basis` gives any; those that are kept are dropped where not."""
    global _keeps
    _keeps = keep
    if not keep:
        drop_low_bases()


def low_basis(high: Tensor, dim: int) -> Tensor | None:
    """The complement of a high basis, laid out and sharded alike; None where it isn't smaller.

    Kept as long as the high basis is, and computed anew when that was written to. The first call
    gathers a sharded basis.
    """
    size, k = high.shape[dim], high.shape[1 - dim]
    if not _keeps or size - k >= k:
        return None
    stamp = _stamp(high)
    known: _Low | None = _kept.get(high)
    if known is not None and known.stamp == stamp:
        return known.basis
    columns = whole(high).detach()
    low = _complement(columns if dim == 0 else columns.mT)
    low = (low if dim == 0 else low.mT).to(high.dtype).contiguous()
    if not is_dtensor(high):
        low = padded(low)
    else:
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = high.device_mesh, high.placements  # type: ignore[attr-defined]
        low = distribute_tensor(low, mesh, placements)  # the first rank's, the same on all
    _kept[high] = _Low(stamp, low)
    return low


def lists_of(holder: nn.Module) -> Lists:
    """The lists of a module's factors that ran last, kept as long as the module is."""
    return _lists.setdefault(holder, Lists())


def drop_low_bases() -> None:
    """Frees the complements that are kept, and the lists that hold bases; the next projections make
    those they need.

    For memory, and after a write to a high basis that autograd doesn't count; see the module. Every
    rank calls it.
    """
    _kept.clear()
    _lists.clear()


def _complement(columns: Tensor) -> Tensor:
    """Orthonormal columns, float64, of what random ones have beside ``columns`` (size, k).

    A round leaves of the protected part what the columns fall short of orthonormal by, 3e-3 in
    bfloat16 and 1e-7 in float32, times the condition of the random block in the first.
    """
    size, k = columns.shape
    rounds = 2 if columns.dtype in (torch.float32, torch.float64) else 3
    columns = columns.double()
    generator = torch.Generator(columns.device).manual_seed(0)
    low = torch.randn(
        size, size - k, dtype=columns.dtype, device=columns.device, generator=generator
    )
    for _ in range(rounds):
        low = orthonormalize(project_(low, columns))
    return low
