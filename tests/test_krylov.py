"""Krylov spaces and subspace iteration: their blocks, and what they say of themselves."""

from __future__ import annotations

import pytest
import torch

from osf_kernels import cpu, truncated_svd
from osf_kernels.linalg.orthonormal import block_gram_schmidt
from osf_kernels.linalg.svd.group import Group
from osf_kernels.linalg.svd.methods import krylov, subspace_iteration
from osf_kernels.testing import matrix_with_spectrum, orthonormality_ratio
from tests.helpers import generator_for
from tests.triplets import SPECTRA, assert_sound, draw, measured_residual


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_gpus_two_passes_give_what_one_gives(
    monkeypatch: pytest.MonkeyPatch, spectrum: str
) -> None:
    """Where no number may be looked at, each block takes float32 Gram matrices, twice."""
    A, _, S, _ = draw(130, 90, spectrum)
    free = truncated_svd(A, 20, method="randomized", generator=generator_for(spectrum))
    monkeypatch.setattr(cpu, "looks_are_free", lambda Y: False)
    for rank in (1, 7, 33, 60):
        assert_sound(A, truncated_svd(A, rank, method="randomized"))
    twice = truncated_svd(A, 20, method="randomized", generator=generator_for(spectrum))
    eps = torch.finfo(torch.float32).eps
    assert float((twice.S - free.S).abs().max() / S[0]) <= 30 * eps
    assert float(twice.captured) == pytest.approx(float(free.captured), rel=30 * eps)


def test_a_pass_is_taken_again_where_it_loses_more_than_rounding() -> None:
    """Blocks that lie almost within the basis: orthonormal to it all the same, and said if not."""
    g = generator_for("within")
    basis = torch.linalg.qr(torch.randn(3, 80, 24, generator=g))[0]
    inside = basis @ torch.randn(3, 24, 8, generator=g)
    outside = torch.randn(3, 80, 8, generator=g)
    eps = torch.finfo(torch.float32).eps
    for scale in (1.0, 1e-2, 1e-4, 1e-6, 0.0):
        Y = inside + scale * outside
        found = block_gram_schmidt.orthonormal_against(
            Y, basis, safe=False, generator=g, growth=1.0
        )
        if scale >= 1e-4:
            assert bool(found.ok.all())
        whole = torch.cat([basis, found.Q], -1)[found.ok].double()
        for Q in whole:
            defect = Q.mT @ Q - torch.eye(32, dtype=torch.float64)
            assert (
                float(torch.linalg.matrix_norm(defect, ord=2))
                < 3 * block_gram_schmidt.GROWTH_LIMIT * eps
            )


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("niter", [2, 4])
def test_the_residual_of_narrow_blocks_is_exact(spectrum: str, niter: int) -> None:
    """No more than WHOLE_BLOCK columns: a product with all of them, not with a few probes."""
    A, _, _, _ = draw(150, 110, spectrum)
    result = truncated_svd(A, 20, method="randomized", niter=niter, oversample=20)
    truth = measured_residual(A, result)
    rounding = 30 * torch.finfo(torch.float32).eps
    assert float(result.residual) == pytest.approx(truth, rel=1e-3, abs=rounding)


@pytest.mark.parametrize("share", [1e-6, 3e-6, 1e-5, 3e-5])
def test_equal_values_far_below_the_largest_have_orthonormal_vectors(share: float) -> None:
    """Their Gram matrix says little of them; the vectors that it gives come out all the same."""
    sigma = torch.where(torch.arange(120) < 3, 1.0, 1.01 * share).double()
    for seed in range(16):
        g = generator_for("far", seed)
        A, _, _ = matrix_with_spectrum(150, 120, sigma, generator=g)
        result = truncated_svd(A, 10, method="randomized", niter=2, oversample=70, generator=g)
        assert orthonormality_ratio(result.U) < 30
        assert orthonormality_ratio(result.V) < 30


@pytest.mark.parametrize("cap", [400_000, 440_000, 520_000])
def test_a_space_that_may_not_grow_to_the_whole_says_how_far_it_came(cap: int) -> None:
    """It ends with a whole block, so that its residual is all of it."""
    A, _, _, _ = draw(103, 101, "flat")
    options = {"method": "randomized", "oversample": 24, "tol": 1e-6}
    with pytest.warns(RuntimeWarning, match="residuals above"):
        result = truncated_svd(A, 8, **options, max_workspace_bytes=cap)
    width = 8 * result.iterations
    assert 32 < width < 101
    assert float(result.residual) == pytest.approx(measured_residual(A, result), rel=1e-3)


def test_a_krylov_space_starts_from_any_columns() -> None:
    """The same space from columns and from others that span what they span."""
    A, _, _, _ = draw(120, 90)
    g = generator_for("start")
    start = torch.randn(1, 90, 6, generator=g)
    turn = torch.randn(6, 6, generator=g) + 3 * torch.eye(6)
    found = []
    for columns in (start, 100 * start @ turn):
        space = krylov.KrylovSpace([A], columns, safe=False, generator=g)
        space.grow(24)
        factors = space.factors(8)
        assert bool(factors.ok.all())
        found.append(factors)
    torch.testing.assert_close(found[0].S, found[1].S, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed", [0.0, 0.003, 0.3, 30.0])
def test_columns_of_a_warm_start_need_not_be_orthogonal(
    monkeypatch: pytest.MonkeyPatch, mixed: float
) -> None:
    """Of nearly orthogonal ones float32 is enough, and the rest is never come to."""
    g = generator_for("mixed", mixed)
    V = torch.linalg.qr(torch.randn(110, 20, generator=g))[0]
    A, _, _, _ = draw(150, 110, "flat")
    truth = torch.linalg.qr((A @ V).double())[0]  # float32 keeps what turns it, to rounding
    turned = V @ (torch.eye(20) + mixed * torch.randn(20, 20, generator=g))
    taken = []
    whole = block_gram_schmidt.orthonormal_against
    monkeypatch.setattr(
        block_gram_schmidt, "orthonormal_against", lambda *a, **k: taken.append(1) or whole(*a, **k)
    )
    group = Group([A], [float(A.norm())], 20, generator=torch.Generator().manual_seed)
    found = subspace_iteration.run(group, turned[None], niter=1, safe=False, generator=g)
    assert bool(found.ok.all())
    assert bool(taken) == (mixed > 0.1)
    Q = found.U[0].double()
    eps = torch.finfo(torch.float32).eps
    assert float(torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(20).double(), ord=2)) < 20 * eps
    angles = torch.linalg.svdvals(truth.mT @ Q)
    assert float(1 - angles.min()) < 1e-6


def test_columns_that_depend_on_each_other_are_not_believed() -> None:
    g = generator_for("twice")
    A, _, _, _ = draw(60, 50)
    V = torch.randn(1, 50, 8, generator=g)
    V[..., 5] = V[..., 2]
    group = Group([A], [float(A.norm())], 8, generator=torch.Generator().manual_seed)
    found = subspace_iteration.run(group, V, niter=1, safe=False, generator=g)
    assert not bool(found.ok.any())
