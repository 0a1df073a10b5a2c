"""integrations.peft under FSDP2, HSDP and DDP: as on one rank, with one collective."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from osf_torch.integrations import peft as osf_peft
from tests.distributed.ranks import Collectives, run_ranks
from tests.integrations.peft_layers import (
    SIDES,
    formula,
    inputs,
    layers,
    loss_of,
    optimizer_of,
    share,
    with_gradients,
    wrapped,
)

LEAK = 1e-6


def reductions(seen: Collectives) -> list[int]:
    """Of each all-reduce, how many ranks took part."""
    return [
        torch.distributed.get_world_size(group)
        for name, _, group in seen.calls
        if name == "all_reduce"
    ]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.clone()


def _sharded(rank: int, ours: bool, dims: str, restored: bool) -> dict[str, Any]:
    """Two steps of SGD with FSDP2, or DDP; what the rank saw, in whole tensors."""
    peft = importlib.import_module("peft")
    ranks = torch.distributed.get_world_size()
    osf_peft.disable()
    if ours:
        osf_peft.enable()
    model = wrapped(peft)
    if dims == "replicated":
        return _steps(DistributedDataParallel(model), rank, restored)
    mesh = (
        init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("replicate", "shard"))
        if dims == "hybrid"
        else init_device_mesh("cpu", (ranks,))
    )
    options: dict[str, Any] = {"mesh": mesh}
    if dims == "columns":
        options["shard_placement_fn"] = lambda p: Shard(p.dim() - 1)
    for layer in layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if ours:
        osf_peft.attach(model)
        assert osf_peft.attach(model) == 6
        osf_peft.verify(model)
    return _steps(model, rank, restored)


def _steps(model: nn.Module, rank: int, restored: bool) -> dict[str, Any]:
    ranks = torch.distributed.get_world_size()
    optimizer = optimizer_of(model, "sgd")
    if restored:
        osf_peft.restore_after(model, optimizer)
    calls = []
    for step in range(2):
        optimizer.zero_grad()
        with Collectives() as backward:
            loss_of(model, inputs(step, 12).chunk(ranks)[rank]).backward()
        grads = [
            whole(layer.osf_svd_params["default"][side].grad)
            for layer in layers(model)
            for side in SIDES
        ]
        with Collectives() as stepped:
            optimizer.step()
        calls.append((reductions(backward), reductions(stepped)))
    params = [
        whole(layer.osf_svd_params["default"][side].detach())
        for layer in layers(model)
        for side in SIDES
    ]
    leaks = [
        share(layer, side, g)
        for (layer, side), g in zip(
            [(layer, side) for layer in layers(model) for side in SIDES], grads, strict=True
        )
    ]
    return {"calls": calls, "grads": grads, "params": params, "leaks": leaks}


def _alone(peft: ModuleType, ranks: int) -> tuple[list[Tensor], list[Tensor]]:
    osf_peft.enable()
    model = wrapped(peft)
    optimizer = optimizer_of(model, "sgd")
    for step in range(2):
        optimizer.zero_grad()
        for part in inputs(step, 12).chunk(ranks):
            (loss_of(model, part) / ranks).backward()
        grads = [
            layer.osf_svd_params["default"][side].grad.clone()
            for layer in layers(model)
            for side in SIDES
        ]
        optimizer.step()
    params = [
        layer.osf_svd_params["default"][side].detach() for layer in layers(model) for side in SIDES
    ]
    return grads, params


def _utility(sharded: bool) -> tuple[list[int], list[Tensor], list[Tensor]]:
    d = with_gradients(30, 21, 9)
    raw = [d[side].grad.clone() for side in SIDES]
    expected = [formula(d, side, g) for side, g in zip(SIDES, raw, strict=True)]
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for name in ("U_high", "V_high", *SIDES):
            d[name] = nn.Parameter(distribute_tensor(d[name].detach(), mesh, [Shard(0)]))
        for side, g in zip(SIDES, raw, strict=True):
            d[side].grad = distribute_tensor(g, mesh, [Shard(0)])
    with Collectives() as seen:
        osf_peft.project_gradient_to_orthogonal_space(d)
    found = [d[side].grad for side in SIDES]
    if sharded:
        found = [whole(g) for g in found]
    return reductions(seen), found, expected


# (sharded along, restored) of each run: processes start in seconds, so they make all of them.
RUNS = {
    2: (("rows", False), ("rows", True), ("columns", True), ("hybrid", True), ("replicated", True)),
    3: (("rows", True),),
}


def _all_runs(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    ranks = torch.distributed.get_world_size()
    if ranks == 2:
        found["peft alone"] = _sharded(rank, False, "rows", False)
        found["utility"] = {sharded: _utility(sharded) for sharded in (False, True)}
    for run in RUNS[ranks]:
        found[run] = _sharded(rank, True, *run)
    return found


@lru_cache
def all_runs(ranks: int) -> list[dict[Any, Any]]:
    return run_ranks(ranks, _all_runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "dims", "restored"), [(ranks, *run) for ranks in RUNS for run in RUNS[ranks]]
)
def test_shards_are_projected_with_one_collective(peft, ranks, dims, restored):
    expected, expected_params = _alone(peft, ranks)
    for seen in (found[dims, restored] for found in all_runs(ranks)):
        assert max(seen["leaks"]) <= LEAK
        for backward, stepped in seen["calls"]:
            if dims == "replicated":
                assert backward == stepped == []
                continue
            own = 1 if dims == "hybrid" else ranks  # the others are FSDP's, over the replicas
            assert backward.count(own) == 1
            assert stepped == [own] * restored
        for a, b in zip(seen["grads"], expected, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()
        for a, b in zip(seen["params"], expected_params, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.slow
def test_peft_alone_leaks_on_shards():
    for seen in (found["peft alone"] for found in all_runs(2)):
        assert max(seen["leaks"]) > 0.1
        assert seen["calls"] == [([], []), ([], [])]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_gradient_that_every_rank_has_is_not_summed(sharded):
    for calls, found, expected in (seen["utility"][sharded] for seen in all_runs(2)):
        assert calls == [2] * sharded
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b).norm() < 2e-6 * b.norm()
