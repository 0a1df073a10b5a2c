"""orthonormalize and polar: orthonormal whatever comes in, and what they promise of the span."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osf_kernels import cpu, orthonormalize, polar
from osf_kernels.linalg.orthonormal.cholesky_qr import cholesky_qr, scale_columns
from osf_kernels.linalg.orthonormal.polar import _by_newton_schulz
from osf_kernels.testing import hard_matrices, matrix_with_spectrum, orthonormality_ratio
from tests.helpers import DTYPES, generator_for, randn

FLOATS = (torch.float32, torch.float64)
SIZES = [(60, 20), (200, 64), (33, 33), (7, 3), (1, 1)]


def unit_columns(Y: Tensor) -> Tensor:
    """Columns scaled to about unit norm in float64, by powers of two; zero ones stay."""
    Y = Y.double()
    exponent = torch.frexp(Y.abs().amax(-2, keepdim=True)).exponent
    Y = torch.ldexp(torch.ldexp(Y, -(exponent // 2)), exponent // 2 - exponent)
    return Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(1)


def outside(Q: Tensor, Y: Tensor) -> float:
    """The largest part of a unit column of Y that Q doesn't span."""
    Y, Q = unit_columns(Y), Q.double()
    if Y.numel() == 0:
        return 0.0
    return float(torch.linalg.vector_norm(Y - Q @ (Q.mT @ Y), dim=-2).max())


def of_condition(m: int, r: int, condition: float, dtype: torch.dtype) -> Tensor:
    falling = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    generator = generator_for(m, r, condition, dtype)
    return matrix_with_spectrum(m, r, falling, dtype=dtype, generator=generator)[0]


# --- orthonormalize --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(48, 20), (20, 20), (5, 2), (1, 1), (70, 1)])
def test_hard_matrices(size: tuple[int, int], dtype: torch.dtype) -> None:
    m, r = size
    for name, Y in hard_matrices(m, r, dtype=dtype, generator=generator_for(size, dtype)):
        Q, rank = orthonormalize(Y, return_rank=True)
        working = torch.float64 if dtype == torch.float64 else torch.float32
        eps = torch.finfo(working).eps
        assert Q.dtype == working, name
        assert orthonormality_ratio(Q) < 10, name
        # Householder's own is a few √r·eps; beyond rank, a singular value of 4√m·eps·σ₁ is left.
        assert outside(Q, Y) <= 8 * r**0.5 * eps, name
        assert outside(Q[:, :rank], Y) <= (8 * r**0.5 + 4 * m**0.5 * r**0.5) * eps, name
        sigma = torch.linalg.svdvals(unit_columns(Y))
        near = 4 * m**0.5 * eps * float(sigma[0])
        assert int((sigma > 2 * near).sum()) <= int(rank) <= int((sigma > near / 2).sum()), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e9, 1e13, 1e30])
@pytest.mark.parametrize("size", SIZES)
def test_every_condition(size: tuple[int, int], condition: float, dtype: torch.dtype) -> None:
    Y = of_condition(*size, condition, dtype)
    Q = orthonormalize(Y)
    peer = torch.linalg.qr(Y)[0]
    eps = torch.finfo(dtype).eps
    assert orthonormality_ratio(Q) <= max(2 * orthonormality_ratio(peer), 2)
    # Householder's is 2 to 5 eps; in float64 a product with R⁻¹ loses some of √r·eps at 1e6.
    assert outside(Q, Y) <= max(4 * outside(peer, Y), 4 * size[1] ** 0.5 * eps)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_wide_ones_go_by_blocks(dtype: torch.dtype) -> None:
    Y = of_condition(600, 515, 1e2, dtype)
    eps = torch.finfo(dtype).eps
    R = orthonormalize(Y).double().mT @ Y.double()
    assert float(R.tril(-1).norm() / R.norm()) < 40 * eps
    for Q in (orthonormalize(Y), polar(Y)):
        assert orthonormality_ratio(Q) < 2
        assert outside(Q, Y) < 4 * 515**0.5 * eps


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_nested_where_the_rank_is_full(condition: float, dtype: torch.dtype) -> None:
    Y = of_condition(80, 24, condition, dtype)
    Q, rank = orthonormalize(Y, return_rank=True)
    assert rank == 24
    R = Q.double().mT @ Y.double()
    eps = torch.finfo(dtype).eps
    assert float(R.tril(-1).norm() / R.norm()) < 8 * eps
    assert bool((R.diagonal() > 0).all())
    truth, triangle = torch.linalg.qr(Y.double())
    truth = truth * triangle.diagonal().sign()
    assert float((Q.double() - truth).norm()) < 30 * eps * condition


def test_first_columns_span_the_range_of_a_deficient_one() -> None:
    column = torch.randn(30, 1)
    Y = torch.cat([torch.zeros(30, 1), column, 2 * column, torch.randn(30, 1), column], -1)
    Q, rank = orthonormalize(Y, return_rank=True)
    assert rank == 2
    assert outside(Q[:, :2], Y) < 1e-6
    assert orthonormality_ratio(Q) < 2


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    data=st.data(),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_properties(m: int, data: st.DataObject, exponent: int, seed: int) -> None:
    r = data.draw(st.integers(1, m))
    true_rank = data.draw(st.integers(0, r))
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, true_rank, dtype=torch.float64, generator=generator)
    right = torch.randn(true_rank, r, dtype=torch.float64, generator=generator)
    Y = (left @ right).float()
    Q, rank = orthonormalize(Y, return_rank=True)
    assert orthonormality_ratio(Q) < 30
    assert int(rank) <= true_rank
    assert outside(Q, Y) < 1e-5
    # Scaling columns by powers of two changes nothing, bit for bit.
    powers = torch.randint(-20, 21, (r,), generator=generator).double()
    scaled, same = orthonormalize((Y * 2.0**powers * 2.0**exponent).float(), return_rank=True)
    assert torch.equal(same, rank)
    assert torch.equal(scaled, Q)
    # Orthonormal columns come back.
    assert float((orthonormalize(Q) - Q).norm()) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_batch_is_its_matrices_safe_ones_and_good_ones(dtype: torch.dtype) -> None:
    Y = torch.stack([A for _, A in hard_matrices(40, 16, dtype=dtype)]).reshape(4, 4, 40, 16)
    Q, rank = orthonormalize(Y, return_rank=True)
    assert rank.shape == (4, 4)
    assert rank.dtype == torch.int64
    eps = torch.finfo(dtype).eps
    for i in range(4):
        for j in range(4):
            alone, own = orthonormalize(Y[i, j], return_rank=True)
            assert own == rank[i, j]
            assert orthonormality_ratio(Q[i, j]) < 3
            if own == 16:
                assert float((alone - Q[i, j]).norm()) < 1e4 * eps
    order = torch.tensor([2, 0, 3, 1])
    again, rank_again = orthonormalize(Y[order], return_rank=True)
    assert torch.equal(rank_again, rank[order])
    assert torch.equal(again, Q[order])


def test_strides_do_not_matter_and_nothing_is_written() -> None:
    base = torch.randn(3, 20, 50)
    before = base.clone()
    assert torch.equal(orthonormalize(base.mT), orthonormalize(base.mT.contiguous()))
    assert torch.equal(polar(base.mT), polar(base.mT.contiguous()))
    assert torch.equal(base, before)


# --- the good path alone ---------------------------------------------------------------------


def good_path(Y: Tensor) -> tuple[Tensor, Tensor]:
    found = cholesky_qr(Y)
    return found.Q.to(Y.dtype), found.ok


def three_passes(Y: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The path of a GPU, run here: float32 Gram matrices, a shift, all passes."""
    monkeypatch.setattr(cpu, "looks_are_free", lambda Y: False)
    return good_path(Y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_flags_are_right(dtype: torch.dtype, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eps = torch.finfo(dtype).eps
    spectrum = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8, 1e12, 1e20]
    Y = torch.stack([of_condition(150, 40, c, dtype) for c in spectrum])
    Y = torch.cat([Y, torch.zeros(1, 150, 40, dtype=dtype), torch.full_like(Y[:1], float("nan"))])
    if on_gpu:
        Q, ok = three_passes(Y, monkeypatch)
    else:
        Q, ok = good_path(Y)
    assert ok.dtype == torch.bool
    for i, condition in enumerate([*spectrum, float("inf"), float("nan")]):
        if ok[i]:
            assert orthonormality_ratio(Q[i]) < 3, condition
            # Products with R⁻¹ in working precision: some eps·r of every column.
            assert outside(Q[i], Y[i]) < 40 * eps, condition
    assert bool(ok[: 5 if dtype == torch.float32 else 8].all())
    assert not bool(ok[-4:].any() if dtype == torch.float32 else ok[-2:].any())


def test_a_batch_that_is_ok_takes_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(Y: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("the safe path ran")

    monkeypatch.setattr(torch.linalg, "qr", never)
    with pytest.raises(AssertionError):
        orthonormalize(torch.ones(5, 100, 30))
    orthonormalize(torch.randn(5, 100, 30))
    polar(torch.randn(5, 100, 30))


# --- polar -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1.0001, 1e1, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("size", [(90, 30), (33, 33), (5, 2)])
def test_polar_is_the_svds(size: tuple[int, int], condition: float, dtype: torch.dtype) -> None:
    Y = of_condition(*size, condition, dtype)
    U, _, Vh = torch.linalg.svd(Y.double(), full_matrices=False)
    Q = polar(Y)
    assert orthonormality_ratio(Q) < 10
    eps = torch.finfo(dtype).eps
    # The factor's own sensitivity is 1/σ_min; float64 intermediates do better for float32.
    assert float((Q.double() - U @ Vh).norm()) < 4 * eps * size[1] * min(condition, 1 / eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(48, 20), (20, 20), (5, 2), (1, 1)])
def test_polar_of_hard_matrices(size: tuple[int, int], dtype: torch.dtype) -> None:
    for name, Y in hard_matrices(*size, dtype=dtype, generator=generator_for(size, dtype)):
        Q = polar(Y)
        eps = torch.finfo(Q.dtype).eps
        assert orthonormality_ratio(Q) < 10, name
        if not Y.any():
            continue
        scaled = Y.double() / Y.double().abs().max()
        H = Q.double().mT @ scaled
        assert float((H - H.mT).norm() / scaled.norm()) < 60 * eps, name
        assert float(torch.linalg.eigvalsh(H + H.mT)[0] / scaled.norm()) > -60 * eps, name
        # Of all orthonormal matrices none has a larger ⟨Q, Y⟩ = the sum of the singular values.
        best = torch.linalg.svdvals(scaled).sum()
        assert float((H.trace() - best).abs() / best) < 30 * eps, name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["one large", "one small", "even"])
def test_polar_keeps_its_symmetry_up_to_its_reach(kind, dtype, monkeypatch) -> None:
    """By Newton–Schulz, which a GPU takes in float32 too."""
    monkeypatch.setattr(cpu, "looks_are_free", lambda X: False)
    believed = 0
    for m, r in ((3, 2), (12, 9), (40, 33)):
        for condition in (1e1, 1e2, 1e3, 1e4, 2e4, 5e4):
            small = torch.tensor(1 / condition, dtype=torch.float64)
            sigma = {
                "one large": small.repeat(r).index_fill(0, torch.tensor(0), 1.0),
                "one small": torch.ones(r).double().index_fill(0, torch.tensor(r - 1), small),
                "even": small ** (torch.arange(r) / (r - 1)),
            }[kind]
            generator = generator_for(m, condition, kind)
            Y, _, _ = matrix_with_spectrum(m, r, sigma, dtype=dtype, generator=generator)
            (Q,), _, ok = _by_newton_schulz(scale_columns(Y[None], (-2, -1)))
            if not bool(ok):
                continue
            believed += 1
            H = Q.mT.double() @ Y.double()
            assert float((H - H.mT).norm()) < 60 * torch.finfo(dtype).eps, (m, condition)
    assert believed > 10


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 30), data=st.data(), seed=st.integers(0, 2**31))
def test_no_orthonormal_matrix_is_nearer(m: int, data: st.DataObject, seed: int) -> None:
    r = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(seed)
    Y = torch.randn(m, r, dtype=torch.float64, generator=generator)
    Q = polar(Y)
    distance = (Q - Y).norm()
    for _ in range(5):
        turned = torch.randn(m, r, dtype=torch.float64, generator=generator)
        other = torch.linalg.qr(Q + 0.1 * turned)
        sign = other.R.diagonal().sign()
        assert float((other.Q * sign - Y).norm()) >= float(distance) * (1 - 1e-12)
    assert float((polar(Q) - Q).norm()) < 1e-13 * r
    assert torch.equal(polar(Y * 2.0**-40), Q)


def test_polar_batch() -> None:
    Y = torch.stack([A for _, A in hard_matrices(40, 16)])
    Q = polar(Y)
    for one, y, (name, _) in zip(Q, Y, hard_matrices(40, 16), strict=True):
        assert orthonormality_ratio(one) < 3, name
        if float(torch.linalg.cond(y.double())) < 1e4:
            assert float((polar(y) - one).norm()) < 1e-5, name
    order = torch.randperm(len(Y))
    assert torch.equal(polar(Y[order]), Q[order])


# --- both: edges, refusals, torch.library ----------------------------------------------------

BOTH = pytest.mark.parametrize("op", [orthonormalize, polar])
Op = Callable[[Tensor], Tensor]


@BOTH
@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (0, 4, 2), (2, 0, 3, 3), (3, 0, 0), (2, 1, 1)])
def test_edges(op: Op, shape: tuple[int, ...]) -> None:
    assert op(torch.ones(shape)).shape == shape
    rank = orthonormalize(torch.ones(shape), return_rank=True)[1]
    assert torch.equal(rank, torch.full(shape[:-2], min(shape[-1], 1)))


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_counted(op: Op, bad: float, dtype: torch.dtype) -> None:
    Y = randn(3, 10, 4, dtype=dtype, generator=generator_for(bad, dtype))
    Y[1, 3:6, 2] = bad
    name = op.__name__
    message = rf"osf_kernels\.{name}: expected Y to be finite, got 3 of 40 entries of matrix 1"
    with pytest.raises(ValueError, match=message):
        op(Y)


@BOTH
def test_refusals(op: Op) -> None:
    name = rf"osf_kernels\.{op.__name__}: expected Y"
    with pytest.raises(ValueError, match=rf"{name}.*m ≥ r, got m=3, r=5; pass Y.mT"):
        op(torch.ones(3, 5))
    with pytest.raises(ValueError, match=rf"{name} to be \(\.\.\., m, r\)"):
        op(torch.ones(3))
    with pytest.raises(TypeError, match=rf"{name} to be float32.*int64"):
        op(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=rf"{name} to be a dense tensor, got torch.sparse_coo"):
        op(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=rf"{name} to be a tensor, got list"):
        op([1.0])  # type: ignore[arg-type]
    Y = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{name}.*requires grad; pass Y.detach\(\)"):
        op(Y)
    with torch.no_grad():
        assert not op(Y).requires_grad
    assert not op(Y.detach()).requires_grad


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(op: Op, dtype: torch.dtype) -> None:
    registered = getattr(torch.ops.osf_kernels, op.__name__).default
    for shape in ((2, 12, 5), (7, 3), (0, 4, 2)):
        torch.library.opcheck(registered, (torch.randn(shape).to(dtype),))


@BOTH
def test_compiles_as_one_graph(op: Op) -> None:
    Y = torch.randn(2, 20, 6)
    compiled = torch.compile(lambda x: op(x * 1.0) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(Y), op(Y) + 1)


@BOTH
def test_vmap_is_the_batch(op: Op) -> None:
    Y = torch.randn(20, 3, 6)
    mapped = torch.vmap(op, in_dims=1)(Y)
    assert torch.equal(mapped, op(Y.movedim(1, 0)))


@BOTH
def test_two_calls_agree(op: Op) -> None:
    Y = torch.stack([A for _, A in hard_matrices(30, 12)])
    assert torch.equal(op(Y), op(Y.clone()))
