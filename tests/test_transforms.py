"""Derivatives by torch.func and in forward mode, and what refuses them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._pytree import tree_leaves

from osf_kernels import (
    Basis,
    apply_,
    coefficients,
    extend_basis,
    merge_basis,
    orthonormalize,
    polar,
    project,
    project_,
    project_many_,
    restore_,
)
from tests.helpers import draw_basis, generator_for, randn

SPANS = ("high", "low", None)

# Of torch.jit, which forward mode imports; of constants, in linearize.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def by_formula(g, U, V, mode="complement"):
    def protected(basis):
        H = basis.columns @ basis.columns.mT
        return H if basis.spans == "high" else torch.eye(len(H), dtype=H.dtype) - H

    left = g if U is None else protected(U) @ g
    if mode == "core":
        return g - (left if V is None else left @ protected(V))
    half = g if U is None else g - left
    return half if V is None else half - half @ protected(V)


def drawn(*key):
    gen = generator_for(*key)
    g = randn(6, 5, dtype=torch.float64, generator=gen)
    return g, *(draw_basis(size, 2, "high", g.dtype, gen).columns for size in (6, 5))


def smooth(f):
    return lambda *a: sum(x.sin().sum() for x in tree_leaves(f(*a)))


def transforms(args, tangents):
    every = tuple(range(len(args)))
    pair = [torch.stack([x, 2 * x]) for x in args]
    return {
        "jvp": lambda f: jvp(f, args, tangents),
        "linearize": lambda f: linearize(f, *args)[1](*tangents),
        "grad": lambda f: grad(smooth(f), argnums=every)(*args),
        "jacfwd": lambda f: jacfwd(f, argnums=every)(*args),
        "jacrev": lambda f: jacrev(f, argnums=every)(*args),
        "hessian": lambda f: hessian(smooth(f), argnums=every)(*args),
        "reverse twice": lambda f: jacrev(grad(smooth(f), argnums=every), argnums=every)(*args),
        "vmap of grad": lambda f: vmap(grad(smooth(f), argnums=every))(*pair),
        "grad of vmap": lambda f: grad(lambda *a: vmap(smooth(f))(*a).sum(), argnums=every)(*pair),
        "jvp of vmap": lambda f: jvp(vmap(f), tuple(pair), tuple(pair)),
    }


def assert_same(ours, truth, what):
    for a, b in zip(tree_leaves(ours), tree_leaves(truth), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 1e-12 * max(1.0, float(b.norm())), what


@pytest.mark.parametrize("mode", ["complement", "core"])
@pytest.mark.parametrize(
    ("left", "right"), [pair for pair in itertools.product(SPANS, SPANS) if any(pair)]
)
def test_project_by_every_transform(mode, left, right):
    g, *columns = drawn(mode, left, right)
    args = (g, *(x for x, spans in zip(columns, (left, right), strict=True) if spans))
    tangents = tuple(torch.randn_like(x) for x in args)

    def called(f):
        def function(g, *held):
            held = iter(held)
            bases = [spans and Basis(next(held), spans) for spans in (left, right)]
            return f(g, *bases, mode=mode)

        return function

    for what, transform in transforms(args, tangents).items():
        assert_same(transform(called(project)), transform(called(by_formula)), what)


def test_other_operators_by_every_transform():
    g, U, V = drawn("others")
    tangent = torch.randn_like(g)

    def many(g):
        y, z = g * 2, g * 3
        project_many_([y, z], [U, None], [None, V])
        return y, z

    def halves(g):
        return by_formula(2 * g, Basis(U), None), by_formula(3 * g, None, Basis(V))

    for ours, truth in (
        (lambda g: project_(g * 2, U, V), lambda g: 2 * by_formula(g, Basis(U), Basis(V))),
        (many, halves),
        (lambda g: coefficients(g, U, V), lambda g: (U.mT @ g, g @ V)),
    ):
        for what, transform in transforms((g,), (tangent,)).items():
            assert_same(transform(ours), transform(truth), what)
    args, tangents = (g, U, V), tuple(torch.randn_like(x) for x in (g, U, V))
    for what, transform in transforms(args, tangents).items():
        assert_same(transform(coefficients), transform(lambda g, U, V: (U.mT @ g, g @ V)), what)


def test_forward_mode_without_torch_func():
    g, U, V = drawn("dual")
    leaves = [x.clone().requires_grad_() for x in (g, U, V)]
    for f, inputs in (
        (project, leaves),
        (coefficients, leaves),
        (lambda g: project_(g * 1, U, V), leaves[:1]),
    ):
        assert gradcheck(f, inputs, check_forward_ad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tangents_have_the_dtype_of_g(dtype):
    args = [x.to(dtype) for x in drawn("dtypes")]
    tangents = [torch.randn_like(x) for x in args]
    _, ours = jvp(project, tuple(args), tuple(tangents))
    exact = [x.double() for x in args]
    _, truth = jvp(
        lambda g, U, V: by_formula(g, Basis(U), Basis(V)),
        tuple(exact),
        tuple(x.double() for x in tangents),
    )
    assert ours.dtype == dtype
    assert (ours - truth).norm() < 16 * torch.finfo(dtype).eps * truth.norm()


def test_constants_are_projected_within_a_transform():
    g, U, V = drawn("constants")
    out = torch.empty_like(g)
    _, tangent = jvp(lambda x: x * project(g, U, V, out=out), (g,), (torch.ones_like(g),))
    assert torch.allclose(tangent, project(g, U, V))
    _, tangent = jvp(lambda x: x[:, :2] * orthonormalize(g[:, :2]), (g,), (torch.ones_like(g),))
    assert torch.allclose(tangent, orthonormalize(g[:, :2]))


REFUSING = {
    "project out": lambda g, U, V: project(g, U, V, out=torch.empty_like(g)),
    "apply_": lambda g, U, V: apply_(g * 1, U, V, *(x.detach() for x in coefficients(g, U, V))),
    "apply_ A": lambda g, U, V: apply_(torch.zeros(6, 5).double(), U, V, *coefficients(g, U, V)),
    "restore_": lambda g, U, V: restore_(g * 1, U, V, protected=torch.zeros(6, 5).double()),
    "restore_ to": lambda g, U, V: restore_(torch.zeros(6, 5).double(), U, V, protected=g),
    "orthonormalize": lambda g, U, V: orthonormalize(g),
    "polar": lambda g, U, V: polar(g),
    "extend_basis": lambda g, U, V: extend_basis(U, g, energy=0.9),
    "merge_basis": lambda g, U, V: merge_basis(U, None, g, energy=0.9).columns,
}


@pytest.mark.parametrize("operator", REFUSING)
def test_what_has_no_derivative_refuses_every_kind(operator):
    """None of them gave an error in forward mode before, and a wrong tangent."""
    g, U, V = drawn("refused")

    def f(g):
        return REFUSING[operator](g, U, V)

    match = "without autograd" if operator == "project out" else "a tensor without gradient"
    with pytest.raises(ValueError, match=match):
        jvp(f, (g,), (g,))
    with pytest.raises(ValueError, match=match):
        jvp(vmap(f), (g[None],), (g[None],))
    with pytest.raises(ValueError, match=match):
        grad(smooth(f))(g)
    with pytest.raises(ValueError, match=match), forward_ad.dual_level():
        f(forward_ad.make_dual(g, g))
    with pytest.raises(ValueError, match=match):
        f(g.clone().requires_grad_())
    f(g)


@pytest.mark.slow
def test_compiled_forward_mode_is_right_or_an_error():
    """Dynamo takes a derivative that it doesn't know to be zero."""
    g, U, V = drawn("compiled")
    tangent = torch.randn_like(g)

    def f(g, tangent):
        return jvp(lambda g: project(g, U, V), (g,), (tangent,))[1]

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="eager")
    assert torch.allclose(compiled(g, tangent), project(tangent, U, V))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward mode in eager calls only"):
        torch.compile(f, backend="eager", fullgraph=True)(g, tangent)
