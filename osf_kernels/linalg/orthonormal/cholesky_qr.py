"""Cholesky QR of tall-skinny matrices, one batch at a time: all of it products of matrices."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives

# Rounding of a Gram matrix of unit columns and of its Cholesky factor, in eps: a few, measured
# between 0.3 and 2 from 8 to 2048 rows.
_SLACK = 8.0
_PASSES = 3
# Upper limit, in eps, of ‖QᵀQ − I‖ before ``polished``, by a bound that is some five times it.
POLISH_GROWTH = 4.0


class CholeskyQR(NamedTuple):
    """Orthonormal columns of every matrix of a batch, and whether they may be believed."""

    Q: Tensor  # (b, m, r), of the dtype that the passes took
    finite: Tensor  # (b,) no NaN or Inf in Y
    ok: Tensor  # (b,) Q is orthonormal and spans Y
    full: Tensor  # (b,) ok, and Y has full numerical rank


def cholesky_qr(Y: Tensor) -> CholeskyQR:
    """Cholesky QR of (b, m, r), m ≥ r, not empty, in up to three passes. On a CPU it stops after
    the first that suffices; on a GPU it never synchronizes.

    Where ok, Q is orthonormal to a few eps and its first j columns span Y's first j, for every j.
    Elsewhere it is undefined.
    """
    b, m, r = Y.shape
    dtype = primitives.working_dtype(Y.dtype)
    on_cpu = cpu.looks_are_free(Y)
    # On a CPU a pass in float64 costs what two in float32 do, and one is enough to a condition
    # number of 1e3, where two in float32 begin to fail. No square of a float32 overflows there.
    X = Y.double() if on_cpu and dtype == torch.float32 else scale_columns(Y.to(dtype))
    finite = done = usable = full = torch.ones(b, dtype=torch.bool, device=Y.device)
    eps = torch.finfo(X.dtype).eps
    target = max(torch.finfo(dtype).eps / 16, 4 * _SLACK * eps * r)

    Q, spread = X, X
    for step in range(_PASSES):
        G = gram(Q)
        if step == 0:
            finite = G.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        # With a unit diagonal no scaling of columns improves the condition by more than √r.
        G, d = with_unit_diagonal(G)
        spread = G.abs().sum(-1).amax(-1)  # ≥ σ₁²; 1 of orthonormal columns
        if step == 0 and not on_cpu:
            # So that the factorization succeeds for all that a second pass can mend.
            G.diagonal(dim1=-2, dim2=-1).add_(_SLACK * eps)
        inverse, _ = primitives.cholesky_inverse(G)
        size = inverse.square().sum((-2, -1))  # ‖R⁻¹‖²_F ≥ 1/σ_min²
        Q = _multiply_triangular(Q, d[:, :, None] * inverse)
        predicted = _SLACK * eps * size
        done = predicted <= target
        usable = predicted <= 0.25
        if step == 0:
            full = 1 / size >= rank_tolerance(m, dtype) ** 2 * spread
        if on_cpu and bool((done | ~usable).all()):
            break
    else:
        # The last pass brings a defect below 1/16 to rounding.
        done = usable & (spread <= 1 + 1 / 16)
    return CholeskyQR(Q, finite, done, done & full)


def with_unit_diagonal(G: Tensor) -> tuple[Tensor, Tensor]:
    """(D G D, d) of Gram matrices (b, r, r): those of the columns scaled by d (b, r) to norm 1.

    A zero column stays zero.
    """
    d = G.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(G.dtype).tiny).rsqrt()
    return d[:, :, None] * G * d[:, None, :], d


def conditioned(Z: Tensor) -> Tensor:
    """Columns with the span of Z's that are far from dependent, though not orthonormal: a product
    with a matrix then loses no more than that matrix's condition number asks for.

    One pass of Cholesky QR in the dtype of Z, shifted so that it never breaks down.
    """
    eps = torch.finfo(Z.dtype).eps
    G, inverse_norms = with_unit_diagonal(Z.mT @ Z)
    G.diagonal(dim1=-2, dim2=-1).add_(8 * Z.shape[-1] * eps)
    inverse, _ = primitives.cholesky_inverse(G)
    return Z @ (inverse_norms.unsqueeze(-1) * inverse)


def polished(Q: Tensor) -> Tensor:
    """Q (3 I − QᵀQ) / 2 of nearly orthonormal columns: the nearest orthonormal ones to first
    order, by one Newton–Schulz step. A defect δ becomes δ²."""
    small = cpu.looks_are_free(Q) and Q.shape[-1] < cpu.GRAM_BLOCKED_FROM
    G = Q.mT @ Q if small else primitives.gram(list(Q))
    correction = G.mul_(-0.5)
    correction.diagonal(dim1=-2, dim2=-1).add_(1.5)
    return Q @ correction


def gram(X: Tensor) -> Tensor:
    """XᵀX of a batch."""
    if X.device.type != "cpu":
        return primitives.gram(X.unbind(0))
    r = X.shape[-1]
    if r < cpu.TRIANGLE_BLOCKED_FROM:
        return X.mT @ X
    G = X.new_empty(len(X), r, r)
    for start in range(0, r, r // 4):
        stop = min(start + r // 4, r)
        G[:, start:stop, start:] = X[..., start:stop].mT @ X[..., start:]
        G[:, stop:, start:stop] = G[:, start:stop, stop:].mT
    return G


def _multiply_triangular(X: Tensor, R: Tensor) -> Tensor:
    """X R for upper triangular R."""
    r = R.shape[-1]
    if X.device.type != "cpu" or r < cpu.TRIANGLE_BLOCKED_FROM:
        return multiply(X, R)
    out = torch.empty_like(X)
    for start in range(0, r, r // 4):
        stop = min(start + r // 4, r)
        torch.matmul(X[..., :stop], R[:, :stop, start:stop], out=out[..., start:stop])
    return out


def multiply(X: Tensor, M: Tensor, *, transpose: bool = False) -> Tensor:
    """X M, or XᵀM, of batches."""
    if X.device.type == "cpu":
        return (X.mT if transpose else X) @ M
    return primitives.multiply(X.unbind(0), M, transpose=transpose)


def rank_tolerance(m: int, dtype: torch.dtype) -> float:
    """Limit of σ/σ₁ of unit columns, above all that rounding leaves of a dependent column."""
    return 4 * math.sqrt(m) * torch.finfo(dtype).eps


def scale_columns(X: Tensor, dim: int | tuple[int, int] = -2) -> Tensor:
    """Columns, or whole matrices, times powers of two: largest magnitudes in [0.5, 1), exactly.

    Zero, NaN and Inf stay.
    """
    largest = torch.linalg.vector_norm(X, torch.inf, dim, keepdim=True)
    exponent = torch.frexp(largest).exponent
    # The power itself would overflow for a subnormal column. Two products with powers take a
    # fortieth of the time of torch.ldexp on the whole of X.
    half, one = exponent // 2, torch.ones_like(exponent, dtype=X.dtype)
    return X * torch.ldexp(one, -half) * torch.ldexp(one, half - exponent)
