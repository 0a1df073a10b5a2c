"""osf_torch: project_grad, protect and its Guard on a small model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from osf_kernels import Basis, project
from osf_torch import Subspace, project_grad, protect


def model_and_subspaces(rank=4, spans="high"):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    subspaces = {}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            U, S, Vh = torch.linalg.svd(p.detach())
            if spans == "high":
                subspaces[name] = Subspace(U[:, :rank], Vh[:rank].mT, S[:rank])
            else:
                low = (Basis(U[:, rank:], "low"), Basis(Vh[rank:].mT, "low"))
                subspaces[name] = Subspace(*low)
    return model, subspaces


def train(model, optimizer, steps=20, backward_per_step=1):
    gen = torch.Generator().manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(backward_per_step):
            x = torch.randn(8, 12, generator=gen)
            (model(x) - x[:, :10]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("spans", ["high", "low"])
@pytest.mark.parametrize("when", ["step", "backward"])
@pytest.mark.parametrize("mode", ["complement", "core"])
def test_the_protected_part_holds_through_adamw(spans, when, mode):
    model, subspaces = model_and_subspaces(spans=spans)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    guard = protect(model, subspaces, optimizer=optimizer, when=when, mode=mode, record=True)
    assert guard.when == when
    train(model, optimizer)
    guard.verify()
    for name, drift in guard.drift().items():
        assert drift < 1e-6, name
        assert (model.get_parameter(name) - before[name]).norm() > 0.01, "it did train"
    for leak in guard.leak().values():
        assert leak.raw > 0.05
        assert leak.applied < 1e-6


def test_without_restore_adamw_drifts():
    model, subspaces = model_and_subspaces()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, subspaces, optimizer=optimizer, restore=False)
    train(model, optimizer)
    assert max(guard.drift().values()) > 1e-3


@pytest.mark.parametrize("when", ["step", "backward"])
def test_accumulated_gradients_are_the_projection_of_the_sum(when):
    model, subspaces = model_and_subspaces()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    protect(model, subspaces, optimizer=optimizer, when=when, restore=False)
    train(model, optimizer, steps=1, backward_per_step=3)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.0), steps=1, backward_per_step=3)
    for name, s in subspaces.items():
        wanted = project(plain.get_parameter(name).grad, s.U, s.V)
        assert torch.allclose(model.get_parameter(name).grad, wanted, atol=1e-6)


def test_auto_says_what_it_chose():
    model, subspaces = model_and_subspaces()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert protect(model, subspaces, optimizer=optimizer).when == "step"
    assert protect(model, subspaces, restore=False).when == "backward"


def test_remove_leaves_no_trace():
    model, subspaces = model_and_subspaces()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = protect(model, subspaces, optimizer=optimizer, when="backward")
    guard.remove()
    guard.remove()
    train(model, optimizer)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert guard.projections == 0


def test_a_weight_without_a_gradient_is_left_alone():
    model, subspaces = model_and_subspaces()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    protect(model, subspaces, optimizer=optimizer)
    untouched = model[2].weight.detach().clone()
    model[0](torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[2].weight, untouched)


def test_verify_notices():
    model, subspaces = model_and_subspaces()
    optimizer = torch.optim.AdamW(model.parameters())
    guard = protect(model, subspaces, optimizer=optimizer)
    with pytest.raises(RuntimeError, match=r"Guard\.verify: expected projected gradients"):
        guard.verify()
    train(model, optimizer, steps=1)
    guard.verify()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="to be the one that was protected, got another"):
        guard.verify()


def test_leak_says_what_it_needs():
    model, subspaces = model_and_subspaces()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="record=True"):
        protect(model, subspaces, optimizer=optimizer).leak()
    with pytest.raises(RuntimeError, match="got none so far"):
        protect(model, subspaces, optimizer=optimizer, record=True).leak()


def test_refusals_attach_nothing():
    model, subspaces = model_and_subspaces()
    other, _ = model_and_subspaces()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    U = subspaces["0.weight"].U
    for arguments, text in (
        ({"subspaces": {}}, "at least one parameter, got none"),
        ({"subspaces": {"nowhere": subspaces["0.weight"]}}, "got 'nowhere'"),
        (
            {"subspaces": {"0.weight": Subspace(U.mT, None)}},
            "parameter '0.weight': osf_kernels.plan",
        ),
        ({"optimizer": elsewhere}, "to own parameter '0.weight'"),
        ({"optimizer": None}, "optimizer to be given with restore=True"),
        ({"optimizer": None, "restore": False, "when": "step"}, 'given with when="step"'),
        ({"when": "later"}, "expected when to be"),
    ):
        call = {"subspaces": subspaces, "optimizer": optimizer} | arguments
        with pytest.raises(ValueError, match=text):
            protect(model, **call)
    s = subspaces["0.weight"]
    foreign = Subspace(s.U, s.V, s.S * 1.5)
    with pytest.raises(ValueError, match=r"parameter '0.weight' to be singular triplets of"):
        protect(model, {"0.weight": foreign}, optimizer=optimizer)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ValueError, match="every named parameter is frozen"):
        protect(frozen, subspaces, restore=False)
    train(model, optimizer, steps=1)
    g = model[0].weight.grad
    assert (U.mT @ g).norm() > 1e-3 * g.norm(), "a hook was left behind"


@pytest.mark.parametrize("mode", ["complement", "core"])
def test_project_grad(mode):
    gen = torch.Generator().manual_seed(2)
    W = torch.randn(9, 7, generator=gen, requires_grad=True)
    U = torch.linalg.qr(torch.randn(9, 3, generator=gen))[0]
    V = Basis(torch.linalg.qr(torch.randn(7, 4, generator=gen))[0], "low")
    x = torch.randn(7, 5, generator=gen)
    y = project_grad(W, U, V, mode=mode)
    assert torch.equal(y, W)
    (projected,) = torch.autograd.grad((y @ x).square().sum(), W)
    (plain,) = torch.autograd.grad((W @ x).square().sum(), W)
    assert torch.allclose(projected, project(plain, U, V, mode=mode), atol=1e-5)
    with pytest.raises(ValueError, match=r"osf_torch\.project_grad: .*pass U\.mT"):
        project_grad(W, U.mT, V)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_project_grad_compiles_as_one_graph():
    torch._dynamo.reset()
    W = torch.randn(9, 7, requires_grad=True)
    U = torch.linalg.qr(torch.randn(9, 3))[0]

    def loss(W):
        return project_grad(W, U, None).sin().sum()

    (expected,) = torch.autograd.grad(loss(W), W)
    (actual,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(W), W)
    assert torch.allclose(actual, expected, atol=1e-6)
