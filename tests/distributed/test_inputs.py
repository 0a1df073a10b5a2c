"""input_subspaces over real processes: inputs of all ranks together, the same bases everywhere."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from osf_kernels.testing import overlap
from osf_torch import input_subspaces, protect, refresh
from tests.distributed.ranks import Collectives, run_ranks
from tests.helpers import generator_for

ENERGY = 0.97


def mlp():
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12), nn.Tanh())
    generator = generator_for("inputs")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.double()


def sharded():
    model = mlp()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def batches(rank):
    """Fewer tokens on later ranks."""
    generator = generator_for("batches", rank)
    scale = 0.8 ** torch.arange(12, dtype=torch.float64)
    return [torch.randn(9 - 2 * rank, 12, generator=generator, dtype=torch.float64) * scale]


def columns(found):
    return {name: s.V.columns for name, s in found.items()}


def whole(rank):
    with Collectives() as counted:
        found = input_subspaces(
            mlp(), batches(rank), energy=ENERGY, group=dist.group.WORLD, progress=False
        )
    return columns(found), sorted({name for name, _, _ in counted.calls})


def on_shards(rank):
    model = sharded()
    before = refresh(model, 0.25, progress=False)
    found = input_subspaces(model, batches(rank), energy=ENERGY, previous=before, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = protect(model, found, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    guard.verify()
    return columns(found), max(guard.drift().values())


def one_sided_steps(rank):
    """What two restored steps with V alone send, beyond FSDP's own."""
    model = sharded()
    found = input_subspaces(model, batches(rank), energy=ENERGY, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = protect(model, found, optimizer=optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 12, dtype=torch.float64)).square().sum().backward()
        with Collectives() as counted:
            optimizer.step()
    return counted.calls, max(guard.drift().values())


def padded_batch(rank):
    """Padding on the first rank alone."""
    mask = torch.ones(2, 3, dtype=torch.long)
    if rank == 0:
        mask[1, 1:] = 0
    scale = 0.8 ** torch.arange(12, dtype=torch.float64)
    x = torch.randn(2, 3, 12, generator=generator_for("pad", rank), dtype=torch.float64) * scale
    return {"x": x, "attention_mask": mask}


def padding_on_one_rank(rank):
    """Every rank runs the sharded model as often, or the others would wait for it."""
    found = input_subspaces(
        sharded(),
        [padded_batch(rank)],
        energy=ENERGY,
        progress=False,
        forward=lambda model, batch: model(batch["x"]),
    )
    return columns(found)


def stream(model, given):
    """Three tasks that reach their floor, of which a later one starts from what the last made."""
    found = None
    for number in range(3):
        x = [batch.roll(number, -1) for batch in given]
        found = input_subspaces(model, x, energy=0.99, previous=found, min_free=4, progress=False)
    spectra = {name: tuple(s.spectra["V"]) for name, s in found.items()}
    return spectra, columns(found), found.released


def stream_on_shards(rank):
    return stream(sharded(), batches(rank))


def turn(model, given):
    """What a guard's turn makes of it, and how far it has drifted after steps since."""
    before = refresh(model, 0.25, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = protect(model, before, optimizer=optimizer)
    found = guard.next_task(batches=given, energy=ENERGY, progress=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 12, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    guard.verify()
    spectra = {name: tuple(s.spectra["V"]) for name, s in found.items()}
    return spectra, max(guard.released().values()), max(guard.drift().values())


def turn_on_shards(rank):
    return turn(sharded(), batches(rank))


def one_bad_rank(rank):
    given = batches(rank)
    if rank == 1:
        given[0][0, 0] = float("nan")
    try:
        input_subspaces(mlp(), given, group=dist.group.WORLD, progress=False)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


RUNS = {
    "whole": whole,
    "shards": on_shards,
    "stream": stream_on_shards,
    "turn": turn_on_shards,
    "one-sided": one_sided_steps,
    "padded": padding_on_one_rank,
    "bad": one_bad_rank,
}


def everything(rank):
    return {name: run(rank) for name, run in RUNS.items()}


@lru_cache
def results(ranks):
    return run_ranks(ranks, everything)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_bases_are_those_of_all_inputs_together(ranks, kind):
    together = [batch for rank in range(ranks) for batch in batches(rank)]
    before = refresh(mlp(), 0.25, progress=False) if kind == "shards" else None
    wanted = input_subspaces(mlp(), together, energy=ENERGY, previous=before, progress=False)
    first, _ = results(ranks)[0][kind]
    for run in results(ranks):
        for name, V in run[kind][0].items():
            assert torch.equal(V, first[name])
    for name, V in columns(wanted).items():
        assert first[name].shape == V.shape
        assert overlap(first[name], V) >= 1 - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stream_of_tasks_is_merged_and_let_go_of_alike(ranks):
    spectra, held, released = stream(mlp(), [b for rank in range(ranks) for b in batches(rank)])
    assert min(released.values()) > 0
    first = results(ranks)[0]["stream"]
    for run in results(ranks):
        theirs, columns_there, lost = run["stream"]
        assert lost == pytest.approx(released, rel=1e-9)
        for name, (V, energies) in spectra.items():
            assert V.shape[1] == (5 if name == "2.weight" else 8)
            W, others = theirs[name]
            assert torch.equal(W, first[0][name][0])
            assert torch.equal(columns_there[name], first[1][name])
            assert columns_there[name].shape == held[name].shape
            there = W * others @ W.mT
            assert float((there - V * energies @ V.mT).norm()) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_turn_by_inputs_of_all_ranks(ranks):
    wanted, _, _ = turn(mlp(), [b for rank in range(ranks) for b in batches(rank)])
    first = results(ranks)[0]["turn"][0]
    for run in results(ranks):
        spectra, released, drift = run["turn"]
        assert max(released, drift) <= 1e-7
        for name, (V, energies) in wanted.items():
            W, others = spectra[name]
            assert torch.equal(W, first[name][0])
            assert float((W * others @ W.mT - V * energies @ V.mT).norm()) <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_hold_still_and_what_is_sent_are_tensors(ranks):
    for run in results(ranks):
        assert run["shards"][1] <= 1e-12
        assert run["whole"][1] == ["all_gather", "all_reduce", "broadcast"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_with_the_unsharded_side_alone_send_nothing(ranks):
    for run in results(ranks):
        calls, drift = run["one-sided"]
        assert calls == []
        assert drift <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_padding_on_one_rank_is_left_out(ranks):
    given = [padded_batch(rank) for rank in range(ranks)]
    tokens = torch.cat([batch["x"][batch["attention_mask"] != 0] for batch in given])
    wanted = input_subspaces(mlp(), [tokens], energy=ENERGY, progress=False)
    for run in results(ranks):
        for name, V in columns(wanted).items():
            assert run["padded"][name].shape == V.shape
            assert overlap(run["padded"][name], V) >= 1 - 1e-9


@pytest.mark.slow
def test_all_ranks_refuse_together():
    first, second = (run["bad"] for run in results(2))
    assert "see what it raised" in first
    assert "NaN or Inf first in '0.weight'" in second
