"""Which weights one call of refresh decomposes together, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import TruncatedSVD
from osf_torch.selection import Selected
from osf_torch.sharding import is_dtensor
from osf_torch.sharing import whole

BATCH = 32  # matrices a call at most: the bar moves, and an interrupt is heeded


class Kind(NamedTuple):
    """What the weights of one batch have in common."""

    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype  # what they are decomposed in
    shape: tuple[int, int]
    rank: int
    complement: bool
    copied_bytes: int  # of one weight's values and start, where those aren't taken as they lie

    @property
    def cost(self) -> float:
        """FLOPs of a decomposition, up to a factor."""
        m, n = self.shape
        return float(m * n) * (min(m, n) if self.complement else self.rank)

    @property
    def factor_dtype(self) -> torch.dtype:
        return torch.float64 if self.computed == torch.float64 else torch.float32

    @property
    def held_bytes(self) -> int:
        """Of one matrix beside what it is computed in: copies, and bases before the larger ones
        are let go."""
        m, n = self.shape
        elements = m * m + n * n if self.complement else (m + n) * self.rank
        return elements * self.factor_dtype.itemsize + self.copied_bytes

    def unfilled(self) -> dict[str, Tensor]:
        """Factors that another rank computes, for their names and shapes, in no memory."""
        (m, n), r = self.shape, self.rank
        shapes: dict[str, tuple[int, ...]] = {"U": (m, r), "S": (r,), "V": (n, r)}
        if self.complement:
            shapes |= {"U_low": (m, m - r), "V_low": (n, n - r)}
        return {
            name: torch.empty(shape, dtype=self.factor_dtype, device="meta")
            for name, shape in shapes.items()
        }

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} r={self.rank}"


class Batch(NamedTuple):
    kind: Kind
    weights: list[Selected]

    def values(self) -> list[Tensor]:
        """The weights, whole and in the dtype that they are decomposed in, one after another.

        Other ranks ``join`` where they are sharded.
        """
        return [whole(s.weight.detach()).to(self.kind.computed) for s in self.weights]

    def join(self) -> None:
        """Gathers with the rank that takes the values, and keeps none."""
        for s in self.weights:
            whole(s.weight.detach())


def kind_of(
    s: Selected,
    complement: bool | None,
    compute_dtype: torch.dtype | None,
    earlier: TruncatedSVD | None,
) -> Kind:
    """
    Args:
        complement: as in ``refresh``.
        earlier: the triplets that it starts from.
    """
    # Low bases pay where both are the smaller ones: of a 4:1 weight the longer side's would be
    # many times the weight itself.
    low = 2 * s.rank > max(s.shape) if complement is None else complement
    weight = s.weight
    computed = compute_dtype or weight.dtype
    copied = 0
    if computed != weight.dtype or is_dtensor(weight):
        copied += weight.numel() * computed.itemsize
    if earlier is not None and earlier.V.device != weight.device:
        copied += sum(factor.nbytes for factor in factors_of(earlier).values())
    return Kind(weight.device, weight.dtype, computed, s.shape, s.rank, low, copied)


def batches(
    selected: Sequence[Selected], kinds: Sequence[Kind], limit_bytes: int
) -> Iterator[Batch]:
    """Weights of one kind, as many as ``limit_bytes`` hold, at least one."""
    alike: dict[Kind, list[Selected]] = {}
    for s, kind in zip(selected, kinds, strict=True):
        alike.setdefault(kind, []).append(s)
    for kind, members in alike.items():
        size = max(1, min(BATCH, limit_bytes // max(1, kind.held_bytes)))
        for first in range(0, len(members), size):
            yield Batch(kind, members[first : first + size])


def factors_of(svd: TruncatedSVD) -> dict[str, Tensor]:
    """The tensors of a result by name, those there are."""
    found = {"U": svd.U, "S": svd.S, "V": svd.V, "U_low": svd.U_low, "V_low": svd.V_low}
    return {name: factor for name, factor in found.items() if factor is not None}
