"""The primitives of ``osf_kernels.linalg``, and which backend computes each.

Four primitives over batches of matrices of one shape, each float32 in and out (float64 stays):
products with a sketch, Gram matrices, Cholesky with the triangular inverse, a small SVD. torch
serves all of them on any device; on a GPU Triton computes products and the compiled extension
factorizes the matrices that its shared memory holds.

``use_backend`` names who computes the products, or raises. Factorizations exist in torch and
cuda alone: "triton" leaves them to torch, "cuda" computes them where a block's shared memory holds
the matrix, as ``largest_cholesky`` and ``largest_jacobi`` say.

May import: torch, ``osf_kernels.backends`` and below.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from osf_kernels import _padding, cpu
from osf_kernels.backends import choosing
from osf_kernels.backends.precision import full_precision as full_precision


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that factors are computed and returned in: float32 for all but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def products_backend(x: Tensor) -> str:
    """Who multiplies: "torch" or "triton", and "cuda" where it is asked for.

    Raises:
        BackendUnavailableError: an explicit choice can't serve this device.
        TypeError: an explicit triton or cuda was asked to take float64.
    """
    return _chosen("products", x)


def multiply(
    As: Sequence[Tensor], Q: Tensor, *, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """Y_i = A_i Q_i, or A_iᵀ Q_i, to float32 accuracy whatever the dtype of A.

    Args:
        As: b matrices (m, n) of one shape, dtype and device, any strides.
        Q: (b, n, l), or (1, n, l) for one sketch that serves all; (·, m, l) to transpose.
        transpose: multiply by A_iᵀ.
        out: where to; best in the order that :func:`empty_product` gives.

    Returns:
        (b, m, l), or (b, n, l), of the working dtype, in either order of strides.
    """
    name = products_backend(As[0])
    if name != "torch":
        rows = As[0].shape[1] if transpose else As[0].shape[0]
        # A copy of a narrow Q costs less than products that read it element by element.
        Q = _padding.padded(Q)
        Y = _padding.empty(rows, Q.shape[-1], Q, batch=(len(As),))
        choosing.module(name).multiply(As, Q, Y, transpose=transpose)
        return Y if out is None else out.copy_(Y)
    if out is None:
        out = empty_product(As, Q, transpose=transpose)
    _chained(As, [Q, out], transpose=transpose)
    return out


def multiply_twice(
    As: Sequence[Tensor], Q: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Y_i = A_i Q_i and A_iᵀ Y_i, as two calls of :func:`multiply` give them.

    On a CPU one matrix after another: the second product finds in a cache what fits there, and both
    take .7 of the time (24 matrices of 384², 16 columns).
    """
    if products_backend(As[0]) != "torch":
        Y = multiply(As, Q, out=out)
        return Y, multiply(As, Y, transpose=True)
    Y = empty_product(As, Q) if out is None else out
    Z = empty_product(As, Y, transpose=True)
    _chained(As, [Q, Y, Z], transpose=False)
    return Y, Z


def power_products(
    As: Sequence[Tensor], Q: Tensor, scales: Sequence[float], *, steps: int
) -> tuple[Tensor, Tensor]:
    """Z = [Z_1 … Z_{steps+1}] and G = [G_1 … G_steps]: Z_1 = s A AᵀQ, G_k = AᵀZ_k, Z_{k+1} = A G_k.

    On a CPU one matrix after another: all products but the first find in a cache what fits there.

    Args:
        As: b matrices (m, n) of one shape, dtype and device, any strides.
        Q: (b, m, l), or (1, m, l) for one sketch that serves all.
        scales: s, of each.

    Returns:
        Z (b, m, (steps + 1)·l) and G (b, n, steps·l) of the working dtype, in any order of strides.
    """
    width = Q.shape[-1]
    factors = torch.tensor(scales, dtype=Q.dtype, device="cpu").to(Q.device, non_blocking=True)
    Z = empty_product(As, Q, width=(steps + 1) * width)
    G = empty_product(As, Q, width=steps * width, transpose=True)
    Zs, Gs = Z.split(width, -1), G.split(width, -1)
    chain = [factors[:, None, None] * Q, empty_product(As, Q, transpose=True), Zs[0]]
    for k in range(steps):
        chain += [Gs[k], Zs[k + 1]]
    if products_backend(As[0]) == "torch":
        _chained(As, chain, transpose=True)
    else:
        for k, (x, y) in enumerate(itertools.pairwise(chain)):
            multiply(As, x, transpose=k % 2 == 0, out=y)
    return Z, G


def _chained(As: Sequence[Tensor], chain: Sequence[Tensor], *, transpose: bool) -> None:
    """Writes to each tensor of a chain A_i or A_iᵀ, by turns, times the one before it.

    By torch, one matrix after another; with ``transpose`` Aᵀ has the first turn.
    """
    # Views are made for all matrices at once: one by one they take as long as small products.
    columns = _in_columns(As[0])
    links: list[tuple[bool, Sequence[Tensor], Sequence[Tensor]]] = []
    for x, y in itertools.pairwise(chain):
        # Both factors and the product lie in columns, or all in rows: (Qᵀ Aᵀ)ᵀ takes 0.4 to 0.8 of
        # the time of A Q for the narrow Q of a sketch on a CPU.
        turned = columns != transpose
        if turned:
            x, y = x.mT, y.mT
        elif not links:
            x = _turned(x)
        links.append((turned, _each(x, As), y.unbind()))
        transpose = not transpose
    for i, R in enumerate(_rows(As, chain[0])):
        for turned, xs, ys in links:
            left, right = (xs[i], R) if turned else (R, xs[i])
            torch.mm(left, right, out=ys[i])


def empty_product(
    As: Sequence[Tensor], Q: Tensor, *, width: int | None = None, transpose: bool = False
) -> Tensor:
    """Memory for A_i Q_i, or for ``width`` columns, in the order of strides that suits torch."""
    rows = As[0].shape[1] if transpose else As[0].shape[0]
    width = Q.shape[-1] if width is None else width
    if _in_columns(As[0]) != transpose:
        return Q.new_empty(len(As), width, rows).mT
    return Q.new_empty(len(As), rows, width)


def _in_columns(A: Tensor) -> bool:
    return A.stride(0) == 1


def _rows(As: Sequence[Tensor], Q: Tensor) -> Iterator[Tensor]:
    """The matrices in the dtype of Q, or their transposes if the first lies in columns."""
    columns, same = _in_columns(As[0]), As[0].dtype == Q.dtype
    for A in As:
        R = A.mT if columns else A
        yield R if same else R.to(Q.dtype)


def _each(Q: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    return Q.unbind() if len(Q) > 1 else [Q[0]] * len(As)


def _turned(Q: Tensor) -> Tensor:
    wanted = Q.shape[-1] in cpu.WANTED_IN_COLUMNS and Q.stride(-1) == 1
    return Q.mT.contiguous().mT if wanted else Q


def gram(As: Sequence[Tensor]) -> Tensor:
    """A_iᵀA_i, exactly symmetric, by one triangle of it.

    Args:
        As: b matrices (m, n) of one shape, dtype and device, any strides.

    Returns:
        (b, n, n) of the working dtype.
    """
    first, n = As[0], As[0].shape[1]
    out = first.new_empty(len(As), n, n, dtype=working_dtype(first.dtype))
    name = products_backend(first)
    if name != "torch":
        choosing.module(name).gram(As, out)
        return out
    for A, G in zip(As, out, strict=True):
        _gram(A.to(out.dtype), G)
    return out


def _gram(X: Tensor, out: Tensor) -> None:
    """out = XᵀX by the blocks of its upper triangle."""
    n = X.shape[1]
    blocks = cpu.GRAM_BLOCKS if n >= cpu.GRAM_BLOCKED_FROM else 1
    bounds = [n * i // blocks for i in range(blocks + 1)]
    for a, b in itertools.pairwise(bounds):
        torch.matmul(X[:, a:b].mT, X[:, a:], out=out[a:b, a:])
        out[b:, a:b] = out[a:b, b:].mT
        block = out[a:b, a:b]
        block.copy_((block + block.mT) / 2)  # a sum that is the same in either order


def cholesky_inverse(G: Tensor) -> tuple[Tensor, Tensor]:
    """(R⁻¹, info) of G = RᵀR with R upper triangular, of a batch.

    Args:
        G: (b, l, l) symmetric positive definite.

    Returns:
        R⁻¹ (b, l, l) upper triangular, all NaN where the factorization failed; info (b,) int32,
        0 or the index from 1 of the first pivot that isn't positive. Never synchronizes on
        cuda's kernels; torch's own factorization doesn't either.
    """
    if cholesky_backend(G) == "cuda":
        pair: tuple[Tensor, Tensor] = choosing.module("cuda").cholesky_inverse(G)
        return pair
    # LAPACK takes lower triangles without a copy, in .6 of the time of upper ones.
    L, info = torch.linalg.cholesky_ex(G)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False).mT
    if G.device.type == "cpu" and not info.any():
        return inverse, info
    failed = (info != 0)[:, None, None]
    return inverse.masked_fill(failed, float("nan")), info


def small_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of M = U diag(S) Vᵀ, S descending, of a batch of small matrices.

    Args:
        M: (b, p, l) with p ≥ l.

    Returns:
        U (b, p, l), S (b, l), V (b, l, l). S is NaN where cuda's kernel did not converge. Never
        synchronizes there; torch's own SVD does.
    """
    if small_svd_backend(M) == "cuda":
        U, S, V, info = choosing.module("cuda").jacobi_svd(M)
        failed = (info != 0)[:, None]
        return U, S.masked_fill(failed, float("nan")), V
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U, S, Vh.mT


def small_svd_backend(M: Tensor) -> str:
    """Who computes :func:`small_svd`: "cuda" or "torch"."""
    if not _may_factorize(M):
        return "torch"
    cuda = choosing.module("cuda")
    held: int = cuda.largest_jacobi(M.device, square=False, rows=max(1, M.shape[-2]))
    return "cuda" if M.shape[-1] <= held else "torch"


def cholesky_backend(G: Tensor) -> str:
    """Who computes :func:`cholesky_inverse`: "cuda" or "torch"."""
    if not _may_factorize(G):
        return "torch"
    held: int = choosing.module("cuda").largest_cholesky(G.device)
    return "cuda" if G.shape[-1] <= held else "torch"


def _may_factorize(x: Tensor) -> bool:
    """Whether the extension may factorize x: on its device, in its dtype, not ruled out."""
    return _chosen("factorization", x) == "cuda"


def _chosen(work: choosing.Work, x: Tensor) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    return choosing.choose(work, choosing.requested(), x.device, dtype)[0]
