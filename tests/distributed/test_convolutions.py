"""Guards of sharded convolutions: what the ranks hold together is what one process computes."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from osf_torch import input_subspaces, protect, refresh
from tests.distributed.ranks import Collectives, run_ranks
from tests.helpers import generator_for
from tests.small_guard import drawn, one_rank

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

RANKS = 2
SETTINGS = {
    "high": {"ratio": 0.4},
    "low": {"ratio": 0.7},
    "triplets": {"ratio": 0.4, "keep": "all", "complement": False},
    "core": {"ratio": 0.4, "mode": "core"},
    "not restored": {"ratio": 0.4, "restore": False},
    "deferred": {"ratio": 0.4, "restore": "deferred"},
    "backward": {"ratio": 0.4, "when": "backward"},
}
FIRST = ("0.weight", "2.weight", "4.weight")
# By a step that isn't the first one.
SUMS = {"high": 2, "low": 2, "deferred": 1, "not restored": 1}


def network():
    """Rows that two ranks share unevenly, and a last layer with fewer rows than ranks."""
    layers = (
        nn.Conv2d(3, 7, 3, padding=1),
        nn.Conv2d(7, 9, 2),
        nn.ConvTranspose2d(9, 6, 2, groups=3),
        nn.Conv2d(6, 1, 3, groups=1),
    )
    parts = [part for layer in layers for part in (layer, nn.Tanh())]
    return drawn(nn.Sequential(*parts[:-1]), "network").double()


def shard(model, mesh):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, steps, rank=0, ranks=1):
    calls = []
    for step in steps:
        gen = generator_for("images", step)
        x = torch.randn(4, 3, 6, 6, generator=gen, dtype=torch.float64).chunk(ranks)[rank]
        optimizer.zero_grad()
        (model(x) - x[:, :1, 1:5, 1:5].sin()).square().mean().backward()
        with Collectives() as counted:
            optimizer.step()
        calls.append([name for name, *_ in counted.calls])
    return calls


def begun(setting, mesh=None, on_shards=False, record=True):
    """The model, its optimizer and its guard; of a mesh sharded, before or after the refresh."""
    options = dict(SETTINGS[setting])
    kept = {key: options.pop(key) for key in ("keep", "complement") if key in options}
    model = network()
    if on_shards:
        shard(model, mesh)
    found = refresh(
        model,
        # A share leaves nothing free of one direction.
        {"6.weight": 1, "*": options.pop("ratio")},
        filter="*.weight",
        progress=False,
        compute_dtype=torch.float64,
        **kept,
    )
    if mesh is not None and not on_shards:
        shard(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, found, optimizer=optimizer, record=record, **options)
    return model, optimizer, guard


def whole(model):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def run(setting, mesh=None, on_shards=False, rank=0, ranks=1):
    model, optimizer, guard = begun(setting, mesh, on_shards)
    train(model, optimizer, range(3), rank, ranks)
    leaks = {name: leak.raw for name, leak in guard.leak().items()}
    guard.clip_grad_norm_(1.0)
    guard.verify()
    first = whole(model)
    guard.next_task({"6.weight": 1, "*": 0.5}, optimizer_state="project", progress=False)
    train(model, optimizer, range(3, 5), rank, ranks)
    guard.verify()
    return {"first": first, "then": whole(model), "leaks": leaks}


def inputs(model, rank=0, ranks=1):
    """What holds the inputs of all ranks, as projections."""
    gen = generator_for("old images")
    x = torch.randn(2, 3, 4, 4, generator=gen, dtype=torch.float64).chunk(ranks)[rank]
    found = input_subspaces(model, [x], energy=0.9, filter=FIRST, progress=False)
    sides = {name: s.U if s.V is None else s.V for name, s in found.items()}
    return {name: basis.columns @ basis.columns.mT for name, basis in sides.items()}


def everything(rank, ranks, folder):
    mesh = init_device_mesh("cpu", (ranks,))
    found = {name: run(name, mesh, False, rank, ranks) for name in SETTINGS}
    found["on shards"] = run("low", mesh, True, rank, ranks)
    for name in SUMS:
        model, optimizer, _ = begun(name, mesh, record=False)
        found[f"{name} calls"] = train(model, optimizer, range(3), rank, ranks)
    for name in ("low", "triplets", "core", "not restored"):
        model, optimizer, guard = begun(name, mesh)
        train(model, optimizer, range(3), rank, ranks)
        dcp.save({"guard": guard.state_dict()}, checkpoint_id=f"{folder}/{name}")
        weights, moments = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        again, other, fresh = begun(name, mesh)
        again.load_state_dict(weights)
        other.load_state_dict(moments)
        state = {"guard": fresh.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        resumed = protect(again, state["guard"], optimizer=other, record=True)
        train(model, optimizer, range(3, 5), rank, ranks)
        train(again, other, range(3, 5), rank, ranks)
        resumed.verify()
        found[f"{name} resumed"] = all(
            torch.equal(a.to_local(), b.to_local())
            for a, b in zip(model.parameters(), again.parameters(), strict=True)
        )
    found["inputs"] = inputs(shard(network(), mesh), rank, ranks)
    model = network()
    subspaces = refresh(model, 0.4, filter="0.weight", progress=False)
    layer = model[0]
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError) as caught:
        protect(model, subspaces, restore=False)
    found["refusal"] = str(caught.value)
    return found


@lru_cache
def results(folder):
    return run_ranks(RANKS, everything, RANKS, folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    return folder, results(folder)


def same(found, wanted, limit=1e-12):
    assert found.keys() == wanted.keys()
    for name, W in wanted.items():
        assert (found[name] - W).norm() <= limit * W.norm(), name


@pytest.mark.parametrize("setting", [*SETTINGS, "on shards"])
def test_fsdp2_is_the_single_process_run(ran, setting):
    """Through clipping, a second task with other ranks, and projected momenta."""
    if setting == "deferred":  # what isn't sharded is pinned at once
        with one_rank():
            wanted = run(setting, init_device_mesh("cpu", (1,)))
    else:
        wanted = run("low" if setting == "on shards" else setting)
    for found in ran[1]:
        same(found[setting]["first"], wanted["first"])
        same(found[setting]["then"], wanted["then"], 1e-9)
        for name, raw in wanted["leaks"].items():
            assert found[setting]["leaks"][name] == pytest.approx(raw, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("setting", SUMS)
def test_a_step_sums_for_all_weights_at_once(ran, setting):
    for found in ran[1]:
        for calls in found[f"{setting} calls"][1:]:
            assert calls == ["all_reduce"] * SUMS[setting]


@pytest.mark.parametrize("setting", ["low", "triplets", "core", "not restored"])
def test_a_state_resumes_to_the_bit_and_alone(ran, setting):
    folder, found = ran
    assert all(one[f"{setting} resumed"] for one in found)
    dcp_to_torch_save(folder / setting, folder / f"{setting}.pt")
    state = torch.load(folder / f"{setting}.pt")["guard"]
    model, optimizer, _ = begun(setting)
    train(model, optimizer, range(3))
    guard = protect(model, state, optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    guard.verify()


def test_other_shards_than_rows_are_refused_by_name(ran):
    for found in ran[1]:
        assert found["refusal"].startswith(
            "osf_torch.protect: parameter '0.weight': expected a convolution's weight to be "
            "sharded by its first dimension"
        )
        assert "got (7, 3, 3, 3) sharded by dimension 1; shard it by Shard(0)" in found["refusal"]


def test_inputs_of_sharded_convolutions_are_those_of_all_ranks(ran):
    wanted = inputs(network())
    assert {name: P.shape[0] for name, P in wanted.items()} == dict(
        zip(FIRST, (27, 28, 9), strict=True)
    )
    for found in ran[1]:
        same(found["inputs"], wanted, 1e-9)
