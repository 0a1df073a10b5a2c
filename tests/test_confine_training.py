"""A confined model where training code runs it: micro-batches, scalers, recomputing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from osf_torch import confine
from tests.small_confine import (
    Explicit,
    adamw,
    bases,
    batches,
    loss_of,
    net,
    relative,
    train,
    weights_of,
    worst,
)

LIMIT = 3e-6
UPDATES = ["merge", "beside"]


@pytest.mark.parametrize("update", UPDATES)
def test_gradient_accumulation_is_one_big_batch(update):
    grads = []
    (x,) = batches(1, "accumulation", size=32)
    for parts in (1, 4):
        model = net("accumulation")
        confined = confine(model, bases(model), update=update)
        for part in x.chunk(parts):
            (loss_of(model, part) / parts).backward()
        grads.append([t.grad for t in confined.parameters()])
    for one, four in zip(*grads, strict=True):
        assert relative(four, one) <= LIMIT


@pytest.mark.parametrize("update", UPDATES)
def test_two_forward_passes_before_their_backward_passes(update):
    """As of contrastive losses, or micro-batches that a pipeline interleaves."""
    x, y = batches(2, "interleaved")
    grads = []
    for interleaved in (False, True):
        model = net("interleaved")
        confined = confine(model, bases(model), update=update)
        if interleaved:
            losses = [loss_of(model, x), loss_of(model, y)]
            for loss in reversed(losses):
                loss.backward()
        else:
            loss_of(model, x).backward()
            loss_of(model, y).backward()
        grads.append([t.grad for t in confined.parameters()])
    for one, other in zip(*grads, strict=True):
        assert relative(other, one) <= LIMIT


def test_clipping_counts_the_free_block_alone():
    model = net("clip")
    plain, subspaces = copy.deepcopy(model), bases(model)
    confined = confine(model, subspaces)
    explicit = Explicit(plain, confined)
    (x,) = batches(1, "clip")
    loss_of(model, x).backward()
    loss_of(explicit, x).backward()
    loss_of(plain, x).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    wanted = nn.utils.clip_grad_norm_(explicit.parameters(), 1e-3)
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert norm < 0.9 * nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    for ours, theirs in zip(confined.parameters(), explicit.trained(), strict=True):
        assert relative(ours.grad, theirs.grad) <= 1e-4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_a_step_that_the_scaler_skips_changes_nothing(update, fused):
    model = net("scaler")
    start, subspaces = weights_of(model), bases(model)
    confined = confine(model, subspaces, update=update)
    optimizer = adamw(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i, x in enumerate(batches(6, "scaler")):
        before = weights_of(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        overflow = i in (0, 3)
        if overflow:
            confined.parameters()[1].grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert same == overflow
    assert worst(start, model, subspaces) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("update", [*UPDATES, "rank"])
def test_autocast(update, dtype):
    """As close to float64 as plain autocast of the same model is; outputs of its dtype."""
    options = {"rank": 3} if update == "rank" else {"update": update}
    model = net("autocast")
    plain, subspaces = copy.deepcopy(model), bases(model)
    start = weights_of(model)
    confined = confine(model, subspaces, **options)
    explicit = Explicit(plain, confined)
    off = {"ours": 0.0, "plain": 0.0}
    optimizer = adamw(model.parameters())
    for x in batches(4, "autocast"):
        # Gradients are compared at the same parameters: AdamW takes a step of full length by the
        # sign of a gradient that rounding alone may turn.
        with torch.no_grad():
            for t, mine in zip(explicit.trained(), confined.parameters(), strict=True):
                t.copy_(mine)
            for name, t in explicit.plain.named_parameters():
                if name.endswith("bias"):
                    t.copy_(model.get_parameter(name))
        optimizer.zero_grad()
        explicit.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
            assert out.dtype == dtype
            loss_of(model, x).backward()
        explicit(x)
        loss_of(explicit, x).backward()
        for t, wanted in zip(confined.parameters(), explicit.trained(), strict=True):
            assert t.dtype == t.grad.dtype == torch.float32
            if wanted.grad.any():
                off["ours"] = max(off["ours"], relative(t.grad, wanted.grad))
        with torch.autocast("cpu", dtype=dtype):
            twin = copy.deepcopy(plain)
            loss_of(twin, x).backward()
        plain.zero_grad()
        loss_of(plain.double(), x.double()).backward()
        for p, wanted in zip(twin.parameters(), plain.parameters(), strict=True):
            if p.dim() == 2:
                off["plain"] = max(off["plain"], relative(p.grad, wanted.grad))
        plain.float()
        optimizer.step()
    assert off["ours"] <= 4 * off["plain"], off
    assert worst(start, model, subspaces) <= LIMIT


def test_autocast_leaves_float64_alone_as_torch_does():
    model = net("doubles").double()
    (x,) = batches(1, "doubles")
    confined = confine(model, bases(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x.double())
    assert out.dtype == torch.float64
    out.square().mean().backward()
    assert all(t.grad.dtype == torch.float64 for t in confined.parameters())


@pytest.mark.parametrize("update", [*UPDATES, "rank"])
def test_an_optimizer_in_the_backward_pass(update):
    """Each C is stepped as its gradient is accumulated, and its weight is merged at once."""
    options = {"rank": 3} if update == "rank" else {"update": update}
    finals = []
    for within in (True, False):
        model = net("in backward")
        subspaces, start = bases(model), weights_of(model)
        confined = confine(model, subspaces, **options)
        held = [p for p in model.parameters() if p.requires_grad]
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1) for p in held}
        stepped = []

        def step(p, optimizers=optimizers, stepped=stepped):
            optimizers[p].step()
            optimizers[p].zero_grad()
            stepped.append(p)

        if within:
            for p in held:
                p.register_post_accumulate_grad_hook(step)
        for x in batches(5, "in backward"):
            loss_of(model, x).backward()
            if within:
                assert len(stepped) == len(held)
                assert all(p.grad is None for p in model.parameters())
                stepped.clear()
            for p in held:
                if not within:
                    step(p)
        finals.append(weights_of(model))
        assert worst(start, model, subspaces) <= LIMIT
        assert max(confined.drift().values()) <= LIMIT
    for name, t in finals[0].items():
        assert relative(t, finals[1][name]) <= 1e-5


def test_evaluation_is_that_of_the_plain_model():
    model = net("evaluation")
    confine(model, bases(model))
    train(model, batches(3, "evaluation"), adamw(model.parameters()))
    twin = net("another")
    twin.load_state_dict(model.state_dict())
    (x,) = batches(1, "evaluation", size=7)
    wanted = twin(x)
    assert torch.equal(model(x), wanted)
    model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = model(x)
        assert torch.equal(out, wanted)
        assert not out.requires_grad
    for t in model.parameters():
        t.requires_grad_(False)
    assert torch.equal(model(x), wanted)
    assert not model(x).requires_grad, "frozen whole"
