"""Derivatives of other kinds than a backward pass: of torch.func, and of derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from osf_kernels import free_block
from osf_torch import confine
from tests.small_confine import batches, drawn, filled, relative

UPDATES = ["merge", "beside"]
# torch's forward mode scripts its rules when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
PLACES = ("0.weight", "2.weight")


def nets(update):
    """A plain model, and one that is confined and has moved, of the same weights."""
    model, plain = (
        filled(nn.Sequential(nn.Linear(20, 14), nn.Tanh(), nn.Linear(14, 3)), "transforms").double()
        for _ in range(2)
    )
    subspaces = {n: drawn(*model.get_parameter(n).shape, 0.4, "UV", "high") for n in PLACES}
    confined = confine(model, subspaces, update=update)
    with torch.no_grad():
        for i, place in enumerate(confined.places):
            place.get(place.spec.free).normal_(std=0.1)
            plain[2 * i].weight.copy_(model[2 * i].weight)
    return plain, model, confined


def inputs():
    (x,) = batches(1, "transforms", size=5)
    return x.double()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "transform",
    [
        vmap,
        jacrev,
        jacfwd,
        hessian,
        lambda f: vmap(grad(lambda v: f(v)[0])),
        lambda f: vmap(jacrev(f)),
    ],
)
def test_transforms_of_the_inputs(transform, update):
    plain, model, _ = nets(update)
    x = inputs()
    assert relative(transform(model)(x), transform(plain)(x)) < 1e-12


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_of_samples(update):
    plain, model, confined = nets(update)
    x = inputs()

    def of(net):
        held = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
        single = grad(lambda held, v: functional_call(net, held, (v,)).square().sum())
        return vmap(single, (None, 0))(held, x)

    ours, theirs = of(model), of(plain)
    for name, place in zip(PLACES, confined.places, strict=True):
        wanted = free_block(theirs[name], place.spec.left, place.spec.right)
        assert relative(ours[f"{name}_free"], wanted) < 1e-12


def penalty(run, x):
    """Of the gradient of the outputs, as WGAN-GP has it."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("update", UPDATES)
def test_derivatives_of_derivatives_are_refused_with_a_way_that_has_them(update):
    plain, model, confined = nets(update)
    x = inputs()
    with pytest.raises(RuntimeError, match=r"expected one derivative .*functional_call\(model"):
        penalty(model, x).backward()
    model.zero_grad()

    def run(x):
        trained = {n: p * 1 for n, p in model.named_parameters() if p.requires_grad}
        return functional_call(model, trained, (x,))

    penalty(run, x).backward()
    penalty(plain, x).backward()
    for layer, place in zip((plain[0], plain[2]), confined.places, strict=True):
        wanted = free_block(layer.weight.grad, place.spec.left, place.spec.right)
        assert relative(place.get(place.spec.free).grad, wanted) < 1e-12


@pytest.mark.parametrize("update", UPDATES)
def test_a_gradient_of_a_constant_depends_on_the_block_too(update):
    """Of a single layer's sum it is the sum of the weight's rows."""
    _, model, _ = nets(update)
    x = inputs().requires_grad_()
    (g,) = torch.autograd.grad(model[0](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative"):
        g.square().sum().backward()


def of_inputs(model, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((model(x).sin() * x[:, :3]).sum(), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)


def of_blocks(model, x):
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(x).square().mean()
    found = torch.autograd.grad(loss, trained, create_graph=True)
    return torch.autograd.grad(loss + sum(g.square().sum() for g in found), trained)


def of_constants(model, x):
    """The gradients of a sum of outputs, which depend on the inner layer through tanh alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x).sum(), trained, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in found), trained, allow_unused=True)


SECOND = {
    "of inputs": of_inputs,
    "of inputs that need a gradient, in blocks": lambda model, x: of_blocks(
        model, x.clone().requires_grad_()
    ),
    "of blocks": of_blocks,
    "of a sum of outputs": of_constants,
    "hessian": lambda model, x: torch.autograd.functional.hessian(lambda v: model(v).sum(), x),
    "hvp": lambda model, x: torch.autograd.functional.hvp(lambda v: model(v).sum(), x, x),
    "jvp": lambda model, x: torch.autograd.functional.jvp(model, x, x),  # a trick of two
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("second", SECOND)
def test_derivatives_of_some_inputs_alone_are_refused_too(second, update):
    """autograd.grad passes over what isn't on the way to them."""
    plain, model, _ = nets(update)
    SECOND[second](plain, inputs())
    with pytest.raises(RuntimeError, match="expected one derivative"):
        SECOND[second](model, inputs())


@pytest.mark.parametrize("update", UPDATES)
def test_first_derivatives_by_functional_autograd(update):
    plain, model, _ = nets(update)
    for of in (
        torch.autograd.functional.jacobian,
        lambda f, x: torch.autograd.functional.vjp(f, x, x[:, :3])[1],
    ):
        assert relative(of(model, inputs()), of(plain, inputs())) < 1e-12


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_gradients_alone_is_made(update):
    _, model, confined = nets(update)
    x = inputs()
    model(x).sin().sum().backward(create_graph=True)
    found = [place.get(place.spec.free).grad.detach().clone() for place in confined.places]
    model.zero_grad()
    model(x).sin().sum().backward()
    for place, one in zip(confined.places, found, strict=True):
        assert torch.equal(place.get(place.spec.free).grad, one)


@pytest.mark.parametrize("update", UPDATES)
def test_inputs_of_another_precision_are_refused(update):
    _, model, _ = nets(update)
    with pytest.raises(RuntimeError, match=r"inputs of '0\.weight' to be torch\.float64.*autocast"):
        model(inputs().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(inputs().float()).dtype == torch.bfloat16


def test_functional_call_says_nothing_of_frozen_blocks(caplog):
    _, model, _ = nets("merge")
    held = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    functional_call(model, held, (inputs(),))
    assert "frozen" not in caplog.text


def test_derivatives_of_derivatives_of_a_compiled_model_are_refused():
    """By a backend whose graphs run under autograd as they are; others refuse by themselves."""
    _, model, _ = nets("merge")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="expected one derivative"):
        penalty(compiled, inputs()).backward()
