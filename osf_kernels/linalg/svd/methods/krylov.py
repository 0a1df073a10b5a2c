"""Block Krylov spaces, batched over a group, with or without a tolerance to grow to.

Products with A and Aᵀ go through ``primitives``, so weights are never stacked or converted where a
kernel reads them as they are. One side is orthonormalized, and a Rayleigh–Ritz step ends the space,
whose residual comes with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.block_gram_schmidt import (
    GROWTH_LIMIT,
    against,
    orthonormal_against,
)
from osf_kernels.linalg.orthonormal.cholesky_qr import POLISH_GROWTH, conditioned, polished
from osf_kernels.linalg.svd.beside import PROBE_BLOCK, beyond, larger, led
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.rayleigh_ritz import leading_svd
from osf_kernels.linalg.svd.residual import confirmed, residual_in, residual_through, rounding

OVERSAMPLE = 2.0  # of the rank
# For a few triplets of a flat spectrum a space of three times the rank is too small: of MiniLM's
# weights at rank 4 it misses half of the subspace, 48 columns more a hundredth.
LEAST_OVERSAMPLE = 48
# With tol the space grows by this factor between checks.
GROWTH = 1.3


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
        # Whether Aᵀ Z_k is computed with Z_k: where the residual needs the last one, and where Z_k
        # is so well conditioned that the product loses nothing.
        self._paired = False
        self._powers: Tensor | None = None  # Aᵀ Z_last, if so

    def grow(self, width: int) -> None:
        """Adds blocks until the space has ``width`` columns, a multiple of the block's or n.

        A width that leaves no room for one more block is taken as n; its last block is narrower.
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
        """Columns with the span of Aᵀ Z_last."""
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
            self._paired = self.block <= cpu.WHOLE_BLOCK and found.lost <= GROWTH_LIMIT
        return found.Q

    def factors(self, rank: int) -> Factors:
        """The leading triplets of the space, by a Rayleigh–Ritz step; rank ≤ width."""
        U, S, W, fine, growth = leading_svd(self._Z, rank, safe=self._safe)
        residual = self._residual(S, W)
        if not (cpu.looks_are_free(U) and bool((growth <= POLISH_GROWTH).all())):
            U = polished(U)
        iterations = [self.iterations] * len(self._As)
        return Factors(U, S, self._V @ W, residual, iterations, self._ok & fine)

    def _residual(self, S: Tensor, W: Tensor) -> Tensor:
        """‖(I − VVᵀ) Aᵀ Z_last W_last Σ⁻¹‖₂ / σ₁."""
        V, As, info = self._V, self._As, torch.finfo(S.dtype)
        if self.width == V.shape[1]:  # the space is the whole one
            return rounding(S)
        # Below the rounding of σ₁ the quotient would be noise.
        S_floored = torch.maximum(S, info.eps * S[:, :1]).clamp_min(info.tiny)
        last = self.block
        Z, W = self._Z[:, :, -last:], W[:, -last:] / S_floored.unsqueeze(-2)
        if last <= cpu.WHOLE_BLOCK:
            back = self._powers
            if back is None:
                back = primitives.multiply(As, Z, transpose=True)
            if W.shape[-1] < last:
                return residual_through(against(back @ W, V), None, S)
            return residual_through(against(back, V), W, S)

        # A few probes are multiplied by Aᵀ, not all of Z.
        def apply(P: Tensor) -> Tensor:
            return against(primitives.multiply(As, Z @ (W @ P), transpose=True), V)

        def transposed(P: Tensor) -> Tensor:
            return W.mT @ (Z.mT @ primitives.multiply(As, against(P, V)))

        return residual_in(apply, transposed, S)

    def beside(self) -> tuple[Tensor, Tensor]:
        """(Q, A Q) of :func:`beyond` this space."""
        return beyond(self._As, self._V, safe=self._safe)

    def join(self, Q: Tensor, Z: Tensor) -> None:
        """Takes orthonormal columns Q of :func:`beyond`, and Z = A Q, into the space. It grows on
        from the last block of the space and the last of Q together."""
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
        """Drops all but some of the group."""
        self._As = [self._As[i] for i in indices.tolist()]
        self._V, self._Z, self._ok = self._V[indices], self._Z[indices], self._ok[indices]
        self._powers = None if self._powers is None else self._powers[indices]


def run(
    group: Group, start: Tensor, width: int, *, safe: bool, generator: torch.Generator
) -> Factors:
    """Triplets of a Krylov space of ``width`` columns from ``start``. With tol it grows until
    residuals meet it and nothing larger is found beside the space.

    Args:
        start: (1 or b, n, w) columns.
    """
    block = start.shape[-1]
    space = KrylovSpace(group.As, start, safe=safe, generator=generator)
    space.grow(width)
    factors = space.factors(group.rank)
    if group.tol is None:
        return led(group.As, factors, group.tol, safe=safe)
    most = min(group.shape)
    if group.niter is not None:
        most = max(width, min(most, group.niter * block))
    while most > width and workspace_bytes(group, block, most, safe=safe) > group.workspace_bytes:
        most = (most - 1) // block * block
    most = max(most, width)
    waiting = torch.arange(len(group.As), device=start.device)
    postponed: list[int] = []
    lacking: list[int] = []
    factors = current = confirmed(group.As, factors, group.tol)
    while True:
        met = current.residual <= group.tol
        late = torch.nonzero(~met).flatten()
        if space.width < group.shape[1] and bool(met.any()):  # else the space is the whole one
            # For all of the batch, which takes no longer than one matrix.
            _, Z = space.beside()
            lacking += waiting[met & larger(Z, current)].tolist()
        if not len(late) or space.width >= most:
            break
        grown = min(most, _next_width(space))
        fitting = int(group.workspace_bytes // workspace_bytes(group, block, grown, safe=safe))
        postponed += waiting[late[max(1, fitting) :]].tolist()
        late = late[: max(1, fitting)]
        if len(late) < len(waiting):
            waiting = waiting[late]
            space.keep(late)
        space.grow(grown)
        current = confirmed(
            [group.As[i] for i in waiting.tolist()], space.factors(group.rank), group.tol
        )
        factors = factors.merged(waiting, current)
    del space, current

    def of(indices: list[int]) -> tuple[Tensor, Group, Tensor]:
        at = torch.tensor(indices, device=start.device)
        return at, group.of(at), start if len(start) == 1 else start[at]

    for i in lacking:  # each alone, so that no result depends on which matrices share the call
        at, one, begun = of([i])
        factors = factors.merged(at, _completed(one, begun, width, most, safe, generator))
    if postponed:
        at, rest, begun = of(postponed)
        factors = factors.merged(at, run(rest, begun, width, safe=safe, generator=generator))
    return factors


def _completed(
    group: Group, start: Tensor, width: int, most: int, safe: bool, generator: torch.Generator
) -> Factors:
    """Triplets of one matrix in a Krylov space that takes in the larger ones found beside it."""
    assert group.tol is not None
    space = KrylovSpace(group.As, start, safe=safe, generator=generator)
    space.grow(width)
    while True:
        factors = confirmed(group.As, space.factors(group.rank), group.tol)
        if bool(factors.residual > group.tol):
            grown = _next_width(space)
            if grown > most:
                grown = most if most == group.shape[1] else space.width
            needed = workspace_bytes(group, space.block, grown, safe=safe)
            if grown == space.width or needed > group.workspace_bytes:
                return factors
            space.grow(grown)
        elif space.width == group.shape[1]:
            return factors
        else:
            Q, Z = space.beside()
            more = larger(Z, factors)
            joined = space.width + Q.shape[-1]
            needed = workspace_bytes(group, space.block + PROBE_BLOCK, joined, safe=safe)
            if not bool(more) or joined > most or needed > group.workspace_bytes:
                return factors._replace(leading=~more)
            space.join(Q, Z)


def _next_width(space: KrylovSpace) -> int:
    """The width of a space that grows by ``GROWTH``, in whole blocks."""
    blocks = math.ceil(space.width * GROWTH / space.block) - math.ceil(space.width / space.block)
    return space.width + max(1, blocks) * space.block


def fits(group: Group) -> bool:
    """Whether the space of one matrix, with ``safe`` too, fits the workspace."""
    factors, working = group.results_bytes, group.results_bytes + group.looks_bytes
    safely = group.whole_bytes(working + workspace_bytes(group, *plan(group), safe=True), factors)
    return group.held_bytes(factors) + safely <= group.workspace_bytes


def plan(group: Group) -> tuple[int, int]:
    """(block, width) of the space that is built before residuals are looked at."""
    small, r = min(group.shape), group.rank
    extra = group.oversample
    if extra is None:
        extra = max(LEAST_OVERSAMPLE, math.ceil(OVERSAMPLE * r))
    width = min(small, r + extra)
    if group.niter is None:
        block = max(1, width // (cpu.KRYLOV_STEPS * cpu.BLOCK_MULTIPLE)) * cpu.BLOCK_MULTIPLE
        width = math.ceil(width / block) * block
    else:  # niter blocks, as wide as that takes
        block = math.ceil(width / group.niter)
        width = block * group.niter
    return min(block, small), min(width, small)


def workspace_bytes(group: Group, block: int, width: int, *, safe: bool = False) -> int:
    m, n = group.shape
    item = group.dtype.itemsize
    # The space, once more while it grows, blocks on their way and triplets as they are replaced; Z,
    # its Gram matrix, the eigenvectors of that and the work of finding them in float64. With
    # ``safe`` an SVD copies Z, and has left vectors.
    space = item * (m + n) * (2 * width + 4 * block + 2 * group.rank)
    if safe or group.dtype == torch.float64:
        return space + 8 * (max(m, n) * (3 * width + group.rank) + 10 * width * width)
    return space + 8 * (max(m, n) * (width + group.rank) + 6 * width * width)
