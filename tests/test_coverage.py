"""What is trained and not covered is named: by refresh, its log, its errors and its summaries."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from osf_torch import (
    allocate_ranks,
    confine,
    input_subspaces,
    layer_importance,
    load_subspaces,
    protect,
    ranks_by_energy,
    refresh,
    save_subspaces,
)
from osf_torch.coverage import coverage
from osf_torch.grown import Grown
from osf_torch.selection import named_weights, require_values
from tests.helpers import grown
from tests.small_refresh import linear, small_model


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 10, 6))
        self.down = nn.Parameter(torch.randn(4, 6, 10))


class Everything(nn.Module):
    """A parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.layer = linear(8, 6)
        self.experts = Experts()
        self.image = nn.Conv2d(3, 4, 2)
        self.normed = weight_norm(nn.Linear(6, 7))
        self.score = nn.Linear(6, 1)
        self.place = nn.Parameter(torch.zeros(1, 5, 6))
        self.frozen = nn.Embedding(9, 6).requires_grad_(False)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight  # goes by the embedding's name


def left_out(model: nn.Module, covered) -> dict[str, str]:
    return dict(coverage(model, covered).left_out)


EXPERTS = {
    "experts.up": "4x10x6, 3-D: a batch of matrices (experts), up of Experts",
    "experts.down": "4x6x10, 3-D: a batch of matrices (experts), down of Experts",
}
NAMED = {
    "place": "1x5x6, 3-D, place of Everything",
    "words.weight": "9x6, nn.Embedding",
    "image.weight": "4x3x2x2, 4-D, nn.Conv2d",
    "normed.parametrizations.weight.original0": "7x1, original0 of a parametrized weight",
    "normed.parametrizations.weight.original1": "7x6, original1 of a parametrized weight",
    "score.weight": "1x6, rho leaves nothing free of one direction, a rank of 1 by name protects "
    "it, nn.Linear",
}


def test_every_trained_matrix_is_named_once():
    model = Everything()
    assert left_out(model, {id(model.layer.weight)}) == NAMED | EXPERTS
    assert left_out(model, ()) == NAMED | EXPERTS | {"layer.weight": "8x6, nn.Linear"}
    assert left_out(model, {id(p) for p in model.parameters()}) == {}
    assert (
        left_out(torch.compile(model, backend="eager"), {id(model.layer.weight)}) == NAMED | EXPERTS
    )


def test_refresh_logs_and_keeps_what_it_leaves_out(caplog, tmp_path):
    model = Everything()
    model.head.weight.requires_grad_(False)
    named = {name: what for name, what in NAMED.items() if name != "words.weight"}
    found = refresh(model, 0.5)
    assert list(found) == ["layer.weight", "experts.up", "experts.down"]
    (line,) = caplog.messages
    assert caplog.records[0].name == "osf_torch"
    assert caplog.records[0].levelno == logging.WARNING
    # Matrices: 48 + 480 of 48 + 480 + 30 + 48 + 7 + 42 + 6. Vectors: 4 + 7 + 1 elements.
    assert "osf_torch.refresh: 78.4 % of the elements that train are covered, 1.7 % are" in line
    assert "image.weight (4x3x2x2, 4-D, nn.Conv2d)" in line
    assert "take these in by refresh(filter=...), freeze them, or name them in leave_out=" in line
    assert found.coverage.share == 528 / (528 + 133 + 12)
    assert found.left_out == named
    assert found.to("cpu").left_out == named
    path = tmp_path / "s.safetensors"
    pytest.importorskip("safetensors", reason="the files are safetensors")
    save_subspaces(path, found, model)
    assert load_subspaces(path, model).left_out == named
    lines = found.summary().splitlines()
    assert lines[-7].startswith("78.4 % of the elements that train are covered")
    assert lines[-6] == "left out, and free to move where it trains: 5"
    for line, (name, what) in zip(lines[-5:], named.items(), strict=True):
        assert line.split(maxsplit=1) == [name, what]
    assert "left out: place, image.weight, normed.parametrizations" in repr(found)


@pytest.mark.parametrize("turn", ["inputs", "ranks"])
def test_what_another_guard_covers_is_not_told_as_left_out(turn, caplog):
    """One guard for each of several optimizers, within their turns and outside of them."""
    model, x = nn.Sequential(linear(8, 6, 0), linear(8, 8, 1)), [torch.randn(3, 6)]
    names = ["0.weight", "1.weight"]
    options = {"progress": False, **({"batches": x} if turn == "inputs" else {"ranks": 3})}
    optimizers = [torch.optim.AdamW([model[0].weight]), torch.optim.SGD([model[1].weight])]
    kept = refresh(model, 2, progress=False)
    guards = [
        protect(model, {name: kept[name]}, optimizer=optimizer)
        for name, optimizer in zip(names, optimizers, strict=True)
    ]
    for _ in range(2):
        model(x[0]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        caplog.clear()
        for guard, name in zip(guards, names, strict=True):
            found = guard.next_task(**options)
            assert list(found) == [name]
            assert found.coverage == guard.coverage()
            assert (found.left_out, found.coverage.share) == ({}, 1.0)
            guard.verify()
        assert not [line for line in caplog.messages if "left out" in line]
    for make in (
        lambda name: refresh(model, 2, filter=name, progress=False),
        lambda name: input_subspaces(model, x, filter=name, progress=False),
    ):
        guards[1] = protect(model, {"1.weight": kept["1.weight"]}, optimizer=optimizers[1])
        caplog.clear()
        assert make("0.weight").left_out == {}
        assert not [line for line in caplog.messages if "left out" in line]
        guards[1].remove()
        assert make("0.weight").left_out == {"1.weight": "8x8, nn.Linear"}
        assert "free to move: 1.weight (8x8, nn.Linear)" in caplog.messages[-1]
        assert "1.weight" in guards[0].coverage().untold


def test_nothing_left_out_is_not_mentioned(caplog):
    with caplog.at_level(logging.INFO, "osf_torch"):
        found = refresh(small_model(), 4)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "osf_torch.refresh: 100 % of the elements that train are covered"
    )
    assert coverage(small_model().requires_grad_(False), ()).share == 1.0
    assert "left out" not in found.summary() + repr(found)
    assert found.summary().endswith("100 % of the elements that train are covered")


def test_inputs_name_what_they_leave_out(caplog):
    model = nn.Sequential(nn.Embedding(9, 6), linear(8, 6))
    found = input_subspaces(model, [torch.arange(4)], progress=False, energy=0.6)
    assert found.left_out == {"0.weight": "9x6, nn.Embedding"}
    assert "input_subspaces: 47 % of the elements that train" in caplog.messages[0]
    assert (
        "; freeze these, name them in leave_out=, or take in by input_subspaces(filter=...) those "
        "that are mul" in caplog.messages[0]
    )
    assert "refresh(filter" not in caplog.messages[0], "a turn by inputs refuses embeddings"
    again = input_subspaces(
        model, [torch.arange(4)], progress=False, energy=0.6, leave_out="0.weight"
    )
    assert not again.coverage.untold
    lines = found.summary().splitlines()
    width = found["1.weight"].V.columns.shape[1]
    assert lines[2].split() == ["1.weight", "none", str(width), "of", "6", "high", "0.0%"]
    assert lines[-1].split() == ["0.weight", "9x6,", "nn.Embedding"]
    assert "1 weights; left out: 0.weight" in repr(found)


@pytest.mark.parametrize("filter", ["layer.bias", "*.bias", ["layer.weight", "layer.bias"]])
def test_what_is_no_matrix_and_is_asked_for_is_refused_by_name(filter):
    """As the only match, or by a full name beside matrices; not where a pattern takes others."""
    model = nn.ModuleDict({"layer": nn.Linear(6, 8)})
    with pytest.raises(ValueError, match=r"no matrix in layer\.bias \(8, 1-D, bias of nn\.Linear"):
        refresh(model, 0.5, filter=filter)
    assert list(refresh(model, 0.5, filter=["layer.w*", "*.b*"])) == ["layer.weight"]


# convolutions


def test_a_convolution_is_taken_by_name_as_one_matrix(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Tanh(), nn.Conv1d(8, 6, 3))
    assert set(refresh(Everything(), 0.5).left_out) >= {"image.weight"}
    found = refresh(model, 0.5, filter="*.weight", progress=False)
    assert {name: (s.shape, s.rank) for name, s in found.items()} == {
        "0.weight": ((8, 3, 2, 2), 4),
        "2.weight": ((6, 8, 3), 3),
    }
    for name, s in found.items():
        W = model.get_parameter(name).detach().double().flatten(1)
        torch.testing.assert_close(s.S, torch.linalg.svdvals(W)[: s.rank].float())
    assert ranks_by_energy(model, 1.0, filter="*.weight") == {"0.weight": 8, "2.weight": 6}
    assert allocate_ranks({"0.weight": 1.0}, model, trr=0.5) == {"0.weight": 4}
    pytest.importorskip("safetensors", reason="the files are safetensors")
    save_subspaces(tmp_path / "s", found, model)
    assert load_subspaces(tmp_path / "s", model)["0.weight"].shape == (8, 3, 2, 2)
    guard = protect(model, found, restore=False)
    assert guard.coverage().left_out == {}
    guard.remove()
    x = [torch.randn(3, 3, 4, 9)]
    forward = lambda model, x: model[2](model[1](model[0](x)).flatten(2))  # noqa: E731
    grown = input_subspaces(model, x, filter="*.weight", forward=forward, progress=False)
    assert list(grown) == ["0.weight", "2.weight"]
    assert grown["2.weight"].V.columns.shape[0] == 24


def test_a_confined_convolution_keeps_its_matrix_and_goes_on_to_the_next_task():
    model = nn.Sequential(nn.Conv2d(3, 8, 2))
    start = model[0].weight.detach().clone().flatten(1).double()
    confined = confine(model, refresh(model, 0.5, filter="0.weight", progress=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
    confined.verify()
    U, _, Vh = torch.linalg.svd(start, full_matrices=False)
    change = model[0].weight.detach().flatten(1).double() - start
    assert float(change.norm()) > 1e-3
    assert float((U[:, :4].mT @ change).norm() + (change @ Vh[:4].mT).norm()) < 1e-5
    assert confined.next_task(widen=1, progress=False)["0.weight"].rank == 5
    confined.verify()


# left out by name


def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize("how", ["refresh", "protect", "without"])
@pytest.mark.parametrize("way", [protect, confine])
def test_what_trains_uncovered_is_refused_unless_it_was_left_out_by_name(way, how):
    """By whoever made the subspaces, or by whoever takes them."""
    model = nn.Sequential(nn.Embedding(9, 6), linear(8, 6), linear(4, 8))
    options = {}
    if how == "refresh":
        subspaces = refresh(model, 0.5, leave_out=["0.*", "2.weight"], progress=False)
        assert list(subspaces) == ["1.weight"]
        assert subspaces.left_out["0.weight"] == "9x6, nn.Embedding, left out by name"
    else:
        subspaces = refresh(model, 0.5, progress=False).without("2.weight")
        assert subspaces.coverage.by_name == {"2.weight"}
        assert subspaces.coverage.share == 48 / (48 + 54 + 32)
        options = {"leave_out": "0.weight"} if how == "protect" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    holder = way(
        model, subspaces, **options, **({"optimizer": optimizer} if way is protect else {})
    )
    optimizer = optimizer if way is protect else torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer)
    if how == "without":
        with pytest.raises(RuntimeError, match=r"got 0\.weight \(9x6, nn\.Embedding\), which noth"):
            holder.verify()
        return
    holder.verify()
    assert set(holder.coverage().left_out) == {"0.weight", "2.weight"}
    # It holds for a run that is resumed, and for the next task.
    model.load_state_dict(model.state_dict())
    state = holder.state_dict()
    if way is protect:
        holder = protect(model, state, optimizer=optimizer)
        holder.next_task(0.6, progress=False)
        steps(model, optimizer)
    else:
        holder.next_task(0.6, progress=False)
    holder.verify()


@pytest.mark.parametrize("way", [protect, confine])
def test_names_that_are_left_out_reach_the_next_task_and_a_resumed_run(way):
    """Patterns that fit what is protected too, and names that the next task leaves out."""
    model = nn.ModuleDict({"emb": nn.Embedding(9, 6), "a": linear(8, 6), "b": nn.Embedding(5, 6)})
    subspaces = refresh(model, 0.5, filter="a.*", progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer} if way is protect else {}
    holder = way(model, dict(subspaces), leave_out=["a*", "emb*"], **options)
    holder.next_task(0.6, progress=False, leave_out="b.weight")
    if way is protect:
        steps(model, optimizer)
        holder.verify()
        holder = protect(model, holder.state_dict(), optimizer=optimizer)
        assert holder.subspaces.coverage.by_name == {"emb.weight", "b.weight"}
        assert "left out by name" in holder.subspaces.summary()
        steps(model, optimizer)
    holder.verify()


@pytest.mark.parametrize("way", [protect, confine])
def test_a_protected_weight_is_not_left_out_by_its_name(way):
    """Neither at first nor at a turn, which would keep on protecting it; nothing is changed."""
    model = nn.Sequential(linear(8, 6), nn.Linear(6, 4))
    subspaces = refresh(model, 0.5, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer} if way is protect else {}
    message = "leave_out to name what isn't protected, got '1.weight', which the subspaces protect"
    with pytest.raises(ValueError, match=rf"osf_torch\.{way.__name__}: expected {message}"):
        way(model, subspaces, leave_out=["1.bias", "1.weight"], **options)
    assert model.state_dict().keys() == before.keys()
    holder = way(model, subspaces, leave_out="1.bias", **options)
    turns = [{}, {"batches": [torch.randn(5, 8)]}]
    for turn in turns:
        with pytest.raises(ValueError, match=rf"\.next_task: expected {message}"):
            holder.next_task(leave_out="1.weight", progress=False, **turn)
    assert holder.drift().keys() == {"0.weight", "1.weight"}
    for name, tensor in before.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


class Heads(nn.Module):
    """A map cut apart by heads, and tables: no batches of matrices that activations go through."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(6, 2, 3))
        self.places = nn.Parameter(torch.randn(4, 5, 6))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 6))


class TopKRouter(Table):
    pass


def test_what_a_module_computes_is_guessed_of_experts_and_routers_alone():
    model = nn.ModuleDict({"heads": Heads(), "table": Table(), "router": TopKRouter()})
    model["experts"] = Experts()
    found = refresh(model, 0.5, progress=False)
    assert list(found) == ["router.weight", "experts.up", "experts.down"]
    assert list(found.coverage.untold) == ["heads.q", "heads.places", "table.weight"]
    taken = refresh(model, 0.5, filter=["heads.q", "table.*"], progress=False)
    assert taken["heads.q"].shape == (6, 2, 3)


def test_vectors_of_adapters_are_told():
    """What VeRA and FourierFT train changes a weight, though it is a vector."""
    model = nn.Sequential(linear(8, 6))
    layer = nn.Module()
    layer.base_layer = model[0]
    layer.vera_lambda_b = nn.ParameterDict({"default": torch.ones(8)})
    model[0] = layer
    found = coverage(model, {id(layer.base_layer.weight)})
    assert found.untold == {
        "0.vera_lambda_b.default": "8, 1-D, default of nn.ParameterDict, of an adapter, which "
        "changes a weight"
    }


def test_a_matrix_that_is_called_a_bias_is_no_vector():
    model = nn.Sequential(linear(8, 6))
    model.register_parameter("rel_bias", nn.Parameter(torch.randn(8, 8)))
    assert coverage(model, {id(model[0].weight)}).untold == {
        "rel_bias": "8x8, rel_bias of nn.Sequential"
    }


def test_what_was_left_out_by_name_is_saved(tmp_path):
    pytest.importorskip("safetensors", reason="the files are safetensors")
    model = nn.Sequential(nn.Embedding(9, 6), linear(8, 6))
    subspaces = refresh(model, 0.5, leave_out="0.*", progress=False)
    for saved in (subspaces, Grown(subspaces, coverage=subspaces.coverage)):
        save_subspaces(tmp_path / "s", saved, model)
        loaded = load_subspaces(tmp_path / "s", model)
        assert loaded.coverage == subspaces.coverage


@pytest.mark.parametrize(
    ("leave_out", "kind", "message"),
    [
        ("embedding*", ValueError, r"leave_out to name parameters of the model, got 'embedding\*'"),
        (["0.weight", "x"], ValueError, "got 'x'; its first are 0.weight, 1.weight"),
        (3, TypeError, "leave_out to be a name, a pattern of names or several, got 3"),
        ([None], TypeError, "several, got .None"),
    ],
)
def test_names_to_leave_out_that_there_are_not(leave_out, kind, message):
    model = nn.Sequential(nn.Embedding(9, 6), linear(8, 6))
    subspaces = refresh(model, 0.5, progress=False)
    for run in (
        lambda: refresh(model, 0.5, leave_out=leave_out),
        lambda: input_subspaces(model, [torch.arange(3)], leave_out=leave_out),
        lambda: confine(model, subspaces, leave_out=leave_out),
        lambda: protect(model, subspaces, None, leave_out=leave_out, restore=False),
    ):
        with pytest.raises(kind, match=rf"osf_torch\.\w+: expected .*{message}"):
            run()
    assert not confine(model, subspaces).parameters()[0].grad


def test_ranks_may_name_what_is_left_out():
    model = nn.Sequential(linear(8, 6), linear(6, 8))
    ranks = ranks_by_energy(model, 0.9)
    assert list(refresh(model, ranks, leave_out="1.*", progress=False)) == ["0.weight"]


# attention


@pytest.mark.parametrize("kdim", [None, 5])
def test_the_weights_of_attention_are_weights(kdim):
    model = nn.MultiheadAttention(6, 2, kdim=kdim, vdim=kdim)
    parts = ["in_proj_weight"] if kdim is None else [f"{p}_proj_weight" for p in "qkv"]
    found = refresh(model, 0.5)
    assert list(found) == [*parts, "out_proj.weight"]
    assert found.left_out == {}
    x, y = torch.randn(3, 1, 6), torch.randn(4, 1, kdim or 6)
    read = input_subspaces(model, [(x, y, y)], energy=1.0, filter=parts, progress=False, min_free=0)
    tokens = {"in_proj_weight": (x, y), "q_proj_weight": (x,)}
    for part in parts:
        V = grown(read[part])
        for seen in tokens.get(part, (y,)):
            rest = seen.flatten(0, -2) - seen.flatten(0, -2) @ V @ V.mT
            assert float(rest.norm()) < 1e-5
        assert V.shape[1] == min(V.shape[0], sum(len(t) for t in tokens.get(part, (y,))))


# adapters


class Adapted(nn.Module):
    """As PEFT builds it: a frozen weight and the factors of its update."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})


FACTORS = r"0\.lora_A\.default\.weight \(2x6, lora_A of a LoRA adapter\), 0\.lora_B\.default"


def test_factors_of_adapters_are_no_weights(caplog):
    model = nn.Sequential(Adapted(linear(8, 6)), linear(6, 8))
    found = refresh(model, 0.5)
    assert list(found) == ["1.weight"]
    assert found.left_out == {
        "0.lora_A.default.weight": "2x6, lora_A of a LoRA adapter",
        "0.lora_B.default.weight": "8x2, lora_B of a LoRA adapter",
    }
    assert "lora_A of a LoRA adapter" in caplog.messages[0]
    for run in (
        lambda: refresh(model[:1], 0.5),
        lambda: ranks_by_energy(model[:1], 0.5),
        lambda: input_subspaces(model[:1], [], progress=False),
    ):
        with pytest.raises(
            ValueError, match=rf"got no match.*what trains are {FACTORS}.*before it"
        ):
            run()
    taken = refresh(model[:1], 0.5, filter="*lora_*")
    assert list(taken) == ["0.lora_A.default.weight", "0.lora_B.default.weight"]


def test_factors_that_peft_adds():
    peft = pytest.importorskip("peft", reason="its LoRA")
    model = nn.Sequential(linear(8, 6), linear(6, 8))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    )
    found = refresh(adapted, 0.5)
    assert list(found) == ["base_model.model.1.modules_to_save.default.weight"]
    assert [what.split()[1] for what in found.left_out.values()] == ["lora_A", "lora_B"]


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("lora_A.default.weight", True),
        ("layers.0.q.lora_a.weight", True),
        ("layers.0.q.lora_embedding_B", True),
        ("block.lora_down.weight", True),
        ("processor.to_q_lora.down.weight", False),
        ("attn.lora_layer.up.weight", True),
        ("lora_model.layers.0.weight", False),
        ("explora_A.weight", False),
        ("lora_B_head.weight", False),
    ],
)
def test_names_of_factors(name, factor):
    model = nn.Module()
    *path, attribute = name.split(".")
    inner = model
    for part in path:
        inner.add_module(part, nn.Linear(4, 4, bias=False))
        inner = inner.get_submodule(part)
    inner.register_parameter(attribute, nn.Parameter(torch.ones(4, 4)))
    assert ("LoRA" in left_out(model, ())[name]) is factor


# what rho leaves free


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.score(torch.tanh(self.body(x)))


def test_a_rank_of_one_by_name_protects_a_single_row():
    """What is said of a row that rho leaves out, and what a wider filter= can't do."""
    model = Scored()
    before = model.score.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = protect(model, refresh(model, {"score.weight": 1, "*": 0.5}), optimizer=optimizer)
    body = model.body.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    guard.verify()
    assert not torch.equal(model.body.weight, body)
    assert torch.allclose(model.score.weight, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [0.5, 0.999, {"score.*": 0.9, "*": 0.5}, {"*": 0.01}])
def test_a_share_below_one_leaves_something_free(ranks, caplog):
    model = Scored()
    found = refresh(model, ranks)
    assert list(found) == ["body.weight"]
    assert found["body.weight"].rank < 8
    assert found.left_out == {"score.weight": NAMED["score.weight"].replace("1x6", "1x8")}
    assert "score.weight (1x8, rho leaves nothing free" in caplog.messages[0]
    before = model.score.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    protect(model, found, optimizer=optimizer)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.score.weight, before)


def test_weights_of_one_direction_alone_are_refused_for_a_share():
    with pytest.raises(ValueError, match=r"leaves something free of.*0\.weight; .*pass ranks=1"):
        refresh(nn.Sequential(nn.Linear(5, 1)), 0.5)


@pytest.mark.parametrize(
    ("ranks", "full"),
    [(1.0, "body.weight, score.weight"), (1, "score.weight"), ({"body*": 8, "*": 0.5}, "body.w")],
)
def test_what_leaves_nothing_free_is_done_and_told(ranks, full, caplog):
    found = refresh(Scored(), ranks)
    assert all(
        found[name].rank == min(found[name].shape) for name in full.split(", ") if name in found
    )
    (line,) = [line for line in caplog.messages if "nothing of it is left to train" in line]
    assert full in line
    assert "a share below 1.0 leaves something free" in line


@pytest.mark.parametrize(("ranks", "told"), [(1, True), ({"*": 1}, True), (2, False), (0.1, False)])
def test_the_int_one_is_told_from_the_share_one(ranks, told, caplog):
    refresh(small_model(), ranks)
    assert [("ranks is the int 1; 1.0 would be every" in line) for line in caplog.messages] == (
        [True] if told else []
    )


def test_ranks_from_figures_say_what_they_freeze(caplog):
    model = Scored()
    importance = dict.fromkeys(("body.weight", "score.weight"), 1.0)
    ranks = allocate_ranks(importance, model, trr=0.97)
    assert ranks == {"body.weight": 7, "score.weight": 1}
    refresh(model, ranks)
    assert (
        "nothing of it is left to train, since its rank is min(m, n): score.weight" in caplog.text
    )
    over = refresh(model, ranks | {"score.weight": 0.5})
    assert list(over) == ["body.weight"]
    assert ranks_by_energy(model, 0.5, maximum=0.9)["score.weight"] == 1
    assert ranks_by_energy(model, 1.0, maximum=0.99)["body.weight"] == 7


# names


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = linear(6, 6, 0)
        self.inner = nn.Module()
        self.inner._checkpoint_wrapped_module = linear(6, 6, 1)
        self.inner.weight = nn.Parameter(torch.randn(6, 6))
        self.head = linear(6, 6, 2)


def test_names_that_would_collide_are_kept_in_full():
    model = Names()
    names = named_weights(model)
    assert len({id(p) for p in names.values()}) == len(list(model.parameters())) == 4
    assert names["inner.weight"] is model.inner.weight
    full = "inner._checkpoint_wrapped_module.weight"
    assert names[full] is model.inner._checkpoint_wrapped_module.weight
    found = refresh(model, 0.5, filter="*")
    assert set(found) == {"weight", "inner.weight", full, "head.weight"}


@pytest.mark.parametrize("filter", ["user[0].weight", ["user[0].weight"], ("x*", "user[0].weight")])
def test_a_name_in_full_goes_before_any_pattern(filter):
    model = nn.ModuleDict({"user[0]": linear(6, 6, 0), "user0": linear(6, 6, 1)})
    assert list(refresh(model, 2, filter=filter)) == ["user[0].weight"]
    ranks = {"user[0].weight": 3, "user*": 2}
    assert {n: s.rank for n, s in refresh(model, ranks).items()} == {
        "user[0].weight": 3,
        "user0.weight": 2,
    }


# values


class Quantized(torch.Tensor):
    """As torchao's training weights: float32 to the eye, codes and a scale within."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} of quantized weights")


def quantized_model() -> nn.Sequential:
    model = nn.Sequential(linear(6, 6, 0), linear(6, 6, 1))
    model[0].weight = nn.Parameter(Quantized(torch.ones(6, 6, dtype=torch.int8), 0.1))
    return model


class Plain(nn.Parameter):
    """A subclass in name alone."""


def sparse_model() -> nn.Sequential:
    model = nn.Sequential(linear(6, 6))
    model[0].weight = nn.Parameter(torch.eye(6).to_sparse())
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("made", "kind", "message"),
    [
        (quantized_model, TypeError, "got Quantized; leave it out by filter=, or dequantize it"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), ValueError, "lazy module; run the model on a"),
        (sparse_model, TypeError, r"to be dense, got torch\.sparse_coo"),
        (
            lambda: nn.Sequential(nn.Linear(6, 6, device="meta")),
            ValueError,
            "got a meta tensor; load the weights first",
        ),
    ],
    ids=["quantized", "lazy", "sparse", "meta"],
)
def test_weights_without_plain_values_are_refused_by_name(made, kind, message):
    model, x = made(), [torch.ones(1, 6)]
    for run in (
        lambda: refresh(model, 2),
        lambda: ranks_by_energy(model, 0.5),
        lambda: input_subspaces(model, x, progress=False),
        lambda: layer_importance(model, x, progress=False),
        lambda: require_values("0.weight", model[0].weight, "x"),
    ):
        with pytest.raises(
            kind, match=rf"osf_torch\..*: expected parameter '0\.weight' .*{message}"
        ):
            run()


def test_what_is_quantized_may_be_left_out(tmp_path):
    model = quantized_model()
    found = refresh(model, 2, filter="1.*")
    assert found.left_out == {"0.weight": "6x6, nn.Linear"}
    pytest.importorskip("safetensors", reason="the files are safetensors")
    saved = {"0.weight": found["1.weight"]}
    with pytest.raises(
        TypeError, match=r"save_subspaces: expected parameter '0\.weight'.*Quantized"
    ):
        save_subspaces(tmp_path / "s", saved, model)
    model[1].weight = Plain(model[1].weight.detach())
    assert list(refresh(model, 2, filter="1.*")) == ["1.weight"]


def test_another_default_device_changes_nothing(tmp_path):
    """meta stands for a GPU: what is made there by mistake has no values."""
    model, x = nn.Sequential(linear(8, 6)), torch.randn(40, 6)
    wanted = refresh(model, 2)
    with torch.device("meta"):
        found = input_subspaces(model, [x], energy=0.5, max_tokens=8, progress=False)
        assert ranks_by_energy(model, 0.5)
        assert layer_importance(model, [x], per="block", progress=False)
        moved = wanted.to("cpu", torch.float64)
        if pytest.importorskip("safetensors", reason="the files are safetensors"):
            save_subspaces(tmp_path / "s", wanted, model)
            loaded = load_subspaces(tmp_path / "s", model)
    assert found["0.weight"].V.columns.device.type == "cpu"
    assert moved["0.weight"].svd.residual.device.type == "cpu"
    assert torch.equal(loaded["0.weight"].U.columns, wanted["0.weight"].U.columns)


@pytest.mark.parametrize(
    ("seed", "kind", "message"),
    [
        ("a", TypeError, "seed to be an int, got 'a'"),
        (1.5, TypeError, "got 1.5"),
        (True, TypeError, "got True"),
        (1 << 70, ValueError, "seed to have 64 bits"),
    ],
)
def test_seeds_that_no_generator_takes(seed, kind, message):
    model = small_model()
    with pytest.raises(kind, match=rf"osf_torch\.refresh: expected .*{message}"):
        refresh(model, 2, seed=seed)
    with pytest.raises(kind, match=rf"osf_torch\.input_subspaces: expected .*{message}"):
        input_subspaces(model, [torch.ones(2, 16)], seed=seed, progress=False)
