"""What tests of decompositions share: spectra, matrices with their truth, and what must hold."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels import TruncatedSVD
from osf_kernels.testing import matrix_with_spectrum, orthonormality_ratio
from tests.helpers import generator_for

SPECTRA = {
    "power law": lambda q: torch.arange(1, q + 1).double() ** -0.5,
    "flat": lambda q: torch.linspace(1.2, 0.8, q, dtype=torch.float64),
    "steep": lambda q: 0.7 ** torch.arange(q).double(),
    "gap": lambda q: torch.where(torch.arange(q) < q // 4, 1.0, 1e-3).double(),
}
COLD = ("randomized", "gram", "exact")


def draw(
    m: int, n: int, spectrum: str = "power law", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(A, U, S, V) with float64 truth of the rounded A."""
    generator = generator_for(f"{m} {n} {spectrum} {dtype} {seed}")
    A, _, _ = matrix_with_spectrum(
        m, n, SPECTRA[spectrum](min(m, n)), dtype=dtype, generator=generator
    )
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return A, U, S, Vh.mT


def overlap(truth: Tensor, found: Tensor) -> float:
    r = found.shape[-1]
    return float((truth[:, :r].mT @ found.double()).norm() ** 2 / r)


def measured_residual(A: Tensor, result: TruncatedSVD) -> float:
    """The definition of ``residual``, in float64."""
    if result.rank == 0:
        return 0.0
    A, U, S, V = A.double(), result.U.double(), result.S.double(), result.V.double()
    R = torch.cat([A @ V - U * S, A.mT @ U - V * S])
    return float(torch.linalg.matrix_norm(R, ord=2) / S[0].clamp_min(1e-300))


def assert_sound(A: Tensor, result: TruncatedSVD) -> None:
    """What every result holds, whatever A: shapes, order, orthonormality, honest figures."""
    m, n, r = *A.shape, result.rank
    assert result.U.shape == (m, r)
    assert result.V.shape == (n, r)
    assert result.S.shape == (r,)
    work = torch.float64 if A.dtype == torch.float64 else torch.float32
    assert {result.U.dtype, result.S.dtype, result.V.dtype} == {work}
    assert bool((result.S[:-1] >= result.S[1:]).all())
    assert bool((result.S >= 0).all())
    for basis in (result.U, result.V):
        assert orthonormality_ratio(basis) < 30
    for high, low in ((result.U, result.U_low), (result.V, result.V_low)):
        if low is not None:
            whole = torch.cat([high, low], -1)
            assert whole.shape[0] == whole.shape[1]
            assert orthonormality_ratio(whole) < 30
    truth = measured_residual(A, result)
    rounding = 30 * torch.finfo(work).eps * max(m, n) ** 0.5
    if r and float(result.S[0]):  # subnormal singular values are rounded to one quantum
        rounding += torch.finfo(work).smallest_normal * torch.finfo(work).eps / float(result.S[0])
    assert truth <= 1.25 * float(result.residual) + rounding
    assert float(result.residual) <= truth + rounding
