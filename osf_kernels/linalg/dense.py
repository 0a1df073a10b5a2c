"""Direct methods: LAPACK's SVD, the Gram matrix, and the low block of an earlier result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg import spread
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.orthonormal import looks_are_free
from osf_kernels.linalg.residual import limit, residual_of
from osf_kernels.linalg.small import column_norms, polished

# Below this share of the largest eigenvalue rounding leaves eigenvectors of which A V isn't nearly
# orthogonal, and U is not after one polishing step.
GRAM_LIMIT = 1e-4
# What a Gram matrix's rounding, eps of its largest eigenvalue, is of the singular values' own,
# 2 σ_r σ₁ eps, below which it tells no less apart than an SVD of A.
GRAM_COARSE = 4.0
# Eigenvalues farther apart than so many eps of the largest mix by less than .06 (the eigensolver's
# divide and conquer leaves up to 4 eps between two), all of them by some 1e-3 of a direction.
EDGE_REACH = 64.0


def exact(As: Sequence[Tensor], rank: int, complement: bool) -> Factors:
    """torch.linalg.svd, in the working dtype, one matrix after another."""
    (m, n), b, like = As[0].shape, len(As), As[0]
    small, dtype = min(m, n), primitives.working_dtype(like.dtype)
    U = like.new_empty(b, m, m if complement else small, dtype=dtype)
    S = like.new_empty(b, small, dtype=dtype)
    V = like.new_empty(b, n, n if complement else small, dtype=dtype)
    for A, *found in zip(As, U, S, V, strict=True):
        u, s, vh = torch.linalg.svd(A.to(dtype), full_matrices=complement)
        for x, y in zip(found, (u, s, vh.mT), strict=True):
            x.copy_(y)
        del u, s, vh, y
    U_low, V_low = U[..., rank:], V[..., rank:]
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank]
    residual = residual_of(As, U, S, V)
    low = (U_low, V_low) if complement else (None, None)
    return Factors(U, S, V, residual, [1] * len(As), _fine(As), *low)


def gram(As: Sequence[Tensor], rank: int, complement: bool, *, safe: bool) -> Factors:
    """Eigenvectors V of AᵀA, and U = A V / σ; of AAᵀ where A is wide.

    A Gram matrix squares the condition number. ``ok`` is False where that leaves a residual above
    what LAPACK's SVD of A has, or may have lost a leading direction; ``safe`` has the Gram matrix
    and its eigenvectors in float64 and orthonormalizes A V by Householder QR; of a float64 A, for
    which nothing is wider, it is LAPACK's SVD.
    """
    if safe and As[0].dtype == torch.float64:
        return exact(As, rank, complement)
    m, n = As[0].shape
    if m < n:
        return gram([A.mT for A in As], rank, complement, safe=safe).swapped()
    if safe:
        return _gram_in_double(As, rank, complement)
    G = primitives.gram(As)
    lowered = spread.lower(G)
    # Ascending: what is returned is copied once, at the end. LAPACK works on columns, of which the
    # transpose of what is symmetric takes no strided copy.
    values, W = torch.linalg.eigh(G.mT)
    del G
    wide = min(n, rank + spread.EDGE)
    B = primitives.multiply(As, W[..., n - wide :])
    ok = _fine(As)
    if lowered is not None:
        # What was set is the largest, unless a space found less of a cluster than there is.
        ok = (values[:, -1] <= 1.01 * lowered.value) | (lowered.number == 0)
        spread.rotate(W, B, n - lowered.most, n)
        spread.couple(As, W, B, lowered, first=0 if complement else n - wide)
    ok = ok & _edge_solved(values, W, B, rank)
    V, AV = W[..., n - rank :], B[..., wide - rank :]
    S = column_norms(AV)
    U = polished(AV / S.unsqueeze(-2))
    residual = residual_of(As, U, S, V, AV=AV)
    ok = ok & (residual <= limit(None, S.dtype, n))
    ok = ok & (S[..., 0].square() > GRAM_LIMIT * values[..., -1])
    V_low = W[..., : n - rank] if complement else None
    return Factors(U.flip(-1), S.flip(-1), V.flip(-1), residual, [1] * len(As), ok, None, V_low)


def _edge_solved(values: Tensor, W: Tensor, B: Tensor, rank: int) -> Tensor:
    """Solves for the eigenvectors about the last wanted one again, in place, where a float32 Gram
    matrix may have mixed them across it.

    Returns:
        (b,) whether all that it may have mixed was within reach.
    """
    n, eps = W.shape[-1], torch.finfo(W.dtype).eps
    squares = B.square().sum(-2)  # ascending, the last of all
    last = squares[:, -rank]
    # Rounding of the Gram matrix against that of A itself.
    coarse = values[:, -1] > GRAM_COARSE * (last * squares[:, -1]).sqrt()
    if rank == n or not bool(coarse.any()):
        return torch.ones_like(coarse)
    start, stop = n - B.shape[-1], min(n, n - rank + spread.EDGE)
    reach = EDGE_REACH * eps * values[:, -1]
    ok = torch.ones_like(coarse)
    if start > 0:
        ok = ok & (squares[:, -rank] - squares[:, 0] >= reach)
    if stop < n:
        ok = ok & (squares[:, stop - n] - squares[:, -rank - 1] >= reach)
    spread.rotate(W, B, start, stop)
    return ok | ~coarse


def _gram_in_double(As: Sequence[Tensor], rank: int, complement: bool) -> Factors:
    m, n = As[0].shape
    X = As[0].new_empty(len(As), m, n, dtype=torch.float64)
    for x, A in zip(X, As, strict=True):
        x.copy_(A)
    V = torch.linalg.eigh(X.mT @ X)[1].flip(-1)
    # σ below 1e-8 σ₁ are noise in the eigenvalues; their columns of A V, in float64, aren't.
    Y = X @ V[..., :rank]
    del X
    order = Y.norm(dim=-2).argsort(dim=-1, descending=True)
    V[..., :rank] = V[..., :rank].gather(-1, order.unsqueeze(-2).expand(-1, n, -1))
    Y = Y.gather(-1, order.unsqueeze(-2).expand_as(Y))
    U, R = torch.linalg.qr(Y)
    del Y
    S = R.diagonal(dim1=-2, dim2=-1)
    U = U * torch.where(S < 0, -1.0, 1.0).unsqueeze(-2)
    S, order = S.abs().sort(dim=-1, descending=True)
    U = U.gather(-1, order.unsqueeze(-2).expand_as(U))
    V[..., :rank] = V[..., :rank].gather(-1, order.unsqueeze(-2).expand(-1, n, -1))
    dtype = primitives.working_dtype(As[0].dtype)
    U, S, V = U.to(dtype), S.to(dtype), V.to(dtype)
    residual = residual_of(As, U, S, V[..., :rank])
    V_low = V[..., rank:] if complement else None
    return Factors(U, S, V[..., :rank], residual, [1] * len(As), _fine(As), None, V_low)


def deflated(
    As: Sequence[Tensor],
    high: Sequence[Tensor],
    low: Sequence[Tensor],
    rank: int,
) -> Factors:
    """The triplets of an earlier result, and those of the low block PᵀAQ, in one order.

    While every update was kept out of the protected span, the earlier U, S, V are still triplets of
    A and all that changed is the low block: its SVD is all that is needed. Whether they are is
    what the residual, measured on A, says.

    Args:
        high: U (b, m, r), S (b, r), V (b, n, r) of the earlier result.
        low: P (b, m, m − r) and Q (b, n, n − r) of it.
        rank: of the new result, at most min(m, n).

    Returns:
        Factors with both low bases. The residual is infinite where the earlier ones aren't
        orthonormal to rounding, for which no product of them is.
    """
    U, S, V = high
    orthonormal = _orthonormal(U, low[0]) & _orthonormal(V, low[1])
    P, Q = low
    core = P.mT @ primitives.multiply(As, Q)  # (b, m − r, n − r)
    finite = core.isfinite().all(-1).all(-1)  # else LAPACK would raise
    core = torch.where(finite[:, None, None], core, 0)
    left, values, right_h = torch.linalg.svd(core, full_matrices=True)
    merged, order = torch.cat([S, values], -1).sort(dim=-1, descending=True, stable=True)
    U, U_low = _merged(U, P @ left, order, rank)
    V, V_low = _merged(V, Q @ right_h.mT, order, rank)
    S = merged[..., :rank]
    residual = torch.where(finite & orthonormal, residual_of(As, U, S, V), math.inf)
    return Factors(U, S, V, residual, [1] * len(As), _fine(As), U_low, V_low)


def _orthonormal(high: Tensor, low: Tensor) -> Tensor:
    """(b,) whether [high, low] is an orthogonal matrix to rounding, by a few products with it: the
    elements of QᵀQ − I may be 30 eps, as LAPACK's ratio of 30 allows."""
    r, m = high.shape[-1], high.shape[-2]
    generator = torch.Generator(high.device).manual_seed(m)
    X = torch.randn(m, 4, dtype=high.dtype, device=high.device, generator=generator)
    Y = high @ X[:r] + low @ X[r:]
    defect = torch.cat([high.mT @ Y, low.mT @ Y], -2) - X
    allowed = 30 * torch.finfo(high.dtype).eps * m**0.5
    fits: Tensor = defect.norm(dim=(-2, -1)) <= allowed * X.norm()
    return fits


def _merged(old: Tensor, new: Tensor, order: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(high, low): columns of both in one order, and those of a longer side's ``new`` last."""
    if rank == old.shape[-1] and looks_are_free(old):
        return _exchanged(old, new, order)
    columns = torch.cat([old, new], -1)
    size = order.shape[-1]
    index = order.unsqueeze(-2).expand(-1, columns.shape[-2], -1)
    sorted_ = columns[..., :size].gather(-1, index)
    columns = torch.cat([sorted_, columns[..., size:]], -1)
    return columns[..., :rank], columns[..., rank:]


def _exchanged(old: Tensor, new: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The same where ``old`` keeps its width: writes the few columns that change places, in ``new``
    and, where there are any, in a copy of ``old``; a third of a deflated refresh went into sorting
    all of them."""
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


def _fine(As: Sequence[Tensor]) -> Tensor:
    return torch.ones(len(As), dtype=torch.bool, device=As[0].device)
