"""Batches to factorize, drawn fresh, and what their factors are held to in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels.backends.cuda.factorizations import CholeskyJob, JacobiJob
from tests.emulator.draws import NAN, columns

EPS = torch.finfo(torch.float32).eps
TINY = 2.0**-149  # between two numbers next to zero
# LAPACK's own tests pass a ratio below this.
THRESHOLD = 30.0


def cholesky_job(G: Tensor) -> CholeskyJob:
    """Outputs full of NaN and of no info there is."""
    b, l, _ = G.shape
    return CholeskyJob(G, torch.full((b, l, l), NAN), torch.full((b,), -9, dtype=torch.int32))


def jacobi_job(M: Tensor) -> JacobiJob:
    """Outputs full of NaN and of no info there is."""
    b, p, l = M.shape
    outputs = [torch.full(shape, NAN) for shape in ((b, l, p), (b, l), (b, l, l))]
    return JacobiJob(M, *outputs, torch.full((b,), -9, dtype=torch.int32))


def with_spectrum(p: int, s: Tensor, generator: torch.Generator) -> Tensor:
    """(p, l) float64 with the singular values s."""
    l = len(s)
    left, right = (columns(n, l, torch.float64, generator) for n in (p, l))
    return (left * s) @ right.mT


def gram(b: int, l: int, condition: float, generator: torch.Generator) -> Tensor:
    """(b, l, l) float32 with eigenvalues from 1 down to 1 / condition."""
    s = condition ** -(torch.arange(l, dtype=torch.float64) / max(2 * l - 2, 1))
    roots = torch.stack([with_spectrum(l, s, generator) for _ in range(b)])
    return (roots.mT @ roots).float()


def assert_inverse_factors(G: Tensor, inverse: Tensor, info: Tensor) -> None:
    """inverse = R⁻¹ of G = RᵀR, all on the CPU.

    In the measure of LAPACK's test POT01, where an inverse may lose the condition of R; and no
    further from the truth than twice what torch makes of it in float32, beside what a rounding of
    G alone may do (torch may be exact by luck).
    """
    l = G.shape[-1]
    assert info.tolist() == [0] * len(G)
    assert torch.equal(inverse, inverse.triu())
    whole = G.double().triu()
    whole = whole + whole.triu(1).mT
    truth = torch.linalg.inv(torch.linalg.cholesky(whole, upper=True))
    eager = torch.linalg.solve_triangular(
        torch.linalg.cholesky(whole.float(), upper=True), torch.eye(l), upper=True
    )
    R = torch.linalg.inv(inverse.double())
    condition = torch.linalg.cond(truth)
    allowed = condition * l * EPS * torch.linalg.matrix_norm(whole)
    assert (torch.linalg.matrix_norm(R.mT @ R - whole) < THRESHOLD * allowed).all()
    error, eager_error = (torch.linalg.matrix_norm(x.double() - truth) for x in (inverse, eager))
    rounding = EPS * condition.square() * torch.linalg.matrix_norm(truth)
    assert (error <= 2 * eager_error + rounding).all()


def awkward_matrices(l: int, generator: torch.Generator) -> dict[str, Tensor]:
    """(l, l) float32 matrices on which decompositions have failed."""
    i = torch.arange(l, dtype=torch.float64)
    fraction = i / (l - 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def spectrum(s: Tensor) -> Tensor:
        return with_spectrum(l, s, generator)

    graded = 10 ** (-30 * fraction)
    orthogonal = spectrum(torch.ones(l, dtype=torch.float64))
    holes = randn(l, l)
    holes[:, ::3] = 0
    holes[1::4] = 0
    cases = {
        "random": randn(l, l),
        "triangular": torch.linalg.qr(randn(3 * l, l))[1],
        "power law": spectrum((i + 1) ** -0.5),
        "condition 1e6": spectrum(10 ** (-6 * fraction)),
        "condition 1e12": spectrum(10 ** (-12 * fraction)),
        "repeated": orthogonal,
        "two values": spectrum(torch.where(i < l // 2, 1.0, 1e-4)),
        "clustered": spectrum(torch.where(i < l // 2, 1 + 1e-6 * i, 1e-3 + 1e-9 * i)),
        "zero": torch.zeros(l, l),
        "identity": torch.eye(l),
        "permutation": torch.eye(l)[torch.randperm(l, generator=generator)],
        "rank one": randn(l, 1) @ randn(1, l),
        "rank three": randn(l, 3) @ randn(3, l),
        "half of the rank": spectrum(torch.where(i < l // 2, 1.0, 0.0)),
        "all ones": torch.ones(l, l),
        "columns twice": randn(l, -(-l // 2)).repeat(1, 2)[:, :l],
        "zero rows and columns": holes,
        "one element": torch.diag(torch.where(i == 1, -2.5, 0.0)).roll(1, 0),
        "Hilbert": 1 / (i[:, None] + i + 1),
        "Kahan": (0.96**i)[:, None] * (torch.eye(l) - 0.28 * torch.ones(l, l).triu(1)),
        "lower ones": torch.ones(l, l).tril(),
        "graded columns": orthogonal * graded,
        "graded columns, rising": orthogonal * graded.flip(0),
        "graded rows": graded[:, None] * orthogonal,
        "graded rows, rising": graded.flip(0)[:, None] * orthogonal,
        "graded columns of a random matrix": randn(l, l) * graded,
        "graded both ways": graded[:, None] ** 0.5 * randn(l, l) * graded**0.5,
        "graded diagonal": torch.diag(graded),
        "near overflow": randn(l, l) * 3e37 / l,
        "largest number": torch.full((l, l), torch.finfo(torch.float32).max / (2 * l)),
        "near underflow": randn(l, l) * 1e-38,
        "subnormal": randn(l, l) * 1e-42,
        "columns over the whole range": randn(l, l) * 10 ** (36 - 72 * fraction),
        "over the whole range": torch.diag(10 ** (38 - 74 * fraction)),
    }
    return {name: case.float() for name, case in cases.items()}


def known_values(l: int) -> dict[str, Tensor]:
    """Singular values, to a few roundings relative to themselves, of the awkward matrices that are
    a diagonal matrix times an orthogonal one. (LAPACK's are accurate relative to the largest.)"""
    fraction = torch.arange(l, dtype=torch.float64) / (l - 1)
    graded, ones = 10 ** (-30 * fraction), torch.ones(l, dtype=torch.float64)
    by_columns = dict.fromkeys(("graded columns", "graded columns, rising"), graded)
    by_rows = dict.fromkeys(("graded rows", "graded rows, rising", "graded diagonal"), graded)
    orthogonal = dict.fromkeys(("repeated", "identity", "permutation"), ones)
    return by_columns | by_rows | orthogonal | {"over the whole range": 10 ** (38 - 74 * fraction)}


def assert_svd(
    M: Tensor, U: Tensor, S: Tensor, V: Tensor, info: Tensor, names: list[str] | None = None
) -> None:
    """M = U diag(S) Vᵀ, all on the CPU, in the measures of LAPACK's test BDT01 and ORT01.

    Singular values are within 30 roundings of the largest, or no further from the truth than twice
    what torch makes of it in float32; and where they are known, within 30 roundings of themselves.
    """
    b, p, l = M.shape
    known = known_values(l) if names else {}
    assert (U.shape, S.shape, V.shape) == ((b, p, l), (b, l), (b, l, l))
    assert info.tolist() == [0] * b
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    true, eager = torch.linalg.svdvals(M.double()), torch.linalg.svdvals(M).double()
    M, U, S, V = M.double(), U.double(), S.double(), V.double()
    norm = torch.linalg.matrix_norm(M)
    residual = torch.linalg.matrix_norm((U * S[:, None]) @ V.mT - M)
    loss_u, loss_v = (
        torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(l, dtype=torch.float64)) for Q in (U, V)
    )
    error, eager_error = ((s - true).abs().amax(-1) for s in (S, eager))
    for k in range(b):
        name = names[k] if names else f"matrix {k}"
        # A subnormal singular value is rounded to a multiple of TINY.
        assert residual[k] < THRESHOLD * max(p, l) * EPS * norm[k] + l * TINY, name
        assert loss_u[k] < THRESHOLD * p * EPS, name
        assert loss_v[k] < THRESHOLD * l * EPS, name
        allowed = max(2 * eager_error[k], THRESHOLD * EPS * true[k, 0])
        assert error[k] <= allowed + TINY, name
        if name in known:
            assert ((S[k] - known[name]).abs() <= THRESHOLD * EPS * known[name]).all(), name
