"""project, project_ and project_many_ against the float64 oracle, and their properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from osf_kernels import Basis, plan, project, project_, project_many_
from osf_kernels.testing import (
    assert_error_within,
    leak,
    matrix_with_spectrum,
    project_eager,
    project_reference,
    relative_error,
)
from tests.helpers import DTYPES, KINDS, draw_basis, generator_for, randn

MODES = ("complement", "core")
M, N = 48, 36


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, KINDS)))
def test_every_form_matches_the_oracle(dtype, mode, left, right):
    gen = generator_for(dtype, mode, left, right)
    for r, k in ((5, 7), (30, 3), (44, 33), (1, 36), (0, 7), (48, 5), (48, 36), (0, 0)):
        g = randn(M, N, dtype=dtype, generator=gen)
        U, V = draw_basis(M, r, left, dtype, gen), draw_basis(N, k, right, dtype, gen)
        reference = project_reference(g, U, V, mode=mode)
        peer = project_eager(g, U, V, mode=mode)
        given_g = g.clone()
        assert_error_within(project(g, U, V, mode=mode), reference, peer, scale=g)
        assert torch.equal(g, given_g), "project wrote to its input"
        out = torch.full_like(g, float("nan"))
        assert project(g, U, V, mode=mode, out=out) is out
        assert_error_within(out, reference, peer, scale=g)
        assert project_(g, U, V, mode=mode) is g
        assert_error_within(g, reference, peer, scale=given_g)


@pytest.mark.parametrize(
    ("dtype", "basis_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes_round_once(dtype, basis_dtype):
    gen = generator_for(dtype, basis_dtype)
    g = randn(M, N, dtype=dtype, generator=gen)
    for left, right in (("high", "high"), ("low", "high"), ("low", "low")):
        U, V = draw_basis(M, 20, left, basis_dtype, gen), draw_basis(N, 9, right, basis_dtype, gen)
        reference = project_reference(g, U, V)
        actual = project(g, U, V)
        assert actual.dtype == dtype
        # computed in float32 throughout: the only 16-bit rounding is the result's own
        limit = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
        assert relative_error(actual, reference, g) <= limit


def test_float16_survives_coefficients_beyond_its_range():
    """Each |g| is under 65504 but a coefficient Uᵀg is √m times as large."""
    m, n = 256, 32
    direction = torch.ones(m, 1) / m**0.5
    g = torch.full((m, n), 3.0e4, dtype=torch.float16)
    assert float((direction.mT @ g.float()).max()) > 65504
    for U in (
        direction.half(),
        Basis(torch.linalg.qr(direction, mode="complete")[0][:, 1:].half(), "low"),
    ):
        result = project(g, U, None)
        assert torch.isfinite(result).all()
        assert float(result.double().norm()) <= 2e-3 * float(g.double().norm())


@pytest.mark.parametrize("mode", MODES)
def test_batches_broadcast_their_bases(mode):
    gen = generator_for("batch", mode)
    g = randn(2, 3, M, N, dtype=torch.float32, generator=gen)
    shared = draw_basis(M, 6, "high", torch.float32, gen)
    each = Basis(
        torch.stack([draw_basis(N, 30, "low", torch.float32, gen).columns for _ in range(3)]), "low"
    )
    actual = project(g, shared, each, mode=mode)
    for i, j in itertools.product(range(2), range(3)):
        V = Basis(each.columns[j], "low")
        reference = project_reference(g[i, j], shared, V, mode=mode)
        peer = project_eager(g[i, j], shared, V, mode=mode)
        assert_error_within(actual[i, j], reference, peer, scale=g[i, j])
    project_(g, shared, each, mode=mode)
    assert torch.equal(g, actual)


def test_a_list_equals_a_loop_bit_for_bit():
    gen = generator_for("list")
    cases = [
        ((40, 30), (5, "high"), (4, "high"), torch.float32),
        ((30, 40), (20, "low"), (3, "high"), torch.bfloat16),
        ((64, 16), (0, "high"), None, torch.float64),
        ((3, 24, 24), None, (20, "low"), torch.float16),
        ((0, 8), (0, "high"), (2, "high"), torch.float32),
        ((1, 1), (1, "high"), None, torch.float32),
    ]
    grads, Us, Vs = [], [], []
    for shape, left, right, dtype in cases:
        grads.append(randn(*shape, dtype=dtype, generator=gen))
        for side, size, into in ((left, shape[-2], Us), (right, shape[-1], Vs)):
            into.append(side and draw_basis(size, *side, dtype, gen))
    for mode in MODES:
        listed = [g.clone() for g in grads]
        project_many_(listed, Us, Vs, mode=mode)
        for g, U, V, actual in zip(grads, Us, Vs, listed, strict=True):
            assert torch.equal(actual, project_(g.clone(), U, V, mode=mode))


def test_two_runs_agree_bit_for_bit():
    gen = generator_for("deterministic")
    for dtype in DTYPES:
        g = randn(200, 150, dtype=dtype, generator=gen)
        U, V = draw_basis(200, 30, "high", dtype, gen), draw_basis(150, 100, "low", dtype, gen)
        assert torch.equal(project(g, U, V), project(g, U, V))


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_strides_do_not_matter(left, right):
    gen = generator_for("strides", left, right)
    dtype = torch.float32
    U, V = draw_basis(M, 30, left, dtype, gen), draw_basis(N, 7, right, dtype, gen)
    base = randn(M, N, dtype=dtype, generator=gen)
    wide = torch.zeros(2 * M, 3 * N)
    wide[::2, ::3] = base
    row = base[:1].expand(M, N)
    views = {
        "transposed": (base.mT.contiguous().mT, base),
        "strided": (wide[::2, ::3], base),
        "flipped batch": (base.flip(0).flip(0), base),
        "expanded": (row, row.contiguous()),
    }

    def rows(basis: Basis | None) -> Basis | None:
        return basis and Basis(basis.columns.mT.contiguous().mT, basis.spans)

    for name, (view, contiguous) in views.items():
        wanted = project(contiguous, U, V)
        actual = project(view, rows(U), rows(V))
        assert relative_error(actual, wanted, contiguous) < 1e-6, name
        if name != "expanded":
            project_(view, rows(U), rows(V))
            assert relative_error(view, wanted, contiguous) < 1e-6, name
    assert (wide[1::2] == 0).all()
    assert (wide[:, 1::3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_between_padded_rows_is_not_read(dtype):
    gen = generator_for("padded", dtype)
    m, n, r = 202, 70, 41

    def padded(t):
        room = torch.full((t.shape[0], t.shape[1] + 8), float("nan"), dtype=dtype)
        room[:, : t.shape[1]] = t
        return room[:, : t.shape[1]]

    g = randn(m, n, dtype=dtype, generator=gen)
    for left, right in (("high", "high"), ("low", "high"), ("low", "low"), ("high", None)):
        U, V = draw_basis(m, r, left, dtype, gen), draw_basis(n, 33, right, dtype, gen)
        wide = [b and Basis(padded(b.columns), b.spans) for b in (U, V)]
        actual = project_(padded(g), *wide)
        reference, peer = project_reference(g, U, V), project_eager(g, U, V)
        assert_error_within(actual, reference, peer, scale=g)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("left", "right"), [k for k in itertools.product(KINDS, KINDS) if any(k)])
@pytest.mark.parametrize("mode", MODES)
def test_nan_and_inf_never_turn_finite(bad, left, right, mode):
    gen = generator_for("nan", left, right, mode)
    for r, k in ((5, 4), (M, 3), (40, 30), (M, N)):
        g = randn(M, N, dtype=torch.float32, generator=gen)
        g[3, 5] = bad
        U, V = draw_basis(M, r, left, g.dtype, gen), draw_basis(N, k, right, g.dtype, gen)
        result = project(g, U, V, mode=mode)
        assert not torch.isfinite(result[3, 5]), (r, k, plan(g, U, V, mode=mode).form)


def test_a_whole_protected_side_gives_exact_zeros():
    gen = generator_for("zeros")
    g = randn(M, N, dtype=torch.float32, generator=gen)
    for U in (draw_basis(M, M, "high", g.dtype, gen), draw_basis(M, M, "low", g.dtype, gen)):
        assert (project(g, U, None) == 0).all()
        assert (project(g, U, draw_basis(N, 3, "high", g.dtype, gen)) == 0).all()


def test_nothing_to_do_launches_nothing():
    g = torch.randn(5, 4)
    project_many_([], [], [])
    empty = plan([], [], [])
    assert (empty.launches, empty.flops, empty.bytes) == (0, 0, 0)
    for shape in ((0, 4), (4, 0), (0, 3, 4), (2, 0, 4)):
        x = torch.empty(shape)
        U = torch.linalg.qr(torch.randn(x.shape[-2], x.shape[-2]))[0][:, :2]
        assert project(x, U, None).shape == shape
        assert plan(x, U, None).launches == 0
    nothing = g.new_empty(5, 0)
    assert torch.equal(project(g, nothing, g.new_empty(4, 0)), g)
    assert plan(g, nothing, None).launches == 0
    assert torch.equal(project(g), g)
    assert torch.equal(project(g, mode="core"), g)


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_ill_conditioned_gradients(exponent):
    """Singular values over eight decades, scaled towards both ends of float32."""
    gen = generator_for("graded", exponent)
    spectrum = torch.logspace(0, -8, 60, dtype=torch.float64) * 2.0**exponent
    g, left, right = matrix_with_spectrum(80, 60, spectrum, generator=gen)
    # Protect the leading singular directions of g itself: nearly all of it is removed.
    U, V = left[:, :10].float().contiguous(), right[:, :10].float().contiguous()
    reference = project_reference(g, U, V)
    assert_error_within(project(g, U, V), reference, project_eager(g, U, V), scale=g)
    low_U = Basis(torch.linalg.qr(left[:, :10], mode="complete")[0][:, 10:].float(), "low")
    actual = project(g, low_U, V)
    assert_error_within(actual, project_reference(g, low_U, V), project_eager(g, low_U, V), scale=g)


@pytest.mark.parametrize(
    ("dtype", "rho", "spans", "limit"),
    [
        (torch.float32, 0.1, "high", 1e-6),
        (torch.float32, 0.5, "high", 1e-6),
        (torch.float32, 0.8, "low", 1e-6),
        (torch.bfloat16, 0.1, "high", 4e-3),
        (torch.bfloat16, 0.5, "high", 4e-3),
        (torch.bfloat16, 0.8, "low", 1e-3),
    ],
    ids=str,
)
def test_leak(dtype, rho, spans, limit):
    gen = generator_for("leak", dtype, rho)
    size = 512
    g = randn(size, size, dtype=dtype, generator=gen)
    U, V = (draw_basis(size, int(rho * size), spans, dtype, gen) for _ in "UV")
    after = project(g, U, V)
    assert leak(after, g, U) <= limit
    assert leak(after, g, V, side="right") <= limit


# --- properties ----------------------------------------------------------------------------

sizes = st.integers(1, 24)


@st.composite
def problems(draw):
    m, n = draw(sizes), draw(sizes)
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sides = []
    for size in (m, n):
        kind = draw(st.sampled_from(KINDS))
        sides.append(draw_basis(size, draw(st.integers(0, size)), kind, torch.float64, gen))
    return m, n, *sides, gen


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from(MODES))
def test_properties(problem, mode):
    m, n, U, V, gen = problem

    def P(x):
        return project(x, U, V, mode=mode)

    x = randn(m, n, dtype=torch.float64, generator=gen)
    y = randn(m, n, dtype=torch.float64, generator=gen)
    tiny = 1e-12 * (1 + float(x.norm()) + float(y.norm()))
    assert (P(P(x)) - P(x)).norm() <= tiny, "idempotent"
    assert (P(2.5 * x - y) - (2.5 * P(x) - P(y))).norm() <= tiny * 4, "linear"
    assert abs((P(x) * y).sum() - (x * P(y)).sum()) <= tiny * (1 + float(y.norm())), "self-adjoint"
    assert P(x).norm() <= x.norm() + tiny, "non-expansive"
    for basis, value in ((U, P(x)), (V, P(x).mT)):
        if mode == "complement" and basis is not None and basis.spans == "high":
            assert (basis.columns.mT @ value).norm() <= tiny, "nothing left in the span"
    if isinstance(U, Basis) and U.columns.shape[1]:
        size = U.columns.shape[1]
        Q = torch.linalg.qr(randn(size, size, dtype=torch.float64, generator=gen))[0]
        turned = project(x, Basis(U.columns @ Q, U.spans), V, mode=mode)
        assert (turned - P(x)).norm() <= tiny, "a basis of the same span"


@settings(deadline=None, max_examples=60)
@given(st.lists(problems(), max_size=5), st.sampled_from(MODES))
def test_a_list_equals_a_loop(drawn, mode):
    grads = [randn(m, n, dtype=torch.float64, generator=gen) for m, n, _, _, gen in drawn]
    Us, Vs = [U for _, _, U, _, _ in drawn], [V for _, _, _, V, _ in drawn]
    looped = [project(g, U, V, mode=mode) for g, U, V in zip(grads, Us, Vs, strict=True)]
    project_many_(grads, Us, Vs, mode=mode)
    assert all(torch.equal(a, b) for a, b in zip(grads, looped, strict=True))


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(MODES))
def test_high_and_low_bases_of_one_subspace_agree(problem, mode):
    m, n, U, V, gen = problem
    x = randn(m, n, dtype=torch.float64, generator=gen)

    def other(basis, size):
        if basis is None:
            return None
        held = basis.columns.shape[1]
        whole = (
            torch.linalg.qr(basis.columns, mode="complete")[0] if held else torch.eye(size).double()
        )
        return Basis(whole[:, held:], "low" if basis.spans == "high" else "high")

    a = project(x, U, V, mode=mode)
    b = project(x, other(U, m), other(V, n), mode=mode)
    assert (a - b).norm() <= 1e-12 * (1 + float(x.norm()))


class Watcher(TorchDispatchMode):
    """Records the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_watches_sees_the_operator() -> None:
    """Unwatched calls skip the dispatcher; a mode and a profile must find the operator there."""
    generator = generator_for("watched")
    g = randn(8, 6, dtype=torch.float32, generator=generator)
    U = draw_basis(8, 2, "high", torch.float32, generator)
    expected = project(g, U)
    with Watcher() as watcher:
        assert torch.equal(project(g, U), expected)
        project_(g.clone(), U)
    assert "osf_kernels.project.default" in watcher.seen
    assert "osf_kernels.project_.default" in watcher.seen
    with torch.profiler.profile(acc_events=True) as profile:
        project(g, U)
        project_(g.clone(), U)
    names = {event.key for event in profile.key_averages()}
    assert {"osf_kernels::project", "osf_kernels::project_"} <= names


def test_an_unwatched_call_moves_the_version_of_what_it_writes() -> None:
    g = torch.randn(8, 6, generator=generator_for("version"))
    U = draw_basis(8, 2, "high", torch.float32, generator_for("version"))
    for V in (None, draw_basis(6, 2, "low", torch.float32, generator_for("V"))):
        before = g._version
        project_(g, U, V)
        assert g._version > before
