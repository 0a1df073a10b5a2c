"""Eigenvectors V of the Gram matrix of the shorter side, and U = A V / σ."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.cholesky_qr import polished
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import exact, steep
from osf_kernels.linalg.svd.rayleigh_ritz import GRAM_LIMIT
from osf_kernels.linalg.svd.residual import confirmed, limit, residual_of

# A float32 Gram matrix is coarse where its rounding, eps·λ₁, exceeds the rounding of the singular
# values in an SVD of A, 2 σ_r σ₁ eps, by more than half of this factor.
GRAM_COARSE = 4.0
# Eigenvalues farther apart than so many eps of the largest mix by less than .06 (the eigensolver's
# divide and conquer leaves up to 4 eps between two), all of them by some 1e-3 of a direction.
EDGE_REACH = 64.0
# Columns on each side of the last wanted one that are solved for again.
EDGE = 64


def run(group: Group, *, safe: bool) -> Factors:
    """In the working dtype, or with ``safe`` in float64; of a float64 A then LAPACK's SVD.

    A Gram matrix squares the condition number. ``ok`` is False where that leaves a residual above
    the tolerance or the residual of LAPACK's SVD, or may have lost a leading direction.
    """
    if safe and group.dtype == torch.float64:
        return exact.run(group, safe=safe)
    m, n = group.shape
    solve = _in_double if safe else _in_working_dtype
    found = solve(group.transposed()).swapped() if m < n else solve(group)
    found = confirmed(group.As, found, group.tol)
    if safe or group.tol is None:
        return found
    return found._replace(ok=found.ok & (found.residual <= group.tol))


def workspace_bytes(group: Group, *, safe: bool) -> int:
    if safe and group.dtype == torch.float64:
        return exact.workspace_bytes(group, safe=safe)
    (m, n), r = group.shape, group.rank
    small, large = min(m, n), max(m, n)
    # The Gram matrix, its eigenvectors and twice as much that finds them; or the eigenvectors and
    # products.
    decomposed = 4 * small * small
    if safe:
        products = small * small + r * (4 * large + small + 2 * r)
        working = 8 * (m * n + max(decomposed, products))
    else:
        products = 2 * small * small + large * 2 * (min(small, r + EDGE) + r) + r * r
        working = group.dtype.itemsize * max(decomposed, products)
    return group.results_bytes + group.looks_bytes + working


def factors_bytes(group: Group) -> int:
    whole = min(group.shape) ** 2 if group.complement else 0
    return group.results_bytes + group.dtype.itemsize * whole


def _in_working_dtype(group: Group) -> Factors:
    As, rank, complement, n = group.As, group.rank, group.complement, group.shape[1]
    G = primitives.gram(As)
    lowered = steep.lower(G)
    # Ascending: only the columns that are returned are copied, at the end. LAPACK works on columns;
    # the transpose of a symmetric matrix spares it a strided copy.
    values, W = torch.linalg.eigh(G.mT)
    del G
    wide = min(n, rank + EDGE)
    B = primitives.multiply(As, W[..., n - wide :])
    ok = group.all_ok()
    if lowered is not None:
        # The value that was set is the largest, unless Lanczos steps found a part of a cluster.
        ok = (values[:, -1] <= 1.01 * lowered.value) | (lowered.number == 0)
        steep.rotate(W, B, n - lowered.most, n)
        steep.couple(As, W, B, lowered, first=0 if complement else n - wide)
    ok = ok & _edge_solved(values, W, B, rank)
    V, AV = W[..., n - rank :], B[..., wide - rank :]
    S = AV.square().sum(-2).sqrt_()  # torch's norm over rows takes ten times as long on a CPU
    U = polished(AV / S.unsqueeze(-2))
    residual = residual_of(As, U, S, V, AV=AV)
    ok = ok & (residual <= limit(None, S.dtype, n))
    ok = ok & (S[..., 0].square() > GRAM_LIMIT**2 * values[..., -1])
    V_low = W[..., : n - rank] if complement else None
    return Factors(U.flip(-1), S.flip(-1), V.flip(-1), residual, [1] * len(As), ok, None, V_low)


def _edge_solved(values: Tensor, W: Tensor, B: Tensor, rank: int) -> Tensor:
    """Solves again, in place, for the eigenvectors around the last wanted one, if a float32 Gram
    matrix may have mixed wanted and other eigenvectors there.

    Returns:
        (b,) whether all of those that may have mixed were within reach.
    """
    n, eps = W.shape[-1], torch.finfo(W.dtype).eps
    squares = B.square().sum(-2)  # ascending, the last of all
    last = squares[:, -rank]
    # Rounding of the Gram matrix against that of A itself.
    coarse = values[:, -1] > GRAM_COARSE * (last * squares[:, -1]).sqrt()
    if rank == n or not bool(coarse.any()):
        return torch.ones_like(coarse)
    start, stop = n - B.shape[-1], min(n, n - rank + EDGE)
    reach = EDGE_REACH * eps * values[:, -1]
    ok = torch.ones_like(coarse)
    if start > 0:
        ok = ok & (squares[:, -rank] - squares[:, 0] >= reach)
    if stop < n:
        ok = ok & (squares[:, stop - n] - squares[:, -rank - 1] >= reach)
    steep.rotate(W, B, start, stop)
    return ok | ~coarse


def _in_double(group: Group) -> Factors:
    As, rank, dtype, (m, n) = group.As, group.rank, group.dtype, group.shape
    X = As[0].new_empty(len(As), m, n, dtype=torch.float64)
    for x, A in zip(X, As, strict=True):
        x.copy_(A)
    V = torch.linalg.eigh(X.mT @ X)[1].flip(-1)
    # σ below 1e-8 σ₁ are noise in the eigenvalues, though not in the norms of the columns of A V.
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
    U, S, V = U.to(dtype), S.to(dtype), V.to(dtype)
    residual = residual_of(As, U, S, V[..., :rank])
    V_low = V[..., rank:] if group.complement else None
    return Factors(U, S, V[..., :rank], residual, [1] * len(As), group.all_ok(), None, V_low)
