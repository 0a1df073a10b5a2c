"""An earlier result's triplets and those of its low block, where all updates were in that block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group, stacked
from osf_kernels.linalg.svd.residual import confirmed, residual_of
from osf_kernels.linalg.svd.result import TruncatedSVD


def run(group: Group, *, safe: bool) -> Factors:
    """The triplets of an earlier result, and those of the low block PᵀAQ, in one order.

    While every update was kept out of the protected span, the earlier U, S, V are still triplets of
    A and only the low block changed: its SVD is all that is needed. Whether they still are is shown
    by the residual, measured on A.

    Returns:
        Factors with both low bases, the same with ``safe`` and without. The residual is infinite
        where the earlier bases aren't orthonormal to rounding, since then no product of them is.
    """
    As, rank = group.As, group.rank
    earlier = [w for w in group.warm if isinstance(w, TruncatedSVD)]
    U, S, V, P, Q = (
        stacked([getattr(result, name) for result in earlier]).to(group.dtype)
        for name in ("U", "S", "V", "U_low", "V_low")
    )
    orthonormal = _orthonormal(U, P) & _orthonormal(V, Q)
    core = P.mT @ primitives.multiply(As, Q)  # (b, m − r, n − r)
    finite = core.isfinite().all(-1).all(-1)  # else LAPACK would raise
    core = torch.where(finite[:, None, None], core, 0)
    left, values, right_h = torch.linalg.svd(core, full_matrices=True)
    merged, order = torch.cat([S, values], -1).sort(dim=-1, descending=True, stable=True)
    U, U_low = _merged(U, P @ left, order, rank)
    V, V_low = _merged(V, Q @ right_h.mT, order, rank)
    S = merged[..., :rank]
    residual = torch.where(finite & orthonormal, residual_of(As, U, S, V), math.inf)
    found = Factors(U, S, V, residual, [1] * len(As), group.all_ok(), U_low, V_low)
    return confirmed(As, found, group.tol)


def workspace_bytes(group: Group, *, safe: bool) -> int:
    (m, n), r = group.shape, group.rank
    core = (m - r) * (n - r) + (m - r) ** 2 + (n - r) ** 2
    starts = (m + n) * r + m * (m - r) + n * (n - r)
    elements = starts + m * n + 2 * core + 3 * (m * m + n * n)
    return group.results_bytes + group.looks_bytes + group.dtype.itemsize * elements


def factors_bytes(group: Group) -> int:
    m, n = group.shape
    return group.dtype.itemsize * 2 * (m * m + n * n)


def _orthonormal(high: Tensor, low: Tensor) -> Tensor:
    """(b,) whether Q = [high, low] is orthogonal to rounding, by a few products with it: elements
    of QᵀQ − I may be 30 eps, as LAPACK's ratio of 30 allows."""
    r, m = high.shape[-1], high.shape[-2]
    generator = torch.Generator(high.device).manual_seed(m)
    X = torch.randn(m, 4, dtype=high.dtype, device=high.device, generator=generator)
    Y = high @ X[:r] + low @ X[r:]
    defect = torch.cat([high.mT @ Y, low.mT @ Y], -2) - X
    allowed = 30 * torch.finfo(high.dtype).eps * m**0.5
    fits: Tensor = defect.norm(dim=(-2, -1)) <= allowed * X.norm()
    return fits


def _merged(old: Tensor, new: Tensor, order: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(high, low): the columns of both in one order, then those of ``new`` without a value."""
    if rank == old.shape[-1] and cpu.looks_are_free(old):
        return _exchanged(old, new, order)
    columns = torch.cat([old, new], -1)
    size = order.shape[-1]
    index = order.unsqueeze(-2).expand(-1, columns.shape[-2], -1)
    sorted_ = columns[..., :size].gather(-1, index)
    columns = torch.cat([sorted_, columns[..., size:]], -1)
    return columns[..., :rank], columns[..., rank:]


def _exchanged(old: Tensor, new: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The same where ``old`` keeps its width: only columns that change places are written, in
    ``new`` and in a copy of ``old`` if it has any. To sort all of them took a third of a deflated
    refresh."""
    r = old.shape[-1]
    here = torch.arange(order.shape[-1], device=order.device)
    copied = old.clone() if bool((order[:, :r] != here[:r]).any()) else old
    for i, sources in enumerate(order):
        places = torch.nonzero(sources != here).flatten()
        sources = sources[places]
        moved = old.new_empty(old.shape[-2], len(places))
        moved[:, sources < r] = old[i][:, sources[sources < r]]
        moved[:, sources >= r] = new[i][:, sources[sources >= r] - r]
        copied[i][:, places[places < r]] = moved[:, places < r]
        new[i][:, places[places >= r] - r] = moved[:, places >= r]
    return copied, new
