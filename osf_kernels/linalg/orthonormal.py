"""orthonormalize and polar: orthonormal columns of tall-skinny matrices, one batch at a time.

Two paths. The good one is Cholesky QR, all matrix products and no decision on the host; it says
per matrix whether its result holds. The safe one is Householder QR in float64 and the SVD of its
triangle, for the matrices where it does not.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.backends import primitives
from osf_kernels.errors import describe
from osf_kernels.ops._library import register
from osf_kernels.ops._validation import DTYPES, require_constant, require_dense, require_tensor

# Rounding of a Gram matrix of unit columns and of its Cholesky factor, in eps: a few, measured
# between 0.3 and 2 from 8 to 2048 rows.
_SLACK = 8.0
_PASSES = 3

# Newton–Schulz reaches σ_min/σ₁ = _POLAR_REACH, by bounds that overestimate by about √r, in
# _POLAR_STEPS; beyond, the SVD costs less.
_POLAR_REACH = 1e-5
_POLAR_STEPS = 17
# The α that suits small singular values best, up to √3, takes σ₁ down to where they are: what is
# rounded there is lost, and QᵀY off symmetric by .4·κ·eps (measured). 1.6 leaves σ₁ at .35 and
# takes no more steps: 17 eps.
_POLAR_ALPHA = 1.6
# λ_min/λ₁ of a float64 Gram matrix down to which its inverse square root is right to float32.
_POLAR_EIGH_REACH = 1e-7


@overload
def orthonormalize(Y: Tensor, *, return_rank: Literal[False] = False) -> Tensor: ...
@overload
def orthonormalize(Y: Tensor, *, return_rank: Literal[True]) -> tuple[Tensor, Tensor]: ...
def orthonormalize(Y: Tensor, *, return_rank: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Q with QᵀQ = I and range(Q) ⊇ range(Y).

    Where Y has full numerical rank, Q is the Q of Y's QR factorization with a positive diagonal
    of R: Q[:, :j] spans Y[:, :j] for every j. Where it hasn't, the first ``rank`` columns span
    range(Y), in order of the singular values of Y with unit columns, and the others complete
    them; then no column belongs to one of Y's.

    The numerical rank counts the singular values of Y with its columns scaled to unit norm that
    exceed 4·√m·eps·σ₁, with eps of Q's dtype: what is given in bfloat16 is taken to be exact. So
    it doesn't depend on the scale of a column; one of 1e-30 counts, and a zero column doesn't.

    Args:
        Y: (..., m, r) with m ≥ r, float32, bfloat16, float16 or float64.
        return_rank: also return the numerical rank.

    Returns:
        Q (..., m, r), float32 (float64 of a float64 Y), orthonormal to a few eps: LAPACK's ratio
        ‖I − QᵀQ‖₁ / (m·eps) is under 30 whatever Y is. Every column of Y lies in range(Q) but for
        some √r·eps of its norm. With return_rank also the rank, (...)
        int64.

    Raises:
        TypeError: Y is no tensor, sparse, or of another dtype.
        ValueError: m < r; NaN or Inf in Y; autograd differentiates Y.

    Mutates nothing; synchronizes once, and again only where a matrix takes the safe path; draws
    no random numbers; not differentiable. Two calls agree bit for bit.

    Source: Cholesky QR with a shifted first pass, Fukaya et al. 2020 (arXiv 1809.11085).
    """
    _admit("orthonormalize", Y)
    Q, rank = _orthonormalize(Y)
    return (Q, rank) if return_rank else Q


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
    _admit("polar", Y)
    Q: Tensor = _polar(Y)
    return Q


# --- the good path: Cholesky QR ------------------------------------------------------------


class _CholeskyQR(NamedTuple):
    """Per matrix of a batch: what Cholesky QR found, and whether it may be believed."""

    Q: Tensor  # (b, m, r), float64 where that is what the passes took
    X: Tensor  # (b, m, r) Y in that dtype, with columns scaled by powers of two or not at all
    finite: Tensor  # (b,) no NaN or Inf in Y
    ok: Tensor  # (b,) Q is orthonormal and spans Y
    full: Tensor  # (b,) ok, and Y has full numerical rank


def _cholesky_qr(Y: Tensor) -> _CholeskyQR:
    """Cholesky QR of (b, m, r), m ≥ r, in up to three passes; on a CPU it stops after the one that
    suffices, with a GPU it never synchronizes.

    Where ok, Q is orthonormal to a few eps and its first j columns span Y's first j, for every j.
    Elsewhere it is undefined, and orthonormal_columns_safe takes over.
    """
    b, m, r = Y.shape
    dtype = primitives.working_dtype(Y.dtype)
    on_cpu = looks_are_free(Y)
    # On a CPU a pass in float64 costs what two in float32 do, and one is enough to a condition
    # number of 1e3, where two in float32 begin to fail. No square of a float32 overflows there.
    X = Y.double() if on_cpu and dtype == torch.float32 else scale_columns(Y.to(dtype))
    finite = done = usable = full = torch.ones(b, dtype=torch.bool, device=Y.device)
    if Y.numel() == 0:
        return _CholeskyQR(X, X, finite, done, full)
    eps = torch.finfo(X.dtype).eps
    target = max(torch.finfo(dtype).eps / 16, 4 * _SLACK * eps * r)

    Q, spread = X, X
    for step in range(_PASSES):
        G = _gram(Q)
        if step == 0:
            finite = G.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        # With a unit diagonal no scaling of columns improves the condition by more than √r.
        G, d = with_unit_diagonal(G)
        spread = G.abs().sum(-1).amax(-1)  # ≥ σ₁²; 1 of orthonormal columns
        if step == 0 and not on_cpu:
            # Lets the factorization of what a second pass can mend succeed.
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
    return _CholeskyQR(Q, X, finite, done, done & full)


def with_unit_diagonal(G: Tensor) -> tuple[Tensor, Tensor]:
    """(D G D, d) of Gram matrices (b, r, r): those of the columns scaled by d (b, r) to norm 1.

    A zero column stays zero.
    """
    d = G.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(G.dtype).tiny).rsqrt()
    return d[:, :, None] * G * d[:, None, :], d


def looks_are_free(X: Tensor) -> bool:
    """Whether the host may decide by what a tensor holds: on a CPU, where nothing waits for it."""
    return X.device.type == "cpu"


# From so many columns it pays on a CPU to skip the half of a product that is zero or known.
_BLOCKED_FROM = 512


def _gram(X: Tensor) -> Tensor:
    if X.device.type != "cpu":
        return primitives.gram(X.unbind(0))
    r = X.shape[-1]
    if r < _BLOCKED_FROM:
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
    if X.device.type != "cpu" or r < _BLOCKED_FROM:
        return _multiply(X, R)
    out = torch.empty_like(X)
    for start in range(0, r, r // 4):
        stop = min(start + r // 4, r)
        torch.matmul(X[..., :stop], R[:, :stop, start:stop], out=out[..., start:stop])
    return out


def _multiply(X: Tensor, M: Tensor, *, transpose: bool = False) -> Tensor:
    if X.device.type == "cpu":
        return (X.mT if transpose else X) @ M
    return primitives.multiply(X.unbind(0), M, transpose=transpose)


def rank_tolerance(m: int, dtype: torch.dtype) -> float:
    """Relative to σ₁ of unit columns: over what rounding alone leaves of a dependent column."""
    return 4 * math.sqrt(m) * torch.finfo(dtype).eps


def scale_columns(X: Tensor, dim: int | tuple[int, int] = -2) -> Tensor:
    """Columns, or whole matrices, times powers of two: largest magnitudes in [0.5, 1), exactly.

    Zero, NaN and Inf stay what they are.
    """
    largest = torch.linalg.vector_norm(X, torch.inf, dim, keepdim=True)
    exponent = torch.frexp(largest).exponent
    # The power itself would overflow for a subnormal column. Two products with powers take a
    # fortieth of the time of torch.ldexp on the whole of X.
    half, one = exponent // 2, torch.ones_like(exponent, dtype=X.dtype)
    return X * torch.ldexp(one, -half) * torch.ldexp(one, half - exponent)


# --- the safe path -------------------------------------------------------------------------


def orthonormal_columns_safe(Y: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, rank) of any finite Y: Householder QR in float64, and the SVD of its triangle.

    Args:
        Y: (b, m, r) with m ≥ r, finite.

    Returns:
        Q (b, m, r) of the working dtype and rank (b,) int64, as orthonormalize promises.
    """
    dtype = primitives.working_dtype(Y.dtype)
    Q, R = torch.linalg.qr(scale_columns(Y.double()))
    norms = torch.linalg.vector_norm(R, dim=-2, keepdim=True)
    U, sigma, _ = torch.linalg.svd(R / torch.where(norms > 0, norms, 1))
    rank = (sigma > rank_tolerance(Y.shape[-2], dtype) * sigma[:, :1]).sum(-1)
    deficient = (rank < Y.shape[-1])[:, None, None]
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    return torch.where(deficient, Q @ U, Q * sign[:, None, :]).to(dtype), rank


# --- polar ---------------------------------------------------------------------------------


def _polar_good(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, finite, ok) of (b, m, r), by the faster of two ways."""
    dtype = primitives.working_dtype(Y.dtype)
    if Y.device.type == "cpu" and dtype == torch.float32:
        return _polar_by_eigh(Y)
    return _polar_by_newton_schulz(scale_columns(Y.to(dtype), (-2, -1)))


def _polar_by_eigh(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y (YᵀY)^-½ in float64, where κ(Y)² · 2⁻⁵³ is far below float32's rounding.

    On two cores a third to a half of what the triangle's iteration takes. No square of a float32
    leaves the range of a float64, so nothing is scaled.
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
    ok = values[:, 0] > _POLAR_EIGH_REACH * values[:, -1]
    powers = values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    M = (vectors * powers[:, None, :]) @ vectors.mT
    Q = torch.empty_like(Y, dtype=torch.float32, memory_format=torch.contiguous_format)
    for piece in pieces:
        X = double(piece)
        Q[piece] = torch.bmm(X, M[piece[0]], out=held[1, : X.numel()].view(X.shape))
    return Q, finite, ok


_PIECE = 1 << 17  # numbers that are turned to float64 at a time, 1 MB: they stay in a core's cache


def _pieces(b: int, m: int, r: int) -> list[tuple[slice, slice]]:
    """Cuts (b, m, r) into several matrices at a time, or several rows of one."""
    matrices, rows = max(1, _PIECE // (m * r)), max(1, min(m, _PIECE // r))
    return [
        (slice(i, i + matrices), slice(j, j + rows))
        for i in range(0, b, matrices)
        for j in range(0, m, rows)
    ]


def _polar_by_newton_schulz(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky QR, then Newton–Schulz on the triangle R = QᵀY."""
    found = _cholesky_qr(Y)
    R = _multiply(found.Q, Y.to(found.Q.dtype), transpose=True)
    above = _norm_bound(R)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, eye, upper=True)
    factor, ok = _newton_schulz(R / above[:, None, None], 1 / (above * _norm_bound(inverse)))
    return _multiply(found.Q, factor).to(Y.dtype), found.finite, found.ok & ok


def _norm_bound(M: Tensor) -> Tensor:
    """An upper bound of ‖M‖₂, 1 of orthogonal diagonal ones: the less of ‖M‖_F, √(‖M‖₁‖M‖∞)."""
    M = M.abs()
    interpolated = (M.sum(-1).amax(-1) * M.sum(-2).amax(-1)).sqrt()
    return torch.minimum(interpolated, torch.linalg.matrix_norm(M))


def _newton_schulz(X: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """(the orthogonal polar factor, whether it converged) of X (b, r, r) with lower ≤ σ ≤ 1.

    x ← αx(3 − α²x²)/2 takes all singular values to 1; with the α that gives ``lower`` and 1 the
    same value, or _POLAR_ALPHA, a small one grows by up to 2.4 a step, not by 1.5.
    """
    on_cpu = looks_are_free(X)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    enough = torch.finfo(X.dtype).eps ** 0.25
    near = within_reach = lower >= _POLAR_REACH
    lower = lower.clamp_min(_POLAR_REACH)
    for step in range(_POLAR_STEPS):
        square = _gram(X)
        near = torch.linalg.matrix_norm(square - eye) <= enough
        if step + 1 == _POLAR_STEPS or (on_cpu and bool((near | ~within_reach).all())):
            break
        alpha = (3 / (1 + lower + lower.square())).sqrt().clamp_max(_POLAR_ALPHA)
        lower = alpha * lower * (3 - (alpha * lower).square()) / 2
        half = (alpha / 2)[:, None, None]
        X = _multiply(X, half * (3 * eye - alpha.square()[:, None, None] * square))
    for _ in range(2):  # each squares the defect, to rounding
        X = _multiply(X, 1.5 * eye - 0.5 * _gram(X))
    return X, near & within_reach


def _polar_safe(Y: Tensor) -> Tensor:
    """The polar factor of any finite (b, m, r), by Householder QR and an SVD in float64."""
    dtype = primitives.working_dtype(Y.dtype)
    Q, R = torch.linalg.qr(scale_columns(Y.double(), (-2, -1)))
    U, _, Vh = torch.linalg.svd(R)
    Z: Tensor = Q @ (U @ Vh)
    return Z.to(dtype)


# --- torch.library -------------------------------------------------------------------------


def _admit(op: str, Y: Tensor) -> None:
    require_tensor(op, "Y", Y)
    require_dense(op, "Y", Y)
    require_constant(op, "Y", Y)


def _check(op: str, Y: Tensor) -> None:
    if Y.dtype not in DTYPES:
        expected = "float32, bfloat16, float16 or float64"
        raise TypeError(describe(op, "Y", expected, Y.dtype, "convert it first"))
    if Y.dim() < 2:
        raise ValueError(describe(op, "Y", "(..., m, r)", tuple(Y.shape), "pass columns"))
    m, r = Y.shape[-2:]
    if m < r:
        expected = "(..., m, r) with m ≥ r"
        got = f"m={m}, r={r}"
        raise ValueError(describe(op, "Y", expected, got, "pass Y.mT if it holds rows"))


def _require_finite(op: str, Y: Tensor, finite: list[bool]) -> None:
    """Names the first matrix of (b, m, r) with NaN or Inf, and how many entries are."""
    if not all(finite):
        first = finite.index(False)
        count = int((~Y[first].isfinite()).sum())
        where = f" of matrix {first} of the batch" if len(finite) > 1 else ""
        got = f"{count} of {Y[first].numel()} entries{where} NaN or Inf"
        raise ValueError(describe(op, "Y", "finite", got))


def _judge(op: str, Y: Tensor, finite: Tensor, ok: Tensor) -> Tensor | None:
    """The matrices that take the safe path, None for none of them; refuses what isn't finite."""
    finite_here, ok_here = torch.stack([finite, ok]).tolist()  # the one synchronization
    _require_finite(op, Y, finite_here)
    rest = [i for i, good in enumerate(ok_here) if not good]
    return torch.tensor(rest, device=Y.device) if rest else None


@primitives.full_precision()
def _orthonormalize_impl(Y: Tensor) -> tuple[Tensor, Tensor]:
    op = "orthonormalize"
    _check(op, Y)
    if not Y.numel():
        Q, rank = _orthonormalize_fake(Y)
        return Q, rank.zero_()
    batch = Y.reshape(-1, *Y.shape[-2:])
    found = _cholesky_qr(batch)
    rest = _judge(op, batch, found.finite, found.full)
    Q = found.Q.to(primitives.working_dtype(Y.dtype))
    rank = torch.full((len(batch),), Y.shape[-1], device=Y.device)
    if rest is not None:
        Q[rest], rank[rest] = orthonormal_columns_safe(batch[rest])
    return _padding.padded_rows(Q.reshape(Y.shape)), rank.reshape(Y.shape[:-2])


def _orthonormalize_fake(Y: Tensor) -> tuple[Tensor, Tensor]:
    _check("orthonormalize", Y)
    Q = _padding.empty_like(Y, primitives.working_dtype(Y.dtype))
    return Q, Y.new_empty(Y.shape[:-2], dtype=torch.int64)


def _orthonormalize_vmap(info: Any, in_dims: Any, Y: Tensor) -> tuple[Any, Any]:
    return _orthonormalize(Y.movedim(in_dims[0], 0)), (0, 0)


@primitives.full_precision()
def _polar_impl(Y: Tensor) -> Tensor:
    op = "polar"
    _check(op, Y)
    if not Y.numel():
        return _polar_fake(Y)
    batch = Y.reshape(-1, *Y.shape[-2:])
    Q, finite, ok = _polar_good(batch)
    rest = _judge(op, batch, finite, ok)
    if rest is not None:
        Q[rest] = _polar_safe(batch[rest])
    return _padding.padded_rows(Q.reshape(Y.shape))


def _polar_fake(Y: Tensor) -> Tensor:
    _check("polar", Y)
    return _padding.empty_like(Y, primitives.working_dtype(Y.dtype))


def _polar_vmap(info: Any, in_dims: Any, Y: Tensor) -> tuple[Any, Any]:
    return _polar(Y.movedim(in_dims[0], 0)), 0


_orthonormalize = register(
    "orthonormalize(Tensor Y) -> (Tensor, Tensor)",
    _orthonormalize_impl,
    _orthonormalize_fake,
    _orthonormalize_vmap,
)
_polar = register("polar(Tensor Y) -> Tensor", _polar_impl, _polar_fake, _polar_vmap)
