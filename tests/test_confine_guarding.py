"""What else writes to a confined model: refused, told, or what training goes on from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from osf_torch import Confined, confine
from osf_torch.integrations import lora
from tests.small_confine import adamw, bases, batches, net, relative, train, weights_of, worst

MODES = {
    "merge": {},
    "zero": {"decay_to": "zero"},
    "beside": {"update": "beside"},
    "rank": {"rank": 3},
}
LIMIT = 1e-5


def confined_net(mode="merge", *key):
    model = net("guarding", *key)
    subspaces = bases(model)
    return model, confine(model, subspaces, **MODES[mode]), subspaces


def decayed(model, steps=40):
    """Training whose gradients are all zero, so that weight decay alone moves anything."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.ones(2, 20)) * 0).sum().backward()
        optimizer.step()


# --- a state that is loaded ---


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_state_is_what_training_goes_on_from(mode, caplog):
    """C begins anew, so that decay pulls to what was loaded, and the log says so once."""
    model, confined, subspaces = confined_net(mode)
    start = weights_of(model)
    train(model, batches(6, mode), adamw(model.parameters()))
    other = weights_of(model)
    train(model, batches(6, mode, "more"), adamw(model.parameters()))
    caplog.clear()
    model.load_state_dict(other)
    for name, t in weights_of(model).items():
        assert relative(t, other[name]) <= 1e-6, name
    told = [r for r in caplog.records if "C begins anew" in r.getMessage()]
    assert len(told) == (mode != "zero")
    if mode != "zero":
        assert not any(place.block.any() for place in confined.places)
        decayed(model)
        for name in subspaces:
            assert relative(weights_of(model)[name], other[name]) <= 1e-6
    train(model, batches(6, mode, "on"), adamw(model.parameters()))
    assert worst(start, model, subspaces) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT


def test_a_fresh_model_that_is_loaded_says_nothing(caplog):
    model, _, _ = confined_net()
    caplog.clear()
    model.load_state_dict(weights_of(model))
    assert not caplog.records


@pytest.mark.parametrize("mode", ["merge", "beside", "rank"])
def test_the_best_of_a_run_is_loaded_with_its_c(mode):
    model, confined, _ = confined_net(mode)
    train(model, batches(4, mode), adamw(model.parameters()))
    best, state = weights_of(model), copy.deepcopy(confined.state_dict())
    blocks = [place.block.detach().clone() for place in confined.places]
    train(model, batches(4, mode, "worse"), adamw(model.parameters()))
    model.load_state_dict(best)
    confined.load_state_dict(state)
    for place, block in zip(confined.places, blocks, strict=True):
        assert relative(place.block, block) <= 1e-6
    for name, t in weights_of(model).items():
        assert relative(t, best[name]) <= 1e-6, name


def test_an_adapter_of_other_weights_isnt_saved(tmp_path):
    pytest.importorskip("safetensors")
    model, confined, _ = confined_net("rank")
    train(model, batches(4, "adapter"), adamw(model.parameters()))
    best, state = weights_of(model), copy.deepcopy(confined.state_dict())
    train(model, batches(4, "adapter", "worse"), adamw(model.parameters()))
    lora.save_adapter(confined, tmp_path / "last")
    model.load_state_dict(best)
    with pytest.raises(ValueError, match="a state was loaded since"):
        lora.save_adapter(confined, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    confined.load_state_dict(state)
    lora.save_adapter(confined, tmp_path / "best")
    with pytest.raises(TypeError, match="what confine"):
        lora.save_adapter(model, tmp_path / "model")


# --- writes to the weights ---


def added(layer):
    with torch.no_grad():
        layer.weight.add_(0.1)


WRITES = {
    "added": added,
    "through data": lambda layer: layer.weight.data.mul_(2),
    "drawn anew": lambda layer: layer.reset_parameters(),
    "initialised": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "the parameter": lambda layer: layer._parameters["weight"].data.add_(0.1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_step_refuses_weights_that_something_has_written_to(write):
    model, confined, _ = confined_net("merge", write)
    optimizer = adamw(model.parameters())
    train(model, batches(3, write), optimizer)
    WRITES[write](model.first)
    (x,) = batches(1, write, "refused")
    optimizer.zero_grad()
    model(x).sum().backward()
    blocks = [t.detach().clone() for t in confined.parameters()]
    with pytest.raises(RuntimeError, match=r"'first.weight' to be as the last step left it"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(blocks, confined.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"verify: expected what is protected of 'first.weight'"):
        confined.verify()
    confined.verify(tol=1e3)


class DecaysAll(torch.optim.Optimizer):
    """Shrinks whatever it is given, gradient or not, frozen or not, in its own step."""

    def __init__(self, parameters, through_data):
        super().__init__(parameters, {})
        self.through_data = through_data

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            (p.data if self.through_data else p).mul_(0.9)
            if p.grad is not None:
                p.sub_(0.1 * p.grad)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("update", ["merge", "beside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_writes_to_frozen_weights_is_refused(dtype, update, through_data):
    """Although C is merged right after its step: into the weight, or W₀, that it has written to."""
    model = net("guarding", "decays all").to(dtype)
    confined = confine(model, bases(model), update=update)
    optimizer = DecaysAll(model.parameters(), through_data)

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 20, dtype=dtype)).square().sum().backward()
        optimizer.step()

    step()
    with pytest.raises(RuntimeError, match=r"protected part has moved by .* something has written"):
        step()
    with pytest.raises(RuntimeError, match="something has written to the weight itself"):
        confined.verify()


@pytest.mark.parametrize("mode", ["merge", "beside"])
def test_a_block_that_isnt_finite_is_named(mode):
    model, confined, _ = confined_net(mode)
    optimizer = torch.optim.SGD(confined.parameters(), lr=0.1)
    model(torch.full((2, 20), float("nan"))).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"verify.* got nan: its free block '.*_free' isn't fin"):
        confined.verify()


def test_rounding_of_a_weight_that_has_grown_is_no_write():
    """All of it is rounded, however small what is protected is beside that."""
    model, confined, _ = confined_net()
    optimizer = torch.optim.SGD(confined.parameters(), lr=1.0)
    for i in range(30):
        for t in confined.parameters():
            generator = torch.Generator().manual_seed(i)
            t.grad = torch.randn(t.shape, generator=generator) * 300
        optimizer.step()
    assert max(confined.drift().values()) > LIMIT
    confined.verify()
    with torch.no_grad():
        model.first.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="something has written to the weight itself"):
        confined.verify()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_confined_in_inference_mode_trains(mode):
    model = net("guarding", "inference")
    with torch.inference_mode():
        confined = confine(model, bases(model), **MODES[mode])
    train(model, batches(2, "inference"), adamw(model.parameters()))
    confined.verify()
    weights, state = model.state_dict(), confined.state_dict()
    model = net("guarding", "inference")
    model.load_state_dict(weights)
    with torch.inference_mode():
        confined = confine(model, state)
        if mode in ("merge", "zero"):
            confined.next_task(widen=1, progress=False)
    train(model, batches(2, "inference"), adamw(model.parameters()))
    confined.verify()


def test_weights_of_the_same_run_are_no_foreign_ones():
    """Copied back over all parameters, as averages are; moved within the free block."""
    model, confined, _ = confined_net()
    optimizer = adamw(model.parameters())
    train(model, batches(3, "same"), optimizer)
    kept = [p.detach().clone() for p in model.parameters()]
    train(model, batches(3, "same", 2), optimizer)
    with torch.no_grad():
        for p, before in zip(model.parameters(), kept, strict=True):
            p.copy_(before)
    train(model, batches(3, "same", 3), optimizer)
    confined.verify()


# --- modules that are put in the place of others ---


def test_a_step_refuses_a_model_whose_confined_layer_was_swapped():
    model, confined, _ = confined_net()
    kept = model.second
    model.second = nn.Linear(28, 20)
    optimizer = adamw(model.parameters())
    (x,) = batches(1, "swapped")
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"'second.weight' in the model, got another Linear"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"'second.weight' in the model"):
        confined.verify()
    model.second = kept
    train(model, batches(2, "put back"), adamw(model.parameters()))
    del model.second
    with pytest.raises(RuntimeError, match="got none"):
        confined.verify()


def test_wrapped_layers_are_where_they_were():
    model, confined, subspaces = confined_net()
    start = weights_of(model)
    model.second = checkpoint_wrapper(model.second)
    train(torch.compile(model, backend="eager"), batches(3, "wrapped"), adamw(model.parameters()))
    confined.verify()
    model.second = model.second._checkpoint_wrapped_module
    assert worst(start, model, subspaces) <= LIMIT


@pytest.mark.parametrize("mode", MODES)
def test_frozen_free_blocks_are_told_once_by_name(mode, caplog):
    model, confined, subspaces = confined_net(mode)
    first, *others = subspaces
    optimizer = adamw(model.parameters())

    def told() -> list[str]:
        caplog.clear()
        train(model, batches(3, "frozen"), optimizer)
        lines = [r.getMessage() for r in caplog.records]
        return [line for line in lines if "doesn't require a gradient" in line]

    assert told() == []
    for t in next(place for place in confined.places if place.name == first).trained():
        t.requires_grad_(False)
    (line,) = told()
    assert first in line
    assert not any(name in line for name in others)
    assert told() == []
    for t in confined.parameters():
        t.requires_grad_(False)
    with torch.no_grad():
        model(batches(1, "frozen")[0])
    assert not caplog.records
    (line,) = told()
    assert first not in line
    assert all(name in line for name in others)
    assert told() == []


# --- handles ---


def test_a_lost_handle_and_that_of_a_copy():
    model, confined, _ = confined_net()
    assert Confined.of(model) is confined
    assert Confined.of(torch.compile(model, backend="eager")) is confined
    train(model, batches(2, "copied"), adamw(model.parameters()))
    twin = copy.deepcopy(model)
    own = Confined.of(twin)
    assert own is not confined
    train(twin, batches(2, "copied", 2), adamw(twin.parameters()))
    own.verify()
    expected = weights_of(twin)
    own.release()
    assert type(twin.first) is nn.Linear
    assert all(torch.equal(t, expected[name]) for name, t in twin.state_dict().items())
    confined.verify()
    assert type(model.first) is not nn.Linear
    with pytest.raises(ValueError, match="expected a confined model"):
        Confined.of(net("plain"))


def test_subspaces_without_some_weights():
    model = net("without")
    subspaces = bases(model)
    fewer = subspaces.without("head.weight")
    assert [*fewer] == ["first.weight", "second.weight"]
    assert "left out by name" in fewer.left_out["head.weight"]
    assert len(subspaces) == 3
    assert len(confine(model, fewer).places) == 2
    with pytest.raises(ValueError, match=r"without: expected names of its weights, got tail"):
        subspaces.without("tail")


def test_what_is_left_out_is_told_by_whoever_comes_first(caplog):
    model = net("told")
    subspaces = bases(model, filter="first.weight")
    assert sum("left out" in r.getMessage() for r in caplog.records) == 1
    caplog.clear()
    confined = confine(model, subspaces)
    assert not caplog.records
    confined.release()
    confine(model, dict(subspaces))
    assert sum("left out" in r.getMessage() for r in caplog.records) == 1
