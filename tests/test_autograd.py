"""Registration with torch.library: derivatives, vmap, compile, opcheck."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from osf_kernels import (
    Basis,
    apply_,
    coefficients,
    project,
    project_,
    project_many_,
    restore_,
    use_backend,
)
from tests.helpers import KINDS, draw_basis, generator_for, randn

OPS = torch.ops.osf_kernels


def differentiable(*tensors):
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, KINDS)))
def test_first_and_second_derivatives(mode, left, right):
    gen = generator_for("gradcheck", mode, left, right)
    g = randn(6, 5, dtype=torch.float64, generator=gen)
    U, V = draw_basis(6, 2, left, g.dtype, gen), draw_basis(5, 2, right, g.dtype, gen)
    leaves = differentiable(g, U and U.columns, V and V.columns)

    def f(g, *columns):
        columns = iter(columns)
        left_basis = None if U is None else Basis(next(columns), left)
        right_basis = None if V is None else Basis(next(columns), right)
        return project(g, left_basis, right_basis, mode=mode)

    inputs = [t for t in leaves if t is not None]
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_derivatives_of_a_batch_sum_over_what_was_broadcast():
    gen = generator_for("batched gradient")
    g = randn(3, 6, 5, dtype=torch.float64, generator=gen).requires_grad_()
    U = draw_basis(6, 2, "high", torch.float64, gen).columns.requires_grad_()
    V = torch.stack([draw_basis(5, 2, "low", torch.float64, gen).columns for _ in range(3)])
    V.requires_grad_()
    assert gradcheck(lambda g, U, V: project(g, U, Basis(V, "low")), (g, U, V))
    assert gradcheck(lambda g, U, V: coefficients(g, U, V), (g, U, V))


def test_backward_in_g_is_the_projection_and_keeps_no_copy_of_g():
    gen = generator_for("saved")
    g = randn(20, 16, dtype=torch.float32, generator=gen).requires_grad_()
    U, V = (draw_basis(size, 3, "high", g.dtype, gen) for size in (20, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        y = project(g, U, V)
    assert g.shape not in saved
    upstream = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, g, upstream)
    assert torch.equal(gradient, project(upstream, U, V))


def test_in_place_on_an_intermediate_keeps_its_graph():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    U = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0]

    def single(x):
        return project_(x * 2, U, None)

    def many(x):
        y, z = x * 2, x * 3
        project_many_([y, z], [U, U], [None, None])
        return y + z

    assert gradcheck(single, x)
    assert gradcheck(many, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.jit
@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize(("left", "right"), [("high", "low"), ("low", None), (None, "high")])
def test_in_place_is_differentiable_in_the_bases(mode, left, right):
    """Though it writes over the g that the bases' derivatives read."""
    gen = generator_for("in place", mode, left, right)
    g = randn(6, 5, dtype=torch.float64, generator=gen)
    U, V = draw_basis(6, 2, left, g.dtype, gen), draw_basis(5, 2, right, g.dtype, gen)
    leaves = [t for t in differentiable(g, U and U.columns, V and V.columns) if t is not None]

    def arguments(g, *columns):
        columns = iter(columns)
        return g * 2, U and Basis(next(columns), left), V and Basis(next(columns), right)

    def single(*inputs):
        return project_(*arguments(*inputs), mode=mode)

    def many(*inputs):
        x, *bases = arguments(*inputs)
        y = x * 3
        project_many_([x, y], *([basis, basis] for basis in bases), mode=mode)
        return x + y

    for f in (single, many):
        assert gradcheck(f, leaves, check_forward_ad=True)
        assert gradgradcheck(f, leaves)
    apart = project(*arguments(*leaves), mode=mode)
    for ours, theirs in zip(
        torch.autograd.grad(single(*leaves).sin().sum(), leaves),
        torch.autograd.grad(apart.sin().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.jit
def test_in_place_on_a_constant_differentiates_the_bases():
    g = torch.randn(6, 5, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(6, 2, dtype=g.dtype))[0]

    def f(U):
        return project_(g.clone(), U)

    jacobian = torch.func.jacrev(lambda U: project(g, U))(U)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(f)(U), jacobian, atol=1e-12)


def test_vmap():
    gen = generator_for("vmap")
    g = randn(4, 6, 5, dtype=torch.float64, generator=gen)
    U = torch.stack([draw_basis(6, 2, "high", g.dtype, gen).columns for _ in range(4)])
    V = draw_basis(5, 2, "high", g.dtype, gen).columns
    looped = torch.stack([project(x, u, V) for x, u in zip(g, U, strict=True)])
    mapped = torch.vmap(project, in_dims=(0, 0, None))(g, U, V)
    assert torch.allclose(mapped, looped, rtol=0, atol=1e-14)
    shifted = torch.vmap(project, in_dims=(1, 2, None))(g.movedim(0, 1), U.movedim(0, 2), V)
    assert torch.allclose(shifted, looped, rtol=0, atol=1e-14)
    one = torch.stack([project(g[0], u, V) for u in U])
    assert torch.allclose(torch.vmap(project, in_dims=(None, 0, None))(g[0], U, V), one, atol=1e-14)
    nested = torch.vmap(torch.vmap(project, in_dims=(0, None, None)), in_dims=(None, 0, None))
    grid = torch.stack([torch.stack([project(x, u, V) for x in g]) for u in U])
    assert torch.allclose(nested(g, U, V), grid, rtol=0, atol=1e-14)
    A, B = torch.vmap(coefficients, in_dims=(0, 0, None))(g, U, V)
    assert torch.allclose(A, U.mT @ g)
    assert torch.allclose(B, g @ V)
    finished = g.clone()
    torch.vmap(apply_, in_dims=(0, 0, None, 0, 0))(finished, U, V, A, B)
    assert torch.allclose(finished, looped, rtol=0, atol=1e-14)
    out = torch.empty(6, 4, 5, dtype=g.dtype)
    torch.vmap(lambda x, u, o: project(x, u, V, out=o), in_dims=(0, 0, 1))(g, U, out)
    assert torch.allclose(out.movedim(1, 0), looped, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="expected g to be vmapped where an argument is"):
        torch.vmap(project_, in_dims=(None, 0, None))(g[0], U, V)
    in_place = g.clone()
    torch.vmap(project_, in_dims=(0, 0, None))(in_place, U, V)
    assert torch.allclose(in_place, looped, rtol=0, atol=1e-14)


def cases():
    g, h = torch.randn(6, 5), torch.randn(6, 5)
    U, V = torch.linalg.qr(torch.randn(6, 2))[0], torch.linalg.qr(torch.randn(5, 2))[0]
    leaf = g.clone().requires_grad_()
    return {
        "project": (leaf, U, V, "complement:high:low"),
        "project core": (leaf, None, V, "core:high:high"),
        "project_out": (g, U, V, "complement:high:high", torch.empty_like(g)),
        "project_": (g, U, V, "core:low:high"),
        "project_many_": ([g, h], [U, None], [None, V], ["complement:high:high"] * 2),
        "coefficients": (leaf, U, V),
        "apply_": (g, U, V, U.mT @ g, g @ V, "complement:high:high"),
        "restore_many_": (
            *([g], [U], [V], [torch.ones(2)], [None], [None], [torch.ones(2, 2)]),
            *(["core:high:high"], True),
        ),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", cases())
def test_opcheck(case):
    op = getattr(OPS, case.split()[0]).default
    torch.library.opcheck(op, cases()[case])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    U, V = torch.linalg.qr(torch.randn(16, 4))[0], torch.linalg.qr(torch.randn(12, 3))[0]
    low = Basis(torch.linalg.qr(U, mode="complete")[0][:, 4:].contiguous(), "low")

    def functional(g):
        return project(g.sin(), low, V).cos()

    def in_place(g, h):
        g, h = g * 2, h * 3
        project_many_([g, h], [U, low], [V, None])
        project_(g, None, V, mode="core")
        restore_(h, U, V[:, :3].new_zeros(12, 4), protected=g)
        return g + h

    for f, inputs in (
        (functional, [torch.randn(16, 12)]),
        (in_place, [torch.randn(16, 12), torch.randn(16, 12)]),
    ):
        expected = f(*[t.clone() for t in inputs])
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        assert torch.allclose(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)
    leaf = torch.randn(16, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(functional(leaf).sum(), leaf)
    compiled = torch.compile(functional, fullgraph=True, backend=backend)
    (gradient,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    """Of CUDA tensors it runs in a thread of autograd's, which sees no use_backend."""
    asked = []

    def select(request, *arguments):
        asked.append(request)
        return "torch", "asked for"

    monkeypatch.setattr("osf_kernels.ops._validation.choose_for", select)
    g = torch.randn(23, 12, requires_grad=True)
    U = torch.linalg.qr(torch.randn(23, 3))[0].requires_grad_()
    with use_backend("torch"):
        total = project(g, U, None).sum()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert g.grad is not None
    assert set(asked) == {"torch"}
