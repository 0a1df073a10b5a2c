"""As on a GPU, where the count of writes to C tells whether W is up to date, not its values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from osf_torch import confine
from osf_torch.free import merging
from tests.small_confine import (
    adamw,
    bases,
    batches,
    net,
    relative,
    train,
    weights_of,
    worst,
)

LIMIT = 3e-6


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(merging, "is_compared", lambda C: False)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def trained(request):
    model = net("counted").to(request.param)
    subspaces, start = bases(net("counted"), 0.5), weights_of(model)
    confined = confine(model, subspaces)
    train(model, inputs(model), adamw(model.parameters()))
    limit = LIMIT if request.param == torch.float32 else torch.finfo(request.param).eps
    return model, confined, subspaces, start, limit


def inputs(model, count=3):
    dtype = next(model.parameters()).dtype
    return [x.to(dtype) for x in batches(count, "counted")]


def is_of_its_state(model, limit):
    """The model runs as the plain one with its state does."""
    plain = net("plain").to(next(model.parameters()).dtype)
    (x,) = inputs(model, 1)
    out = model(x)  # before state_dict, which would merge
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    assert relative(out, plain(x)) <= 4 * limit


def test_nothing_is_merged_that_nothing_has_written_to(trained, monkeypatch):
    model, _, _, _, _ = trained
    monkeypatch.setattr(merging, "_merge_whole", None)
    for x in inputs(model):
        model(x).sum().backward()
        with torch.no_grad():
            model(x)


def test_copies_averages_and_swaps(trained):
    model, confined, subspaces, start, limit = trained
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    twin = copy.deepcopy(model)
    averaged.update_parameters(model)
    train(model, inputs(model), adamw(model.parameters()))
    averaged.update_parameters(model)
    for one in (twin, averaged.module, model):
        is_of_its_state(one, limit)
        assert worst(start, one, subspaces) <= limit
    (x,) = inputs(model, 1)
    wanted = averaged(x)
    assert relative(model(x), wanted) > 1e-3
    with torch.no_grad():
        for p, mean in zip(model.parameters(), averaged.module.parameters(), strict=True):
            p.copy_(mean)
    assert relative(model(x), wanted) <= 4 * limit
    # Other memory in the place of C's, as averages swap it that avoid copies.
    before = [t.data for t in confined.parameters()]
    for t in confined.parameters():
        t.data = t.data + 0.1
    is_of_its_state(model, limit)
    assert relative(model(x), wanted) > 1e-2
    for t, held in zip(confined.parameters(), before, strict=True):
        t.data = held
    assert relative(model(x), wanted) <= 4 * limit
    assert worst(start, model, subspaces) <= limit


def test_states(trained):
    model, confined, _, _, limit = trained
    saved = copy.deepcopy((model.state_dict(), confined.state_dict()))
    (x,) = inputs(model, 1)
    wanted = model(x)
    train(model, inputs(model), adamw(model.parameters()))
    model.load_state_dict(saved[0])
    is_of_its_state(model, limit)
    confined.load_state_dict(saved[1])
    assert relative(model(x), wanted) <= 4 * limit
    is_of_its_state(model, limit)
    resumed = net("other").to(x.dtype)
    resumed.load_state_dict(saved[0])
    confine(resumed, saved[1])
    assert relative(resumed(x), wanted) <= 4 * limit
    other = net("other").to(x.dtype)
    model.load_state_dict(other.state_dict())
    assert relative(model(x), other(x)) <= 4 * limit


@pytest.mark.parametrize("how", ["merge", "state_dict", "drift", "release", "next_task"])
def test_what_is_written_through_data_is_seen_where_it_is_asked_for(trained, how):
    model, confined, subspaces, start, limit = trained
    before = weights_of(model)
    for t in confined.parameters():
        t.data.add_(0.1)
    if how == "merge":
        confined.merge()
    elif how == "drift":
        assert max(confined.drift().values()) <= limit
    elif how == "release":
        confined.release()
    elif how == "next_task":
        confined.next_task(progress=False)
    state = model.state_dict()
    assert relative(state["first.weight"], before["first.weight"]) > 0.05
    is_of_its_state(model, limit)
    assert worst(start, model, subspaces) <= limit
