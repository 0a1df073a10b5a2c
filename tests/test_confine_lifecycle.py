"""What one does with a Confined: merging, releasing, the next task, looking, and what else reads
the model meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from osf_torch import (
    Confined,
    confine,
    input_subspaces,
    layer_importance,
    protect,
    ranks_by_energy,
    refresh,
)
from tests.helpers import generator_for
from tests.small_confine import (
    adamw,
    bases,
    batches,
    drawn,
    filled,
    loss_of,
    net,
    protected_part,
    relative,
    train,
    weights_of,
    worst,
)
from tests.small_guard import REPARAMETRIZE

MODES = {"merge": {}, "zero": {"decay_to": "zero"}, "beside": {"update": "beside"}}
MODES["rank"] = {"rank": 2}
LIMIT = 3e-6
NAMES = ["first.weight", "second.weight", "head.weight"]


def confined_net(mode="merge", ratio=0.4, **options):
    model = net("life")
    subspaces, start = bases(model, ratio), weights_of(model)
    return model, confine(model, subspaces, **MODES[mode], **options), subspaces, start


@pytest.mark.parametrize("mode", MODES)
def test_merging_twice_is_merging_once(mode):
    model, confined, _, start = confined_net(mode)
    confined.merge()
    assert all(torch.equal(t, start[n]) for n, t in model.state_dict().items()), "nothing to do"
    with torch.no_grad():
        for t in confined.parameters():
            t.add_(0.1)
    confined.merge()
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        confined.merge()
    assert all(torch.equal(p, held[name]) for name, p in model.named_parameters())
    assert relative(model.state_dict()["first.weight"], start["first.weight"]) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_release_gives_the_plain_model_back(mode):
    model = net("release")
    model.head.weight.requires_grad_(mode not in ("beside", "rank"))
    model.head.train(False)
    subspaces = bases(model, filter="*.weight")
    plain = copy.deepcopy(model)
    confined = confine(model, subspaces, **MODES[mode])
    train(model, batches(5, "release"), adamw(model.parameters()))
    (x,) = batches(1, "release")
    wanted, state = model(x), weights_of(model)
    confined.release()
    assert relative(model(x), wanted) <= LIMIT
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert ours.training == theirs.training
        for hooks in ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            assert not ours.__dict__[hooks]
    for (a, p), (b, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert a == b
        assert p.requires_grad == q.requires_grad
        assert torch.equal(p, state[a])
    assert copy.deepcopy(model).first.weight.is_leaf
    assert model.get_parameter("first.weight") is model.first.weight
    train(model, batches(2, "plain"), adamw(model.parameters()))
    assert relative(model.first.weight, state["first.weight"]) > 1e-4
    for call in (confined.release, confined.merge, confined.drift, confined.parameters):
        with pytest.raises(RuntimeError, match="expected a confined model, got one that was rel"):
            call()
    again = confine(model, bases(model))
    assert max(again.drift().values()) == 0
    assert "Confined(0 weights" in repr(confined)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_of_what_was_released_is_refused(mode):
    model, confined, _, _ = confined_net(mode)
    optimizer = adamw(model.parameters())
    train(model, batches(2, "old"), optimizer)
    confined.release()
    before = weights_of(model)
    loss_of(model, batches(1, "old")[0]).backward()
    with pytest.raises(RuntimeError, match=r"optimizer that was made after Confined\.release\(\)"):
        optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("mode", ["merge", "zero"])
@pytest.mark.parametrize("grows", [{}, {"widen": 3}, {"ranks": 0.7}, {"ranks": {"*": 5}}])
def test_the_next_task(mode, grows):
    model, confined, subspaces, start = confined_net(mode)
    optimizer = adamw(model.parameters())
    train(model, batches(20, "one"), optimizer)
    (x,) = batches(1, "task")
    before, after_one = model(x), weights_of(model)
    found = confined.next_task(**grows, progress=False, compute_dtype=torch.float64)
    assert list(found) == NAMES
    assert relative(model(x), before) <= LIMIT, "the task ends with the weights it has"
    assert worst(start, model, subspaces) <= LIMIT
    wanted = {"ranks": 14} if grows.get("ranks") == 0.7 else grows
    rank = wanted.get("ranks", 8 + wanted.get("widen", 0))
    rank = 5 if isinstance(rank, dict) else rank
    assert f" {rank}/{rank} " in confined.summary().splitlines()[2]
    with pytest.raises(RuntimeError, match=r"made after Confined\.next_task\(\)"):
        optimizer.step()
    assert all(torch.equal(t, after_one[n]) for n, t in model.state_dict().items())
    train(model, batches(20, "two"), adamw(model.parameters()))
    assert worst(after_one, model, found) <= LIMIT
    assert max(confined.drift().values()) <= LIMIT
    assert relative(weights_of(model)["first.weight"], after_one["first.weight"]) > 1e-3


@pytest.mark.parametrize("mode", ["merge", "zero"])
def test_what_is_frozen_stays_frozen_in_the_next_task(mode):
    """As the head of an earlier task."""
    model, confined, _, _ = confined_net(mode)
    train(model, batches(3, "one"), adamw(model.parameters()))
    model.get_parameter(f"{NAMES[0]}_free").requires_grad_(False)
    confined.next_task(widen=1, progress=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert f"{NAMES[0]}_free" not in trained
    assert {f"{name}_free" for name in NAMES[1:]} <= trained
    before = weights_of(model)[NAMES[0]].clone()
    train(model, batches(3, "two"), adamw(p for p in model.parameters() if p.requires_grad))
    assert torch.equal(weights_of(model)[NAMES[0]], before)
    confined.verify()


@pytest.mark.parametrize(
    ("mode", "sides", "options", "kind", "told"),
    [
        ("merge", "UV", {"ranks": 0.5, "widen": 2}, ValueError, "ranks or widen, got both"),
        ("merge", "UV", {"widen": 100}, ValueError, "something free"),
        ("merge", "UV", {"widen": "more"}, TypeError, "widen"),
        ("merge", "UV", {"ranks": {"first.weight": 3}}, ValueError, "a rank for every weight"),
        ("merge", "UV", {"rank": 3}, TypeError, "expected options of refresh, .*, got rank"),
        ("merge", "V", {}, ValueError, "bases of triplets"),
        ("beside", "UV", {}, RuntimeError, 'update="merge", got "beside"'),
        ("rank", "UV", {}, RuntimeError, 'update="merge", got rank=2'),
    ],
)
def test_a_next_task_that_is_refused_leaves_everything(mode, sides, options, kind, told):
    model = net("refused")
    subspaces = {n: drawn(*model.get_parameter(n).shape, 0.4, sides, "high") for n in NAMES}
    confined = confine(model, subspaces, **MODES[mode])
    optimizer = adamw(model.parameters())
    train(model, batches(3, "refused"), optimizer)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(kind, match=told):
        confined.next_task(**options, progress=False)
    for name, p in model.named_parameters():
        assert (id(p), True) == (before[name][0], torch.equal(p, before[name][1]))
    train(model, batches(2, "goes on"), optimizer)
    assert max(confined.drift().values()) <= LIMIT


def test_sizes_are_printed_in_units_that_fit():
    for width, unit in ((16, "KiB"), (512, "MiB")):
        model = nn.Sequential(nn.Linear(width, width))
        confined = confine(model, {"0.weight": drawn(width, width, 0.5, "UV", "high")})
        header, _, line, *_, last, told = confined.summary().splitlines()
        assert header.count(unit) == 4
        assert float(line.split()[5]) == round(width**2 / (2**10 if unit == "KiB" else 2**20), 1)
        assert last.count(unit) == 3
        assert "of the elements that train are covered" in told


@pytest.mark.parametrize("mode", MODES)
def test_what_is_printed(mode):
    _, confined, _, _ = confined_net(mode)
    text = str(confined)
    assert text == confined.summary()
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["parameter", "shape"]
    assert [line.split()[0] for line in lines[2:6]] == [*NAMES, "all"]
    count = sum(t.numel() for t in confined.parameters())
    assert f"{count:,}" in lines[5]
    assert ("rank 2" in text) == (mode == "rank")
    plan = confined.plan(64)
    assert ("28×20, free 20×12, rank 2, 64" if mode == "rank" else "28×20, free 20×12, 64") in plan
    assert "all 3: " in plan.splitlines()[-1]
    assert repr(confined).startswith("Confined(3 weights, update=")


# --- what else reads the model ---


@pytest.mark.parametrize("mode", ["merge", "beside"])
def test_inputs_and_importance_are_found_as_of_the_plain_model(mode):
    """Both watch the calls of modules, and find confined ones without a filter too."""
    model, _, _, _ = confined_net(mode)
    train(model, batches(3, "watched"), adamw(model.parameters()))
    plain = net("plain")
    plain.load_state_dict(model.state_dict())
    xs = batches(2, "watched")
    found, wanted = (input_subspaces(one, xs, progress=False) for one in (model, plain))
    assert list(found) == list(wanted) == NAMES
    for name, subspace in wanted.items():
        V, theirs = (s.V.columns.double() for s in (found[name], subspace))
        assert V.shape == theirs.shape
        assert (V @ V.mT - theirs @ theirs.mT).norm() <= 1e-3
    ours, theirs = (layer_importance(one, xs, progress=False) for one in (model, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("how", [refresh, ranks_by_energy], ids=lambda how: how.__name__)
def test_what_reads_weights_reads_current_ones_or_refuses(how):
    options = {"ranks": 0.3} if how is refresh else {"energy": 0.6}
    model, confined, _, _ = confined_net("merge")
    for t in confined.parameters():
        t.data.add_(0.2)  # behind every hook
    found = how(model, **options, progress=False)
    plain = net("plain")
    plain.load_state_dict(model.state_dict())
    wanted = how(plain, **options, progress=False)
    if how is refresh:
        assert list(found) == list(wanted) == NAMES
        for name in NAMES:
            assert relative(found[name].S, wanted[name].S) <= 1e-5
    else:
        assert dict(found) == dict(wanted)
    beside, _, _, _ = confined_net("beside")
    with pytest.raises(ValueError, match=rf"osf_torch\.{how.__name__}: .*update=\"beside\""):
        how(beside, **options, progress=False)


def test_a_guard_of_the_other_weights_stands_beside():
    """Half of a model confined, the other half under ``protect``, by one optimizer."""
    model = net("both")
    subspaces, start = bases(model), weights_of(model)
    confined = confine(model, {"first.weight": subspaces["first.weight"]})
    optimizer = adamw(model.parameters())
    others = {name: subspaces[name] for name in NAMES[1:]}
    guard = protect(model, others, optimizer)
    train(model, batches(20, "both"), optimizer)
    guard.verify()
    assert worst(start, model, subspaces) <= 1e-5
    with pytest.raises(ValueError, match=r"osf_torch\.protect: .*'first\.weight' .*confine"):
        protect(model, subspaces, optimizer)
    with pytest.raises(ValueError, match=r"osf_torch\.protect: .*'first\.weight' .*confine"):
        protect(model, {"first.weight": subspaces["first.weight"]}, optimizer)
    guard.verify()
    assert max(confined.drift().values()) <= LIMIT


def test_two_models_and_one_optimizer_each():
    """Steps of the one leave the other, and what is wrong with the one doesn't stop the other."""
    one, first, _, _ = confined_net("merge")
    two, second, _, _ = confined_net("beside")
    ours, theirs = adamw(one.parameters()), adamw(two.parameters())
    kept = weights_of(two)
    train(one, batches(3, "one"), ours)
    assert all(torch.equal(t, kept[n]) for n, t in two.state_dict().items())
    dict(one.named_parameters())["first.weight"].requires_grad_(True)
    train(two, batches(3, "two"), theirs)
    with pytest.raises(RuntimeError, match="to stay frozen"):
        ours.step()
    del one.first._parameters["weight"]
    train(two, batches(1, "two"), theirs)
    with pytest.raises(RuntimeError, match="to have its parameter 'weight', got none"):
        ours.step()
    assert max(second.drift().values()) <= LIMIT
    assert first.places[0].name == "first.weight"


def test_a_part_of_a_model_by_its_own_confined():
    """Two groups of one model's weights, the second with other settings, released one by one."""
    model = filled(nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 6)), "parts")
    start = weights_of(model)
    shapes = {"0.weight": (16, 20), "2.weight": (6, 16)}
    subspaces = {name: drawn(*shape, 0.5, "UV", "high") for name, shape in shapes.items()}
    first = confine(model, {"0.weight": subspaces["0.weight"]})
    second = confine(model, {"2.weight": subspaces["2.weight"]}, rank=2)
    train(model, batches(10, "parts"), adamw(model.parameters()))
    assert worst(start, model, subspaces) <= LIMIT
    first.release()
    assert type(model[0]) is nn.Linear
    assert type(model[2]) is not nn.Linear
    assert second.drift()["2.weight"] <= LIMIT
    second.release()
    assert type(model[2]) is nn.Linear
    assert list(model.state_dict()) == list(start)


def test_the_confined_lives_as_long_as_its_model_does():
    import gc
    import weakref

    model = net("lives")
    alive = weakref.ref(confine(model, bases(model)))
    gc.collect()
    assert alive() is not None
    optimizer = adamw(model.parameters())
    train(model, batches(1, "lives"), optimizer)
    model = optimizer = None
    gc.collect()
    assert alive() is None


# --- what the next task lets go of ---


@pytest.mark.parametrize("mode", ["merge", "zero"])
def test_what_the_next_task_lets_go_of_is_told(mode):
    model, confined, subspaces, _ = confined_net(mode)
    with pytest.raises(RuntimeError, match=r"Confined\.released: expected next_task\(\) to have"):
        confined.released()
    with torch.no_grad():  # learned where it may, and more than what was protected
        for t in confined.parameters():
            t.add_(2 * torch.randn(t.shape, generator=generator_for("let go")))
    confined.merge()
    weights = weights_of(model)
    state = confined.state_dict()
    found = confined.next_task(progress=False)
    for name, share in confined.released().items():
        H = protected_part(weights[name], subspaces[name])
        wanted = (H - protected_part(H, found[name])).norm() / H.norm()
        assert share == pytest.approx(float(wanted), rel=1e-5)
        assert share > 0.3
    twin = Confined.of(copy.deepcopy(model))
    assert twin.released() == confined.released()
    confined.next_task(widen=0.3, progress=False)
    assert max(confined.released().values()) < 0.3, "room for both"
    confined.next_task(progress=False)
    assert max(confined.released().values()) <= 1e-5, "nothing was learned meanwhile"
    other = confine(net("life"), subspaces, **MODES[mode])
    other.load_state_dict(state | {"confined": other.state_dict()["confined"]})
    with pytest.raises(RuntimeError, match="got none so far"):
        other.released()


# --- who puts another weight in the place of a confined one ---


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("way", REPARAMETRIZE)
@pytest.mark.parametrize("mode", MODES)
def test_whoever_puts_another_weight_in_its_place_is_refused_first(mode, way):
    model, confined, _, _ = confined_net(mode)
    before = {name: p.clone() for name, p in model.named_parameters()}
    hooks = len(model.first._forward_pre_hooks)
    with pytest.raises(
        RuntimeError,
        match=r"^osf_torch\.confine: expected 'first\.weight' to stay as it is while .*, got .*"
        r"torch\.nn\.utils\.\w+, which puts another .*release\(\) before it",
    ):
        REPARAMETRIZE[way](model.first)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(model.first._forward_pre_hooks) == hooks
    (x,) = batches(1, "reparametrized")
    loss_of(model, x).backward()
    confined.verify()
    if mode == "merge":
        confined.release()
        REPARAMETRIZE[way](model.first)
        model(x)


@pytest.mark.parametrize("mode", MODES)
def test_get_parameter_gives_what_named_parameters_has(mode):
    model, _, _, _ = confined_net(mode)
    for name, p in model.named_parameters():
        assert model.get_parameter(name) is p
    assert not isinstance(model.first.weight, nn.Parameter)
    with pytest.raises(RuntimeError, match=r"'first\.weight' .*, got its deletion"):
        del model.first.weight
    del model.first.bias, model.first._parameters["weight"]
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        _ = model.first.weight


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_refuses_averages_of_another_free_block(mode, fused):
    """Torch's fused AdamW ends the process of a larger one, and steps by rows of a smaller one."""
    model, confined, _, _ = confined_net(mode)
    optimizer = adamw(confined.parameters(), fused=fused)
    train(model, batches(2, "averages"), optimizer)
    moments = optimizer.state_dict()
    # Of rank s one factor's shape follows its basis.
    other, again, _, _ = confined_net(mode, ratio=0.2)
    second = adamw(again.parameters(), fused=fused)
    second.load_state_dict(moments)
    before = [t.detach().clone() for t in again.parameters()]
    (x,) = batches(1, "averages")
    loss_of(other, x).backward()
    with pytest.raises(
        RuntimeError,
        match=r"'exp_avg' of a free block of 'first\.weight' to have its .*confine\(model, state\)",
    ):
        second.step()
    assert all(map(torch.equal, again.parameters(), before))
