"""A weight that is used more than once before a backward pass: its last basis is applied once."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from osf_kernels import free_block
from osf_torch import confine
from osf_torch.free.spec import places_of
from tests.small_confine import batches, drawn, filled, relative

TOKENS = 64


def pair(protected=0.5, transposed=False, width=20, height=28):
    """A layer in float64, plain and confined; the fewest FLOPs are with one basis first."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(height, width) if transposed else nn.Linear(width, height)
    model = filled(nn.Sequential(layer), "shared").double()
    plain = copy.deepcopy(model)
    m, n = layer.weight.shape
    confined = confine(model, {"0.weight": drawn(m, n, protected, "UV", "high")})
    (place,) = confined.places
    assert place.spec.order(TOKENS) in ("left", "right")
    return plain, model, place


def inputs(count, width=20):
    return [x.double() for x in batches(count, "shared", size=TOKENS, width=width)]


def wanted(plain, place):
    return free_block(plain[0].weight.grad, place.spec.left, place.spec.right)


def loss(y):
    return y.sin().square().sum()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(20, 28), (28, 20)])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_gradients_of_all_uses_are_added(uses, shape, transposed):
    plain, model, place = pair(transposed=transposed, width=shape[0], height=shape[1])
    for _ in range(2):
        for one in (plain, model):
            one.zero_grad()
            sum(loss(one(x)) for x in inputs(uses, shape[0])).backward()
        assert relative(place.get(place.spec.free).grad, wanted(plain, place)) < 1e-12
        assert place.spec.shared is None


@pytest.mark.parametrize("uses", [2, 256])
def test_sums_of_half_precision_are_of_the_blocks(uses):
    """Many uses under autocast err no more than one."""
    plain, model, place = pair()
    xs = [x + 0.5 for x in inputs(uses)]
    sum(loss(plain(x)) for x in xs).backward()
    model.float()
    total = 0.0
    for x in xs:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x.float())
        total = total + loss(y.float())
    total.backward()
    assert relative(place.get(place.spec.free).grad, wanted(plain, place)) < 0.02


def test_the_last_basis_is_applied_once():
    _, model, place = pair()

    def flops(uses):
        outputs = [loss(model(x)) for x in inputs(uses)]
        with FlopCounterMode(display=False) as counter:
            sum(outputs).backward()
        return counter.get_total_flops()

    one, two, three = map(flops, (1, 2, 3))
    spec = place.spec
    last = spec.right.width * spec.left.side.flops  # U_l of (m, q)
    assert spec.order(TOKENS) == "right"
    assert three - two == two - one == one - last


def test_backward_passes_of_their_own():
    """Each has its own sum, also of graphs that were made before the first of them was run."""
    plain, model, place = pair()
    for one in (plain, model):
        first, second, third = (loss(one(x)) for x in inputs(3))
        (first + second).backward(retain_graph=True)
        third.backward()
        second.backward()
    assert relative(place.get(place.spec.free).grad, wanted(plain, place)) < 1e-12


def test_a_forward_pass_without_a_backward_pass_adds_nothing():
    plain, model, place = pair()
    xs = inputs(3)
    model(xs[0])
    for one in (plain, model):
        loss(one(xs[1])).backward()
    block = place.get(place.spec.free)
    assert relative(block.grad, wanted(plain, place)) < 1e-12
    model(xs[0])
    with torch.no_grad():
        block.add_(0.1)  # as a step does: what is used from here on is another graph's
        plain[0].weight.copy_(model[0].weight)
    for one in (plain, model):
        one.zero_grad()
        loss(one(xs[2])).backward()
    assert relative(block.grad, wanted(plain, place)) < 1e-12


def test_hooks_see_the_whole_sum_once():
    plain, model, place = pair()
    block, seen, written = place.get(place.spec.free), [], []
    block.register_hook(lambda g: seen.append(g.clone()))
    block.register_post_accumulate_grad_hook(lambda p: written.append(p.grad.clone()))
    for one in (plain, model):
        sum(loss(one(x)) for x in inputs(2)).backward()
    assert len(seen) == len(written) == 1
    assert relative(seen[0], wanted(plain, place)) < 1e-12
    assert torch.equal(seen[0], written[0])


def test_copies_and_precisions_have_sums_of_their_own():
    plain, model, place = pair()
    other = copy.deepcopy(model)
    (of_other,) = places_of(other)
    (x, y) = inputs(2)
    (loss(model(x)) + loss(other(y)) + loss(model(y))).backward()
    sum(loss(plain(t)) for t in (x, y)).backward()
    assert relative(place.get(place.spec.free).grad, wanted(plain, place)) < 1e-12
    plain.zero_grad()
    loss(plain(y)).backward()
    assert relative(of_other.get(place.spec.free).grad, wanted(plain, place)) < 1e-12
    model.float()
    model.zero_grad()
    block = place.get(place.spec.free)
    x, y = x.float(), y.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(model(x))
    (half + loss(model(y))).backward()
    plain.zero_grad()
    sum(loss(plain(t.double())) for t in (x, y)).backward()
    assert block.grad.dtype == torch.float32
    assert relative(block.grad, wanted(plain, place)) < 0.02


def test_a_forward_pass_alone_keeps_nothing_alive():
    def held():
        _, model, place = pair()
        model(inputs(1)[0])
        assert place.spec.shared is not None
        return weakref.ref(place.spec), weakref.ref(place.get(place.spec.free))

    spec, block = held()
    gc.collect()
    assert spec() is None
    assert block() is None


@pytest.mark.parametrize("how", ["release", "next_task"])
def test_a_backward_pass_of_weights_that_are_confined_no_more(how):
    model = filled(nn.Sequential(nn.Linear(20, 28)), "ended")
    confined = confine(model, {"0.weight": drawn(28, 20, 0.5, "UV", "high")})
    y = loss(model(batches(1, "ended", size=TOKENS)[0]))
    if how == "release":
        confined.release()
    else:
        confined.next_task(progress=False)
    gc.collect()
    with pytest.raises(RuntimeError, match=r"release\(\) or next_task\(\) has ended since"):
        y.backward()
