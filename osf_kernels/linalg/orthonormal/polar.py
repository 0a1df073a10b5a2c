"""polar: of all matrices with orthonormal columns the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels import cpu
from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.cholesky_qr import cholesky_qr, gram, multiply, scale_columns
from osf_kernels.linalg.orthonormal.operator import admit, operator

# Newton–Schulz reaches σ_min/σ₁ = _REACH, by bounds that overestimate by about √r, in _STEPS. For
# smaller ratios the SVD costs less.
_REACH = 1e-5
_STEPS = 17
# The α that suits small singular values best, up to √3, takes σ₁ down to their size. Rounding of
# that step is lost, and leaves QᵀY off symmetric by .4·κ·eps (measured). With 1.6, which leaves σ₁
# at .35, QᵀY is off by 17 eps, in no more steps.
_ALPHA = 1.6
# λ_min/λ₁ of a float64 Gram matrix down to which its inverse square root is right to float32.
_EIGH_REACH = 1e-7


def polar(Y: Tensor) -> Tensor:
    """Q = Y (YᵀY)^(-1/2): of all matrices with orthonormal columns the nearest to Y.

    Where Y is rank deficient the nearest one isn't unique; Q is then U Vᵀ of an SVD of Y.

    Args:
        Y: (..., m, r) with m ≥ r, float32, bfloat16, float16 or float64.

    Returns:
        Q (..., m, r), float32 (float64 of a float64 Y), orthonormal as orthonormalize's; QᵀY is
        symmetric positive semidefinite to rounding of ‖Y‖.

    Raises:
        TypeError, ValueError: as orthonormalize.

    Mutates nothing; synchronizes once, and again only where a matrix takes the safe path; draws
    no random numbers; not differentiable. Two calls agree bit for bit.

    Source: Newton–Schulz with the scaling of Chen & Chow 2014, A stable scaling of Newton–Schulz
    for improving the sign function computation of a Hermitian matrix; that the polar factor of Y
    is that of its triangle, Higham & Papadimitriou 1994.
    """
    admit("polar", Y)
    Q: Tensor = _polar(Y)
    return Q


def _fast(Y: Tensor) -> tuple[tuple[Tensor], Tensor, Tensor]:
    """((Q,), finite, ok) of (b, m, r), by the faster of two ways."""
    dtype = primitives.working_dtype(Y.dtype)
    if Y.device.type == "cpu" and dtype == torch.float32:
        Q, finite, ok = _by_eigh(Y)
    else:
        Q, finite, ok = _by_newton_schulz(scale_columns(Y.to(dtype), (-2, -1)))
    return (Q,), finite, ok


def _by_eigh(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y (YᵀY)^-½ in float64, where κ(Y)² · 2⁻⁵³ is far below float32's rounding.

    On two cores it takes a third to a half of the time of the triangle's iteration. No square of a
    float32 leaves the range of a float64, so nothing is scaled.
    """
    r = Y.shape[-1]
    G = Y.new_zeros(len(Y), r, r, dtype=torch.float64)
    pieces = _pieces(*Y.shape)
    held = Y.new_empty(2, Y[pieces[0]].numel(), dtype=torch.float64)  # made once: no new pages

    def double(piece: tuple[slice, slice]) -> Tensor:
        X = Y[piece]
        return held[0, : X.numel()].view(X.shape).copy_(X)

    for piece in pieces:
        X = double(piece)
        G[piece[0]].baddbmm_(X.mT, X)
    finite = G.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()  # as Y is: squares don't cancel
    G = torch.where(finite[:, None, None], G, 0.0)
    values, vectors = torch.linalg.eigh(G)
    ok = values[:, 0] > _EIGH_REACH * values[:, -1]
    powers = values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    M = (vectors * powers[:, None, :]) @ vectors.mT
    Q = torch.empty_like(Y, dtype=torch.float32, memory_format=torch.contiguous_format)
    for piece in pieces:
        X = double(piece)
        Q[piece] = torch.bmm(X, M[piece[0]], out=held[1, : X.numel()].view(X.shape))
    return Q, finite, ok


def _pieces(b: int, m: int, r: int) -> list[tuple[slice, slice]]:
    """Cuts (b, m, r) into several matrices at a time, or several rows of one."""
    numbers = cpu.DOUBLED_AT_ONCE
    matrices, rows = max(1, numbers // (m * r)), max(1, min(m, numbers // r))
    return [
        (slice(i, i + matrices), slice(j, j + rows))
        for i in range(0, b, matrices)
        for j in range(0, m, rows)
    ]


def _by_newton_schulz(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky QR, then Newton–Schulz on the triangle R = QᵀY."""
    found = cholesky_qr(Y)
    R = multiply(found.Q, Y.to(found.Q.dtype), transpose=True)
    above = _norm_bound(R)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, eye, upper=True)
    factor, ok = _newton_schulz(R / above[:, None, None], 1 / (above * _norm_bound(inverse)))
    return multiply(found.Q, factor).to(Y.dtype), found.finite, found.ok & ok


def _norm_bound(M: Tensor) -> Tensor:
    """An upper bound of ‖M‖₂, 1 of orthogonal diagonal ones: the less of ‖M‖_F, √(‖M‖₁‖M‖∞)."""
    M = M.abs()
    interpolated = (M.sum(-1).amax(-1) * M.sum(-2).amax(-1)).sqrt()
    return torch.minimum(interpolated, torch.linalg.matrix_norm(M))


def _newton_schulz(X: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """(the orthogonal polar factor, whether it converged) of X (b, r, r) with lower ≤ σ ≤ 1.

    x ← αx(3 − α²x²)/2 takes all singular values to 1; with the α that gives ``lower`` and 1 the
    same value, or _ALPHA, a small one grows by up to 2.4 a step, not by 1.5.
    """
    on_cpu = cpu.looks_are_free(X)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    enough = torch.finfo(X.dtype).eps ** 0.25
    near = within_reach = lower >= _REACH
    lower = lower.clamp_min(_REACH)
    for step in range(_STEPS):
        square = gram(X)
        near = torch.linalg.matrix_norm(square - eye) <= enough
        if step + 1 == _STEPS or (on_cpu and bool((near | ~within_reach).all())):
            break
        alpha = (3 / (1 + lower + lower.square())).sqrt().clamp_max(_ALPHA)
        lower = alpha * lower * (3 - (alpha * lower).square()) / 2
        half = (alpha / 2)[:, None, None]
        X = multiply(X, half * (3 * eye - alpha.square()[:, None, None] * square))
    for _ in range(2):  # each squares the defect, to rounding
        X = multiply(X, 1.5 * eye - 0.5 * gram(X))
    return X, near & within_reach


def _safe(Y: Tensor) -> tuple[Tensor]:
    """The polar factor of any finite (b, m, r), by Householder QR and an SVD in float64."""
    dtype = primitives.working_dtype(Y.dtype)
    Q, R = torch.linalg.qr(scale_columns(Y.double(), (-2, -1)))
    U, _, Vh = torch.linalg.svd(R)
    return ((Q @ (U @ Vh)).to(dtype),)


_polar = operator("polar(Tensor Y) -> Tensor", _fast, _safe)
