"""Samples of a subspace: what they hold of given directions, and which others they point along."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels.linalg.orthonormal.cholesky_qr import scale_columns


class Samples:
    """Columns X (b, m, s), each matrix of them scaled by a number, in float64.

    Where X has at least as many columns as rows and isn't float64 itself, all is computed from
    XXᵀ: what that rounds is far below the rounding of float32 samples, and a merge of 4,096 samples
    with m/2 directions took .56, .82 and .99 of the time at m = 384, 768 and 1,536 (one CPU core).

    Args:
        samples: (b, m, s), finite.

    Attributes:
        total: (b,) ‖X‖²_F.
    """

    def __init__(self, samples: Tensor) -> None:
        X = samples.double()
        X = scale_columns(X, (-2, -1)) if X.numel() else X
        self.is_exact = samples.dtype == torch.float64
        self.total = X.square().sum((-2, -1))
        self._X: Tensor | None = X
        self._gram: Tensor | None = None
        if not self.is_exact and X.shape[-1] >= X.shape[-2]:
            self._X, self._gram = None, X @ X.mT

    def on(self, P: Tensor) -> Tensor:
        """PᵀXXᵀP (b, k, k) of columns P (b, m, k)."""
        if self._gram is not None:
            return P.mT @ (self._gram @ P)
        assert self._X is not None
        C = P.mT @ self._X
        return C @ C.mT

    def within(self, F: Tensor | None) -> tuple[Tensor, Tensor]:
        """Left singular vectors (b, r, ·) and squared singular values, descending, of FᵀX: the
        samples in the coordinates of orthonormal columns F (b, m, r), or all of them where F is
        None."""
        if self._gram is not None:
            return _eigen(self._gram if F is None else self.on(F))
        assert self._X is not None
        return self._singular(self._X if F is None else F.mT @ self._X)

    def _singular(self, R: Tensor) -> tuple[Tensor, Tensor]:
        """By the SVD of float64 samples, or by a Gram matrix of the shorter side."""
        if self.is_exact:
            U, S, _ = torch.linalg.svd(R, full_matrices=False)
            return U, S.square()
        if R.shape[-2] <= R.shape[-1]:
            return _eigen(R @ R.mT)
        V, squares = _eigen(R.mT @ R)
        squares = squares.clamp_min(torch.finfo(R.dtype).tiny)
        return R @ V / squares.sqrt()[:, None, :], squares


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    squares, U = torch.linalg.eigh(gram)
    return U.flip(-1), squares.flip(-1).clamp_min(0)
