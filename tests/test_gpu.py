"""The operators on a GPU, on every backend that is there: what only a GPU can show."""

from __future__ import annotations

import itertools

import pytest
import torch

from osf_kernels import (
    Basis,
    apply_,
    coefficients,
    plan,
    project,
    project_,
    project_many_,
    restore_many_,
    use_backend,
)
from osf_kernels.backends.choosing import NAMES, unavailable_reason
from osf_kernels.testing import (
    assert_error_within,
    leak,
    project_eager,
    project_reference,
    relative_error,
    restore_reference,
)
from tests import lists
from tests.helpers import KINDS, draw_basis, generator_for, randn
from tests.lists import MIXED, PINNED, SPLIT, List

pytestmark = pytest.mark.gpu

CUDA = "cuda"
# How many of eager torch's errors lists of small matrices may have: a float32 product of the
# kernels is within 2⁻²², four roundings, where eager's small sums are within one.
TF32X3 = 4.0


@pytest.fixture(params=NAMES)
def backend(request):
    reason = unavailable_reason(request.param, torch.device(CUDA))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


def on_gpu(value):
    if isinstance(value, Basis):
        return Basis(value.columns.to(CUDA), value.spans)
    return None if value is None else value.to(CUDA)


def draw(m, n, r, k, left, right, dtype, gen, basis_dtype=None):
    g = randn(m, n, dtype=dtype, generator=gen)
    held = basis_dtype or dtype
    return tuple(
        map(on_gpu, (g, draw_basis(m, r, left, held, gen), draw_basis(n, k, right, held, gen)))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["complement", "core"])
def test_a_mixed_list_of_every_form(backend, dtype, mode):
    gen = generator_for("gpu", dtype, mode)
    problems = []
    shapes = ((256, 192, 24, 40), (130, 511, 100, 300), (64, 64, 64, 3), (1000, 33, 8, 33))
    for (m, n, r, k), left, right in itertools.product(shapes, KINDS, KINDS):
        problems.append(draw(m, n, r, k, left, right, dtype, gen))
    listed = [g.clone() for g, _, _ in problems]
    project_many_(listed, [U for _, U, _ in problems], [V for _, _, V in problems], mode=mode)
    for (g, U, V), actual in zip(problems, listed, strict=True):
        reference = project_reference(g, U, V, mode=mode)
        assert_error_within(actual, reference, project_eager(g, U, V, mode=mode), scale=g)
        again = project_(g.clone(), U, V, mode=mode)
        assert_error_within(again, reference, project_eager(g, U, V, mode=mode), scale=g)
        if backend == "cuda":
            assert torch.equal(again, actual), "a list equals a loop, bit for bit"


def test_two_runs_agree_bit_for_bit(backend):
    gen = generator_for("gpu bits")
    for dtype in (torch.float32, torch.bfloat16):
        g, U, V = draw(1024, 768, 64, 48, "high", "high", dtype, gen)
        assert torch.equal(project(g, U, V), project(g, U, V))


@pytest.mark.parametrize(
    ("dtype", "rho", "spans", "limit"),
    [
        (torch.float32, 0.06, "high", 1e-6),
        (torch.bfloat16, 0.06, "high", 4e-3),
        (torch.bfloat16, 0.8, "low", 1e-3),
    ],
    ids=str,
)
def test_leak(backend, dtype, rho, spans, limit):
    gen = generator_for("gpu leak", dtype)
    rank = int(rho * 1024)
    g, U, V = draw(1024, 1024, rank, rank, spans, spans, dtype, gen)
    after = project(g, U, V)
    assert leak(after, g, U) <= limit
    assert leak(after, g, V, side="right") <= limit


def test_strided_and_transposed(backend):
    gen = generator_for("gpu strides")
    g, U, V = draw(200, 120, 20, 16, "high", "high", torch.float32, gen)
    wanted = project(g, U, V)
    wide = torch.zeros(400, 240, device=CUDA)
    wide[::2, ::2] = g
    for view in (g.mT.contiguous().mT, wide[::2, ::2]):
        rows = Basis(V.columns.mT.contiguous().mT)
        assert relative_error(project_(view, U, rows), wanted, g) < 1e-6


def test_nan_and_inf(backend):
    gen = generator_for("gpu nan")
    for left, right in (("high", "high"), ("low", "high"), ("low", "low")):
        g, U, V = draw(96, 80, 30, 20, left, right, torch.float32, gen)
        for bad in (float("nan"), float("inf")):
            g[3, 5] = bad
            assert not torch.isfinite(project(g, U, V)[3, 5])


def test_on_the_callers_stream(backend):
    gen = generator_for("gpu stream")
    g, U, V = draw(2048, 2048, 64, 64, "high", "high", torch.float32, gen)
    wanted = project(g, U, V)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.empty_like(g)
        torch.cuda._sleep(20_000_000)
        late.copy_(g)
        actual = project(late, U, V)
    stream.synchronize()
    assert torch.equal(actual, wanted)


def test_graph_capture(backend):
    gen = generator_for("gpu graph")
    problems = [
        draw(512, 384, 32, 16, "high", "high", torch.bfloat16, gen),
        draw(300, 512, 20, 400, "high", "low", torch.bfloat16, gen),
    ]
    static = [g.clone() for g, _, _ in problems]
    Us, Vs = [U for _, U, _ in problems], [V for _, _, V in problems]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            project_many_(static, Us, Vs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        project_many_(static, Us, Vs)
    for _ in range(2):
        for target in static:
            target.copy_(torch.randn_like(target))
        wanted = [t.clone() for t in static]
        project_many_(wanted, Us, Vs)
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip(static, wanted, strict=True):
            assert relative_error(actual, expected, expected) < 1e-2


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_a_prepared_list(backend, mode):
    """Over the same memory and new, in other strides and alignments, halves, shards and pins."""
    lists.follows_every_address_and_layout(
        List(MIXED, "gpu", mode=mode, device=CUDA, factor=TF32X3)
    )
    lists.halves_make_the_whole(List(SPLIT, "gpu halves", mode=mode, device=CUDA, factor=TF32X3))
    lists.restores_what_is_pinned(List(PINNED, "gpu pins", mode=mode, device=CUDA, factor=TF32X3))
    case = List(PINNED, "gpu shards", mode=mode, device=CUDA, factor=TF32X3)
    S, pinned = case.triplets()
    lists.shards_make_the_whole(case, 2, {"S": S}, pinned)


def test_a_prepared_list_follows_new_addresses(backend):
    """As after zero_grad(set_to_none=True): more of them than records are kept for."""
    case = List(MIXED, "gpu addresses", device=CUDA, factor=TF32X3)
    prepared, held = case.prepare(), []
    for _ in range(20):
        held.append(case.draw())
        before = [x.clone() for x in held[-1]]
        prepared.project_(held[-1])
        case.assert_projected(held[-1], before)
    assert len({grads[0].data_ptr() for grads in held}) == 20


def test_a_hundred_captures_of_a_prepared_call(backend):
    """In a row, none with a call between; all of them replay, the last first."""
    case = List(MIXED, "gpu captures", device=CUDA, factor=TF32X3)
    prepared, grads = case.prepare(), case.draw()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        prepared.project_(grads)
    stream.synchronize()
    graphs = []
    for _ in range(100):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            prepared.project_(grads)
    for graph in graphs[::-1]:
        before = case.refill(grads)
        graph.replay()
        torch.cuda.synchronize()
        case.assert_projected(grads, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiles_with_inductor(backend):
    gen = generator_for("gpu compile")
    g, U, V = draw(128, 96, 16, 8, "high", "high", torch.float32, gen)

    def f(g):
        return project(g * 2, U, V).sin()

    compiled = torch.compile(f, fullgraph=True)
    assert relative_error(compiled(g), f(g), g) < 1e-5


def test_restore_and_halves(backend):
    gen = generator_for("gpu restore")
    W0 = randn(300, 200, dtype=torch.float32, generator=gen)
    u, s, vt = torch.linalg.svd(W0, full_matrices=False)
    W = (W0 + 0.1 * randn(300, 200, dtype=torch.float32, generator=gen)).to(CUDA)
    U, S, V = (t.to(CUDA).contiguous() for t in (u[:, :40], s[:40], vt[:40].mT))
    protected = on_gpu(W0) - project(on_gpu(W0), U, V)
    by_values, dense = W.clone(), W.clone()
    restore_many_([by_values, dense], [U, U], [V, V], S=[S, None], protected=[None, protected])
    reference = restore_reference(W, U, V, S=S)
    assert relative_error(by_values, reference, W) < 2e-6
    assert relative_error(dense, reference, W) < 2e-6
    A, B = coefficients(W, U, V)
    halves = apply_(W.clone(), U, V, A, B)
    assert relative_error(halves, project_reference(W, U, V), W) < 2e-6


def test_float64_is_torchs():
    gen = generator_for("gpu float64")
    g, U, V = draw(64, 48, 8, 8, "high", "high", torch.float64, gen)
    assert plan(g, U, V).backend == "torch"
    for name in ("triton", "cuda"):
        if unavailable_reason(name, torch.device(CUDA)) is None:
            with use_backend(name), pytest.raises(TypeError, match="float64 with backend"):
                project(g, U, V)
