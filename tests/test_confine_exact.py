"""What is protected of a confined weight stays where it is, whatever AdamW does to C."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osf_torch import Subspace, confine
from tests.small_confine import (
    Conv1D,
    adamw,
    bases,
    batches,
    drawn,
    filled,
    moved,
    net,
    relative,
    train,
    weights_of,
    worst,
)

LIMIT = 1e-5  # of the protected part's norm, in float32
SHAPES = {"tall": (36, 20), "wide": (20, 36), "square": (28, 28)}


def pull(model, x):
    """Pulls everything, what is protected too, a long way off."""
    return model(x).square().mean() + (model(x) - 3.0).abs().mean()


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_two_hundred_steps_of_adamw_with_weight_decay(update, shape, rho):
    m, n = SHAPES[shape]
    model = filled(nn.Sequential(nn.Linear(n, m)), shape)
    subspaces = {"0.weight": drawn(m, n, rho, "UV", "high")}
    start = weights_of(model)
    confined = confine(model, subspaces, update=update)
    train(model, batches(200, rho, width=n), adamw(model.parameters()), pull)
    assert worst(start, model, subspaces) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT
    assert relative(model[0].weight, start["0.weight"]) > 0.05, "it did train"


@pytest.mark.slow
def test_a_thousand_steps_of_adamw_with_weight_decay():
    """Beside it the fault: the same training of the weight itself moves what is protected."""
    off = {}
    for confines in (True, False):
        model = net("thousand")
        subspaces = bases(model, 0.5)
        start = weights_of(model)
        if confines:
            confined = confine(model, subspaces)
        train(model, batches(1000, "thousand"), adamw(model.parameters()))
        off[confines] = worst(start, model, subspaces)
    assert max(confined.drift().values()) <= LIMIT
    assert off[True] <= LIMIT
    assert off[False] >= 1e-2


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("spans", ["high", "low"])
@pytest.mark.parametrize("sides", ["U", "V", "UV"])
@pytest.mark.parametrize("update", ["merge", "beside"])
def test_one_side_either_span_and_either_layer(update, sides, spans, kind):
    layer = nn.Linear(24, 18) if kind is nn.Linear else Conv1D(18, 24)
    model = filled(nn.Sequential(layer, nn.Tanh(), nn.Linear(18, 6)), sides, spans)
    m, n = layer.weight.shape
    subspaces = {"0.weight": drawn(m, n, 0.5, sides, spans)}
    start = weights_of(model)
    confined = confine(model, subspaces, update=update)
    xs = batches(100, sides, width=24)
    losses = train(model, xs, adamw(model.parameters()), pull)
    assert worst(start, model, subspaces) <= LIMIT
    assert confined.drift()["0.weight"] <= LIMIT
    assert losses[-1] < 0.7 * losses[0]
    assert relative(layer.weight, start["0.weight"]) > 0.05


def test_a_subspace_of_v_alone_by_its_arguments():
    """The outputs for the protected inputs are what they were, in the weights and in the model."""
    model = filled(nn.Sequential(nn.Linear(24, 18, bias=False)), "v alone")
    V = drawn(18, 24, 0.5, "V", "high").V
    confine(model, {"0.weight": Subspace(None, V)})
    inputs = (torch.randn(5, V.columns.shape[1]) @ V.columns.mT).contiguous()
    other = torch.randn(5, 24)
    before, beside = model(inputs), model(other)
    train(model, batches(50, "v alone", width=24), adamw(model.parameters()), pull)
    assert relative(model(inputs), before) <= LIMIT
    assert relative(model(other), beside) > 0.05


@pytest.mark.parametrize("update", ["merge", "beside"])
def test_drift_tells_of_writes_to_the_weight(update):
    model = net("writes")
    subspaces = bases(model, 0.5)
    confined = confine(model, subspaces, update=update)
    train(model, batches(3, "writes"), adamw(model.parameters()))
    before = confined.drift()
    assert max(before.values()) <= 1e-6
    start = weights_of(model)
    model._modules["second"]._parameters["weight"].data.mul_(0.97)
    after = confined.drift()
    assert after["first.weight"] == before["first.weight"]
    name = "second.weight"
    wanted = moved(start[name], weights_of(model)[name], subspaces[name])
    assert after["second.weight"] == pytest.approx(wanted, rel=0.5)
    assert wanted > 0.01


def test_drift_tells_of_what_is_written_through_the_property():
    """``module.weight.data`` is the weight's own memory, under a graph too."""
    model = net("property")
    confined = confine(model, bases(model, 0.5))
    model.first.weight.data[0, 0] += 1.0
    assert confined.drift()["first.weight"] > 1e-2
    with torch.no_grad():
        model.head.weight.mul_(0.9)
    assert confined.drift()["head.weight"] == pytest.approx(0.1, rel=0.05)
