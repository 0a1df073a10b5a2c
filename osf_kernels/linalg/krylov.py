"""Iterative methods: block Golub–Kahan (Krylov) and subspace iteration, batched over a group.

Both multiply by A and Aᵀ through ``primitives.multiply``, so weights are never stacked or
converted where a kernel reads them as they are, and both end in a Rayleigh–Ritz step whose
residual comes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.residual import residual_in, residual_of
from osf_kernels.linalg.small import leading_svd, polished

# ‖G − I‖_F of a block's Gram matrix. Below the first, one pass of CholeskyQR comes out orthonormal
# to rounding; above the second, what is left after the first pass has lost too much to the
# projection for the second to end there.
ONE_PASS_LIMIT = 0.5
SECOND_PASS_LIMIT = 1e-2


class KrylovSpace:
    """A block Krylov space of a group, grown block by block.

    Block Golub–Kahan bidiagonalization with full reorthogonalization, twice: U and V span the left
    and right Krylov spaces, B = UᵀAV, A V = U B, and AᵀU = V Bᵀ + (I − VVᵀ)Z in the last block, so
    the residual of triplets (U X, Σ, V Y) is (I − VVᵀ) Z X_last with no further product.

    Args:
        As: b matrices (m, n) of one shape, dtype and device.
        start: (1 or b, n, w) orthonormal columns.
        safe: orthonormalize by Householder QR, for matrices whose rank ends within the space.
        generator: draws what continues a space that ends; used only with ``safe``.

    Source: Golub, Luk, Overton 1981 (block Lanczos for singular values); Musco & Musco 2015 for
    how fast it converges; Simon & Zha 2000 for reorthogonalizing.
    """

    def __init__(
        self, As: Sequence[Tensor], start: Tensor, *, safe: bool, generator: torch.Generator
    ) -> None:
        (m, n), b = As[0].shape, len(As)
        self.block = start.shape[-1]
        self.width = 0
        self.iterations = 0
        self._As, self._safe, self._generator = list(As), safe, generator
        self._Z = start.expand(b, n, self.block)  # what the next block of V comes from
        self._ok = torch.ones(b, dtype=torch.bool, device=start.device)
        self._U = start.new_empty(b, m, 0)
        self._V = start.new_empty(b, n, 0)
        self._B = start.new_empty(b, 0, 0)

    def grow(self, width: int) -> None:
        """Adds blocks until the space has ``width`` ≤ min(m, n) columns.

        The last block may be narrower where the space then is the whole one, n = width.
        """
        done, b = self.width, len(self._U)
        U, V = (old.new_empty(b, old.shape[1], width) for old in (self._U, self._V))
        B = self._B.new_zeros(b, width, width)
        U[:, :, :done], V[:, :, :done], B[:, :done, :done] = self._U, self._V, self._B
        for begin in range(done, width, self.block):
            end = min(width, begin + self.block)
            Q = self._Z[:, :, : end - begin]
            if begin:
                Q = self._orthonormal(Q, V[:, :, :begin])
            V[:, :, begin:end] = Q
            Y = primitives.multiply(self._As, Q)
            X = self._orthonormal(Y, U[:, :, :begin])
            U[:, :, begin:end] = X
            B[:, :end, begin:end] = U[:, :, :end].mT @ Y
            self._Z = primitives.multiply(self._As, X, transpose=True)
            self.iterations += 1
        self._U, self._V, self._B, self.width = U, V, B, width

    def factors(self, rank: int) -> Factors:
        """The leading triplets of the space, by a Rayleigh–Ritz step; rank ≤ width."""
        U, V, Z = self._U, self._V, self._Z
        Ub, S, Vb, fine = leading_svd(self._B, rank, safe=self._safe)
        outside = Z - V @ (V.mT @ Z)  # (b, n, w)
        residual = residual_in(outside @ Ub[:, -Z.shape[-1] :], S)
        return Factors(U @ Ub, S, V @ Vb, residual, self.iterations, self._ok & fine)

    def keep(self, indices: Tensor) -> None:
        """Goes on with some of the group."""
        self._As = [self._As[i] for i in indices.tolist()]
        self._U, self._V, self._B = self._U[indices], self._V[indices], self._B[indices]
        self._Z, self._ok = self._Z[indices], self._ok[indices]

    def _orthonormal(self, Y: Tensor, basis: Tensor) -> Tensor:
        Q, fine = orthonormal_against(Y, basis, safe=self._safe, generator=self._generator)
        self._ok = self._ok & fine
        return Q


def subspace_iteration(
    As: Sequence[Tensor],
    start: Tensor,
    rank: int,
    *,
    tol: float | None,
    niter: int,
    safe: bool,
    generator: torch.Generator,
) -> Factors:
    """Leading triplets by U = orth(A Q), Aᵀ U = V Σ Wᵀ, Q ← V, at most ``niter`` times.

    Aᵀ U = V Σ holds by construction, and A V − U Σ is measured. Each matrix is left as it is in
    the round in which its residual is ≤ tol.

    Args:
        As: b matrices (m, n) of one shape, dtype and device.
        start: (1 or b, n, w) of any columns, w ≥ rank.

    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4, with a Rayleigh–Ritz step in each round.
    """
    empty = start.new_empty(len(As), As[0].shape[0], 0)
    ok = torch.ones(len(As), dtype=torch.bool, device=start.device)
    V, found = start, None
    for iteration in range(1, niter + 1):
        Y = primitives.multiply(As, V)
        U, fine = orthonormal_against(Y, empty, safe=safe, generator=generator)
        ok = ok & fine
        Z = primitives.multiply(As, U, transpose=True)
        V, S, W, fine = leading_svd(Z, U.shape[-1], safe=safe)
        U, ok = U @ W, ok & fine
        if tol is None and iteration < niter:
            continue
        high = U[..., :rank], S[:, :rank], V[..., :rank]
        residual = residual_of(As, *high, right_is_exact=True)
        current = Factors(*high, residual, iteration, ok)
        found = current if found is None or tol is None else _first(found, current, tol)
        if tol is not None and bool((found.residual <= tol).all()):
            break
    assert found is not None  # niter is at least 1
    return found._replace(V=polished(found.V), iterations=iteration)


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
    return later._replace(**kept)


def orthonormal_against(
    Y: Tensor, basis: Tensor, *, safe: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(Q, ok): orthonormal columns that span Y less its part in ``basis``, orthogonal to it.

    Projecting and orthonormalizing twice is enough (Barlow & Smoktunowicz 2013); the first pass
    leaves a condition number that the second takes to rounding.
    """
    ok = torch.ones(len(Y), dtype=torch.bool, device=Y.device)
    if safe:
        # Where the space ends, noise far below the rounding of A continues it.
        noise = torch.randn(Y.shape, dtype=Y.dtype, device=Y.device, generator=generator)
        norm = Y.norm(dim=(-2, -1), keepdim=True)
        scale = torch.where(norm > 0, norm, 1) * (torch.finfo(Y.dtype).eps / Y.shape[-2])
        Y = _against(Y, basis) + scale * noise
        # Where nothing but rounding was left of Y, it lies anywhere: the second round may take most
        # of it away, and the third mends what that costs.
        for _ in range(2):
            Y = _against(torch.linalg.qr(Y)[0], basis)
        return torch.linalg.qr(Y)[0], ok
    alone = not basis.shape[-1]
    Y, fine, spread = cholesky_qr(_against(Y, basis))
    if alone and Y.device.type == "cpu" and bool((spread < ONE_PASS_LIMIT).all()):
        return Y, fine  # a look at a number is free there
    Y, again, spread = cholesky_qr(_against(Y, basis), scale=False)
    return Y, fine & again & (spread < SECOND_PASS_LIMIT)


def _against(Y: Tensor, basis: Tensor) -> Tensor:
    return torch.baddbmm(Y, basis, basis.mT @ Y, alpha=-1) if basis.shape[-1] else Y


def cholesky_qr(Y: Tensor, *, scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, ok, spread) by one pass of CholeskyQR, on columns scaled to norm 1 unless told otherwise.

    ok (b,) says that the factorization exists; spread (b,) is ‖G − I‖_F of the Gram matrix G that
    is factorized.
    """
    G = Y.mT @ Y
    norms = G.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
    inverse_norms = norms.reciprocal() if scale else torch.ones_like(norms)
    G = G * inverse_norms * inverse_norms.mT
    spread = (G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)).norm(dim=(-2, -1))
    inverse, info = primitives.cholesky_inverse(G)
    return Y @ (inverse_norms * inverse), info == 0, spread
