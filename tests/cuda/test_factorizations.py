"""Inverse Cholesky factors and Jacobi SVD, compiled by g++ and run in the emulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.emulator import factorizations as f
from tests.emulator.draws import NAN, lay_out
from tests.emulator.harness import SHARED_LIMIT, EmulatorError, Run, build, compiler, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++)")

SIZES = (1, 2, 3, 7, 8, 9, 16, 25, 48)


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, str(key))))


def first_of(runs: list[Run], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The first seed's outputs; another schedule may not change a bit of them."""
    for other in runs[1:]:
        for out in outputs:
            assert torch.equal(runs[0][out].isnan(), other[out].isnan())
            assert torch.equal(runs[0][out].nan_to_num(), other[out].nan_to_num())
    return [runs[0][out] for out in outputs]


def cholesky(G: Tensor, **options: object) -> list[Tensor]:
    """The inverse factors and info."""
    job = f.cholesky_job(G)
    return first_of(run([job], **options), job[1:])  # type: ignore[arg-type]


def jacobi(M: Tensor, **options: object) -> list[Tensor]:
    """U, S, V and info."""
    job = f.jacobi_job(M)
    Ut, S, Vt, info = first_of(run([job], **options), job[1:])  # type: ignore[arg-type]
    return [Ut.mT, S, Vt.mT, info]


def v_outside(p: int, l: int) -> int:
    """Shared memory of the columns and not of V."""
    return 4 * (p * l + 2 * l)


# --- Cholesky -------------------------------------------------------------------------------


@pytest.mark.parametrize("l", SIZES)
def test_inverse_factors(l: int) -> None:
    G = f.gram(2, l, 1e2, generator("gram", l))
    f.assert_inverse_factors(G, *cholesky(G, seeds=(0, 1, 2)))


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_inverse_factors_of_any_condition_and_scale(condition: float, scale: float) -> None:
    G = f.gram(2, 30, condition, generator(condition, scale))
    inverse, info = cholesky(G * scale)
    f.assert_inverse_factors(G, inverse * scale**0.5, info)


def test_a_matrix_that_is_not_positive_definite() -> None:
    """Named by its first bad pivot and all NaN; the others of the batch are as they are alone."""
    l, bad = 21, (0, 1, 8, 15, 20)
    G = f.gram(len(bad) + 1, l, 10.0, generator("indefinite"))
    for k, pivot in enumerate(bad):
        G[k, pivot, pivot] = -1e-3
    inverse, info = cholesky(G, seeds=(0, 1))
    assert info.tolist() == [pivot + 1 for pivot in bad] + [0]
    assert torch.equal(info, torch.linalg.cholesky_ex(G, upper=True).info)
    assert inverse[:-1].isnan().all()
    assert torch.equal(inverse[-1:], cholesky(G[-1:])[0])

    singular = torch.stack([torch.zeros(5, 5), torch.ones(5, 5)])
    inverse, info = cholesky(singular)
    assert info.tolist() == [1, 2]
    assert inverse.isnan().all()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_is_a_bad_pivot(value: float) -> None:
    l = 12
    G = f.gram(3, l, 10.0, generator("finite"))
    G[0, 9, 9] = value
    G[1, 2, 5] = value
    G[2, 5, 2] = value  # in the lower triangle, which is not read
    inverse, info = cholesky(G)
    assert info.tolist() == [10, 6, 0]
    assert inverse[:2].isnan().all()
    f.assert_inverse_factors(G[2:], inverse[2:], info[2:])


def test_the_upper_triangle_is_read_once_and_the_inverse_written_once() -> None:
    b, l = 3, 19
    job = f.cholesky_job(f.gram(b, l, 10.0, generator("bytes")))
    done = run([job])[0]
    assert done.bytes_read[id(job.G)] == 4 * b * l * (l + 1) // 2
    assert done.bytes_written[id(job.inverse)] == 4 * b * l * l
    assert done.launches == 1


@pytest.mark.parametrize("layout", ["columns", "padded", "unaligned", "strided"])
def test_any_strides(layout: str) -> None:
    g = generator(layout)
    G, M = f.gram(1, 13, 10.0, g), torch.randn(1, 15, 11, generator=g)
    strided = [lay_out(x[0], layout)[None].expand(2, -1, -1) for x in (G, M)]
    for got, expected in zip(cholesky(strided[0]), cholesky(G), strict=True):
        assert torch.equal(got, expected.expand_as(got))
    for got, expected in zip(jacobi(strided[1]), jacobi(M), strict=True):
        assert torch.equal(got, expected.expand_as(got))


@pytest.mark.parametrize(("capability", "largest"), [(80, 288), (90, 340)])
def test_inverse_factors_that_fit(capability: int, largest: int) -> None:
    """Refused one beyond; taken, a matrix of zeros ends at its first pivot."""
    limit = SHARED_LIMIT[capability]
    assert cholesky(torch.zeros(1, largest, largest), shared_limit=limit)[1].tolist() == [1]
    with pytest.raises(EmulatorError, match="cholesky_inverse: the matrices do not fit"):
        cholesky(torch.zeros(1, largest + 1, largest + 1), shared_limit=limit)


@pytest.mark.slow
def test_the_largest_inverse_factor() -> None:
    G = f.gram(1, 340, 1e3, generator("largest"))
    f.assert_inverse_factors(G, *cholesky(G, shared_limit=SHARED_LIMIT[90]))


# --- SVD ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 13])
@pytest.mark.parametrize("l", [*SIZES[:-1], pytest.param(SIZES[-1], marks=pytest.mark.slow)])
def test_svd(l: int, extra: int) -> None:
    M = torch.randn(2, l + extra, l, generator=generator("svd", l, extra))
    f.assert_svd(M, *jacobi(M, seeds=(0, 3)))


@pytest.mark.parametrize("l", [6, pytest.param(27, marks=pytest.mark.slow)])
def test_awkward_matrices(l: int) -> None:
    """Ranks, clusters, grading and scales; also with a row on top that makes them tall."""
    cases = f.awkward_matrices(l, generator("awkward", l))
    names = list(cases)
    M = torch.stack([cases[name] for name in names])
    f.assert_svd(M, *jacobi(M), names)
    tall = torch.cat([torch.zeros(len(names), 1, l), M], 1)
    f.assert_svd(tall, *jacobi(tall), names)


def test_v_outside_of_shared_memory_has_the_same_bits() -> None:
    g = generator("outside")
    for p, l in ((20, 20), (31, 9), (1, 1)):
        M = torch.stack([torch.randn(p, l, generator=g), torch.ones(p, l)])
        inside = jacobi(M)
        for seeds in ((0,), (1,), (2,)):
            outside = jacobi(M, seeds=seeds, shared_limit=v_outside(p, l))
            assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


def test_a_matrix_has_the_bits_it_has_alone() -> None:
    M = torch.randn(3, 14, 10, generator=generator("alone"))
    together = jacobi(M, seeds=(1, 2))
    for k in range(3):
        for whole, alone in zip(together, jacobi(M[k : k + 1]), strict=True):
            assert torch.equal(whole[k : k + 1], alone)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_gives_nan_and_spoils_no_other(value: float) -> None:
    M = torch.randn(3, 9, 8, generator=generator("not finite"))
    M[0, 0, 0] = M[2, 8, 7] = value
    U, S, V, info = jacobi(M, seeds=(0, 1))
    assert info.tolist() == [-1, 0, -1]
    for k in (0, 2):
        assert all(x[k].isnan().all() for x in (U, S, V))
    f.assert_svd(M[1:2], U[1:2], S[1:2], V[1:2], info[1:2])


def test_scaling_by_a_power_of_two_scales_the_singular_values_alone() -> None:
    M = torch.randn(1, 12, 12, generator=generator("scaled"))
    U, S, V, _ = jacobi(M)
    for power in (-100, 1, 110):
        scaled = jacobi(M * 2.0**power)
        assert torch.equal(scaled[0], U)
        assert torch.equal(scaled[1], S * 2.0**power)
        assert torch.equal(scaled[2], V)


def test_what_is_read_and_written() -> None:
    b, p, l = 2, 12, 9
    job = f.jacobi_job(torch.randn(b, p, l, generator=generator("bytes")))
    done = run([job])[0]
    assert done.bytes_read[id(job.M)] == 4 * b * p * l
    assert done.bytes_written[id(job.Ut)] == 4 * b * p * l
    assert done.bytes_written[id(job.S)] == 4 * b * l
    assert done.bytes_written[id(job.Vt)] == 4 * b * l * l
    assert done.launches == 1


def test_nothing_is_launched_for_nothing() -> None:
    for shape in ((0, 5, 5), (3, 0, 0)):
        job = f.cholesky_job(torch.empty(shape))
        assert run([job])[0].launches == 0
    for shape in ((0, 7, 5), (3, 4, 0), (2, 0, 0)):
        svd = f.jacobi_job(torch.empty(shape))
        assert run([svd])[0].launches == 0


@pytest.mark.parametrize(
    ("capability", "rows", "largest"),
    [(80, 0, 203), (90, 0, 240), (80, 1000, 41), (90, 1000, 57), (90, 58110, 1)],
)
def test_svds_that_fit(capability: int, rows: int, largest: int) -> None:
    """Refused one beyond; taken, a matrix of NaN ends before the first sweep. 0 rows: square."""
    limit = SHARED_LIMIT[capability]
    fits = torch.full((1, rows or largest, largest), NAN)
    assert jacobi(fits, shared_limit=limit)[3].tolist() == [-1]
    with pytest.raises(EmulatorError, match="jacobi_svd: the matrices do not fit"):
        jacobi(torch.zeros(1, rows or largest + 1, largest + 1), shared_limit=limit)


@pytest.mark.slow
def test_the_largest_svd() -> None:
    """Rows and columns of a bidiagonal matrix, shuffled: few rotations, in every column."""
    l, g = 240, generator("largest")
    M = torch.diag(torch.linspace(1, 2, l)) + torch.diag(torch.full((l - 1,), 1e-3), 1)
    M = M[torch.randperm(l, generator=g)][:, torch.randperm(l, generator=g)]
    f.assert_svd(M[None], *jacobi(M[None], shared_limit=SHARED_LIMIT[90]))


@pytest.mark.slow
def test_a_larger_svd() -> None:
    M = torch.randn(1, 110, 100, generator=generator("larger"))
    f.assert_svd(M, *jacobi(M, seeds=(5,), shared_limit=v_outside(110, 100)))


@pytest.mark.slow
def test_factorizations_under_the_sanitizers() -> None:
    """Address and undefined-behaviour sanitizers see buffers of exactly the tensors' size."""
    g = generator("sanitized")
    sanitized = build(sanitize=True)
    for l in (1, 3, 8, 21):
        G = torch.cat([f.gram(1, l, 10.0, g), torch.zeros(1, l, l)])
        inverse, info = cholesky(G, emulator=sanitized, seeds=(3,))
        assert info.tolist() == [0, 1]
        f.assert_inverse_factors(G[:1], inverse[:1], info[:1])
        for limit in (SHARED_LIMIT[80], v_outside(l + 2, l)):
            M = torch.stack([torch.randn(l + 2, l, generator=g), torch.ones(l + 2, l)])
            f.assert_svd(M, *jacobi(M, emulator=sanitized, seeds=(2,), shared_limit=limit))
        assert jacobi(torch.full((1, l, l), NAN), emulator=sanitized)[3].tolist() == [-1]
