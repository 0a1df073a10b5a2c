"""refresh over real processes: shared out, the same everywhere, and the same as by one."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard

from osf_kernels import Basis
from osf_kernels.testing import overlap
from osf_torch import input_subspaces, protect, ranks_by_energy, refresh
from osf_torch.sharing import Ranks
from tests.distributed.ranks import Collectives, run_ranks
from tests.helpers import generator_for

KEEP = {"keep": "all", "complement": True, "progress": False}


def mlp(dtype=torch.float32):
    sizes = [(20, 33), (33, 33), (33, 33), (33, 20), (20, 20)]
    model = nn.Sequential(*(nn.Linear(m, n) for m, n in sizes))
    gen = generator_for("refresh")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model.to(dtype)


def sharded(dtype=torch.float32):
    model = mlp(dtype)
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def plain(subspaces):
    """What can travel back from a process."""
    return {
        name: {
            "factors": s.factors(),
            "facts": (s.method, s.rank, s.shape, s.iterations, s.converged),
            "figures": (s.residual, s.captured),
        }
        for name, s in subspaces.items()
    }


def shared_refresh(rank, ranks):
    with Collectives() as counted:
        found = refresh(mlp(), 0.4, group=dist.group.WORLD, tol=1e-4, **KEEP)
    kinds = {name for name, _, _ in counted.calls}
    return plain(found), sorted(kinds)


def sharded_refresh(rank, ranks):
    return plain(refresh(sharded(), 0.4, **KEEP, tol=1e-4))


def smaller_refresh(rank, ranks):
    return plain(refresh(sharded(), 0.7, progress=False, offload="cpu", dtype=torch.bfloat16))


def failing_refresh(rank, ranks):
    """A weight that overflows float32 is found by the rank that decomposes it, and told to all."""
    model = mlp()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(3e38)
    try:
        refresh(model, 0.4, group=dist.group.WORLD, progress=False)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def infinite_refresh(rank, ranks):
    """One rank's slice holds an Inf: all ranks refuse, naming the weight."""
    model = sharded()
    if rank == ranks - 1:
        with torch.no_grad():
            model[1].weight.to_local()[0, 0] = float("inf")
    try:
        refresh(model, 0.4, progress=False)
    except ValueError as error:
        return str(error)
    return ""


def flat_refresh(rank, ranks):
    """What FSDP1 makes of weights is refused; what it hasn't wrapped or has put back isn't."""
    said = []
    for options in ({"use_orig_params": True}, {"use_orig_params": False}):
        whole, part = mlp(), mlp()
        part[1] = FSDP(part[1], device_id=torch.device("cpu"), **options)
        for model in (FSDP(whole, device_id=torch.device("cpu"), **options), part):
            for run in (
                lambda model=model: refresh(model, 0.4, progress=False),
                lambda model=model: ranks_by_energy(model, 0.5, progress=False),
                lambda model=model: input_subspaces(model, [torch.ones(1, 20)], progress=False),
            ):
                try:
                    run()
                    said.append("works")
                except ValueError as error:
                    said.append(str(error))
    model = FSDP(mlp(), device_id=torch.device("cpu"), use_orig_params=True)
    with FSDP.summon_full_params(model):
        return said, list(refresh(model, 0.4, progress=False))


def next_task(rank, ranks):
    """A task, a deflated refresh on the shards, another task."""
    model = sharded(torch.float64)
    first = refresh(model, 0.4, **KEEP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, first, optimizer=optimizer)
    return tasks(model, guard, optimizer, rank, ranks)


def tasks(model, guard, optimizer, rank=0, ranks=1):
    gen = generator_for("tasks")
    for _ in range(2):
        for _ in range(4):
            x = torch.randn(12, 20, generator=gen, dtype=torch.float64).chunk(ranks)[rank]
            optimizer.zero_grad()
            (model(x) - x.sin()).square().mean().backward()
            optimizer.step()
        found = guard.next_task(widen=0.2, progress=False)
    guard.verify()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}
    return full, sorted({s.method for s in found.values()}), max(guard.drift().values())


RUNS = {
    "shared": shared_refresh,
    "sharded": sharded_refresh,
    "smaller": smaller_refresh,
    "failing": failing_refresh,
    "infinite": infinite_refresh,
    "flat": flat_refresh,
    "next task": next_task,
}


def everything(rank, ranks):
    return {name: run(rank, ranks) for name, run in RUNS.items()}


@lru_cache
def results(ranks, name=None):
    """Starting processes takes longer than what they do: once for each number of ranks."""
    if name is None:
        return run_ranks(ranks, everything, ranks)
    return [found[name] for found in results(ranks)]


def same_everywhere(runs):
    first, *others = runs
    for other in others:
        for name, entry in first.items():
            assert entry["facts"] == other[name]["facts"]
            assert entry["figures"] == other[name]["figures"]
            assert entry["factors"].keys() == other[name]["factors"].keys()
            for part, factor in entry["factors"].items():
                assert torch.equal(factor, other[name]["factors"][part])


def as_by_one(found, wanted):
    assert list(found) == list(wanted)
    for name, s in wanted.items():
        assert found[name]["facts"][:3] == (s.method, s.rank, s.shape)
        assert found[name]["factors"].keys() == s.factors().keys()
        for part, factor in s.factors().items():
            other = found[name]["factors"][part]
            assert other.dtype == factor.dtype
            if part == "S":
                assert torch.allclose(other, factor, rtol=1e-5)
            else:
                assert overlap(other.double(), factor.double()) >= 1 - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["shared", "sharded"])
def test_every_rank_has_what_one_process_finds(ranks, kind):
    runs = results(ranks, kind)
    if kind == "shared":
        for _, kinds in runs:
            assert kinds == ["all_reduce", "broadcast"], "tensors, no pickles"
        runs = [found for found, _ in runs]
    same_everywhere(runs)
    as_by_one(runs[0], refresh(mlp(), 0.4, tol=1e-4, **KEEP))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_smaller_bases_in_another_dtype(ranks):
    runs = results(ranks, "smaller")
    same_everywhere(runs)
    wanted = refresh(mlp(), 0.7, progress=False)
    for name, s in wanted.items():
        factors = runs[0][name]["factors"]
        assert factors.keys() == s.factors().keys()
        for part, factor in factors.items():
            assert factor.dtype == (torch.float32 if part == "S" else torch.bfloat16)
    assert any(isinstance(s.U, Basis) and s.U.spans == "low" for s in wanted.values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_no_rank_waits_for_one_that_failed(ranks):
    failures = results(ranks, "failing")
    assert all(failures)
    assert any("expected" in text and "weight" in text for text in failures)
    for text in results(ranks, "infinite"):
        assert "got NaN or Inf: '1.weight' has 1 such entries" in text


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_flat_parameters_of_fsdp1_are_refused_with_what_to_do(ranks):
    for said, taken in results(ranks, "flat"):
        assert len(said) == 12
        for text in said:
            assert "got FSDP1's flat parameters" in text
            assert "fully_shard (FSDP2)" in text
        assert taken == list(refresh(mlp(), 0.4, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_tasks_on_shards_are_tasks_on_one(ranks):
    model = mlp(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    guard = protect(model, refresh(model, 0.4, **KEEP), optimizer=optimizer)
    wanted, methods, _ = tasks(model, guard, optimizer)
    for weights, others, drift in results(ranks, "next task"):
        assert others == methods == ["deflated"]
        assert drift <= 1e-12
        for name, W in wanted.items():
            assert (weights[name] - W).norm() <= 1e-9 * W.norm(), name


def test_work_is_split_by_cost():
    ranks = Ranks(None)
    ranks.count = 3
    costs = [5.0, 1.0, 1.0, 4.0, 3.0, 1.0, 3.0]
    shares = ranks.split(costs)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert max(sum(costs[i] for i in share) for share in shares) == 6.0
    assert ranks.split([]) == [[], [], []]
    assert Ranks(None).split(costs) == [list(range(7))]
