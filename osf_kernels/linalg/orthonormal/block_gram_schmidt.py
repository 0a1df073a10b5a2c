"""Orthonormal columns of a block against a basis: block Gram–Schmidt by Cholesky QR."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.cholesky_qr import polished, with_unit_diagonal

# Upper limit of ``Block.growth`` after one pass on a CPU. A pass multiplies the growth by 2 to 25,
# for random and for trained weights: a block or a few come out of one pass, then one takes two.
# ‖I − VᵀV‖₂ of whole spaces is 1 to 5 times the limit in eps, of leading triplets up to 10 eps.
GROWTH_LIMIT = 16.0
# Upper limits of the second pass: of the factor by which it amplifies rounding, and of ‖G − I‖_F of
# the Gram matrix that it factorizes. Above them the first pass lost too much to the projection.
SECOND_PASS_GROWTH = 1.1
SECOND_PASS_LIMIT = 1e-2
# A pass that amplifies rounding by up to this factor leaves columns orthonormal to some 1e-4, which
# one polishing step squares, in a third of the time of a second pass of Cholesky QR.
POLISH_REACH = 1e3
# Up to this ‖G − I‖_F of the Gram matrix of unit columns their condition number is at most √3.
NEARLY_ORTHOGONAL = 0.5


class Block(NamedTuple):
    """Orthonormal columns made of a block Y, beside a basis B."""

    Q: Tensor  # (b, m, w)
    ok: Tensor  # (b,) False where the factorization broke down
    growth: float  # bound on ‖I − [B Q]ᵀ[B Q]‖ / eps
    lost: float = math.inf  # factor by which the first pass amplified rounding in Y, if known


def orthonormal_against(
    Y: Tensor, basis: Tensor, *, safe: bool, generator: torch.Generator, growth: float = 1.0
) -> Block:
    """Orthonormal columns with the span of (I − BBᵀ) Y, orthogonal to the basis B.

    Projecting and orthonormalizing twice is enough (Barlow & Smoktunowicz 2013): the first pass
    leaves a condition number whose rounding the second removes. On a CPU, where a look at a number
    is free, the second is left out where the first lost little (Daniel, Gragg, Kaufman, Stewart
    1976).

    Args:
        growth: bound on ‖I − BᵀB‖ / eps.
        safe: by Householder QR, and a Y that depends on B is continued by noise.
    """
    ok = torch.ones(len(Y), dtype=torch.bool, device=Y.device)
    along = basis.mT @ Y if basis.shape[-1] else None
    X = Y if along is None else torch.baddbmm(Y, basis, along, alpha=-1)
    if safe:
        # Where the space ends, noise far below the rounding of Y continues it. The noise is the
        # same for every matrix, so that no result depends on which matrices share the call.
        noise = torch.randn(Y.shape[1:], dtype=Y.dtype, device=Y.device, generator=generator)
        norm = Y.norm(dim=(-2, -1), keepdim=True)
        scale = torch.where(norm > 0, norm, 1) * (torch.finfo(Y.dtype).eps / Y.shape[-2])
        X = X + scale * noise
        # Where only rounding was left of Y, it may lie anywhere: the second round may take most of
        # it away, and the third restores the orthogonality that the second lost.
        for _ in range(2):
            X = against(torch.linalg.qr(X)[0], basis)
        return Block(torch.linalg.qr(X)[0], ok, growth)
    if cpu.looks_are_free(Y):
        Q, pass_growth = _one_pass_in_float64(X, along)
        lost = float(pass_growth.amax())  # may be NaN, which is below no limit
        if growth * lost <= GROWTH_LIMIT:
            return Block(Q, ok, growth * max(1.0, lost), lost)
        along = basis.mT @ Q
        Q = torch.baddbmm(Q, basis, along, alpha=-1)
        if lost <= POLISH_REACH:
            return Block(polished(Q), ok, growth, lost)
        Q, second = _one_pass_in_float64(Q, along)
        # Of columns that depend on each other the first pass leaves only rounding.
        ok = (pass_growth <= 1 / torch.finfo(Y.dtype).eps) & (second <= SECOND_PASS_GROWTH)
        return Block(Q, ok, growth, lost)
    Q, first, _ = one_pass(X)
    Q, second, spread = one_pass(against(Q, basis), scale=False)
    return Block(Q, first & second & (spread < SECOND_PASS_LIMIT), growth)


def orthonormal_columns(Y: Tensor, safe: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(Q, ok) of Y = A V, where the columns of V may nearly be singular vectors.

    The columns of Y are then nearly orthogonal, and one pass in float32 loses nothing. On a CPU,
    where a look at its result is free, that pass is tried first: it takes a third of the time of
    one in float64.
    """
    if not safe and cpu.looks_are_free(Y):
        Q, ok, spread = one_pass(Y)
        if bool((spread <= NEARLY_ORTHOGONAL).all()):
            return Q, ok
    found = orthonormal_against(Y, Y[..., :0], safe=safe, generator=generator)
    return found.Q, found.ok


def against(Y: Tensor, basis: Tensor) -> Tensor:
    """(I − BBᵀ) Y."""
    return torch.baddbmm(Y, basis, basis.mT @ Y, alpha=-1)


def one_pass(Y: Tensor, *, scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
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


def _one_pass_in_float64(X: Tensor, along: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Q, growth) by one pass of CholeskyQR with a float64 Gram matrix, on any scale of columns.

    A float64 Gram matrix costs what two in float32 do, and loses nothing of X that float32 holds.
    Args:
        X: (b, m, w) Y, or (I − BBᵀ) Y where ``along`` is BᵀY.

    Returns:
        growth (b,) is the largest factor by which a column of Q amplifies rounding in Y: the
        largest norm of a column of diag(‖y‖) R⁻¹. It is NaN where the factorization doesn't exist.
    """
    D = X.double()
    G = D.mT @ D
    inverse, _ = primitives.cholesky_inverse(G)
    square = G.diagonal(dim1=-2, dim2=-1)  # ‖y‖²
    if along is not None:
        square = square + along.double().square().sum(-2)
    inverse = inverse.to(X.dtype)  # an overflow here is a growth beyond every limit
    growth = (square.unsqueeze(-2) @ inverse.double().square()).amax((-2, -1)).sqrt()
    return X @ inverse, growth
