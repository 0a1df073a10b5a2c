"""Subspace iteration: one block, for matrices whose Krylov space doesn't fit the workspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.block_gram_schmidt import orthonormal_columns
from osf_kernels.linalg.orthonormal.cholesky_qr import POLISH_GROWTH, polished
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.rayleigh_ritz import leading_svd
from osf_kernels.linalg.svd.residual import confirmed, residual_of


def run(
    group: Group, start: Tensor, *, niter: int, safe: bool, generator: torch.Generator
) -> Factors:
    """Leading triplets by U = orth(A Q), Aᵀ U = V Σ Wᵀ, Q ← V, at most ``niter`` times.

    Aᵀ U = V Σ holds by construction, and A V − U Σ is measured. Each matrix keeps the factors of
    the round in which its residual is ≤ tol.

    Args:
        start: (1 or b, n, w) of any columns, w ≥ rank.

    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4, with a Rayleigh–Ritz step in each round.
    """
    As, rank, tol, ok = group.As, group.rank, group.tol, group.all_ok()
    V, found, polish = start, None, False
    for iteration in range(1, niter + 1):
        U, fine = orthonormal_columns(primitives.multiply(As, V), safe, generator)
        ok = ok & fine
        Z = primitives.multiply(As, U, transpose=True)
        V, S, W, fine, growth = leading_svd(Z, U.shape[-1], safe=safe)
        U, ok = U @ W, ok & fine
        polish = polish or not (cpu.looks_are_free(V) and bool((growth <= POLISH_GROWTH).all()))
        if tol is None and iteration < niter:
            continue
        high = U[..., :rank], S[:, :rank], V[..., :rank]
        residual = residual_of(As, *high, right_is_exact=True)
        current = confirmed(As, Factors(*high, residual, [iteration] * len(As), ok), tol)
        found = current if found is None or tol is None else _first(found, current, tol)
        if tol is not None and bool((found.residual <= tol).all()):
            break
    assert found is not None  # niter is at least 1
    return found._replace(V=polished(found.V) if polish else found.V)


def _first(earlier: Factors, later: Factors, tol: float) -> Factors:
    """Of each matrix the factors that met tol first, or the later ones."""
    met = earlier.residual <= tol
    fields = ("U", "S", "V", "residual", "ok")
    kept: dict[str, Any] = {
        name: torch.where(
            met.reshape(-1, *[1] * (getattr(later, name).dim() - 1)),
            getattr(earlier, name),
            getattr(later, name),
        )
        for name in fields
    }
    iterations = [
        before if m else now
        for m, before, now in zip(met.tolist(), earlier.iterations, later.iterations, strict=True)
    ]
    return later._replace(**kept, iterations=iterations)


def workspace_bytes(group: Group, width: int) -> int:
    (m, n), item = group.shape, group.dtype.itemsize
    return item * (m + n) * 3 * width + 8 * n * width + 8 * 3 * width * width
