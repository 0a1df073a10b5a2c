"""A run that was saved on some ranks goes on on others and on other meshes as if uninterrupted."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from osf_torch import confine, protect, refresh
from tests.distributed.ranks import run_ranks
from tests.distributed.test_meshes import adamw, parallel, shard, stack, train, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

BEFORE, AFTER = range(3), range(3, 5)
# Low bases and a dense part, triplets and what a weight has beside them, a sketch.
SETTINGS = {
    "low": {"ratio": 0.7},
    "triplets": {"ratio": 0.4, "keep": "all", "complement": False},
    "not restored": {"ratio": 0.4, "restore": False},
    "core": {"ratio": 0.4, "keep": "all", "complement": False, "mode": "core"},
}
LAYOUTS = {
    2: {"fsdp": ((2,), ("dp",)), "tp": ((2,), ("tp",))},
    4: {"fsdp": ((4,), ("dp",)), "both": ((2, 2), ("dp", "tp"))},
}


def subspaces_of(model, ratio, **options):
    kept = {key: options[key] for key in ("keep", "complement") if key in options}
    return refresh(model, ratio, progress=False, compute_dtype=torch.float64, **kept)


def laid_out(model, mesh):
    if mesh is not None and "tp" in mesh.mesh_dim_names:
        parallel(model, mesh["tp"])
    if mesh is not None and "dp" in mesh.mesh_dim_names:
        shard(model, mesh["dp"])
    return model


def begun(setting, mesh, state=None):
    options = SETTINGS[setting]
    model = laid_out(stack(), mesh)
    optimizer = adamw(model)
    if state is None:
        state = subspaces_of(stack(), **options)
        chosen = {key: options[key] for key in ("restore", "mode") if key in options}
        return model, optimizer, protect(model, state, optimizer=optimizer, **chosen)
    return model, optimizer, None


def weights(model):
    return {name: whole(t) for name, t in model.state_dict().items()}


SAVED = {"fsdp": ("low", "triplets"), "tp": ("triplets", "not restored", "core")}


def saving(rank, ranks, folder):
    for layout, settings in SAVED.items():
        shape, names = LAYOUTS[2][layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for setting in settings:
            model, optimizer, guard = begun(setting, mesh)
            train(model, optimizer, mesh, BEFORE)
            dcp.save(states(model, optimizer, guard), checkpoint_id=f"{folder}/{layout} {setting}")
    model = laid_out(stack(), mesh := init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    confined = confine(model, subspaces_of(stack(), 0.4))
    optimizer = adamw(model)
    train(model, optimizer, mesh, BEFORE)
    dcp.save(states(model, optimizer, confined), checkpoint_id=f"{folder}/confined")


def states(model, optimizer, ours):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "ours": ours.state_dict(),
    }


def loaded(model, optimizer, folder):
    found = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])


def resuming(rank, ranks, folder):
    """Into a guard that is there, by a distributed checkpoint; and by a guard of whole tensors."""
    if ranks == 1:
        return resumed("fsdp", None, folder) | resumed("tp", None, folder)
    flat, both = (init_device_mesh("cpu", s, mesh_dim_names=n) for s, n in LAYOUTS[4].values())
    return resumed("fsdp", flat, folder) | resumed("tp", both, folder)


def resumed(saved, mesh, folder):
    found = {}
    for setting in SAVED[saved]:
        path = f"{folder}/{saved} {setting}"
        model, optimizer, guard = begun(setting, mesh, state="later" if saved == "tp" else None)
        loaded(model, optimizer, path)
        if guard is None:
            state = torch.load(f"{path}.pt")["ours"]
            guard = protect(model, state, optimizer=optimizer)
        else:
            state = {"ours": guard.state_dict()}
            dcp.load(state, checkpoint_id=path)
            guard.load_state_dict(state["ours"])
        train(model, optimizer, mesh, AFTER)
        guard.verify()
        found[saved, setting] = weights(model), max(guard.drift().values())
    if saved == "tp":
        model = parallel(stack(), mesh["tp"]) if mesh is not None else stack()
        confined = confine(model, subspaces_of(stack(), 0.4))
        if mesh is not None:
            shard(model, mesh["dp"])
        optimizer = adamw(model)
        loaded(model, optimizer, f"{folder}/confined")
        state = {"ours": confined.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/confined")
        confined.load_state_dict(state["ours"])
        train(model, optimizer, mesh, AFTER)
        found["confined",] = weights(model), max(confined.drift().values())
    return found


@lru_cache
def uninterrupted(setting):
    if setting == "confined":
        model = stack()
        guard = confine(model, subspaces_of(model, 0.4))
        optimizer = adamw(model)
        train(model, optimizer, None, [*BEFORE, *AFTER])
        return weights(model), max(guard.drift().values())
    model, optimizer, guard = begun(setting, None)
    train(model, optimizer, None, [*BEFORE, *AFTER])
    return weights(model), max(guard.drift().values())


def test_a_guard_resumes_on_other_ranks_and_meshes(tmp_path):
    run_ranks(2, saving, 2, tmp_path)
    for path in list(tmp_path.iterdir()):
        dcp_to_torch_save(path, f"{path}.pt")
    for run in (resuming(0, 1, tmp_path), *run_ranks(4, resuming, 4, tmp_path)):
        for (*_, setting), (found, drift) in run.items():
            wanted, moved = uninterrupted(setting)
            assert drift <= max(1e-12, 1.01 * moved)
            for name, W in wanted.items():
                assert (found[name] - W).norm() <= 1e-11 * W.norm(), (setting, name)
