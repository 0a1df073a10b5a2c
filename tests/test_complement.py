"""complement: what completes a basis is orthonormal, and orthogonal to it, for every basis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osf_kernels.linalg.orthonormal.complement import complement, reflector
from osf_kernels.testing import orthonormality_ratio
from tests.helpers import generator_for


def random_columns(m: int, r: int, *key: object) -> Tensor:
    noise = torch.randn(m, m, dtype=torch.float64, generator=generator_for(m, r, *key))
    return torch.linalg.qr(noise)[0][:, :r]


def hard_columns(m: int, r: int) -> Iterator[tuple[str, Tensor]]:
    """Orthonormal columns whose top block is singular, the identity, its negative, defective."""
    eye = torch.eye(m, dtype=torch.float64)
    yield "identity", eye[:, :r]
    yield "minus identity", -eye[:, :r]
    yield "last unit columns", eye[:, m - r :]
    yield "permutation", eye[:, torch.randperm(m)[:r]]
    yield "signed permutation", (eye * (1 - 2 * (torch.arange(m) % 2)))[:, torch.randperm(m)[:r]]
    shift = eye.roll(1, 0)
    yield "cyclic shift", shift[:, :r]
    yield "minus cyclic shift", -shift[:, :r]
    rotations = eye
    for i in range(m - 1):
        turn = eye.clone()
        turn[i : i + 2, i : i + 2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=eye.dtype)
        rotations = turn @ rotations
    yield "Hessenberg", rotations[:, :r]
    yield "transposed Hessenberg", rotations.mT[:, :r]
    k = torch.arange(m, dtype=torch.float64)
    waves = torch.cos(torch.pi * (k[:, None] + 0.5) * k / m)
    yield "cosines", torch.linalg.qr(waves)[0][:, :r]
    yield (
        "top block zero",
        torch.cat([torch.zeros(r, r), random_columns(m - r, r)]) if (m >= 2 * r) else eye[:, :r],
    )
    nearly = eye[:, :r] + 1e-9 * torch.randn(m, r, dtype=torch.float64)
    yield "nearly identity", torch.linalg.qr(nearly)[0]
    yield "nearly minus identity", -torch.linalg.qr(nearly)[0]


def cross_ratio(Q: Tensor, P: Tensor) -> float:
    """‖QᵀP‖₁ / (m·eps), by the measure of orthonormality_ratio."""
    if P.numel() == 0 or Q.numel() == 0:
        return 0.0
    norm = torch.linalg.matrix_norm(Q.double().mT @ P.double(), ord=1).max()
    return float(norm / (Q.shape[-2] * torch.finfo(P.dtype).eps))


def assert_completes(Q: Tensor, P: Tensor, name: str = "") -> None:
    m, r = Q.shape[-2:]
    assert P.shape == (*Q.shape[:-1], m - r), name
    # Householder's complete Q comes to 0.05 to 0.9 by this measure, depending on the size.
    assert orthonormality_ratio(P) < 2, name
    assert cross_ratio(Q, P) < 2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("m", "r"), [(128, 64), (300, 151), (200, 190), (200, 65), (150, 2), (5, 1), (1, 1), (70, 70)]
)
def test_random_columns(m: int, r: int, dtype: torch.dtype) -> None:
    Q = random_columns(m, r, dtype).to(dtype)[None]
    P = complement(Q)
    assert P.dtype == dtype
    assert_completes(Q, P)
    square = torch.cat([Q, P], -1)[0].double()
    assert orthonormality_ratio(square.mT.to(dtype)) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "r"), [(96, 40), (150, 130), (140, 70)])
def test_hard_columns(m: int, r: int, dtype: torch.dtype) -> None:
    for name, Q in hard_columns(m, r):
        assert_completes(Q.to(dtype)[None], complement(Q.to(dtype)[None]), name)


def test_spans_what_householder_completes() -> None:
    Q = random_columns(90, 33)
    rest = torch.linalg.qr(Q, mode="complete")[0][:, 33:]
    P = complement(Q[None])[0]
    assert float((P @ P.mT - rest @ rest.mT).norm()) < 1e-12


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 90), data=st.data(), seed=st.integers(0, 2**31))
def test_any_size_is_completed(m: int, data: st.DataObject, seed: int) -> None:
    r = data.draw(st.integers(0, m))
    Q = random_columns(m, r, seed).float()[None]
    assert_completes(Q, complement(Q))


def test_a_batch_is_its_matrices() -> None:
    Q = torch.stack([random_columns(100, 70, i) for i in range(4)])
    together = complement(Q)
    for one, P in zip(Q, together, strict=True):
        assert float((complement(one[None])[0] - P).norm()) < 1e-13
    order = torch.tensor([3, 1, 0, 2])
    assert torch.equal(complement(Q[order]), together[order])


@pytest.mark.parametrize("columns", [0, 1, 7, 30, 99])
def test_the_first_columns_alone(columns: int) -> None:
    Q = random_columns(100, 70)[None]
    few, all_ = complement(Q, columns), complement(Q)
    assert few.shape[-1] == min(columns, 30)
    assert float((few - all_[..., : few.shape[-1]]).norm()) < 1e-13


def test_what_defect_the_basis_has_is_kept() -> None:
    """Columns orthonormal to 1e-5 are completed to about 1e-5, not worse."""
    Q = random_columns(120, 50)
    rough = (Q + 1e-6 * torch.randn(120, 50, dtype=torch.float64))[None]
    defect = orthonormality_ratio(rough)
    P = complement(rough)
    assert defect > 1e6
    assert orthonormality_ratio(P) < 3 * defect
    assert cross_ratio(rough, P) < 3 * defect


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_columns_give_float32(dtype: torch.dtype) -> None:
    Q = torch.eye(20, 8, dtype=dtype)[None]
    assert complement(Q).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 5, 5), (2, 5, 0), (3, 0, 0), (1, 1, 0)])
def test_edges(shape: tuple[int, int, int]) -> None:
    b, m, r = shape
    P = complement(torch.eye(m, r).expand(b, m, r))
    assert P.shape == (b, m, m - r)
    assert_completes(torch.eye(m, r).expand(b, m, r), P)


def test_reflector_survives_an_svd_that_fails_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LAPACK's divide and conquer did so for the bases of a trained MiniLM."""
    Q = random_columns(40, 25, "reflector")
    expected = reflector(Q)
    svd = torch.linalg.svd

    def failing(A: Tensor, *args: object, **options: object) -> object:
        if A.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return svd(A, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    Y, N = reflector(Q)
    for found, wanted in zip((Y, N), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-4
    H = torch.eye(40, dtype=torch.float64) - Y @ N @ Y.mT
    assert (H.mT @ H - torch.eye(40)).abs().max() < 1e-13
    assert (H[:, 25:].mT @ Q).abs().max() < 1e-13
