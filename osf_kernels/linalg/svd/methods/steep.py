"""Gram matrices of a steep spectrum, lowered so that float32 tells more eigenvectors apart.

An eigensolver errs by a few eps of the largest eigenvalue, and in eigenvectors by that over the gap
to the next eigenvalue. Where a few eigenvalues stand far above the others, Lanczos steps find them
first, and they are set to a value just above the rest: the eigenvectors stay, and the largest
eigenvalue becomes smaller. Products with A then remove the coupling that this leaves between the
eigenvectors that were set and the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.cpu import LANCZOS_BLOCK as BLOCK
from osf_kernels.linalg import primitives

# Lower limit of n Σλ² / (Σλ)², which is 1 for equal eigenvalues, 2 for a square matrix of noise and
# 2 to 5 for MiniLM's weights: below it lowering the largest eigenvalue isn't worth its time.
STEEP = 8.0
# Upper limit of ‖G q − λ q‖ for a pair that is set, in eps of the largest eigenvalue: the rounding
# of G leaves up to that.
FOUND_TO = 16.0
# Couplings up to this are removed by a rotation of the first order, which leaves their square.
FIRST_ORDER = 1e-3
# The value that is set, relative to the largest eigenvalue left: far enough above it not to mix.
SET_TO = 1.5


class Lowered(NamedTuple):
    """How many of the largest eigenvalues of each Gram matrix were set to ``value``, both (b,)."""

    number: Tensor
    value: Tensor

    @property
    def most(self) -> int:
        return int(self.number.max())


def lower(G: Tensor) -> Lowered | None:
    """Sets the largest eigenvalues of Gram matrices (b, n, n), in place, to one above the rest.

    With a basis Q that Lanczos steps found, M = QᵀGQ, F = GQ − QM and P = I − QQᵀ, G is
    QMQᵀ + QFᵀ + FQᵀ + PGP. It becomes τQQᵀ + PGP, with the same eigenvectors but for F / gap, where
    F is rounding. Those of τ come out in any order, and ``rotate`` tells them apart.

    Returns:
        None where no matrix gains by it.
    """
    n = G.shape[-1]
    if n < cpu.LANCZOS_FROM:
        return None
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    norm = torch.linalg.vector_norm(G, dim=(-2, -1))
    steep = n * norm.square() > STEEP * trace.square()
    if not bool(steep.any()):  # synchronizes
        return None
    Q, GQ, values, below = _leading(G)
    F = GQ - Q * values.unsqueeze(-2)
    errors = F.square().sum(-2).sqrt().cummax(-1).values
    gap = values - below
    rounding = FOUND_TO * torch.finfo(G.dtype).eps * values[:, :1]
    fits = (gap > 0.05 * values) & (errors < rounding)
    count = torch.where(fits, torch.arange(1, BLOCK + 1, device=G.device), 0).amax(-1)
    gained = below.gather(-1, (count - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    count = torch.where(steep & (gained < 0.5 * values[:, 0]), count, 0)
    value = SET_TO * gained
    if not bool((count > 0).any()):
        return None
    chosen = torch.arange(BLOCK, device=G.device) < count[:, None, None]
    Q, GQ = torch.where(chosen, Q, 0), torch.where(chosen, GQ, 0)
    M = Q.mT @ GQ
    M.diagonal(dim1=-2, dim2=-1).sub_(torch.where(count > 0, value, 0).unsqueeze(-1))
    X = GQ - Q @ (Q.mT @ GQ) + 0.5 * (Q @ M)
    G.baddbmm_(torch.cat([Q, X], -1), torch.cat([X, Q], -1).mT, alpha=-1)
    return Lowered(count, value)


def _leading(G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ritz vectors of the largest eigenvalues of G by block Lanczos, all of the space kept.

    Returns:
        Q (b, n, BLOCK), G Q, the Ritz values (b, BLOCK), and of each the next smaller one.
    """
    b, n, width = len(G), G.shape[-1], BLOCK * cpu.LANCZOS_STEPS
    # In columns, since columns are read and written at a time.
    V, GV = G.new_empty(2, b, width, n).mT
    generator = torch.Generator(G.device).manual_seed(n)
    Y = torch.randn(1, n, BLOCK, dtype=G.dtype, device=G.device, generator=generator)
    for begin in range(0, width, BLOCK):
        basis, new = V[..., :begin], slice(begin, begin + BLOCK)
        # Twice, with unit columns the second time: the last block of a space that has ended is
        # rounding, and would lose its orthogonality otherwise.
        for _ in range(2 if begin else 1):
            Y = torch.linalg.qr(Y - basis @ (basis.mT @ Y))[0]
        V[..., new] = Y
        Y = G @ Y
        GV[..., new] = Y
    M = (V.mT @ GV).double()
    values, W = torch.linalg.eigh(torch.nan_to_num(0.5 * (M + M.mT)))  # eigh raises for NaN
    values, W = values.to(G.dtype).flip(-1), W[..., -BLOCK:].flip(-1).to(G.dtype)
    return V @ W, GV @ W, values[:, :BLOCK], values[:, 1 : BLOCK + 1]


def couple(A: Sequence[Tensor], W: Tensor, B: Tensor, lowered: Lowered, *, first: int) -> None:
    """Removes the coupling between eigenvectors that were set and the others, by products with A.

    The coupling is rounding of G, small beside the largest eigenvalue and large beside small ones.
    W and B are rotated in place, except where a rotation of the first order isn't enough: there
    the residual will be large.

    Args:
        W: (b, n, n) eigenvectors, ascending.
        B: (b, m, t) A times the last t of them.
        first: the column of W from which on the others are rotated as well.
    """
    # All BLOCK columns that may have been set.
    n, t, k = W.shape[-1], B.shape[-1], BLOCK
    top = W[..., n - k :]
    lead, before = B[..., t - k :].clone(), top.clone()
    squares = torch.zeros_like(W[:, 0])  # ascending
    squares[:, n - t :] = B.square().sum(-2)
    was_set = torch.arange(n, 0, -1, device=W.device) <= lowered.number[:, None]
    pairs = ~was_set[:, :, None] & was_set[:, None, n - k :]
    # C_ji = w_jᵀ AᵀA v_i
    C = W.mT @ primitives.multiply(A, lead, transpose=True)
    gap = squares[:, None, n - k :] - squares[:, :, None]
    small = ((C.abs() <= FIRST_ORDER * gap) | ~pairs).all(-1).all(-1)
    theta = torch.where(pairs & small[:, None, None], C / gap, 0)
    turn = W @ theta
    W[..., first:].baddbmm_(before, theta[:, first:].mT, alpha=-1)
    B.baddbmm_(lead, theta[:, n - t :].mT, alpha=-1)
    top.add_(turn)
    B[..., t - k :] = primitives.multiply(A, top)


def rotate(W: Tensor, B: Tensor, start: int, stop: int) -> None:
    """A Rayleigh–Ritz step of A in the span of W's columns from start to stop, in place; B, A times
    the last columns of W, goes with them."""
    shift = W.shape[-1] - B.shape[-1]
    V, AV = W[..., start:stop], B[..., start - shift : stop - shift]
    X = AV.double()
    turn = torch.linalg.eigh(torch.nan_to_num(X.mT @ X))[1].to(W.dtype)
    V.copy_(V @ turn)
    AV.copy_(AV @ turn)
