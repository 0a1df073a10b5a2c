"""merge_basis: a protected subspace that grows with samples, and lets go of what counts least."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels._padding import padded
from osf_kernels.errors import TypeRefusal, ValueRefusal
from osf_kernels.linalg import primitives
from osf_kernels.linalg.extend_basis import (
    BasisLike,
    admit,
    directions,
    require_energy,
    signed,
)
from osf_kernels.linalg.orthonormal.complement import complement
from osf_kernels.linalg.orthonormal.operator import require_dtype
from osf_kernels.ops._validation import require_constant, require_tensor

_OP = "merge_basis"


class MergedBasis(NamedTuple):
    """A basis in principal directions, of which the energies are known; made by ``merge_basis``.

    columns diag(energies) columnsᵀ is the sum, over all sets of samples so far, of XXᵀ/‖X‖²_F
    within the span that was held of each.

    Attributes:
        columns: (..., m, r') orthonormal, of the working dtype.
        energies: (..., r') float64, descending.
        free: (..., m, m − r') orthonormal, of the same dtype: what the columns don't span. It is at
            hand when they are made, and as a low ``Basis`` protects the same.
        released: (...) float64, of the sum of all energies the share that was let go of.
    """

    columns: Tensor
    energies: Tensor
    free: Tensor
    released: Tensor


@primitives.full_precision()
def merge_basis(
    basis: BasisLike,
    energies: Tensor | None,
    samples: Tensor,
    *,
    energy: float,
    max_rank: int | None = None,
) -> MergedBasis:
    """The principal directions of [B, N], the leading ``max_rank`` of them.

    [B, N] is what ``extend_basis`` makes: the narrowest with ‖[B, N][B, N]ᵀX‖²_F ≥ energy·‖X‖²_F.
    The energies e of B's columns and those of X are merged on it,

        M = diag(e) ⊕ 0 + [B, N]ᵀ (XXᵀ / ‖X‖²_F) [B, N] = R diag(e') Rᵀ,

    and B' = [B, N] R are the eigenvectors in order of their energies e', without those after the
    first ``max_rank``. Each set of samples counts alike, whatever its size; one of zeros adds
    nothing. Within the span of [B, N] what a call doesn't let go of is kept, so that until
    something is released B' holds ``energy`` of every set of samples that it was merged with.

    Args:
        basis: (..., m, r) orthonormal columns, r = 0 allowed; a Basis, of which a low one is
            replaced by its complement; None for an empty one.
        energies: (..., r) at least 0, of the protected columns in their order, as
            ``MergedBasis.energies`` has them. None where they aren't known: then B counts as one
            set of samples that had as much in each of its directions, 1/r. So a direction of
            unknown energy is neither the first to be released nor safe: it gives way to what one
            set of samples held more of.
        samples: (..., m, s) columns, of the same batch.
        energy: in (0, 1].
        max_rank: of B', at least 0; None takes all.

    Returns:
        A MergedBasis: columns of float32, or of float64 where basis and samples are. A batch has
        one r', as in ``extend_basis``; arbitrary directions that fill up one of its matrices have
        no energy and are the first to be released.

    Raises:
        TypeError: another type, dtype, or float64 beside another dtype.
        ValueError: energy outside (0, 1]; negative energies or max_rank; shapes or devices that
            don't fit; NaN or Inf. Nothing is returned then.

    Mutates nothing; computes in float64; synchronizes; draws no random numbers; not
    differentiable.

    Source: the growth is that of Saha et al. 2021, Gradient Projection Memory (arXiv 2103.09762),
    equations 8 and 9; the merge is the sequential Karhunen-Loève transform, Levy & Lindenbaum 2000,
    restricted to the span that is held.
    """
    require_energy(_OP, energy)
    if isinstance(max_rank, bool) or not isinstance(max_rank, int | None):
        raise TypeRefusal.of(_OP, "max_rank", "an int or None", repr(max_rank))
    if max_rank is not None and max_rank < 0:
        raise ValueRefusal.of(_OP, "max_rank", "at least 0", max_rank)
    held, spans = admit(_OP, basis, samples, None)
    *batch, m, width = held.shape
    r = width if spans == "high" else m - width
    if energies is not None:
        _require_energies(energies, (*batch, r), samples)
    count = samples.shape[:-2].numel()
    B = held.reshape(count, m, width)
    X = samples.reshape(count, *samples.shape[-2:])
    indices = [None] if samples.dim() == 2 else range(count)
    found = directions(_OP, B, X, spans, energy, indices)
    Q = found.Q if spans == "high" else complement(found.Q)
    Z = found.coordinates(range(count), max(found.counts, default=0))
    P = torch.cat([Q, found.at(range(count), Z)], -1)
    smallest = torch.finfo(P.dtype).tiny
    M = found.X.on(P) / found.X.total.clamp_min(smallest)[:, None, None]
    before = M.new_full((count, r), 1 / max(r, 1))
    if energies is not None:
        before = energies.to(M).reshape(count, r)
    M.diagonal(dim1=-2, dim2=-1)[:, :r] += before
    squares, R = torch.linalg.eigh(M)
    squares, R = squares.flip(-1).clamp_min(0), R.flip(-1)
    kept = squares.shape[-1] if max_rank is None else min(squares.shape[-1], max_rank)
    released = squares[:, kept:].sum(-1) / squares.sum(-1).clamp_min(smallest)
    never = found.at(range(count), complement(Z))
    free = torch.cat([never, P @ R[..., kept:]], -1)

    def laid(t: Tensor) -> Tensor:
        columns = signed(t) if t.numel() else t
        dtype = primitives.working_dtype(held.dtype)
        return padded(columns.to(dtype).reshape(*batch, m, t.shape[-1]))

    return MergedBasis(
        laid(P @ R[..., :kept]),
        squares[:, :kept].reshape(*batch, kept),
        laid(free),
        released.reshape(tuple(batch)),
    )


def _require_energies(energies: object, shape: tuple[int, ...], samples: Tensor) -> None:
    """Refuses what can't be the energies of a basis's columns."""
    require_tensor(_OP, "energies", energies)
    assert isinstance(energies, Tensor)
    require_dtype(_OP, "energies", energies)
    got: object = tuple(energies.shape)
    if got != shape:
        expected = f"{shape}, one of each protected direction"
        raise ValueRefusal.of(_OP, "energies", expected, got)
    if energies.device != samples.device:
        expected = f"on {samples.device} like its samples"
        raise ValueRefusal.of(_OP, "energies", expected, f"on {energies.device}")
    require_constant(_OP, ("energies",), energies)
    bad = int((~(energies >= 0) | energies.isinf()).sum())
    if bad:
        got = f"{bad} of {energies.numel()} entries negative, NaN or Inf"
        raise ValueRefusal.of(_OP, "energies", "finite and at least 0", got)
