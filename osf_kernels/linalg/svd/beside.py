"""Whether triplets are the leading ones: a look for larger singular values beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels.linalg import primitives
from osf_kernels.linalg.orthonormal.block_gram_schmidt import orthonormal_against
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.residual import largest_eigenvalue, limit

# Columns and blocks of the space that is searched. Of 512 columns it finds one value of 1 beside
# forty of .9 and forty of .8, and in one further round all that two such clusters have.
PROBE_BLOCK = 8
PROBE_STEPS = 4
# Rounding of the norm that is found and of the values it is compared with, in eps of σ₁.
PROBE_ROUNDING = 32.0


def beyond(As: Sequence[Tensor], V: Tensor, *, safe: bool) -> tuple[Tensor, Tensor]:
    """(Q, A Q): a small block Krylov space of A(I − VVᵀ), orthonormal and orthogonal to V.

    A Krylov space from any start holds as many vectors of equal singular values as its block has
    columns, and at first no more of a close cluster: smaller singular values converge before the
    rest of the cluster is met. A is large on that rest, which is orthogonal to the space, and
    columns drawn from there meet it.

    Args:
        V: (b, n, w) orthonormal columns, w < n.
    """
    (m, n), w = As[0].shape, V.shape[-1]
    stop = min(n, w + PROBE_STEPS * PROBE_BLOCK)
    # The same columns for every space of one width: the caller's generator is for sketches.
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
    """(b,) whether ‖Z‖₂ exceeds the last singular value by more than its error and rounding.

    Z is A Q of columns Q beside the triplets. Where it is larger, the triplets aren't the leading
    ones: the span of Q and V has larger ones.
    """
    S = factors.S
    Z = Z.double()
    norm = largest_eigenvalue(Z.mT @ Z).sqrt()
    error = factors.residual.double() + PROBE_ROUNDING * torch.finfo(S.dtype).eps
    return norm > S[:, -1].double() + error * S[:, 0].double()


def led(As: Sequence[Tensor], factors: Factors, tol: float | None, *, safe: bool) -> Factors:
    """The factors, with ``leading`` of those whose residual is small enough for it to tell."""
    r, small = factors.S.shape[-1], min(As[0].shape)
    right = limit(tol, factors.S.dtype, small)
    met = torch.nonzero(factors.ok & (factors.residual <= right)).flatten()
    if not len(met) or r == small:  # synchronizes
        return factors
    _, Z = beyond([As[i] for i in met.tolist()], factors.V[met], safe=safe)
    leading = torch.ones_like(factors.ok)
    leading[met] = ~larger(Z, factors._replace(S=factors.S[met], residual=factors.residual[met]))
    return factors._replace(leading=leading)
