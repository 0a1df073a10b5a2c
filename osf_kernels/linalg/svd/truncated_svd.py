"""truncated_svd: the leading singular triplets of a matrix, a batch or a list."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from osf_kernels.linalg.svd.arguments import Options, WarmStart
from osf_kernels.linalg.svd.driver import decompose
from osf_kernels.linalg.svd.methods import Method
from osf_kernels.linalg.svd.result import TruncatedSVD


@overload
def truncated_svd(
    A: Tensor,
    rank: float,
    *,
    tol: float | None = None,
    method: Method = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: WarmStart = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> TruncatedSVD: ...


@overload
def truncated_svd(
    A: Sequence[Tensor],
    rank: float | Sequence[float],
    *,
    tol: float | None = None,
    method: Method = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: WarmStart | Sequence[WarmStart] = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> list[TruncatedSVD]: ...


@torch.no_grad()
def truncated_svd(
    A: Tensor | Sequence[Tensor],
    rank: float | Sequence[float],
    *,
    tol: float | None = None,
    method: Method = "auto",
    niter: int | None = None,
    oversample: int | None = None,
    warm_start: WarmStart | Sequence[WarmStart] = None,
    complement: bool = False,
    generator: torch.Generator | None = None,
    max_workspace_bytes: int | None = None,
) -> TruncatedSVD | list[TruncatedSVD]:
    """A ≈ U diag(S) Vᵀ: the leading singular triplets of a matrix, a batch or a list.

    Matrices of one shape, dtype and device are decomposed together, with one sketch for all of
    them. A list gives the results of a loop over it with equally seeded generators, to rounding.

    Args:
        A: (m, n), (..., m, n), or a list of matrices of any mix of shapes, dtypes and devices;
            float32, bfloat16, float16, float64. Never written.
        rank: one for all, or in a list one of each: an int up to min(m, n), or a float in (0, 1],
            the fraction ρ of min(m, n).
        tol: upper bound of the residual ‖[A V − U Σ; AᵀU − V Σ]‖₂ / σ₁ of the wanted triplets, and
            so of each triplet's own. It is measured; iterative methods go on until it is met and
            nothing larger than σ_r is found beside the triplets, or ``niter`` is spent. A matrix
            that misses it is named in a ConvergenceWarning and has converged=False. None: a fixed
            number of iterations, and no warning: ``converged`` says whether they were enough for a
            result as right as torch.linalg.svd's.
        method: "randomized": block Krylov, where its space fits the workspace, else subspace
            iteration. "gram": eigenvectors of the smaller Gram matrix, in float64 where float32
            is not enough for the spectrum or for ``tol`` (LAPACK's SVD of a float64 A). "warm":
            ``warm_start`` as the sketch; one round, and a Krylov space from there while ``tol``
            isn't met, or "gram" where that would be the whole space. "deflated": the triplets of
            ``warm_start`` and those of its low block, in one order. "exact": torch.linalg.svd.
            "auto": by rank, size, device, how many matrices a batch in one tensor has, and the
            factors of ``warm_start``; an earlier result that no longer fits (residual above 1e-3,
            or tol), that lacks a leading direction, or whose dtype is narrower than the result's,
            is dropped for a cold start. ``TruncatedSVD.method`` is the one that ran.
        niter: steps, a product with A and one with Aᵀ each, that an iterative method may take;
            default 12, or with ``tol`` as many as a space of min(m, n) needs. 1 and 2 take a
            shorter way, for those who come from torch.svd_lowrank(A, q, niter=2) and have no more
            time.
        oversample: columns beyond the rank: of the whole Krylov space, default max(48, 2·rank); of
            the block in subspace iteration, default max(8, rank/8), and in a warm start, default 0.
        warm_start: a TruncatedSVD of an earlier A, or columns V (n, k) of any k; in a list one of
            each or None. More columns than wanted are dropped, fewer are filled up at random.
            For "deflated" it is orthonormal to rounding, in the dtype of the result or a wider one.
        complement: also return U_low and V_low, orthonormal to rounding and orthogonal to U and V.
        generator: on A's device; None is the default generator. One number is drawn from it where
            a method draws a sketch, none otherwise.
        max_workspace_bytes: the most that is allocated at a time beside the results, LAPACK's own
            work not counted. The default is 256 MiB on a CPU, or 26 times the bytes of a matrix
            where that is more, and half of the free memory on a GPU. Groups that don't fit are
            taken in parts, with one warning; a single matrix that doesn't fit is refused.

    Returns:
        A :class:`TruncatedSVD`, batched as A is, or a list of them. U, S, V are float32 (float64
        of float64); columns are orthonormal to LAPACK's ratio ‖I − QᵀQ‖₁ / (m·eps) < 30.

        Where ``converged`` is True without a ``tol`` the residual is within ten times that of
        torch.linalg.svd in the same dtype, and so is the loss of leading directions, but for 1e-4
        of one: always with "gram" and "exact", with the others where the spectrum allows it.
        Where it is False the triplets are approximate, as ``residual`` says: Krylov spaces without
        a ``tol`` are for directions that hold the energy (1 − overlap of 1e-3 or less at σᵢ = i^-½)
        and may leave residuals of 1e-2. Pass a ``tol``, or method="gram", where more is needed.
        "randomized" and "warm" look with 32 columns for larger singular values beside those they
        found: one that stands apart from σ_r by a few percent is found, one among close values
        that a warm start left out may not be.

    Raises:
        Refusal: a TypeError or a ValueError, before any solver runs but for a few of a warm start.
        TypeError: A holds no tensors, or tensors of another dtype than those above.
        ValueError: rank beyond min(m, n), NaN or Inf in A (before any solver runs, with the count
            in each matrix) or in a warm start, a generator on another device, a warm start whose
            factors don't fit A or each other, or aren't exact enough for "deflated"; a singular
            value that overflows the result's dtype.

    Synchronizes, a few times a group. Doesn't take part in autograd, and runs as it is where
    torch.compile meets it. Nothing is returned, and nothing written, unless every matrix was
    decomposed.

    Source: Musco & Musco 2015 (block Krylov), Halko, Martinsson & Tropp 2011; see
    :class:`osf_kernels.linalg.svd.methods.krylov.KrylovSpace`.
    """
    options = Options(method, tol, niter, oversample, complement, generator, max_workspace_bytes)
    # Factorizations don't compile; a disabled function runs as it is within a compiled one. Where
    # Dynamo wasn't imported nothing is compiled, and importing it takes a second.
    run = torch.compiler.disable(decompose) if "torch._dynamo" in sys.modules else decompose
    result, found = run(A, rank, warm_start, options)
    for warning in found:
        warnings.warn(warning, stacklevel=3)  # past no_grad
    return result
