"""Subspaces on disk over real processes: the file of a sharded model is that of a whole one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from osf_torch import Subspace, load_subspaces, protect, refresh, save_subspaces, storage
from tests.distributed.ranks import run_ranks
from tests.helpers import generator_for

pytest.importorskip("safetensors.torch", reason="the files are safetensors")
pytestmark = pytest.mark.slow

KEEP = {"keep": "all", "complement": True, "progress": False}


def mlp():
    """Sizes that neither 2 nor 3 divides, and a head with fewer rows than ranks."""
    sizes = [(14, 25), (25, 25), (25, 2)]
    model = nn.Sequential(*(nn.Linear(m, n) for m, n in sizes))
    gen = generator_for("storage")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=gen))
    return model


def sharded(ranks):
    model = mlp()
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def by_columns(ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    return parallelize_module(mlp(), mesh, {"1": RowwiseParallel()})


def replicated(ranks):
    return DistributedDataParallel(mlp())


MODELS = {"sharded": sharded, "columns": by_columns, "replicated": replicated}


def factors(subspaces):
    return {name: entry.factors() for name, entry in subspaces.items()}


def refusal(run, *arguments):
    try:
        run(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def saved(rank, ranks, folder):
    """Each rank with a path of its own, which shows who wrote."""
    found = {}
    for kind, build in MODELS.items():
        model = build(ranks)
        subspaces = refresh(model, 0.4, **KEEP)
        path = folder / f"{kind} {rank}"
        if kind != "replicated" or rank == 0:  # there the others take no part
            save_subspaces(path, subspaces, model)
        found[kind] = factors(subspaces), path.exists()
    return found


def saved_at_one_path(rank, ranks, folder):
    """All with one path, twice: what a rank finds there when it returns, and protects with."""
    model = sharded(ranks)
    path = folder / "one"
    save_subspaces(path, refresh(model, 0.2, progress=False), model)
    first = len(load_subspaces(path, model)["0.weight"].S)
    save_subspaces(path, refresh(model, 0.4, progress=False), model)
    loaded = load_subspaces(path, model)
    optimizer = torch.optim.AdamW(model.parameters())
    protect(model, loaded, optimizer=optimizer)
    return first, len(loaded["0.weight"].S), loaded["0.weight"].S.tolist()


def hashes(rank, ranks, folder):
    kinds = ("sharded", "columns")
    models = {kind: dict(MODELS[kind](ranks).named_parameters()) for kind in kinds}
    assert isinstance(models["columns"]["1.weight"], DTensor)
    return {
        kind: {name: storage.content_hash(weights[f"{name}.weight"]) for name in "012"}
        for kind, weights in models.items()
    }


def dense(rank, ranks, folder):
    """A protected part that is sharded like its weight is saved whole."""
    model = sharded(ranks)
    weights = dict(model.named_parameters())
    basis = refresh(model, 0.4, progress=False)["1.weight"].V
    subspaces = {"1.weight": Subspace(None, basis, None, weights["1.weight"].detach())}
    save_subspaces(folder / "dense", subspaces, model)
    return load_subspaces(folder / "dense", model)["1.weight"].protected


def refusals(rank, ranks, folder):
    """Of all ranks, where one alone has a reason or all have."""
    model = sharded(ranks)
    subspaces = refresh(model, 0.4, progress=False)
    path = folder / "refusals"
    save_subspaces(path, subspaces, model)
    absent = folder / "absent"
    found = {
        "folder": refusal(save_subspaces, absent / "s", subspaces, model),
        "written": refusal(save_subspaces, folder, subspaces, model),
        "file": refusal(load_subspaces, path if rank == 0 else absent, model),
    }
    with torch.no_grad():
        model[1].weight.to_local()[:1].add_(1e-3 * (rank == ranks - 1))
    return found | {"values": refusal(load_subspaces, path, model)}


RUNS = {
    "saved": saved,
    "one": saved_at_one_path,
    "hashes": hashes,
    "dense": dense,
    "refusals": refusals,
}


def everything(rank, ranks, folder):
    return {name: run(rank, ranks, folder) for name, run in RUNS.items()}


@pytest.fixture(scope="module", params=[2, 3])
def ran(request, tmp_path_factory):
    """The folder that the files are in, and what each rank found: one start of the processes."""
    folder = tmp_path_factory.mktemp("subspaces")
    return folder, run_ranks(request.param, everything, request.param, folder)


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_rank_writes_a_file_that_fits_the_whole_model(ran, kind):
    folder, runs = ran
    runs = [run["saved"][kind] for run in runs]
    assert [wrote for _, wrote in runs] == [True, *[False] * (len(runs) - 1)]
    loaded = factors(load_subspaces(folder / f"{kind} 0", mlp()))
    wanted = runs[0][0]
    assert list(loaded) == list(wanted) == ["0.weight", "1.weight", "2.weight"]
    for name, kept in wanted.items():
        assert loaded[name].keys() == kept.keys()
        assert all(torch.equal(loaded[name][part], factor) for part, factor in kept.items())


def test_every_rank_loads_what_is_there_when_saving_returns(ran):
    runs = [run["one"] for run in ran[1]]
    assert runs.count(runs[0]) == len(runs)
    assert runs[0][:2] == (3, 6)


def test_a_shard_hashes_as_the_whole(ran):
    runs = [run["hashes"] for run in ran[1]]
    wanted = {name: storage.content_hash(mlp()[int(name)].weight) for name in "012"}
    for run in runs:
        assert run == {"sharded": wanted, "columns": wanted}


def test_a_sharded_factor_is_saved_whole(ran):
    runs = [run["dense"] for run in ran[1]]
    for protected in runs:
        assert torch.equal(protected, mlp()[1].weight)


def test_no_rank_waits_for_one_that_is_refused(ran):
    runs = [run["refusals"] for run in ran[1]]
    first, *others = runs
    assert (first["folder"][0], first["written"][0]) == ("FileNotFoundError", "IsADirectoryError")
    assert "expected a folder to write s to" in first["folder"][1]
    for run in others:
        for what in ("folder", "written"):
            assert run[what][0] == "RuntimeError"
            assert "save_subspaces: expected every rank to do its share" in run[what][1]
            assert "rank 0 of the group" in run[what][1]
        assert run["file"][0] == "FileNotFoundError"
    assert first["file"][0] == "RuntimeError"
    for run in runs:
        assert run["values"][0] == "ValueError"
        assert "'1.weight' to hold the values" in run["values"][1]
