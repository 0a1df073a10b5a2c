"""extend_basis: a protected subspace that grows with what new samples add to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast, overload

import torch
from torch import Tensor

from osf_kernels._padding import padded
from osf_kernels.basis import Basis, Spans
from osf_kernels.errors import Index, TypeRefusal, ValueRefusal
from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.cholesky_qr import rank_tolerance
from osf_kernels.linalg.orthonormal.complement import complement
from osf_kernels.linalg.orthonormal.operator import require_dtype
from osf_kernels.linalg.orthonormal.orthonormalize import orthonormalize
from osf_kernels.linalg.samples import Samples
from osf_kernels.ops._validation import columns, require_constant, require_lengths, require_tensor

_OP = "extend_basis"
BasisLike = Tensor | Basis | None


@overload
def extend_basis(basis: Tensor | None, samples: Tensor, *, energy: float) -> Tensor: ...
@overload
def extend_basis(basis: Basis, samples: Tensor, *, energy: float) -> Basis: ...
@overload
def extend_basis(
    basis: Sequence[Tensor | Basis | None], samples: Sequence[Tensor], *, energy: float
) -> list[Tensor | Basis]: ...
def extend_basis(
    basis: Tensor | Basis | Sequence[Tensor | Basis | None] | None,
    samples: Tensor | Sequence[Tensor],
    *,
    energy: float,
) -> Tensor | Basis | list[Tensor | Basis]:
    """The narrowest B' = [B, N] with ‖B'B'ᵀX‖²_F ≥ energy·‖X‖²_F.

    N are the leading left singular vectors of X − BBᵀX, as few as reach the energy. A direction
    below 4·√m·eps·‖X‖_F is rounding and never added, so energy = 1 ends at the range of X.

    Args:
        basis: (..., m, r) orthonormal columns, r = 0 allowed; a Basis; None for an empty one; or
            a list of these, of any mix of shapes.
        samples: (..., m, s) columns, of the same batch; or a list as long.
        energy: in (0, 1].

    Returns:
        (..., m, r'): the columns of ``basis`` bit for bit, and orthonormal ones, orthogonal to them
        to rounding; float32, or float64 where all arguments are. Where ``basis`` holds the energy,
        it is returned itself. A Basis gives a Basis that spans alike: from a low one the new
        directions are taken away, and m − r' new columns span the rest.

        In a list each matrix grows by as many columns as it needs. A batch has one r', that of the
        matrix that needs most: the others take more directions than the energy asks for, of their
        own residual while it has any, then arbitrary orthonormal ones. Pass a list where that
        matters.

    Raises:
        TypeError: another type, dtype, or float64 beside another dtype.
        ValueError: energy outside (0, 1]; shapes or devices that don't fit; NaN or Inf; lists of
            different lengths. Nothing is returned then, of a list neither.

    Mutates nothing; computes in float64; synchronizes; draws no random numbers; not
    differentiable.

    Source: Saha et al. 2021, Gradient Projection Memory (arXiv 2103.09762), equations 8 and 9.
    """
    require_energy(_OP, energy)
    if isinstance(basis, (list, tuple)) and isinstance(samples, Tensor):
        got = "one tensor beside a list of bases"
        raise TypeRefusal.of(_OP, "samples", "a list", got, "pass samples.unbind()")
    if isinstance(basis, (list, tuple)) or isinstance(samples, (list, tuple)):
        return _extend_list(
            cast(Sequence[BasisLike], basis), cast(Sequence[Tensor], samples), energy
        )
    return _extend(cast(BasisLike, basis), cast(Tensor, samples), energy)


@primitives.full_precision()
def _extend(basis: BasisLike, samples: Tensor, energy: float) -> Tensor | Basis:
    held, spans = admit(_OP, basis, samples, None)
    count = samples.shape[:-2].numel()
    B = held.reshape(count, *held.shape[-2:])
    X = samples.reshape(count, *samples.shape[-2:])
    indices = [None] if samples.dim() == 2 else range(count)
    found = directions(_OP, B, X, spans, energy, indices)
    most = max(found.counts, default=0)
    if most == 0:
        return held if basis is None else basis
    grown = found.grown(range(len(X)), most)
    grown = padded(grown.reshape(*samples.shape[:-2], *grown.shape[-2:]))
    return Basis(grown, basis.spans) if isinstance(basis, Basis) else grown


@primitives.full_precision()
def _extend_list(
    bases: Sequence[BasisLike], samples: Sequence[Tensor], energy: float
) -> list[Tensor | Basis]:
    require_lengths(_OP, basis=bases, samples=samples)
    pairs = zip(bases, samples, strict=True)
    admitted = [admit(_OP, b, x, i) for i, (b, x) in enumerate(pairs)]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, ((held, spans), x) in enumerate(zip(admitted, samples, strict=True)):
        if x.dim() != 2:
            got = tuple(x.shape)
            raise ValueRefusal.of(_OP, "samples", "(m, s)", got, "unbind the batch", index=i)
        key = (held.shape, held.dtype, spans, x.shape, x.dtype, x.device)
        groups.setdefault(key, []).append(i)
    result: list[Tensor | Basis]
    result = [held if b is None else b for b, (held, _) in zip(bases, admitted, strict=True)]
    for members in groups.values():
        B = torch.stack([admitted[i][0] for i in members])
        X = torch.stack([samples[i] for i in members])
        found = directions(_OP, B, X, admitted[members[0]][1], energy, members)
        for k in set(found.counts) - {0}:
            alike = [at for at, count in enumerate(found.counts) if count == k]
            for at, grown in zip(alike, padded(found.grown(alike, k)), strict=True):
                before = bases[members[at]]
                wrapped = Basis(grown, before.spans) if isinstance(before, Basis) else grown
                result[members[at]] = wrapped
    return result


def require_energy(op: str, energy: object) -> None:
    """Refuses a share that no samples hold."""
    if not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise ValueRefusal.of(op, "energy", "in (0, 1]", energy, "0.97 is usual")


def admit(op: str, basis: BasisLike, samples: Tensor, index: int | None) -> tuple[Tensor, Spans]:
    """(columns, spans) of the basis, empty for None; refuses all that doesn't fit."""
    at = "" if index is None else f"[{index}]"
    name = f"basis{at}"
    require_tensor(op, f"samples{at}", samples)
    require_dtype(op, "samples", samples, index)
    if samples.dim() < 2:
        raise ValueRefusal.of(op, "samples", "(..., m, s)", tuple(samples.shape), index=index)
    *batch, m, _ = samples.shape
    held, _ = columns(op, name, basis)
    spans: Spans = basis.spans if isinstance(basis, Basis) else "high"
    if held is None:
        dtype = primitives.working_dtype(samples.dtype)
        held = samples.new_empty(*batch, m, 0, dtype=dtype)
    require_dtype(op, "basis", held, index)
    if (held.dtype == torch.float64) != (samples.dtype == torch.float64):
        expected = "float64 together with its samples or not at all"
        got = f"{held.dtype} beside {samples.dtype}"
        raise TypeRefusal.of(op, "basis", expected, got, "convert one of them", index=index)
    if held.shape[:-1] != samples.shape[:-1]:
        expected = f"{(*batch, m)} and its columns, as samples"
        remedy = "both hold vectors of length m as columns; transpose what holds rows"
        raise ValueRefusal.of(op, "basis", expected, tuple(held.shape), remedy, index=index)
    if held.shape[-1] > m:
        expected = f"no wider than its side, (..., m, r) with m={m}"
        remedy = "orthonormal columns can't outnumber their rows"
        raise ValueRefusal.of(op, "basis", expected, tuple(held.shape), remedy, index=index)
    if held.device != samples.device:
        expected = f"on {samples.device} like its samples"
        raise ValueRefusal.of(op, "basis", expected, f"on {held.device}", index=index)
    require_constant(op, (f"samples{at}", name), samples, held)
    return held, spans


class Directions(NamedTuple):
    """The directions that the samples of a batch add to their bases, leading first.

    They are known by their coordinates in F, orthonormal columns of what isn't held: all work is
    on matrices of m − r rows, and what remains free is at hand beside them.
    """

    held: Tensor  # (b, m, ·) as given
    spans: Spans
    Q: Tensor  # held, orthonormal to the rounding of float64: the r directions, or F
    F: Tensor | None  # (b, m, m − r) float64; None where nothing is held: F = I
    X: Samples
    U: Tensor  # (b, m − r, q) float64
    counts: list[int]  # how many reach the energy
    real: list[int]  # how many there are over rounding

    def grown(self, which: Sequence[int], k: int) -> Tensor:
        """The bases of ``which``, grown by k directions each, of the working dtype."""
        dtype = primitives.working_dtype(self.held.dtype)
        coordinates = self.coordinates(which, k)
        if self.spans == "low":
            return self.at(which, complement(coordinates)).to(dtype)
        added = signed(self.at(which, coordinates)).to(dtype)
        return torch.cat([self.held[list(which)].to(dtype), added], -1)

    def coordinates(self, which: Sequence[int], k: int) -> Tensor:
        """Z (b, m − r, k) of ``which``, orthonormal: what is added to each is F Z."""
        Z = self.U[list(which), :, :k]
        for j, i in enumerate(which):
            own = min(self.real[i], k)
            if own < k:  # another matrix of the batch has more to add
                Z[j, :, own:] = complement(Z[j : j + 1, :, :own], k - own)[0]
        return orthonormalize(Z)

    def at(self, which: Sequence[int], Z: Tensor) -> Tensor:
        """F Z of ``which``."""
        return Z if self.F is None else self.F[list(which)] @ Z


def signed(N: Tensor) -> Tensor:
    """The columns, each with the sign that its largest entry is positive by."""
    largest = N.gather(-2, N.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -N, N)


def directions(
    op: str,
    held: Tensor,
    samples: Tensor,
    spans: Spans,
    energy: float,
    indices: Sequence[Index],
) -> Directions:
    """The residual's left singular vectors of (b, m, r) bases and (b, m, s) samples."""
    for name, t in (("basis", held), ("samples", samples)):
        bad = (~t.isfinite()).sum((-2, -1)).tolist()
        for i, count in enumerate(bad):
            if count:
                got = f"{count} of {t[i].numel()} entries NaN or Inf"
                raise ValueRefusal.of(op, name, "finite", got, index=indices[i])
    m, r = held.shape[-2:]
    Q = orthonormalize(held.double())
    F = Q if spans == "low" else complement(Q) if r else None
    X = Samples(samples)
    total = X.total
    U, energies = X.within(F)
    rounding = rank_tolerance(m, primitives.working_dtype(held.dtype)) ** 2 * total
    # Samples of zeros have no directions, whatever the smallest number is that is divided by.
    rounding = rounding.clamp_min(torch.finfo(energies.dtype).tiny)
    real = energies > rounding[:, None]
    left = energies.sum(-1, keepdim=True)
    before = (total[:, None] - left).clamp_min(0) + energies.cumsum(-1) - energies
    needed = real & (before < energy * total[:, None])
    counts, available = torch.stack([needed.sum(-1), real.sum(-1)]).tolist()
    room = r if spans == "low" else m - r
    counts, available = ([min(c, room) for c in found] for found in (counts, available))
    return Directions(held, spans, Q, F, X, U, counts, available)
