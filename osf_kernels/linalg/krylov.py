"""Iterative methods: block Golub–Kahan (Krylov) and subspace iteration, batched over a group.

Both multiply by A and Aᵀ through ``primitives.multiply``, so weights are never stacked or
converted where a kernel reads them as they are, and both end in a Rayleigh–Ritz step whose
residual comes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.orthonormal import looks_are_free
from osf_kernels.linalg.residual import residual_in, residual_of, residual_through, rounding
from osf_kernels.linalg.small import POLISH_GROWTH, leading_svd, polished

# What one pass on a CPU may make of rounding, by a bound that is some five times what it does.
# A pass multiplies what the space has lost before, by 1 to 6 for random and for trained weights:
# a few blocks come out as orthonormal from one pass as from two, then one takes two.
GROWTH_LIMIT = 16.0
# Above these, what is left after the first pass has lost too much to the projection for the second
# to end there: what the second makes of rounding, and ‖G − I‖_F of the Gram matrix it factorizes.
SECOND_PASS_GROWTH = 1.1
SECOND_PASS_LIMIT = 1e-2
# Up to this ‖G − I‖_F of the Gram matrix of unit columns their condition number is at most √3.
NEARLY_ORTHOGONAL = 0.5
# Up to so many columns one product with all of a block takes no longer than three with the eight
# probes of its residual (2048², two cores: 32 columns 2.1 to 3.2 ms, the three 4.2).
WHOLE_BLOCK = 48


class KrylovSpace:
    """A block Krylov space of a group, grown block by block.

    Block Golub–Kahan bidiagonalization with full reorthogonalization, twice: U and V span the left
    and right Krylov spaces, and A V = U B. The last product with Aᵀ gives V one block N more, in
    AᵀU = [V N] C with C = [Bᵀ; 0 R], and the SVD of C gives triplets (U Y, Σ, [V N] X). Aᵀ U Y is
    [V N] X Σ to rounding, and A [V N] X − U Y Σ = (A N − U_last Rᵀ) X_last.

    Args:
        As: b matrices (m, n) of one shape, dtype and device.
        start: (1 or b, n, w) columns, which are orthonormalized.
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
        first = orthonormal_against(start, start[..., :0], safe=safe, generator=generator)
        self._next = first.Q.expand(b, n, self.block)  # of V
        self._R = start.new_empty(b, 0, self.block)  # of the next block and the last of U
        self._ok = first.ok.expand(b)
        self._U = start.new_empty(b, m, 0)
        self._V = start.new_empty(b, n, 0)
        self._B = start.new_empty(b, 0, 0)
        self._growth = {"U": 1.0, "V": 1.0}

    def grow(self, width: int) -> None:
        """Adds blocks until the space has ``width`` ≤ min(m, n) columns, or n where a block more
        would not fit; the last is then as narrow as it takes.
        """
        n = self._V.shape[1]
        width = n if n - width < self.block else width
        done, b = self.width, len(self._U)
        U, V = (old.new_empty(b, old.shape[1], width) for old in (self._U, self._V))
        B = self._B.new_zeros(b, width, width)
        U[:, :, :done], V[:, :, :done], B[:, :done, :done] = self._U, self._V, self._B
        for begin in range(done, width, self.block):
            Q = self._next
            end = begin + Q.shape[-1]
            V[:, :, begin:end] = Q
            Y = primitives.multiply(self._As, Q)
            X, B[:, :begin, begin:end] = self._orthonormal("U", Y, U[:, :, :begin])
            U[:, :, begin:end] = X
            B[:, begin:end, begin:end] = X.mT @ Y
            Z = primitives.multiply(self._As, X, transpose=True)
            self._next = self._following(Z, V[:, :, :end])
            self._R = self._next.mT @ Z
            self.iterations += 1
        self._U, self._V, self._B, self.width = U, V, B, width

    def _following(self, Z: Tensor, V: Tensor) -> Tensor:
        """The block of V after these: as many columns as Z has, or as are missing to the whole."""
        left = V.shape[1] - V.shape[2]
        return self._orthonormal("V", Z[:, :, :left], V)[0] if left else Z[:, :, :0]

    def factors(self, rank: int) -> Factors:
        """The leading triplets of the space, by a Rayleigh–Ritz step; rank ≤ width."""
        U, V, N, R = self._U, self._V, self._next, self._R
        extra, last = R.shape[-2:]
        C = torch.cat([self._B.mT, self._B.new_zeros(len(U), extra, self.width)], -2)
        C[:, self.width :, self.width - last :] = R
        X, S, Y, fine, _ = leading_svd(C, rank, safe=self._safe)
        inside, outside = X[:, : self.width], X[:, self.width :]
        if not extra:
            return Factors(U @ Y, S, V @ X, rounding(S), self.iterations, self._ok & fine)
        U_last = U[:, :, -last:]
        residual = self._residual(U_last, outside, S)
        V = torch.baddbmm(N @ outside, V, inside)
        return Factors(U @ Y, S, V, residual, self.iterations, self._ok & fine)

    def _residual(self, U_last: Tensor, outside: Tensor, S: Tensor) -> Tensor:
        """‖(A N − U_last Rᵀ) X‖₂ / σ₁ of the rows X of the small factor that are N's."""
        N, R, As = self._next, self._R, self._As
        if N.shape[-1] <= WHOLE_BLOCK:
            rest = torch.baddbmm(primitives.multiply(As, N), U_last, R.mT, alpha=-1)
            return residual_through(rest, outside, S)

        # A few probes are multiplied by A, not all of N.
        def apply(P: Tensor) -> Tensor:
            P = outside @ P
            return torch.baddbmm(primitives.multiply(As, N @ P), U_last, R.mT @ P, alpha=-1)

        def transposed(P: Tensor) -> Tensor:
            back = N.mT @ primitives.multiply(As, P, transpose=True) - R @ (U_last.mT @ P)
            return outside.mT @ back

        return residual_in(apply, transposed, S)

    def keep(self, indices: Tensor) -> None:
        """Goes on with some of the group."""
        self._As = [self._As[i] for i in indices.tolist()]
        self._U, self._V, self._B = self._U[indices], self._V[indices], self._B[indices]
        self._next, self._R, self._ok = self._next[indices], self._R[indices], self._ok[indices]

    def _orthonormal(self, side: str, Y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """The next block of a side from Y, and basisᵀY."""
        found = orthonormal_against(
            Y, basis, safe=self._safe, generator=self._generator, growth=self._growth[side]
        )
        self._ok, self._growth[side] = self._ok & found.ok, found.growth
        return found.Q, found.along


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
    ok = torch.ones(len(As), dtype=torch.bool, device=start.device)
    V, found, polish = start, None, False
    for iteration in range(1, niter + 1):
        U, fine = _orthonormal_columns(primitives.multiply(As, V), safe, generator)
        ok = ok & fine
        Z = primitives.multiply(As, U, transpose=True)
        V, S, W, fine, growth = leading_svd(Z, U.shape[-1], safe=safe)
        U, ok = U @ W, ok & fine
        polish = polish or not (looks_are_free(V) and bool((growth <= POLISH_GROWTH).all()))
        if tol is None and iteration < niter:
            continue
        high = U[..., :rank], S[:, :rank], V[..., :rank]
        residual = residual_of(As, *high, right_is_exact=True)
        current = Factors(*high, residual, iteration, ok)
        found = current if found is None or tol is None else _first(found, current, tol)
        if tol is not None and bool((found.residual <= tol).all()):
            break
    assert found is not None  # niter is at least 1
    return found._replace(V=polished(found.V) if polish else found.V, iterations=iteration)


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


class Block(NamedTuple):
    """Orthonormal columns Q (b, m, w) made of Y, and ``along`` = basisᵀY.

    ``ok`` (b,) is False where the factorization broke down. ``growth`` bounds what basis and Q
    together have lost of orthogonality, in roundings.
    """

    Q: Tensor
    along: Tensor
    ok: Tensor
    growth: float


def orthonormal_against(
    Y: Tensor,
    basis: Tensor,
    *,
    safe: bool,
    generator: torch.Generator,
    growth: float = 1.0,
) -> Block:
    """Orthonormal columns that span Y less its part in ``basis``, orthogonal to it.

    Projecting and orthonormalizing twice is enough (Barlow & Smoktunowicz 2013); the first pass
    leaves a condition number that the second takes to rounding. On a CPU, where a look at a number
    is free, the second is left out where the first lost little (Daniel, Gragg, Kaufman, Stewart
    1976) of a basis that has lost ``growth``.
    """
    ok = torch.ones(len(Y), dtype=torch.bool, device=Y.device)
    along = basis.mT @ Y
    X = torch.baddbmm(Y, basis, along, alpha=-1) if basis.shape[-1] else Y
    if safe:
        # Where the space ends, noise far below the rounding of A continues it.
        noise = torch.randn(Y.shape, dtype=Y.dtype, device=Y.device, generator=generator)
        norm = Y.norm(dim=(-2, -1), keepdim=True)
        scale = torch.where(norm > 0, norm, 1) * (torch.finfo(Y.dtype).eps / Y.shape[-2])
        X = X + scale * noise
        # Where nothing but rounding was left of Y, it lies anywhere: the second round may take most
        # of it away, and the third mends what that costs.
        for _ in range(2):
            X = _against(torch.linalg.qr(X)[0], basis)
        return Block(torch.linalg.qr(X)[0], along, ok, growth)
    if looks_are_free(Y):
        Q, pass_growth = _cholesky_qr_in_float64(X, along)
        after = growth * float(pass_growth.amax())
        if after <= GROWTH_LIMIT:  # not of NaN
            return Block(Q, along, ok, max(growth, after))
        lost = basis.mT @ Q
        Q, pass_growth = _cholesky_qr_in_float64(torch.baddbmm(Q, basis, lost, alpha=-1), lost)
        return Block(Q, along, pass_growth <= SECOND_PASS_GROWTH, growth)
    Q, first, _ = cholesky_qr(X)
    Q, second, spread = cholesky_qr(_against(Q, basis), scale=False)
    return Block(Q, along, first & second & (spread < SECOND_PASS_LIMIT), growth)


def _orthonormal_columns(
    Y: Tensor, safe: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(Q, ok) of Y = A V for a V of columns that may nearly be singular vectors.

    Those of Y are then nearly orthogonal, and one pass in float32 loses nothing; on a CPU, where a
    look at it is free, it is tried first and takes a third of the time of one in float64.
    """
    if not safe and looks_are_free(Y):
        Q, ok, spread = cholesky_qr(Y)
        if bool((spread <= NEARLY_ORTHOGONAL).all()):
            return Q, ok
    found = orthonormal_against(Y, Y[..., :0], safe=safe, generator=generator)
    return found.Q, found.ok


def _against(Y: Tensor, basis: Tensor) -> Tensor:
    return torch.baddbmm(Y, basis, basis.mT @ Y, alpha=-1)


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


def _cholesky_qr_in_float64(X: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, growth) by one pass of CholeskyQR with a float64 Gram matrix, on any scale of columns.

    A float64 Gram matrix costs what two in float32 do, and loses nothing of X that float32 holds.
    Each column x of X is what was left of one y, y less its part ``lost``; growth (b,) is the most
    that a column of Q has of the rounding of y: the columns of diag(‖y‖) R⁻¹ by their norm. It is
    NaN where the factorization doesn't exist.
    """
    D = X.double()
    G = D.mT @ D
    inverse, _ = primitives.cholesky_inverse(G)
    square = G.diagonal(dim1=-2, dim2=-1) + lost.double().square().sum(-2)  # ‖y‖²
    inverse = inverse.to(X.dtype)  # what overflows here is a growth beyond every limit
    growth = (square.unsqueeze(-1) * inverse.double().square()).sum(-2).amax(-1).sqrt()
    return X @ inverse, growth
