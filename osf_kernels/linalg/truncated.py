"""truncated_svd (spine: exact only)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels.linalg.result import TruncatedSVD


def truncated_svd(
    A: Tensor | Sequence[Tensor],
    rank: int | float | Sequence[int | float],
    *,
    tol: float | None = None,
    method: str = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: Any = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> Any:
    if not isinstance(A, Tensor):
        ranks = rank if isinstance(rank, Sequence) else [rank] * len(A)
        return [truncated_svd(a, r, complement=complement) for a, r in zip(A, ranks)]
    small = min(A.shape[-2:])
    r = rank if isinstance(rank, int) else max(1, round(rank * small))
    X = A if A.dtype == torch.float64 else A.float()
    U, S, Vh = torch.linalg.svd(X, full_matrices=complement)
    V = Vh.mT
    left = (X @ V[..., :r] - U[..., :r] * S[..., None, :r]).norm(dim=-2)
    right = (X.mT @ U[..., :r] - V[..., :r] * S[..., None, :r]).norm(dim=-2)
    top = S[..., 0].clamp_min(torch.finfo(S.dtype).tiny)
    return TruncatedSVD(
        U[..., :r],
        S[..., :r],
        V[..., :r],
        (left.square() + right.square()).sqrt().amax(-1) / top,
        S[..., :r].square().sum(-1) / S.square().sum(-1),
        1,
        "exact",
        None,
        U[..., r:] if complement else None,
        V[..., r:] if complement else None,
    )
