"""What a GPU runs for 16-bit matrices: its operands on meta tensors, its errors on CPU tensors.

``served`` has the torch backend take the GPU's way on a CPU, which multiplies the same 16-bit
operands and sums them in float32, as tensor cores do.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import osf_torch
from osf_kernels import apply_, coefficients, restore_
from osf_kernels.backends import torch as torch_backend
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.torch import Program, sixteen_bit
from osf_kernels.plan import Matrix, choose, choose_pinned
from osf_kernels.testing import (
    assert_error_within,
    project_eager,
    project_reference,
    relative_error,
)
from tests import test_projection, test_restore
from tests.helpers import KINDS, draw_basis, generator_for, randn

DTYPES = (torch.bfloat16, torch.float16)
MODES = ("complement", "core")
BASES = (*DTYPES, torch.float32)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(sixteen_bit, "DEVICES", {"cuda", "cpu"})


# --- operands --------------------------------------------------------------------------------

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "dot", "mv", "_scaled_mm")


class Operands(TorchDispatchMode):
    """Notes the dtypes of the operands and of the result of every matrix product."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.rstrip("_") in PRODUCTS:
            tensors = [t.dtype for t in args if isinstance(t, torch.Tensor)]
            self.products.append((tensors[-2:], result.dtype, tensors[:-2]))
        return result


def matrix_of(x, U, V):
    widths = [None if b is None else b.columns.shape[-1] for b in (U, V)]
    spans = ["high" if b is None else b.spans for b in (U, V)]
    return Matrix(*x.shape[-2:], *widths, *spans, dtype=str(x.dtype).removeprefix("torch."))


def in_place(x, *others, **named):
    x = x.clone()
    return Problem(x, x, *others, **named)


def projections(dtype, basis_dtype, batch=()):
    """(name, problem, reference, peer), planned for a GPU: projecting, restoring densely and
    applying ready coefficients, in both modes and with every pair of bases."""
    m, n = 48, 36
    gen = generator_for("sixteen", dtype, basis_dtype, batch)
    for mode, left, right, ranks in itertools.product(MODES, KINDS, KINDS, ((5, 4), (40, 20))):
        x = randn(*batch, m, n, dtype=dtype, generator=gen)
        U, V = draw_basis(m, ranks[0], left, basis_dtype, gen), None
        V = draw_basis(n, ranks[1], right, basis_dtype, gen)
        held = [None if b is None else b.columns.expand(*batch, *b.columns.shape) for b in (U, V)]
        steps = [
            choose(matrix_of(x, U, V), mode, "cuda", **options)
            for options in ({}, {"once": True}, {"once": True, "shard": True})
        ]
        addend = randn(*batch, m, n, dtype=torch.float32, generator=gen)
        A = None if U is None else (held[0].double().mT @ x.double()).float()
        B = None if V is None else (x.double() @ held[1].double()).float()
        reference = project_reference(x, U, V, mode=mode)
        peer = project_eager(x, U, V, mode=mode)
        name = f"{mode} {left} {right} {ranks}"
        yield f"project {name}", in_place(x, *held, steps[0]), reference, peer
        yield f"apply_ {name}", in_place(x, *held, steps[2], A=A, B=B), reference, peer
        summed = reference + addend.double(), (peer.float() + addend).to(dtype)
        yield f"dense {name}", in_place(x, *held, steps[1], addend=addend), *summed


def pinned(dtype, basis_dtype, batch=()):
    """(name, problem, reference): restoring by singular values, with a residual and without, a
    weight that a step has moved by 2 %."""
    gen = generator_for("sixteen pinned", dtype, basis_dtype, batch)
    for mode, r, with_rest in itertools.product(MODES, (1, 7, 30), (True, False)):
        W0 = randn(*batch, 40, 30, dtype=dtype, generator=gen)
        if with_rest:
            U, S, V = test_restore.rough(W0, r, basis_dtype, gen)
        else:
            U, S, V = test_restore.triplets(W0, r, basis_dtype)
        S = S.float()
        rest = test_restore.missing(W0, U, S, V, mode) if with_rest else None
        rests = (None, rest) if mode == "core" else rest or (None, None)
        rests = [t if t is None else t.float() for t in rests]
        W = (W0.double() + 0.02 * torch.randn(W0.shape, generator=gen)).to(dtype)
        step = choose_pinned(Matrix(40, 30, r, r), mode, "cuda")
        named = dict(zip(("rest_A", "rest_B"), rests, strict=True))
        problem = Problem(W, W, U, V, step, S, **named)
        yield f"{mode} {r} {with_rest}", problem, pinned_reference(W, U, V, S, rests, mode)


def pinned_reference(W, U, V, S, rests, mode):
    """W − D as ``restore_`` defines it, in float64."""
    W, U, V, S = (t.double() for t in (W, U, V, S))
    rests = [0 if t is None else t.double() for t in rests]
    if mode == "core":
        return W - U @ (U.mT @ W @ V - S.diag_embed() - rests[1]) @ V.mT
    A = U.mT @ W - S[..., None] * V.mT - rests[0]
    B = W @ V - U * S[..., None, :] - rests[1]
    return W - (U @ A + (B - U @ (A @ V)) @ V.mT)


def on_meta(item):
    return item._replace(
        **{k: t.to("meta") for k, t in item._asdict().items() if isinstance(t, torch.Tensor)}
    )


@pytest.mark.parametrize("batch", [pytest.param((), marks=pytest.mark.slow), (3,)], ids=str)
@pytest.mark.parametrize("basis_dtype", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_multiplies_no_float32_operand(dtype, basis_dtype, batch, monkeypatch):
    monkeypatch.setattr(sixteen_bit, "DEVICES", {"cuda", "meta"})
    problems = [p for _, p, *_ in (*projections(dtype, basis_dtype, batch),)]
    problems += [p for _, p, _ in pinned(dtype, basis_dtype, batch)]
    seen = 0
    for problem in map(on_meta, problems):
        problem = problem._replace(out=problem.x)
        with Operands() as run:
            torch_backend.run([problem])
        with Operands() as program:
            ready = [(problem.A, problem.B)]
            Program([problem]).run([problem.x], ready if ready != [(None, None)] else None)
        assert program.products == run.products
        for operands, result, added in run.products:
            assert operands == [dtype, dtype], problem.step
            assert result == torch.float32 or (result == dtype == torch.bfloat16)
            assert set(added) <= {dtype}
        trivial = problem.step.form in ("identity", "zero")
        assert bool(run.products) != trivial
        seen += len(run.products)
    x, U, V = (torch.empty(*batch, *s, device="meta") for s in ((8, 6), (8, 3), (6, 2)))
    A, B = x.new_empty(*batch, 3, 6), x.new_empty(*batch, 8, 2)
    with Operands() as halves:
        bases = U.to(basis_dtype), V.to(basis_dtype)
        torch_backend.coefficients_of([x.to(dtype)], [bases[0]], [bases[1]], [A], [B])
    assert {(*operands, result) for operands, result, _ in halves.products} == {
        (dtype, dtype, torch.float32)
    }
    assert seen > 300


def test_a_plain_bfloat16_projection_is_as_it_was(monkeypatch):
    monkeypatch.setattr(sixteen_bit, "DEVICES", {"cuda", "meta"})
    monkeypatch.setattr(sixteen_bit, "run", None)
    x, U, V = (torch.empty(*s, device="meta").bfloat16() for s in ((8, 6), (8, 3), (6, 2)))
    step = choose(Matrix(8, 6, 3, 2, dtype="bfloat16", basis_dtype="bfloat16"), MODES[0], "cuda")
    with Operands() as operands:
        torch_backend.run([Problem(x, x, U, V, step)])
    assert {result for _, result, _ in operands.products} == {torch.bfloat16}


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_guarded_step_multiplies_no_float32_operand(mode, basis_dtype, served, monkeypatch):
    """Gradients projected, weights restored from S with what they have beside it, and densely."""
    seen = []

    def watched(name, multiply):
        def run(*arguments, **options):
            seen.append((name, [t.dtype for t in arguments if isinstance(t, torch.Tensor)]))
            return multiply(*arguments, **options)

        return run

    monkeypatch.setattr(sixteen_bit, "product32", watched("product32", sixteen_bit.product32))
    plain = watched("mm", torch.mm), watched("addmm", torch.addmm), torch.cat
    monkeypatch.setattr(torch_backend, "_OF_MATRICES", plain)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 40)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = osf_torch.refresh(model, {"0.weight": 12, "1.weight": 30}, progress=False)
    guard = osf_torch.protect(model, found.to(basis_dtype), optimizer=optimizer, mode=mode)
    for _ in range(2):
        model(torch.randn(8, 48, dtype=torch.bfloat16)).square().mean().backward()
        seen.clear()
        optimizer.step()
        assert {name for name, _ in seen} >= {"product32"}
        assert {dtype for _, dtypes in seen for dtype in dtypes} == {torch.bfloat16}
    guard.verify()


def test_float32_matrices_keep_float32_products(monkeypatch):
    monkeypatch.setattr(sixteen_bit, "DEVICES", {"cuda", "meta"})
    x, U = torch.empty(8, 6, device="meta"), torch.empty(8, 3, device="meta").bfloat16()
    step = choose(Matrix(8, 6, 3, None), MODES[0], "cuda")
    with Operands() as operands:
        torch_backend.run([Problem(x, x, U, None, step)])
    assert all(o == [torch.float32] * 2 for o, _, _ in operands.products)
    assert operands.products


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("basis_dtype", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_round_once(dtype, basis_dtype, batch, served):
    """Beside the suite's bound: as good as float32 throughout, where anything is float32."""
    for name, problem, reference, peer in projections(dtype, basis_dtype, batch):
        given = problem.x.clone()
        kept = [t if t is None else t.clone() for t in (problem.A, problem.B)]
        torch_backend.run([problem])
        assert_error_within(problem.x, reference, peer, scale=given)
        for t, before in zip((problem.A, problem.B), kept, strict=True):
            assert t is None or torch.equal(t, before)
        if basis_dtype == torch.bfloat16 == dtype and name.startswith("project"):
            continue
        rounding = relative_error(reference.to(dtype), reference, given)
        exact = 1e-5 if dtype == torch.bfloat16 else 1e-6
        assert relative_error(problem.x, reference, given) <= 1.05 * rounding + exact, name


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("basis_dtype", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restoring_by_singular_values_rounds_once(dtype, basis_dtype, batch, served):
    """Beside one rounding only what high parts miss of the little that is taken off."""
    for name, problem, reference in pinned(dtype, basis_dtype, batch):
        moved = relative_error(problem.x, reference, reference)
        torch_backend.run([problem])
        rounding = relative_error(reference.to(dtype), reference, reference)
        error = relative_error(problem.x, reference, reference)
        assert error <= 1.02 * rounding + torch.finfo(dtype).eps / 4 * moved, name


@pytest.mark.parametrize("basis_dtype", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_have_the_bits_of_float32(dtype, basis_dtype, served):
    gen = generator_for("sixteen coefficients", dtype, basis_dtype)
    for shape in ((48, 36), (700, 300)):
        g = randn(*shape, dtype=dtype, generator=gen)
        U, V = (draw_basis(s, 30, "high", basis_dtype, gen).columns for s in shape)
        A, B = coefficients(g, U, V)
        assert A.dtype == B.dtype == torch.float32
        eps = torch.finfo(torch.float32).eps
        assert relative_error(A, U.double().mT @ g.double(), g) <= 4 * eps
        assert relative_error(B, g.double() @ V.double(), g) <= 4 * eps


@pytest.mark.parametrize("exponent", [-20, -8, 0, 8, 15])
def test_float16_parts_follow_their_tensor(exponent, served):
    """A coefficient may be as large as float32 allows, or below what float16 holds."""
    gen = generator_for("scale", exponent)
    for scale in (2.0**exponent, 2.0 ** (6 * exponent)):
        t = randn(20, 30, dtype=torch.float32, generator=gen) * scale
        parts, shift = sixteen_bit.split(t, torch.float16)
        value = sum(part.double() for part in parts) * 2.0 ** shift.double()
        assert all(part.isfinite().all() for part in parts)
        assert float((value - t.double()).norm() / t.double().norm()) <= 2.0**-21


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_what_is_not_finite(dtype, bad):
    """It stays so, and scales nothing beside it away."""
    t = randn(6, 5, dtype=torch.float32, generator=generator_for("not finite", dtype))
    t[2, 3] = bad
    parts, exponent = sixteen_bit.split(t, dtype)
    value = sum(part.double() for part in parts) * 2.0 ** (0 if exponent is None else exponent)
    assert not torch.isfinite(value[2, 3])
    others = torch.isfinite(t)
    assert float((value - t)[others].norm() / t[others].norm()) <= torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_entries_do_not_overflow(dtype, served):
    """|g| is near the largest float16, a coefficient √m times as large."""
    gen = generator_for("large", dtype)
    direction = torch.ones(256, 1) / 16
    g = 3.0e4 + randn(256, 32, dtype=torch.float32, generator=gen)
    g = g.to(dtype)
    for basis_dtype, V in itertools.product((dtype, torch.float32), (None, torch.ones(32, 1))):
        U = direction.to(basis_dtype)
        V = None if V is None else (V / 32**0.5).to(basis_dtype)
        A, B = coefficients(g, U, V)
        for result in (
            apply_(g.clone(), U, V, A, B),
            restore_(g.clone(), U, V, protected=torch.zeros(256, 32)),
        ):
            assert_error_within(
                result, project_reference(g, U, V), project_reference(g, U, V).to(dtype), scale=g
            )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("basis_dtype", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_never_turn_finite(dtype, basis_dtype, bad, served):
    for name, problem, *_ in (
        *projections(dtype, basis_dtype),
        *pinned(dtype, basis_dtype),
    ):
        if problem.A is None and problem.B is None:
            problem.x[3, 5] = bad
            torch_backend.run([problem])
            assert not torch.isfinite(problem.x[3, 5]), name


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("basis_dtype", BASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_keeps_the_bounds(dtype, basis_dtype, batch):
    cases = [(p, r, peer) for _, p, r, peer in projections(dtype, basis_dtype, batch)]
    cases += [(p, r, r.to(dtype)) for _, p, r in pinned(dtype, basis_dtype, batch)]
    for problem, reference, peer in cases:
        tensors = {k: t for k, t in problem._asdict().items() if isinstance(t, torch.Tensor)}
        there = problem._replace(**{k: t.cuda() for k, t in tensors.items()})
        torch_backend.run([there._replace(out=there.x)])
        assert_error_within(there.x.cpu(), reference, peer, scale=problem.x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_suite_of_the_operators(dtype, mode, served):
    """What the operators promise on every device, by the GPU's products."""
    for left, right in itertools.product(KINDS, KINDS):
        test_restore.test_a_dense_protected_part_serves_any_basis(dtype, mode, left, right)
        test_restore.test_halves_make_the_whole(dtype, mode, left, right)
        test_projection.test_every_form_matches_the_oracle(dtype, mode, left, right)
    for rank in (1, 7, 30):
        test_restore.test_with_the_residual_the_weight_is_pinned_and_not_its_triplets(
            dtype, mode, rank
        )
    for basis_dtype in BASES:
        if basis_dtype != dtype:
            test_projection.test_mixed_dtypes_round_once(dtype, basis_dtype)
    test_restore.test_sixteen_bit_weights_are_rounded_once()
    test_restore.test_what_is_pinned_may_be_wider_than_the_weight()
    test_projection.test_float16_survives_coefficients_beyond_its_range()
    test_projection.test_a_list_equals_a_loop_bit_for_bit()
