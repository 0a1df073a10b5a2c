"""A guard in the settings that training code runs in: optimizers, scalers, clipping, compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from osf_kernels import project
from osf_torch import protect, refresh
from tests.helpers import generator_for

ROUNDING = 2e-6  # of float32 bases and a few steps, relative


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 28), nn.Linear(28, 20), nn.Linear(20, 6)
        self.recompute = False

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.recompute:
            hidden = checkpoint(lambda t: torch.tanh(self.second(t)), hidden, use_reentrant=False)
        else:
            hidden = torch.tanh(self.second(hidden))
        return self.head(hidden)


def net(*key):
    model = Net()
    gen = generator_for("net", *key)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen))
    return model


def bases(model, ratio=0.4, **options):
    return refresh(model, ratio, progress=False, compute_dtype=torch.float64, **options)


def batches(count, *key):
    gen = generator_for("batches", *key)
    return [torch.randn(16, 20, generator=gen) for _ in range(count)]


def loss_of(model, x):
    return (model(x) - x[:, :6].sin()).square().mean()


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def held(guard, limit=ROUNDING):
    worst = max(guard.drift().values())
    assert worst <= limit, worst
    guard.verify()


OPTIMIZERS = {
    "adamw": adamw,
    "adamw foreach": lambda model: adamw(model, foreach=True),
    "adamw fused": lambda model: adamw(model, fused=True),
    "adamw amsgrad": lambda model: adamw(model, amsgrad=True),
    "sgd momentum": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True
    ),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_the_protected_part_where_it_was(name):
    model = net(name)
    start = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model)
    guard = protect(model, bases(model), optimizer=optimizer)
    for x in batches(25, name):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    held(guard)
    for a, b in zip(model.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() > 1e-3 * b.norm(), "it did train"


@pytest.mark.slow
def test_a_thousand_steps_of_adamw_with_weight_decay():
    drifts = {}
    for restore in (True, False):
        model = net("thousand")
        subspaces = bases(model, keep="all", complement=False)
        optimizer = adamw(model)
        guard = protect(model, subspaces, optimizer=optimizer, restore=restore)
        for x in batches(1000, "thousand"):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        drifts[restore] = max(guard.drift().values())
    assert drifts[True] <= 1e-5
    assert drifts[False] >= 1e-2


def test_an_optimizer_within_another_is_the_one_that_is_hooked():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = net("wrapped")
    wrapper = Wrapper(adamw(model))
    guard = protect(model, bases(model), optimizer=wrapper)
    loss_of(model, batches(1)[0]).backward()
    wrapper.step()
    assert guard.projections == 1
    held(guard)


def test_a_closure_is_projected_too():
    """LBFGS evaluates within the step: gradients are projected as they accumulate."""
    model = net("closure")
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    guard = protect(model, bases(model), optimizer=optimizer, when="backward")
    (x,) = batches(1, "closure")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    before = loss_of(model, x)
    optimizer.step(closure)
    assert guard.projections > 1
    assert loss_of(model, x) < before
    held(guard)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_step_that_the_scaler_skips_changes_nothing(fused, when):
    model = net("scaler", fused)
    optimizer = adamw(model, fused=fused)
    guard = protect(model, bases(model), optimizer=optimizer, when=when)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i, x in enumerate(batches(6, fused, when)):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        overflow = i in (0, 3)
        if overflow:
            model.second.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert same == overflow
    held(guard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("when", ["step", "backward"])
def test_autocast(dtype, when):
    """Projecting inside of the region, or by hooks that run there, is as exact as outside."""
    model = net("autocast", dtype)
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, when=when, record=True)
    for x in batches(4, "autocast"):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
    assert max(leak.applied for leak in guard.leak().values()) <= ROUNDING
    held(guard)


@pytest.mark.parametrize("when", ["step", "backward"])
def test_clipping_after_projecting_counts_what_is_kept(when):
    model, plain = net("clip"), net("clip")
    subspaces = bases(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = protect(model, subspaces, optimizer=optimizer, when=when, restore=False)
    (x,) = batches(1, "clip")
    loss_of(model, x).backward()
    loss_of(plain, x).backward()
    kept = {
        name: project(p.grad, subspaces[name].U, subspaces[name].V) if name in subspaces else p.grad
        for name, p in plain.named_parameters()
    }
    wanted = torch.cat([g.reshape(-1) for g in kept.values()]).norm()
    norm = guard.clip_grad_norm_(0.5 * float(wanted))
    assert torch.allclose(norm, wanted, rtol=1e-5)
    projections = guard.projections
    optimizer.step()
    assert guard.projections == projections, "clipped gradients are projected still"
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, 0.5 * kept[name], atol=1e-6)


def test_clipping_before_projecting_counts_everything():
    model, plain = net("clip"), net("clip")
    subspaces = bases(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    protect(model, subspaces, optimizer=optimizer, restore=False)
    (x,) = batches(1, "clip")
    for one in (model, plain):
        loss_of(one, x).backward()
        nn.utils.clip_grad_norm_(one.parameters(), 0.01)
    optimizer.step()
    for name, s in subspaces.items():
        wanted = project(plain.get_parameter(name).grad, s.U, s.V)
        assert torch.allclose(model.get_parameter(name).grad, wanted, atol=1e-7)


def test_a_gradient_that_grows_after_it_was_projected_is_projected_again():
    model = net("grows")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, bases(model), optimizer=optimizer, restore=False)
    first, second = batches(2, "grows")
    loss_of(model, first).backward()
    guard.project_grads()
    guard.project_grads()
    assert guard.projections == 1, "nothing was written in between"
    loss_of(model, second).backward()
    optimizer.step()
    assert guard.projections == 2
    s = guard.subspaces["second.weight"]
    g = model.second.weight.grad
    assert (g - project(g, s.U, s.V)).norm() <= ROUNDING * g.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_compiled_model_and_a_compiled_step(when):
    torch._dynamo.reset()
    losses = {}
    for compiled in (False, True):
        model = net("compiled")
        subspaces = bases(model)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = adamw(model)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        guard = protect(run, subspaces, optimizer=optimizer, when=when)
        losses[compiled] = []
        for x in batches(5, "compiled"):
            optimizer.zero_grad()
            loss = loss_of(run, x)
            loss.backward()
            step()
            losses[compiled].append(loss.item())
        assert guard.projections == 5 * (1 if when == "step" else 3)
        held(guard)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_activation_checkpointing():
    model = net("recompute")
    model.recompute = True
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer, when="backward")
    for x in batches(3, "recompute"):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    assert guard.projections == 9
    held(guard)


def test_a_shared_weight_is_projected_once():
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    subspaces = bases(model)
    assert list(subspaces) == ["0.weight"]
    subspaces = {"0.weight": subspaces["0.weight"], "2.weight": subspaces["0.weight"]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = protect(model, subspaces, optimizer=optimizer, when="backward")
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    assert guard.projections == 1
    held(guard)


def test_frozen_weights_are_left_out():
    model = net("frozen")
    subspaces = bases(model)
    model.first.weight.requires_grad_(False)
    optimizer = adamw(model)
    guard = protect(model, subspaces, optimizer=optimizer)
    assert set(guard.drift()) == {"second.weight", "head.weight"}
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    held(guard)


@pytest.mark.parametrize("when", ["step", "backward"])
def test_protecting_again_replaces_the_hooks(when):
    model = net("again")
    optimizer = adamw(model)
    subspaces = bases(model)
    earlier = protect(model, subspaces, optimizer=optimizer, when=when)
    part = {name: subspaces[name] for name in ("first.weight", "head.weight")}
    later = protect(model, part, optimizer=optimizer, when="backward")
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert earlier.projections == 1, "of the weight that was left to it"
    assert set(earlier.drift()) == {"second.weight"}
    assert later.projections == 2
    last = protect(model, subspaces, optimizer=optimizer, when="step")
    optimizer.step()
    assert (earlier.projections, later.projections, last.projections) == (1, 2, 1)
    with pytest.raises(RuntimeError, match=r"expected hooks on the model, got none"):
        later.verify()


def test_verify_notices_a_deepcopy():
    model = net("deepcopy")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    guard.verify(model)
    guard.verify(nn.Sequential(model)[0])
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"a deepcopy has no hooks"):
        guard.verify(twin)


def test_verify_notices_an_optimizer_that_lets_go():
    model = net("lets go")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = list(model.head.parameters())
    with pytest.raises(RuntimeError, match=r"expected the optimizer to own parameter"):
        guard.verify()


def test_verify_notices_weights_that_moved():
    model = net("moved")
    optimizer = adamw(model)
    guard = protect(model, bases(model), optimizer=optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    with torch.no_grad():
        model.second.weight.mul_(0.99)
    with pytest.raises(RuntimeError, match=r"protected part of 'second\.weight' .* drift of 1"):
        guard.verify()
    guard.verify(tol=0.05)


def test_bfloat16_weights_drift_by_their_rounding():
    model = net("bf16").to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    guard = protect(model, bases(model), optimizer=optimizer)
    for x in batches(10, "bf16"):
        optimizer.zero_grad()
        loss_of(model, x.bfloat16()).backward()
        optimizer.step()
    held(guard, 4 * torch.finfo(torch.bfloat16).eps)
    with torch.no_grad():
        model.second.weight.mul_(0.8)
    with pytest.raises(RuntimeError, match="drift of"):
        guard.verify()


def test_names_are_those_of_the_bare_model():
    model = net("names")
    subspaces = bases(model)
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert list(bases(wrapped)) == list(subspaces)
    optimizer = adamw(model)
    guard = protect(wrapped, subspaces, optimizer=optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    guard.verify(wrapped)
