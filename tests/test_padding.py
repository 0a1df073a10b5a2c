"""Leading dimensions of 16 bytes: the helper, and what the library lays out by it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import osf_kernels
import osf_kernels.backends.torch as torch_backend
import osf_torch
from osf_kernels import Basis, _padding
from osf_kernels._padding import empty, is_aligned, is_padded, padded
from osf_kernels.backends import grouped, jobs
from osf_kernels.backends.chains import chain_of
from osf_kernels.backends.operands import Arena
from osf_kernels.backends.triton import configs, groups
from osf_kernels.backends.triton.views import dot_rule
from osf_kernels.plan import Matrix, Mode, choose
from osf_kernels.testing import project_reference
from osf_torch.protected import columns_of
from tests.helpers import generator_for

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU gets, on the CPU."""
    monkeypatch.setattr(_padding, "pads", lambda device: True)


def test_nothing_is_padded_on_the_cpu() -> None:
    """There BLAS packs its operands anyhow, and torch's bfloat16 product reads the padding."""
    like = torch.zeros(4, 77, dtype=BF16)
    assert empty(4, 77, like).is_contiguous()
    assert padded(like) is like
    assert padded(like, dtype=FP32).is_contiguous()
    assert _padding.pads(torch.device("cuda"))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("dtype", "width"), [(BF16, 80), (FP16, 80), (FP32, 80), (FP64, 78)], ids=str
)
def test_empty(dtype: torch.dtype, width: int) -> None:
    like = torch.zeros(())
    made = empty(5, 77, like, dtype=dtype, batch=(2, 3))
    assert made.shape == (2, 3, 5, 77)
    assert made.stride() == (3 * 5 * width, 5 * width, width, 1)
    assert is_aligned(made)
    assert is_aligned(made[1, 2])
    assert is_aligned(made.mT)
    assert not made._is_view()  # an operator's output may be written to under autograd
    assert made.untyped_storage().nbytes() == 30 * width * dtype.itemsize
    assert empty(5, 80, like, dtype=dtype).is_contiguous()


@pytest.mark.usefixtures("everywhere")
def test_padded_copies_what_is_not_aligned_and_nothing_else() -> None:
    for whole in (torch.randn(9, 80), torch.randn(9, 80).mT, torch.randn(9, 80)[:, :77]):
        assert padded(whole) is whole
    ragged = torch.randn(9, 77)
    wide = torch.randn(9, 96)
    for source in (ragged, wide[:, 1:78], wide[:, ::2][:, :47], torch.randn(3, 9, 77)):
        made = padded(source)
        assert torch.equal(made, source)
        assert made.stride(-1) == 1
        assert is_aligned(made)
        assert padded(made) is made
    made = padded(ragged)
    assert made.stride() == (80, 1)
    assert torch.equal(made.as_strided((9, 3), (80, 1), 77), torch.zeros(9, 3))


@pytest.mark.usefixtures("everywhere")
def test_padded_keeps_the_order_of_memory() -> None:
    """A basis is often held as the rows of Vᵀ; its leading dimension is then its height."""
    columns = torch.randn(5, 77).mT  # (77, 5), columns contiguous
    made = padded(columns)
    assert torch.equal(made, columns)
    assert made.stride() == (1, 80)
    assert is_aligned(made)


@pytest.mark.usefixtures("everywhere")
def test_padded_converts_in_one_copy() -> None:
    """``Tensor.to`` drops the padding of what it copies."""
    source = padded(torch.randn(9, 77))
    assert not is_aligned(source.to(BF16))
    made = padded(source, dtype=BF16)
    assert torch.equal(made, source.bfloat16())
    assert made.stride() == (80, 1)
    assert is_aligned(made)
    assert padded(torch.empty(9, 0), dtype=BF16).dtype == BF16
    assert padded(torch.ones(7), dtype=BF16).stride() == (1,)  # a vector has no lines
    with pytest.raises(TypeError, match=r"osf_kernels\.padded: expected t to be a tensor"):
        padded(Basis(source))  # type: ignore[arg-type]


def test_padding_lies_in_the_storage() -> None:
    """A kernel reads the last line's padding too."""
    flat = torch.zeros(9 * 80)
    assert is_padded(flat.as_strided((9, 77), (80, 1)))
    assert not is_padded(flat[:-1].clone().as_strided((9, 77), (80, 1)))
    assert not is_padded(flat[:-1].clone().as_strided((3, 3, 77), (240, 80, 1)))
    assert not is_padded(flat.as_strided((9, 80), (80, 1)))  # has none
    assert not is_padded(flat.as_strided((9, 77), (76, 1)))  # lines overlap


UNALIGNED = [config for _, config in configs.shipped("sm_90", aligned=False)]


def torch_new(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)


def unaligned(problem: jobs.Problem) -> bool:
    """Whether a matrix takes a config for operands that aren't aligned; nothing is run."""

    def choose(_: object, math: configs.Math, rank: int, aligned: bool) -> configs.Projection:
        return configs.projection_config("sm_90", math, rank, aligned)

    arena = Arena(problem.x.device)
    new = arena.new if _padding.pads(problem.x.device) else torch_new
    bases = [t.dtype for t in (problem.U, problem.V) if t is not None]
    coefficient, _ = dot_rule(problem.x.dtype, bases, (FP32,), "tf32x3")
    chain = chain_of(problem, coefficient, new)
    assert chain
    config = groups.plan_chain(chain, arena, "tf32x3", choose).config
    return any(config is other for other in UNALIGNED)


SPANS = (("high", "high"), ("low", "low"), ("high", "low"), (None, "high"), ("low", None))


def problem_of(
    rank: int,
    dtype: torch.dtype,
    down: bool,
    spans: tuple[str | None, str | None],
    own: bool,
    mode: Mode = "complement",
) -> jobs.Problem:
    """One matrix and two bases, laid out by the library, or contiguous as a user's."""
    m, n = 520, 528
    x = torch.empty(m, n, dtype=dtype)

    def basis(rows: int) -> Tensor:
        if down:
            return torch.empty(rank, rows, dtype=dtype).mT
        return empty(rows, rank, x) if own else torch.empty(rows, rank, dtype=dtype)

    bases = [
        None if held is None else basis(rows) for held, rows in zip(spans, (m, n), strict=True)
    ]
    name = str(dtype).removeprefix("torch.")
    ranks = [None if held is None else rank for held in spans]
    kind = Matrix(m, n, *ranks, *(held or "high" for held in spans), name, name)
    return jobs.Problem(x, x, *bases, choose(kind, mode, "cuda"))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("down", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_no_rank_is_launched_unaligned(dtype: torch.dtype, down: bool) -> None:
    """Ranks 1…512, high and low, of bases and coefficients that the library allocated."""
    modes: tuple[Mode, ...] = ("complement", "core")
    wrong = [
        (rank, spans, mode)
        for rank, spans, mode in itertools.product(range(1, 513), SPANS, modes)
        if unaligned(problem_of(rank, dtype, down, spans, own=True, mode=mode))
    ]
    assert not wrong


@pytest.mark.usefixtures("everywhere")
def test_a_ragged_basis_as_it_comes_is_launched_unaligned() -> None:
    """What the test before would find, and what ``padded`` is for."""
    problem = problem_of(77, BF16, False, SPANS[0], own=False)
    assert unaligned(problem)
    assert problem.U is not None
    assert problem.V is not None
    assert not unaligned(problem._replace(U=padded(problem.U), V=padded(problem.V)))


def test_coefficients_as_torch_lays_them_out_are_launched_unaligned() -> None:
    problem = problem_of(77, BF16, True, SPANS[0], own=True)
    assert unaligned(problem)


# --- what the library allocates ---


def layouts(*tensors: Tensor | None) -> list[bool]:
    return [is_aligned(t) for t in tensors if t is not None]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("batch", [False, True])
def test_decompositions_are_padded(batch: bool) -> None:
    A = torch.randn(2, 48, 40, generator=generator_for(batch))
    found = osf_kernels.truncated_svd(A if batch else list(A), 13, complement=True)
    for svd in [found] if isinstance(found, osf_kernels.TruncatedSVD) else found:
        assert all(layouts(svd.U, svd.V, svd.U_low, svd.V_low))
        assert svd.U.stride()[-2:] == (16, 1)
        assert svd.S.is_contiguous()


@pytest.mark.usefixtures("everywhere")
def test_orthonormal_columns_are_padded() -> None:
    g = generator_for("columns")
    Y = torch.randn(48, 7, generator=g)
    Q = osf_kernels.orthonormalize(Y)
    grown = osf_kernels.extend_basis(Q, torch.randn(48, 4, generator=g), energy=1.0)
    assert isinstance(grown, Tensor)
    assert grown.shape == (48, 11)
    assert all(layouts(Q, osf_kernels.polar(Y), grown))
    (listed,) = osf_kernels.extend_basis([Q], [torch.randn(48, 2, generator=g)], energy=1.0)
    assert isinstance(listed, Tensor)
    assert is_aligned(listed)


@pytest.mark.usefixtures("everywhere")
def test_coefficients_are_padded_but_for_those_that_shards_sum() -> None:
    """A collective takes contiguous tensors alone."""
    g = torch.randn(48, 38)
    A, B = osf_kernels.coefficients(g, torch.randn(48, 7), torch.randn(38, 5))
    assert A.is_contiguous()
    assert B.stride() == (8, 1)
    B.mul_(2)  # an output, not a view
    x = torch.randn(48, 38, requires_grad=True)
    _, B = osf_kernels.coefficients(x, None, torch.randn(38, 5))
    B.sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_torch_backend_computes_the_same_with_padding(
    mode: Mode, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator_for(mode, batch)
    x = torch.randn(*batch, 48, 40, generator=g)
    products = _padding.matmul, torch.addmm, _padding.cat
    U, V = (torch.linalg.qr(torch.randn(*batch, size, 7, generator=g))[0] for size in (48, 40))
    for bases in ((U, V), (Basis(U, "low"), Basis(V, "low")), (U, Basis(V, "low")), (None, V)):
        with monkeypatch.context() as on_a_gpu:
            on_a_gpu.setattr(torch_backend, "_OF_MATRICES", products)
            actual = osf_kernels.project(x, *bases, mode=mode)
        with monkeypatch.context() as plain:
            plain.setattr(_padding, "pads", lambda device: False)
            expected = osf_kernels.project(x, *bases, mode=mode)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_prepare_copies_a_ragged_basis_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generator_for("prepare")

    def drawn(size: int, rank: int) -> Tensor:
        made: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=g))[0]
        return made.contiguous()

    U, V, whole = drawn(48, 7), drawn(40, 7), drawn(40, 8)
    made: list[Tensor] = []
    copy = _padding.padded

    def watched(t: Tensor) -> Tensor:
        found = copy(t)
        if found is not t:
            made.append(found)
        return found

    monkeypatch.setattr("osf_kernels.ops.prepared.padded", watched)
    x = torch.randn(48, 40, generator=g)
    prepared = osf_kernels.prepare([x, x], [U, None], [V, whole])
    assert "2 bases are copied once" in str(prepared)
    assert "copied" not in str(osf_kernels.prepare([x], [None], [whole]))
    assert len(made) == 2

    def assert_projects() -> None:
        grads = [torch.randn(48, 40, generator=g) for _ in range(2)]
        before = [grad.clone() for grad in grads]
        prepared.project_(grads)
        for grad, given, bases in zip(grads, before, ((U, V), (None, whole)), strict=True):
            torch.testing.assert_close(grad, project_reference(given, *bases).float())

    for _ in range(3):
        assert_projects()
    assert len(made) == 2
    U.copy_(drawn(48, 7))  # holds from the next call on
    assert_projects()
    assert len(made) == 4


@pytest.mark.usefixtures("everywhere")
def test_subspaces_stay_padded(tmp_path: Path) -> None:
    """Refreshed, converted, saved and loaded, and in the state of a guard."""
    model = nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 40))

    def factors(found: osf_torch.Subspaces) -> list[Tensor]:
        return [f for s in found.values() for part, f in s.factors().items() if part != "S"]

    found = osf_torch.refresh(model, 13, keep="all", complement=True)
    assert len(factors(found)) == 8
    assert all(layouts(*factors(found)))
    half = found.to(BF16)
    assert all(layouts(*factors(half)))
    assert factors(half)[0].dtype == BF16
    osf_torch.save_subspaces(tmp_path / "bases.safetensors", found, model)
    loaded = osf_torch.load_subspaces(tmp_path / "bases.safetensors", model)
    assert all(layouts(*factors(loaded)))  # type: ignore[arg-type]
    for before, after in zip(factors(found), factors(loaded), strict=True):  # type: ignore[arg-type]
        assert torch.equal(before, after)

    def held(guard: osf_torch.Guard) -> list[bool]:
        pinned = [item.held for item in guard._items.values()]
        return layouts(*(columns_of(basis) for p in pinned for basis in (p.U, p.V)))

    guard = osf_torch.protect(model, found, restore=False, when="backward")
    assert all(held(guard))
    guard.load_state_dict(guard.state_dict())
    assert len(held(guard)) == 4
    assert all(held(guard))
    guard.remove()


def test_a_program_that_reads_padding_takes_no_matrix_without() -> None:
    """Same shape, strides and alignment; but the storage ends with the last element."""
    flat = torch.zeros(9 * 80)
    with_padding = flat.as_strided((9, 77), (80, 1))
    without = flat[:-3].clone().as_strided((9, 77), (80, 1))
    program: Any = None  # isn't asked
    made = grouped._Made([with_padding], program)
    assert made.serves([torch.zeros(9, 80)[:, :77]])
    assert not made.serves([without])
    assert grouped._Made([without], program).serves([with_padding])
