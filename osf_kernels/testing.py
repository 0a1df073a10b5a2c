"""What a test needs to hold the operators, or a wrapper of them, to account.

The oracles here are transcriptions of the formulas in float64 with explicit projector matrices;
they share no code with any backend. Tolerances come from the same formula in same-dtype eager
torch (:func:`assert_error_within`), never from a bare number. Public: wrappers may use it.

May import: torch, ``osf_kernels.basis``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from osf_kernels.basis import Basis, Spans

BasisLike = Tensor | Basis | None


# --- inputs --------------------------------------------------------------------------------


def random_basis(
    size: int,
    rank: int,
    *,
    spans: Spans = "high",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Basis:
    """A Basis that protects ``rank`` random directions of ``size``, held high or low.

    Columns are orthonormal to float64 rounding before they are rounded to ``dtype``. Draws
    size² normal numbers from ``generator``.
    """
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    Q = torch.linalg.qr(noise)[0]
    held = Q[:, :rank] if spans == "high" else Q[:, rank:]
    return Basis(held.to(dtype).contiguous().to(device), spans)


def matrix_with_spectrum(
    m: int,
    n: int,
    singular_values: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, U, V): A = U diag(σ) Vᵀ of given singular values, computed in float64, then rounded.

    Args:
        singular_values: (q,) with q ≤ min(m, n), descending.

    Returns:
        A (m, n) of ``dtype``; U (m, q) and V (n, q) of float64, orthonormal.
    """
    q = len(singular_values)
    U = torch.linalg.qr(torch.randn(m, q, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, q, dtype=torch.float64, generator=generator))[0]
    A = (U * singular_values.double()) @ V.mT
    return A.to(dtype), U, V


def hard_matrices(
    m: int,
    n: int,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, A) of (m, n) matrices that factorizations fail on, made in float64 and rounded.

    Zero, identity, rank one, rank deficient (rank ⌈q/2⌉ of q = min(m, n)), with a zero and a
    repeated column, repeated and clustered singular values, singular values falling to eps,
    Hilbert's, Kahan's, columns graded to 1e-30, and random ones scaled near overflow, to
    underflow and to subnormal numbers. The names are unique. A column or row that a small matrix
    has not is left as it is.
    """
    q = min(m, n)
    info = torch.finfo(dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def spectrum(singular_values: Tensor) -> Tensor:
        return matrix_with_spectrum(
            m, n, singular_values, dtype=torch.float64, generator=generator
        )[0]

    i = torch.arange(m, dtype=torch.float64)[:, None]
    j = torch.arange(n, dtype=torch.float64)
    falling = torch.arange(q, dtype=torch.float64) / max(q - 1, 1)
    noise = randn(m, n)
    unit = noise / noise.abs().amax() if noise.numel() else noise
    repeated = noise.clone()
    repeated[:, n // 2 :] = noise[:, : n - n // 2]
    gap = noise.clone()
    gap[:, n // 2 : n // 2 + 1] = 0
    # Kahan: diag(sⁱ)(I − c N), N the ones above the diagonal, s² + c² = 1; R of a full rank whose
    # smallest singular value its diagonal doesn't show.
    kahan = 0.96**i * torch.where(i == j, 1.0, torch.where(i < j, -0.28, 0.0))
    matrices = {
        "zero": torch.zeros(m, n, dtype=torch.float64),
        "identity": torch.eye(m, n, dtype=torch.float64),
        "rank one": randn(m, 1) @ randn(1, n),
        "rank deficient": randn(m, (q + 1) // 2) @ randn((q + 1) // 2, n),
        "zero column": gap,
        "repeated columns": repeated,
        "repeated singular values": spectrum(torch.where(falling < 0.5, 2.0, 1.0).double()),
        "clustered singular values": spectrum(1 + falling.flip(0) * 4 * info.eps),
        "steep singular values": spectrum(info.eps**falling),
        "Hilbert": 1 / (i + j + 1),
        "Kahan": kahan,
        "graded columns": unit * 1e-30 ** (j / max(n - 1, 1)),
        "graded rows": unit * 1e-30 ** (i / max(m - 1, 1)),
        "near overflow": unit * (info.max / 2 / max(1, m * n) ** 0.5),  # σ₁ doesn't overflow
        "near underflow": unit * (info.tiny * 4),
        "subnormal": unit * (info.smallest_normal * info.eps * 64),
    }
    for name, A in matrices.items():
        yield name, A.to(dtype)


# --- oracles -------------------------------------------------------------------------------


def protected_projector(basis: BasisLike, size: int) -> Tensor | None:
    """H (size, size) float64: U Uᵀ of high columns, I − U Uᵀ of low ones, None of none."""
    if basis is None:
        return None
    held = basis if isinstance(basis, Basis) else Basis(basis)
    columns = held.columns.double()
    eye = torch.eye(size, dtype=torch.float64, device=columns.device)
    # Square orthonormal columns span everything, whatever their own rounding says.
    square = columns @ columns.mT if columns.shape[-1] < size else eye
    return square if held.spans == "high" else eye - square


def project_reference(g: Tensor, U: BasisLike, V: BasisLike, *, mode: str = "complement") -> Tensor:
    """g − H g − g H' + H g H', or in mode "core" g − H g H', in float64 with H and H' explicit."""
    g = g.double()
    H, K = protected_projector(U, g.shape[-2]), protected_projector(V, g.shape[-1])
    if H is None and K is None:
        return g.clone()
    if mode == "core":
        protected = g if H is None else H @ g
        return g - (protected if K is None else protected @ K)
    left = 0 if H is None else H @ g
    right = 0 if K is None else g @ K
    both = 0 if H is None or K is None else H @ g @ K
    return g - left - right + both


def restore_reference(
    W: Tensor,
    U: BasisLike,
    V: BasisLike,
    *,
    S: Tensor | None = None,
    protected: Tensor | None = None,
    mode: str = "complement",
) -> Tensor:
    """P(W) + protected, with protected = U diag(S) Vᵀ of singular triplets, in float64."""
    if protected is None:
        assert S is not None
        assert isinstance(U, Tensor)
        assert isinstance(V, Tensor)
        protected = (U.double() * S.double().unsqueeze(-2)) @ V.double().mT
    return project_reference(W, U, V, mode=mode) + protected.double()


def project_eager(g: Tensor, U: BasisLike, V: BasisLike, *, mode: str = "complement") -> Tensor:
    """The same formula as a user writes it in eager torch, in g's own dtype: the peer whose
    error ours is compared with."""

    def removed(x: Tensor, basis: BasisLike, left: bool) -> Tensor:
        """H x or x H."""
        assert basis is not None
        held = basis if isinstance(basis, Basis) else Basis(basis)
        columns = held.columns.to(x.dtype)
        part = columns @ (columns.mT @ x) if left else (x @ columns) @ columns.mT
        return part if held.spans == "high" else x - part

    if U is None and V is None:
        return g.clone()
    if mode == "core":
        protected = g if U is None else removed(g, U, True)
        return g - (protected if V is None else removed(protected, V, False))
    out = g if U is None else g - removed(g, U, True)
    return out if V is None else out - removed(out, V, False)


# --- measures ------------------------------------------------------------------------------


def relative_error(actual: Tensor, reference: Tensor, scale: Tensor) -> float:
    """‖actual − reference‖_F / ‖scale‖_F in float64; NaN anywhere is an infinite error."""
    difference = (actual.double() - reference.double()).norm()
    error = float(difference / scale.double().norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def leak(after: Tensor, before: Tensor, basis: Tensor | Basis, *, side: str = "left") -> float:
    """‖H after‖ / ‖H before‖ in float64: how much of the protected part of a gradient is left.

    For a high basis it is ‖Uᵀ g'‖ / ‖Uᵀ g‖. The true projector of the rounded columns is taken,
    from their QR, so that a bfloat16 basis isn't charged for its own rounding.
    """
    held = basis if isinstance(basis, Basis) else Basis(basis)
    Q = torch.linalg.qr(held.columns.double())[0]

    def protected(x: Tensor) -> Tensor:
        x = x.double() if side == "left" else x.double().mT
        inside: Tensor = Q.mT @ x
        return inside if held.spans == "high" else x - Q @ inside

    return float(protected(after).norm() / protected(before).norm().clamp_min(1e-300))


def orthonormality_ratio(Q: Tensor) -> float:
    """LAPACK's test ratio ‖I − QᵀQ‖₁ / (m·eps) of (m, r) columns; under 30 is orthonormal.

    Source: LAPACK Users' Guide and LAWN 41, test paths of xQRT and xBDT.
    """
    m, r = Q.shape[-2:]
    columns = Q.double()
    defect = torch.eye(r, dtype=torch.float64, device=Q.device) - columns.mT @ columns
    norm = torch.linalg.matrix_norm(defect, ord=1).max() if defect.numel() else 0.0
    return float(norm / (max(m, 1) * torch.finfo(Q.dtype).eps))


def svd_ratio(A: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    """LAPACK's test ratio ‖A − U diag(S) Vᵀ‖₁ / (‖A‖₁·max(m, n)·eps); under 30 is a factorization.

    Args:
        A: (..., m, n).
        U, S, V: (..., m, q), (..., q), (..., n, q), q = min(m, n); eps is that of their dtype.

    Returns:
        The largest of a batch; infinite where a factor is NaN, 0 where A is empty. A zero A is
        held to absolute zero.

    Source: LAPACK Users' Guide and LAWN 41, test 1 of xBDT and xDRVBD.
    """
    if A.numel() == 0:
        return 0.0
    # Scaled by a power of two first: sums of columns near overflow don't overflow in float64.
    exponent = torch.frexp(A.double().abs().amax((-2, -1))).exponent[..., None]
    A, S = torch.ldexp(A.double(), -exponent[..., None]), torch.ldexp(S.double(), -exponent)
    error = torch.linalg.matrix_norm(A - (U.double() * S.unsqueeze(-2)) @ V.double().mT, ord=1)
    norm = torch.linalg.matrix_norm(A, ord=1)
    unit = norm * max(A.shape[-2:]) * torch.finfo(U.dtype).eps
    ratio = float(torch.where(norm > 0, error / unit, torch.where(error > 0, torch.inf, 0.0)).max())
    return ratio if ratio == ratio else float("inf")


def overlap(U: Tensor, reference: Tensor) -> float:
    """‖U*ᵀU‖²_F / r in float64: the share of a subspace that another holds, 1 where they agree.

    Args:
        U, reference: (..., m, r) orthonormal columns, of one r.

    Returns:
        The smallest of a batch; 1 where r = 0, and 0 where either is NaN.
    """
    r = reference.shape[-1]
    if r == 0 or U.numel() == 0:
        return 1.0
    inside = (reference.double().mT @ U.double()).square().sum((-2, -1)) / r
    smallest = float(inside.min())
    return smallest if smallest == smallest else 0.0


def assert_error_within(
    actual: Tensor,
    reference: Tensor,
    peer: Tensor,
    *,
    scale: Tensor,
    factor: float = 2.0,
) -> None:
    """Fails unless ‖actual − reference‖ ≤ factor·max(‖peer − reference‖, rounding·‖scale‖),
    with rounding = eps/2, or 2 eps for float64.

    Args:
        actual: what is tested.
        reference: the float64 truth.
        peer: the same formula in same-dtype eager torch.
        scale: what errors are relative to, usually the input g.
        factor: how many of the peer's errors are allowed.

    Raises:
        AssertionError: with both errors. A NaN in actual fails.
    """
    ours = relative_error(actual, reference, scale)
    theirs = relative_error(peer, reference, scale)
    # A float64 truth is itself rounded, a few eps of what a float64 result is compared with.
    rounding = torch.finfo(actual.dtype).eps * (2.0 if actual.dtype == torch.float64 else 0.5)
    allowed = factor * max(theirs, rounding)
    if not ours <= allowed:
        raise AssertionError(
            f"error {ours:.3e} relative to the input exceeds {factor:g} × max(eager "
            f"{actual.dtype} torch {theirs:.3e}, its rounding {rounding:.3e})"
        )
