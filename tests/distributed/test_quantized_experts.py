"""Experts of float8 that FSDP2 shards: trained beside as by one process, and looked at."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from osf_torch import confine, refresh
from tests.distributed.ranks import run_ranks
from tests.small_confine import adamw, relative
from tests.small_experts import ids
from tests.small_quantized import float8_experts

STEPS = 3


def trained(rank: int, way: str, ranks: int):
    """What a run ends with: C, drift, and what verify says once a code has changed."""
    model, _, _ = float8_experts(way)
    found = refresh(model, 0.5, progress=False, compute_dtype=torch.float64)
    confined = confine(model, found, update="beside")
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(TypeError, match="quantized weight that is sharded; refresh and conf"):
            refresh(model, 0.5, progress=False, filter="*experts*_proj")
    optimizer = adamw(confined.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = ids("sharded", step)
        shares = batch.chunk(ranks)
        loss = model(shares[rank]).logits.sin().square().mean()
        loss.backward()
        optimizer.step()
    confined.verify()
    C = [whole(t) for t in confined.parameters()]
    drift, kept = confined.drift(), confined.state_dict()
    confined.load_state_dict(kept)
    confined.verify()
    name = confined.places[0].spec.attribute
    held = confined.places[0].module._parameters[f"{name}_scale_inv"]
    with torch.no_grad():
        getattr(held, "_local_tensor", held).mul_(1.5)
    with pytest.raises(RuntimeError, match="something has written to what the quantized weight"):
        confined.verify()
    return C, drift


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_sharded_experts_train_as_those_of_one_process(way):
    pytest.importorskip("transformers", reason="the experts are its own")
    wanted, _ = trained(0, way, 1)
    for C, drift in run_ranks(2, trained, way, 2):
        assert all(relative(t, want) <= 1e-4 for t, want in zip(C, wanted, strict=True))
        assert max(drift.values()) <= 1e-5
