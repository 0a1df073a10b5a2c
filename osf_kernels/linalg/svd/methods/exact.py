"""torch.linalg.svd in the working dtype, one matrix after another."""

from __future__ import annotations

import torch

from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.residual import confirmed, residual_of


def run(group: Group, *, safe: bool) -> Factors:
    """The same with ``safe`` and without."""
    (m, n), r, complement = group.shape, group.rank, group.complement
    small, like = min(m, n), group.As[0]
    U = like.new_empty(len(group.As), m, m if complement else small, dtype=group.dtype)
    S = like.new_empty(len(group.As), small, dtype=group.dtype)
    V = like.new_empty(len(group.As), n, n if complement else small, dtype=group.dtype)
    for A, *outs in zip(group.As, U, S, V, strict=True):
        u, s, vh = torch.linalg.svd(A.to(group.dtype), full_matrices=complement)
        for x, y in zip(outs, (u, s, vh.mT), strict=True):
            x.copy_(y)
        del u, s, vh, y
    high = U[..., :r], S[..., :r], V[..., :r]
    low = (U[..., r:], V[..., r:]) if complement else (None, None)
    residual = residual_of(group.As, *high)
    found = Factors(*high, residual, [1] * len(group.As), group.all_ok(), *low)
    return confirmed(group.As, found, group.tol)


def workspace_bytes(group: Group, *, safe: bool) -> int:
    (m, n), item = group.shape, group.dtype.itemsize
    small, large = min(m, n), max(m, n)
    lapack = item * (m * n + small * small + 8 * large)
    return group.results_bytes + group.looks_bytes + 2 * factors_bytes(group) + lapack


def factors_bytes(group: Group) -> int:
    m, n = group.shape
    elements = m * m + n * n if group.complement else (m + n) * min(m, n)
    return group.dtype.itemsize * elements
