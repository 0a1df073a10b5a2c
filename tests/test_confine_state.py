"""States: of the model, under its plain names, and of a run that is taken up again."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from osf_torch import confine, protect
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

MODES = {
    "merge": {},
    "zero": {"decay_to": "zero"},
    "beside": {"update": "beside"},
    "rank": {"rank": 3},
    "half block": {"dtype": torch.bfloat16},
}
HALF = {"merge": {}, "beside": {"update": "beside"}, "rank": {"rank": 3}}
LIMIT = 3e-6


def confined_net(mode="merge", dtype=torch.float32, key="state"):
    model = net(key).to(dtype)
    return model, confine(model, bases(net(key), 0.5), **MODES[mode])


def through_a_file(state):
    """Saved and loaded as torch loads what it doesn't trust."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def drive(model, key, count=4, optimizer=None):
    optimizer = optimizer or adamw(model.parameters())
    dtype = next(model.parameters()).dtype
    return train(model, [x.to(dtype) for x in batches(count, key)], optimizer), optimizer


# --- of the model ---


@pytest.mark.parametrize("mode", MODES)
def test_a_state_has_plain_names_and_current_values(mode):
    model, _ = confined_net(mode)
    drive(model, "names")
    state = through_a_file(model.state_dict())
    plain = net("another")
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    (x,) = batches(1, "names")
    assert relative(plain(x), model(x)) <= LIMIT
    assert list(model.first.state_dict(prefix="first.")) == ["first.weight", "first.bias"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_loading_a_plain_state(mode, assign):
    """The effective weights are what was loaded, C begins anew, and what is protected stays through
    further training by the same optimizer."""
    model, confined = confined_net(mode)
    started = [t.detach().clone() for t in confined.parameters()]
    _, optimizer = drive(model, "before")
    twin, _ = confined_net(mode)  # which has learned something else
    drive(twin, "elsewhere")
    state = through_a_file(twin.state_dict())
    given = set(state)
    missing, unexpected = model.load_state_dict(state, strict=True, assign=assign)
    assert not missing
    assert not unexpected
    (x,) = batches(1, "loading")
    assert relative(model(x), twin(x)) <= LIMIT
    for name, t in model.state_dict().items():
        assert relative(t, state[name]) <= 1e-6
    for place in confined.places:
        block = place.get(place.spec.trainable[0])
        if mode == "zero":
            assert relative(block, started[confined.places.index(place)]) > 1e-3
        else:
            assert not block.any()
    start = weights_of(model)
    drive(model, "after", optimizer=optimizer)
    assert worst(start, model, bases(net("state"), 0.5)) <= LIMIT
    assert relative(model.state_dict()["first.weight"], start["first.weight"]) > 1e-3
    assert max(confined.drift().values()) <= LIMIT
    assert set(state) == given, "the caller's dict is as it was"


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_another_run_are_refused_by_the_next_step(mode):
    model, confined = confined_net(mode)
    _, optimizer = drive(model, "before")
    other = net("loaded")
    model.load_state_dict(other.state_dict())
    (x,) = batches(1, "loading")
    assert relative(model(x), other(x)) <= LIMIT
    with pytest.raises(RuntimeError, match="to be as the last step left it"):
        drive(model, "after", optimizer=optimizer)
    assert max(confined.drift().values()) > 0.1
    for name, t in model.state_dict().items():
        assert relative(t, other.state_dict()[name]) <= LIMIT


@pytest.mark.parametrize("mode", HALF)
def test_loading_half_precision(mode):
    model, confined = confined_net(mode, torch.bfloat16)
    drive(model, "before")
    other, _ = confined_net(mode, torch.bfloat16)
    drive(other, "elsewhere")
    state = other.state_dict()
    model.load_state_dict(state)
    for name, t in model.state_dict().items():
        assert relative(t, state[name]) <= torch.finfo(torch.bfloat16).eps
    before = weights_of(model)
    drive(model, "after")
    assert relative(model.state_dict()["first.weight"], before["first.weight"]) > 1e-3
    assert max(confined.drift().values()) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mode", MODES)
def test_a_model_s_own_state_changes_nothing(mode):
    """Loaded back, as for the best of several epochs."""
    model, confined = confined_net(mode)
    start = weights_of(model)
    _, optimizer = drive(model, "best")
    best = copy.deepcopy(model.state_dict())
    (x,) = batches(1, "best")
    wanted = model(x)
    drive(model, "worse", optimizer=optimizer)
    model.load_state_dict(best)
    assert relative(model(x), wanted) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT
    assert worst(start, model, bases(net("state"), 0.5)) <= LIMIT


def test_parts_and_what_does_not_fit():
    """A part of the names leaves the others, and torch's own errors are its own."""
    model, confined = confined_net()
    drive(model, "parts")
    before = weights_of(model)
    loaded = net("loaded").state_dict()
    part = {"first.weight": loaded["first.weight"]}
    missing, _ = model.load_state_dict(part, strict=False)
    assert "second.weight" in missing
    assert not any("free" in name or "merged" in name for name in missing)
    now = weights_of(model)
    assert relative(now["first.weight"], loaded["first.weight"]) <= 1e-6
    assert torch.equal(now["second.weight"], before["second.weight"])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**loaded, "first.other": loaded["head.bias"]})
    for mode in ("merge", "beside", "rank"):
        model, confined = confined_net(mode)
        drive(model, "parts")
        wrong = {**loaded, "first.weight": torch.zeros(3, 4)}
        with pytest.raises(RuntimeError, match=r"size mismatch for (first\.)?weight"):
            model.load_state_dict(wrong)
    assert len(confined.parameters()) == 6


# --- of a run ---


@pytest.mark.parametrize("whence", ["the checkpoint", "the base model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_unstopped_one(mode, dtype, whence):
    """To the bit from the checkpoint of a merged model, and of half precision from either."""
    if mode == "zero" and dtype == torch.bfloat16:
        pytest.skip("refused, as test_confine_refusals has it")
    model, confined = confined_net(mode, dtype)
    start = weights_of(model)
    _, optimizer = drive(model, "first")
    saved = through_a_file(
        {
            "model": model.state_dict(),
            "confined": confined.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
    )
    drive(model, "second", optimizer=optimizer)
    resumed = net("state" if whence == "the base model" else "another").to(dtype)
    if whence == "the checkpoint":
        resumed.load_state_dict(saved["model"])
    again = confine(resumed, saved["confined"])
    assert again.update == confined.update
    assert again.rank == confined.rank
    assert again.decay_to == confined.decay_to
    for a, b in zip(again.parameters(), confined.parameters(), strict=True):
        assert a.dtype == b.dtype
    for name in ("first.bias", "second.bias", "head.bias"):
        with torch.no_grad():
            resumed.get_parameter(name).copy_(saved["model"][name])
    optimizer = adamw(resumed.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    drive(resumed, "second", optimizer=optimizer)
    now, wanted = resumed.state_dict(), model.state_dict()
    merged = mode in ("merge", "zero", "half block")
    exact = merged and (whence == "the checkpoint" or dtype == torch.bfloat16)
    for name, t in wanted.items():
        if exact:
            assert torch.equal(now[name], t)
        else:
            assert relative(now[name], t) <= (1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:
        assert worst(start, resumed, bases(net("state"), 0.5)) <= LIMIT
        assert max(again.drift().values()) <= LIMIT, "since the run began"
    assert confined.state_dict()["confined"].keys() == saved["confined"]["confined"].keys()


@pytest.mark.parametrize("mode", MODES)
def test_a_state_goes_back_into_the_run_that_saved_it(mode):
    model, confined = confined_net(mode)
    _, optimizer = drive(model, "first")
    state, run = copy.deepcopy(model.state_dict()), copy.deepcopy(confined.state_dict())
    (x,) = batches(1, "back")
    wanted = model(x)
    blocks = [t.detach().clone() for t in confined.parameters()]
    drive(model, "second", optimizer=optimizer)
    model.load_state_dict(state)
    confined.load_state_dict(run)
    assert relative(model(x), wanted) <= LIMIT
    for t, block in zip(confined.parameters(), blocks, strict=True):
        assert torch.equal(t, block)
    assert max(confined.drift().values()) <= LIMIT
    drive(model, "third", optimizer=optimizer)
    assert max(confined.drift().values()) <= LIMIT


def untouched(model, before):
    assert type(model.first) is torch.nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert {n: id(p) for n, p in model.named_parameters()} == before[0]
    assert all(torch.equal(t, before[1][n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("mode", ["merge", "zero", "beside", "rank"])
def test_states_of_others_are_refused_before_anything_is_changed(mode):
    model, confined = confined_net(mode)
    drive(model, "others")
    state = through_a_file(confined.state_dict())
    half = {**state, "confined": {"first.weight": state["confined"]["first.weight"]}}
    cases = [
        (net("another"), state, {}, ValueError, "to be the weight that was saved"),
        (net("state"), {**state, "format": 7}, {}, ValueError, "format=1"),
        (net("state"), {"format": 1, "confined": {}}, {}, ValueError, "format=1 .*without"),
        (net("state"), state, {"rank": 5}, ValueError, "rank"),
    ]
    if mode != "zero":
        cases.append((net("state"), state, {"decay_to": "zero"}, ValueError, "decay_to"))
    for other, given, options, kind, told in cases:
        before = {n: id(p) for n, p in other.named_parameters()}, weights_of(other)
        with pytest.raises(kind, match=f"osf_torch.confine: .*{told}"):
            confine(other, given, **options)
        untouched(other, before)
    values = weights_of(model)
    held = [t.detach().clone() for t in confined.parameters()]
    for wrong, told in (
        (half, "none for .*second"),
        ({**state, "update": "else"}, "update"),
        ({}, "format"),
    ):
        with pytest.raises(ValueError, match=told):
            confined.load_state_dict(wrong)
    other = net("state")
    options = {"rank": 1} if mode == "rank" else MODES[mode]
    smaller = confine(other, bases(net("state"), 0.8), **options).state_dict()
    with pytest.raises(ValueError, match="rank=3" if mode == "rank" else "block like the model's"):
        confined.load_state_dict(smaller)
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    for t, block in zip(confined.parameters(), held, strict=True):
        assert torch.equal(t, block)


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_a_state_of_the_other_precision_is_refused(saved, now):
    """W₀ is kept beside a weight of half precision alone: what is missing or left is told of."""
    model = net("precision").to(saved)
    confined = confine(model, bases(model))
    drive(model, "precision")
    state = through_a_file(confined.state_dict())
    other = net("precision").to(now)
    other.load_state_dict(model.state_dict())
    before = {n: id(p) for n, p in other.named_parameters()}, weights_of(other)
    with pytest.raises(ValueError, match=rf"confine: .*{now}.* convert the model to what"):
        confine(other, state)
    untouched(other, before)


def test_the_state_of_a_guard_is_sent_to_protect():
    model, other = net("guard"), net("guard")
    optimizer = torch.optim.AdamW(other.parameters())
    state = protect(other, bases(other), optimizer=optimizer).state_dict()
    before = {n: id(p) for n, p in model.named_parameters()}, weights_of(model)
    with pytest.raises(ValueError, match=r"Guard\.state_dict\(\) .* protect\(model, state"):
        confine(model, state)
    untouched(model, before)
