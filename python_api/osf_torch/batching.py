"""Which weights one call of refresh decomposes together, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from osf_kernels import TruncatedSVD, plan_svd
from osf_torch.selection import Selected
from osf_torch.sharding import is_dtensor
from osf_torch.sharing import Ranks, matrices, whole

K = TypeVar("K", bound=Hashable)
Method = Literal["auto", "randomized", "gram", "warm", "deflated", "exact"]

BATCH = 32  # matrices a call at most: the bar moves, and an interrupt is heeded


class Kind(NamedTuple):
    """What the weights of one batch have in common."""

    device: torch.device
    dtype: torch.dtype
    computed: torch.dtype  # what they are decomposed in
    shape: tuple[int, int]
    rank: int
    complement: bool
    copied_bytes: int  # of one matrix's values and start, where those aren't taken as they lie
    is_stacked: bool  # whether they are batches of matrices, which are decomposed as one tensor
    method: Method  # of truncated_svd

    @property
    def cost(self) -> float:
        """FLOPs of the decomposition of one matrix, up to a factor."""
        m, n = self.shape
        return float(m * n) * (min(m, n) if self.complement else self.rank)

    @property
    def factor_dtype(self) -> torch.dtype:
        return torch.float64 if self.computed == torch.float64 else torch.float32

    @property
    def held_dtype(self) -> torch.dtype:
        """Of the bases that are kept, where none was asked for."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def held_bytes(self) -> int:
        """Of one matrix beside what it is computed in: copies, and bases before the larger ones
        are let go."""
        m, n = self.shape
        elements = m * m + n * n if self.complement else (m + n) * self.rank
        return elements * self.factor_dtype.itemsize + self.copied_bytes

    def unfilled(self, count: int) -> dict[str, Tensor]:
        """Factors that another rank computes, for their names and shapes, in no memory."""
        (m, n), r = self.shape, self.rank
        shapes: dict[str, tuple[int, ...]] = {"U": (m, r), "S": (r,), "V": (n, r)}
        if self.complement:
            shapes |= {"U_low": (m, m - r), "V_low": (n, n - r)}
        lead = (count,) if self.is_stacked else ()
        return {
            name: torch.empty(lead + shape, dtype=self.factor_dtype, device="meta")
            for name, shape in shapes.items()
        }

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} r={self.rank}"


@dataclass(frozen=True)
class Part:
    """A matrix, or some of a batch of matrices: what is decomposed at once of one weight.

    Attributes:
        selected: the weight.
        first, count: of the matrices in its batch dimensions, taken as one.
    """

    selected: Selected
    first: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        return self.selected.name

    def values(self) -> Tensor:
        """(m, n) of a matrix, (count, m, n) of a batch; gathered where they are sharded, which
        every rank of the mesh must join; of a quantized weight dequantized."""
        packed = self.selected.stored
        if packed is not None:
            return packed.values(self.name, "refresh", self.first, self.count)
        W = self.selected.weight.detach()
        if self.selected.is_flat:
            return whole(W).flatten(1)
        if not self.selected.batch:
            return whole(W)
        if W.dim() > 3:
            return whole(W).flatten(0, -3).narrow(0, self.first, self.count)
        return matrices(W, self.first, self.count)

    def of(self, factor: Tensor) -> Tensor:
        """Its part of a factor of the whole weight."""
        if not self.selected.batch:
            return factor
        lead = len(self.selected.batch)
        return factor.flatten(0, lead - 1).narrow(0, self.first, self.count)


class Batch(NamedTuple):
    kind: Kind
    parts: list[Part]

    @property
    def matrices(self) -> int:
        return sum(part.count for part in self.parts)

    def values(self) -> list[Tensor] | Tensor:
        """The weights, whole and in the dtype that they are decomposed in: matrices one after
        another, batches of them in one tensor.

        Other ranks ``join`` where they are sharded.
        """
        values = [part.values().to(self.kind.computed) for part in self.parts]
        if not self.kind.is_stacked:
            return values
        return values[0] if len(values) == 1 else torch.cat(values)

    def join(self) -> None:
        """Gathers with the rank that takes the values, and keeps none."""
        for part in self.parts:
            if part.selected.stored is None:  # which is whole on every rank
                part.values()


def kind_of(
    s: Selected,
    complement: bool | None,
    compute_dtype: torch.dtype | None,
    earlier: TruncatedSVD | None,
    method: Method = "auto",
) -> Kind:
    """
    Args:
        complement, method: as in ``refresh``.
        earlier: the triplets that it starts from.
    """
    # Low bases pay where both are the smaller ones: of a 4:1 weight the longer side's would be
    # many times the weight itself.
    low = 2 * s.rank > max(s.shape) if complement is None else complement
    weight, (m, n) = s.weight, s.shape
    computed = compute_dtype or s.dtype
    copied = 0
    # Batches of several weights are put together in one tensor.
    if computed != s.dtype or is_dtensor(weight) or s.batch or s.stored is not None:
        copied += m * n * computed.itemsize
    if s.stored is not None and (computed != s.dtype or s.batch):  # as it was read
        copied += m * n * s.dtype.itemsize
    if earlier is not None and (earlier.V.device != weight.device or s.batch):
        copied += sum(factor.nbytes for factor in factors_of(earlier).values()) // s.matrices
    if method == "auto" and s.batch and earlier is None:
        # By all matrices of the weight, so that it doesn't matter how they are parted.
        device = weight.device.type
        method = plan_svd(m, n, s.rank, device=device, batch=s.matrices).method
    stacked = bool(s.batch)
    return Kind(weight.device, s.dtype, computed, s.shape, s.rank, low, copied, stacked, method)


def parts_of(s: Selected, size: int) -> list[Part]:
    """A weight in parts of ``size`` matrices at most."""
    return [Part(s, first, min(size, s.matrices - first)) for first in range(0, s.matrices, size)]


def packed(parts: Iterable[tuple[K, Part]], most: Callable[[K], int]) -> list[tuple[K, list[Part]]]:
    """Parts of one kind together, as many as have ``most`` matrices of it at most."""
    alike: dict[K, list[Part]] = {}
    for kind, part in parts:
        alike.setdefault(kind, []).append(part)
    found: list[tuple[K, list[Part]]] = []
    for kind, members in alike.items():
        count = 0
        for part in members:
            if not count or count + part.count > most(kind):
                found.append((kind, []))
                count = 0
            found[-1][1].append(part)
            count += part.count
    return found


def most(kind: Kind, limit_bytes: int) -> int:
    """How many matrices one call takes, at least one."""
    return max(1, min(BATCH, limit_bytes // max(1, kind.held_bytes)))


def shared_out(
    selected: Sequence[Selected], kinds: Sequence[Kind], limit_bytes: int, ranks: Ranks
) -> list[list[Batch]]:
    """The batches of each rank: all matrices, by their cost, also those of one weight."""
    parts = [
        (kind, part)
        for s, kind in zip(selected, kinds, strict=True)
        for part in parts_of(s, min(most(kind, limit_bytes), -(-s.matrices // ranks.count)))
    ]
    return [
        [
            Batch(*batch)
            for batch in packed((parts[i] for i in share), lambda k: most(k, limit_bytes))
        ]
        for share in ranks.split([kind.cost * part.count for kind, part in parts])
    ]


def factors_of(svd: TruncatedSVD) -> dict[str, Tensor]:
    """The tensors of a result by name, those there are."""
    found = {"U": svd.U, "S": svd.S, "V": svd.V, "U_low": svd.U_low, "V_low": svd.V_low}
    return {name: factor for name, factor in found.items() if factor is not None}
