"""Iterative methods: block Krylov spaces and subspace iteration, batched over a group.

Both multiply by A and Aᵀ through ``osf_kernels.backends.primitives``, so weights are never stacked
or converted where a kernel reads them as they are; both orthonormalize one side, and end in a
Rayleigh–Ritz step whose residual comes with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels.backends import primitives
from osf_kernels.linalg.factors import Factors
from osf_kernels.linalg.orthonormal import looks_are_free, with_unit_diagonal
from osf_kernels.linalg.residual import (
    confirmed,
    largest_eigenvalue,
    residual_in,
    residual_of,
    residual_through,
    rounding,
)
from osf_kernels.linalg.small import POLISH_GROWTH, leading_svd, polished

# What one pass on a CPU may make of rounding. Each multiplies what the space has lost before, by 2
# to 25 for random and for trained weights: a block or a few come out of one pass, then one takes
# two. ‖I − VᵀV‖₂ of whole spaces is 1 to 5 times this in eps, of leading triplets up to 10 eps.
GROWTH_LIMIT = 16.0
# Above these, what is left after the first pass has lost too much to the projection for the second
# to end there: what the second makes of rounding, and ‖G − I‖_F of the Gram matrix it factorizes.
SECOND_PASS_GROWTH = 1.1
SECOND_PASS_LIMIT = 1e-2
# A pass that multiplies rounding by up to this leaves columns orthonormal to some 1e-4, which one
# polishing step squares: a third of the time of a second pass of Cholesky QR.
POLISH_REACH = 1e3
# Up to this ‖G − I‖_F of the Gram matrix of unit columns their condition number is at most √3.
NEARLY_ORTHOGONAL = 0.5
# Up to so many columns one product with all of the last block takes no longer than three with the
# eight probes of its residual (2048², two cores: 32 columns 2.1 to 3.2 ms, the three 4.2).
WHOLE_BLOCK = 48
# Columns and blocks of the space that is looked for larger singular values in beside another: of
# 512 columns it finds one value of 1 beside forty of .9 and forty of .8, and in one further round
# all that two such clusters have.
PROBE_BLOCK = 8
PROBE_STEPS = 4
# Rounding of its norm and of the values it is compared with, in eps of σ₁.
PROBE_ROUNDING = 32.0


class KrylovSpace:
    """A block Krylov space of a group, grown block by block.

    V_1 = orth(start), V_{k+1} = orth((I − VVᵀ) Aᵀ A V_k) and Z = A V, so that the SVD Z = U Σ Wᵀ
    gives triplets (U, Σ, V W), of which A V W = U Σ holds by construction. Aᵀ A V_k lies in the
    space for all blocks but the last, so that AᵀU − V W Σ = (I − VVᵀ) Aᵀ Z_last W_last Σ⁻¹. One
    side is orthonormalized, where block Golub–Kahan has two.

    Args:
        As: b matrices (m, n) of one shape, dtype and device, m ≥ n.
        start: (1 or b, n, w) columns, of which the space is made.
        safe: orthonormalize by Householder QR, for matrices whose rank ends within the space.
        generator: draws what continues a space that ends; used only with ``safe``.

    Source: Musco & Musco 2015 (block Krylov with a Rayleigh–Ritz step) for how fast it converges;
    Simon & Zha 2000 for orthonormalizing one side only.
    """

    def __init__(
        self, As: Sequence[Tensor], start: Tensor, *, safe: bool, generator: torch.Generator
    ) -> None:
        (m, n), b = As[0].shape, len(As)
        self.block = start.shape[-1]
        self.width = 0
        self.iterations = 0
        self._As, self._safe, self._generator = list(As), safe, generator
        self._start = start
        self._ok = torch.ones(b, dtype=torch.bool, device=start.device)
        self._V = start.new_empty(b, n, 0)
        self._Z = start.new_empty(b, m, 0)
        self._growth = 1.0
        # Whether Aᵀ Z_k is made with Z_k: where the last one pays, for the residual, and where Z_k
        # is so well conditioned that Aᵀ Z_k loses nothing of it.
        self._paired = False
        self._powers: Tensor | None = None  # Aᵀ Z_last, if so

    def grow(self, width: int) -> None:
        """Adds blocks until the space has ``width`` columns, a multiple of the block's or n.

        A width that leaves no room for a block more is taken as n, whose last block is narrower.
        """
        n, done = self._V.shape[1], self.width
        width = n if n - width < self.block else width
        V = self._V.new_empty(*self._V.shape[:-1], width)
        Z = primitives.empty_product(self._As, V, width=width)
        if done:
            V[:, :, :done], Z[:, :, :done] = self._V, self._Z
        for begin in range(done, width, self.block):
            end = min(begin + self.block, width)
            Y = self._powered(Z[:, :, :begin]) if begin else self._start
            Q = self._orthonormal(Y[..., : end - begin], V[:, :, :begin])
            V[:, :, begin:end] = Q
            if self._paired:
                _, self._powers = primitives.multiply_twice(self._As, Q, out=Z[:, :, begin:end])
            else:
                primitives.multiply(self._As, Q, out=Z[:, :, begin:end])
            self.iterations += 1
        self._V, self._Z, self.width = V, Z, width

    def _powered(self, Z: Tensor) -> Tensor:
        """Columns that span what Aᵀ Z_last does."""
        if self._powers is not None:
            return self._powers
        Z = Z[:, :, -self.block :]
        X = torch.linalg.qr(Z)[0] if self._safe else conditioned(Z)
        return primitives.multiply(self._As, X, transpose=True)

    def _orthonormal(self, Y: Tensor, basis: Tensor) -> Tensor:
        found = orthonormal_against(
            Y, basis, safe=self._safe, generator=self._generator, growth=self._growth
        )
        self._ok, self._growth = self._ok & found.ok, found.growth
        if self.iterations == 0:
            self._paired = self.block <= WHOLE_BLOCK and found.lost <= GROWTH_LIMIT
        return found.Q

    def factors(self, rank: int) -> Factors:
        """The leading triplets of the space, by a Rayleigh–Ritz step; rank ≤ width."""
        U, S, W, fine, growth = leading_svd(self._Z, rank, safe=self._safe)
        residual = self._residual(S, W)
        if not (looks_are_free(U) and bool((growth <= POLISH_GROWTH).all())):
            U = polished(U)
        iterations = [self.iterations] * len(self._As)
        return Factors(U, S, self._V @ W, residual, iterations, self._ok & fine)

    def _residual(self, S: Tensor, W: Tensor) -> Tensor:
        """‖(I − VVᵀ) Aᵀ Z_last W_last Σ⁻¹‖₂ / σ₁."""
        V, As, info = self._V, self._As, torch.finfo(S.dtype)
        if self.width == V.shape[1]:  # the space is the whole one
            return rounding(S)
        # Below rounding of σ₁ the quotient says nothing of U.
        S_floored = torch.maximum(S, info.eps * S[:, :1]).clamp_min(info.tiny)
        last = self.block
        Z, W = self._Z[:, :, -last:], W[:, -last:] / S_floored.unsqueeze(-2)
        if last <= WHOLE_BLOCK:
            back = self._powers
            if back is None:
                back = primitives.multiply(As, Z, transpose=True)
            if W.shape[-1] < last:
                return residual_through(_against(back @ W, V), None, S)
            return residual_through(_against(back, V), W, S)

        # A few probes are multiplied by Aᵀ, not all of Z.
        def apply(P: Tensor) -> Tensor:
            return _against(primitives.multiply(As, Z @ (W @ P), transpose=True), V)

        def transposed(P: Tensor) -> Tensor:
            return W.mT @ (Z.mT @ primitives.multiply(As, _against(P, V)))

        return residual_in(apply, transposed, S)

    def beside(self) -> tuple[Tensor, Tensor]:
        """(Q, A Q) of :func:`beyond` this space."""
        return beyond(self._As, self._V, safe=self._safe)

    def join(self, Q: Tensor, Z: Tensor) -> None:
        """Takes orthonormal columns Q that :func:`beyond` found, and Z = A Q, into the space, which
        then grows by the block that both of them end in."""
        keep, last = self.width - self.block, min(PROBE_BLOCK, Q.shape[-1])
        kept, ends = (..., slice(None, keep)), (..., slice(keep, None))
        new, newest = (..., slice(None, -last)), (..., slice(-last, None))
        self._V = torch.cat([self._V[kept], Q[new], self._V[ends], Q[newest]], -1)
        self._Z = torch.cat([self._Z[kept], Z[new], self._Z[ends], Z[newest]], -1)
        self.block += last
        self.width = self._V.shape[-1]
        self.iterations += math.ceil(Q.shape[-1] / last)
        self._powers, self._paired = None, False

    def keep(self, indices: Tensor) -> None:
        """Goes on with some of the group."""
        self._As = [self._As[i] for i in indices.tolist()]
        self._V, self._Z, self._ok = self._V[indices], self._Z[indices], self._ok[indices]
        self._powers = None if self._powers is None else self._powers[indices]


def beyond(As: Sequence[Tensor], V: Tensor, *, safe: bool) -> tuple[Tensor, Tensor]:
    """(Q, A Q): a small block Krylov space of A(I − VVᵀ), orthonormal and orthogonal to V.

    A space from any start holds of equal singular values as many vectors as its block has columns,
    and of a close cluster at first no more; what lies below converges before the others are met.
    They are large in A on what is orthogonal to the space, and met from columns drawn there.

    Args:
        V: (b, n, w) orthonormal columns, w < n.
    """
    (m, n), w = As[0].shape, V.shape[-1]
    stop = min(n, w + PROBE_STEPS * PROBE_BLOCK)
    # Always the same columns beside a space of one width: the caller's generator is for sketches.
    generator = torch.Generator(V.device).manual_seed(w)
    Y = torch.randn(1, n, PROBE_BLOCK, dtype=V.dtype, device=V.device, generator=generator)
    Y = Y.expand(len(V), -1, -1)
    basis, Z = V.new_empty(len(V), n, stop), V.new_empty(len(V), m, stop - w)
    basis[..., :w] = V
    for begin in range(w, stop, PROBE_BLOCK):
        end = min(begin + PROBE_BLOCK, stop)
        Y = Y[..., : end - begin]
        Q = orthonormal_against(Y, basis[..., :begin], safe=safe, generator=generator).Q
        basis[..., begin:end] = Q
        AQ = primitives.multiply(As, Q)
        Z[..., begin - w : end - w] = AQ
        Y = primitives.multiply(As, AQ, transpose=True)
    return basis[..., w:], Z


def larger(Z: Tensor, factors: Factors) -> Tensor:
    """(b,) whether ‖Z‖₂, Z = A Q of Q beside the triplets, is above the least of their singular
    values by more than they may be wrong by, or by rounding.

    Where it is, the triplets aren't the leading ones: Q and V together have more large ones.
    """
    S = factors.S
    Z = Z.double()
    norm = largest_eigenvalue(Z.mT @ Z).sqrt()
    error = factors.residual.double() + PROBE_ROUNDING * torch.finfo(S.dtype).eps
    return norm > S[:, -1].double() + error * S[:, 0].double()


def conditioned(Z: Tensor) -> Tensor:
    """Columns that span what those of Z do, and are far from dependent: not orthonormal, only fit
    to be multiplied by a matrix whose condition number would meet theirs.

    One pass of CholeskyQR in the dtype of Z, shifted so that it never breaks down.
    """
    eps = torch.finfo(Z.dtype).eps
    G, inverse_norms = with_unit_diagonal(Z.mT @ Z)
    G.diagonal(dim1=-2, dim2=-1).add_(8 * Z.shape[-1] * eps)
    inverse, _ = primitives.cholesky_inverse(G)
    return Z @ (inverse_norms.unsqueeze(-1) * inverse)


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


class Block(NamedTuple):
    """Orthonormal columns Q (b, m, w) made of Y.

    ``ok`` (b,) is False where the factorization broke down. ``growth`` bounds what basis and Q
    together have lost of orthogonality, in roundings, and ``lost`` what a first pass makes of the
    rounding of Y; it is infinite where that isn't known.
    """

    Q: Tensor
    ok: Tensor
    growth: float
    lost: float = math.inf


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
    along = basis.mT @ Y if basis.shape[-1] else None
    X = Y if along is None else torch.baddbmm(Y, basis, along, alpha=-1)
    if safe:
        # Where the space ends, noise far below the rounding of A continues it: the same for every
        # matrix, so that none depends on which others share the call.
        noise = torch.randn(Y.shape[1:], dtype=Y.dtype, device=Y.device, generator=generator)
        norm = Y.norm(dim=(-2, -1), keepdim=True)
        scale = torch.where(norm > 0, norm, 1) * (torch.finfo(Y.dtype).eps / Y.shape[-2])
        X = X + scale * noise
        # Where nothing but rounding was left of Y, it lies anywhere: the second round may take most
        # of it away, and the third mends what that costs.
        for _ in range(2):
            X = _against(torch.linalg.qr(X)[0], basis)
        return Block(torch.linalg.qr(X)[0], ok, growth)
    if looks_are_free(Y):
        Q, pass_growth = _cholesky_qr_in_float64(X, along)
        lost = float(pass_growth.amax())  # may be NaN, which is below no limit
        if growth * lost <= GROWTH_LIMIT:
            return Block(Q, ok, growth * max(1.0, lost), lost)
        along = basis.mT @ Q
        Q = torch.baddbmm(Q, basis, along, alpha=-1)
        if lost <= POLISH_REACH:
            return Block(polished(Q), ok, growth, lost)
        Q, second = _cholesky_qr_in_float64(Q, along)
        # What the first pass leaves of columns that depend on each other is rounding.
        ok = (pass_growth <= 1 / torch.finfo(Y.dtype).eps) & (second <= SECOND_PASS_GROWTH)
        return Block(Q, ok, growth, lost)
    Q, first, _ = cholesky_qr(X)
    Q, second, spread = cholesky_qr(_against(Q, basis), scale=False)
    return Block(Q, first & second & (spread < SECOND_PASS_LIMIT), growth)


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
    inverse_norms = None
    if scale:
        G, inverse_norms = with_unit_diagonal(G)
    spread = (G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)).norm(dim=(-2, -1))
    inverse, info = primitives.cholesky_inverse(G)
    if inverse_norms is not None:
        inverse = inverse_norms.unsqueeze(-1) * inverse
    return Y @ inverse, info == 0, spread


def _cholesky_qr_in_float64(X: Tensor, along: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Q, growth) by one pass of CholeskyQR with a float64 Gram matrix, on any scale of columns.

    A float64 Gram matrix costs what two in float32 do, and loses nothing of X that float32 holds.
    Each column x of X is what was left of one y, y less its part ``along`` a basis if there is one;
    growth (b,) is the most that a column of Q has of the rounding of y: the columns of diag(‖y‖)R⁻¹
    by their norm. It is NaN where the factorization doesn't exist.
    """
    D = X.double()
    G = D.mT @ D
    inverse, _ = primitives.cholesky_inverse(G)
    square = G.diagonal(dim1=-2, dim2=-1)  # ‖y‖²
    if along is not None:
        square = square + along.double().square().sum(-2)
    inverse = inverse.to(X.dtype)  # what overflows here is a growth beyond every limit
    growth = (square.unsqueeze(-2) @ inverse.double().square()).amax((-2, -1)).sqrt()
    return X @ inverse, growth
