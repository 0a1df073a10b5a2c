"""Batches of matrices (experts) however a mesh shards them: what one process computes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from osf_torch import Subspace, confine, protect
from tests.distributed.ranks import Collectives, run_ranks
from tests.helpers import generator_for

pytestmark = pytest.mark.slow

COUNT, ROWS, COLUMNS = 5, 6, 8  # experts that neither mesh dimension divides
STEPS = 2
PLACED = {
    "experts": (Shard(0), Replicate()),
    "experts twice": (Shard(0), Shard(0)),
    "experts by FSDP": (_StridedShard(0, split_factor=2), Shard(0)),
    "rows and experts": (Shard(1), Shard(0)),
    "columns": (Replicate(), Shard(2)),
    "rows and columns": (Shard(1), Shard(2)),
    "columns and rows": (Shard(2), Shard(1)),
    "rows twice": (_StridedShard(1, split_factor=2), Shard(1)),
}
SETTINGS = {
    "triplets": {},
    "one for all": {"common": True},
    "inputs alone": {"sides": "V"},
    "core": {"mode": "core"},
    "not restored": {"restore": False},
}
PARALLEL = {"experts": Shard(0), "rows": Shard(1), "columns": Shard(2), "none": None}


def drawn(*key):
    gen = generator_for("experts", *key)
    return torch.randn(COUNT, ROWS, COLUMNS, generator=gen, dtype=torch.float64)


def subspace(common=False, sides="UV", high=2):
    if common:
        U, _, Vh = torch.linalg.svd(drawn("weight").mean(0))
        return Subspace(U[:, :high].contiguous(), Vh[: high + 1].mT.contiguous())
    U, S, Vh = torch.linalg.svd(drawn("weight"), full_matrices=False)
    V = Vh[:, :high].mT.contiguous()
    if sides == "V":
        return Subspace(None, V)
    return Subspace(U[..., :high].contiguous(), V, S[:, :high].contiguous())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(drawn("weight"))

    def forward(self, x):  # (count, T, columns)
        W = self.weight
        if isinstance(W, DTensor):
            x = distribute_tensor(x, W.device_mesh, [Replicate()] * W.device_mesh.ndim)
        return torch.bmm(x, W.mT)


def whole(t):
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


def protected_run(setting, mesh=None, placements=None):
    """Gradients are drawn: what is computed of them is what is looked at."""
    options = dict(SETTINGS[setting])
    held = {key: options.pop(key) for key in ("common", "sides") if key in options}

    def placed(t):
        if mesh is None:
            return t
        return distribute_tensor(t, mesh, placements, src_data_rank=None)

    model = Experts()
    model.weight = nn.Parameter(placed(model.weight.detach()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, {"weight": subspace(**held)}, optimizer=optimizer, **options)
    calls = []
    for step in range(STEPS):
        model.weight.grad = placed(drawn("gradient", step))
        with Collectives() as counted:
            optimizer.step()
        calls.append(len(counted.calls))
    guard.verify()
    drift = guard.drift()["weight"]
    resumed = protect(model, guard.state_dict(), optimizer=optimizer)  # in the place of the first
    return whole(model.weight), drift, resumed.drift()["weight"], calls


def confined_run(mesh=None, placement=None, update="merge"):
    model = Experts()
    if placement is not None:
        weight = distribute_tensor(model.weight.detach(), mesh["ep"], [placement])
        model.weight = nn.Parameter(weight)
    confined = confine(model, {"weight": subspace()}, update=update)
    rank, ranks = 0, 1
    if mesh is not None:
        fully_shard(model, mesh=mesh["dp"])
        rank, ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for step in range(STEPS):
        gen = generator_for("experts", "inputs", step)
        x = torch.randn(COUNT, 8, COLUMNS, generator=gen, dtype=torch.float64)
        optimizer.zero_grad()
        loss = model(x.chunk(ranks, 1)[rank]).square().mean()
        loss.backward()
        optimizer.step()
    confined.verify()
    return whole(model.state_dict()["weight"]), confined.drift()["weight"]


def everything(rank, ranks):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "ep"))
    protected = {
        (where, setting): protected_run(setting, mesh, placements)
        for where, placements in PLACED.items()
        for setting in SETTINGS
    }
    confined = {
        (where, update): confined_run(mesh, placement, update)
        for where, placement in PARALLEL.items()
        for update in ("merge", "beside")
    }
    return protected, confined


@lru_cache
def results():
    return run_ranks(4, everything, 4)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("where", PLACED)
def test_protected_experts_are_those_of_one_process(where, setting):
    wanted, moved, _, _ = protected_run(setting)
    assert (wanted - drawn("weight")).norm() > 0.01 * wanted.norm()
    sums = sum(isinstance(p, Shard | _StridedShard) and p.dim != 0 for p in PLACED[where])
    for protected, _ in results():
        found, drift, resumed, calls = protected[where, setting]
        assert (found - wanted).norm() <= 1e-12 * wanted.norm()
        for figure in (drift, resumed):
            assert figure <= max(1e-12, 1.01 * moved)
        restores = SETTINGS[setting].get("restore", True)
        if setting != "inputs alone":
            assert calls == [sums * (1 + restores)] * STEPS, "none where whole experts are shared"


@pytest.mark.parametrize("update", ["merge", "beside"])
@pytest.mark.parametrize("where", PARALLEL)
def test_confined_experts_are_those_of_one_process(where, update):
    wanted, _ = confined_run(update=update)
    assert (wanted - drawn("weight")).norm() > 1e-3 * wanted.norm()
    for _, confined in results():
        found, drift = confined[where, update]
        assert (found - wanted).norm() <= 1e-12 * wanted.norm()
        assert drift <= 1e-12
