"""refresh of batches of matrices over real processes: the same everywhere, and as by one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from osf_torch import confine, protect, refresh
from osf_torch.sharing import whole
from tests.distributed.ranks import run_ranks
from tests.small_refresh import linear

OPTIONS = {"progress": False, "compute_dtype": torch.float64}
WAYS = ("shared out", "by expert", "within")


class Experts(nn.Module):
    """Five of each layer, which two ranks have three and two of."""

    def __init__(self, key: int) -> None:
        super().__init__()
        weights = [linear(12, 8, key, i, dtype=torch.float64).weight.detach() for i in range(5)]
        self.up = nn.Parameter(torch.stack(weights))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.up @ x.mT).sum(0).mT[:, :8].tanh()


def made(way: str) -> nn.Module:
    model = nn.Sequential(Experts(0), Experts(1))
    options = {"shard_placement_fn": lambda p: Shard(1)} if way == "within" else {}
    if way in ("by expert", "within"):
        for layer in model:
            fully_shard(layer, **options)
    return model


def _refused(tensor: DTensor) -> torch.Tensor:
    raise AssertionError("a batch of experts was gathered whole, for some of its matrices")


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The weights after three steps, whole."""
    for step in range(3):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [whole(t.detach()) for name, t in model.state_dict().items() if name.endswith("up")]


def found_by(rank: int, way: str) -> dict[str, object]:
    """The bases as projectors, and weights after steps under protect and confined."""
    model = made(way)
    group = dist.group.WORLD if way == "shared out" else None
    with mock.patch.object(DTensor, "full_tensor", _refused):
        subspaces = refresh(model, 0.4, group=group, **OPTIONS)
    held = {n: (s.V.columns @ s.V.columns.mT, s.S, s.shape) for n, s in subspaces.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = protect(model, subspaces, optimizer)
    protected = train(model, optimizer)
    guard.verify()
    other = made("alone")
    confined = confine(other, refresh(other, 0.4, **OPTIONS))
    if way in ("by expert", "within"):
        for layer in other:
            fully_shard(layer)
    after = train(other, torch.optim.AdamW(other.parameters(), lr=1e-2))
    confined.verify()
    return {"held": held, "protected": protected, "confined": after}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_experts_over_ranks_are_those_of_one_process(way):
    alone = found_by(0, "alone")
    for found in run_ranks(2, found_by, way):
        for name, (projector, S, shape) in alone["held"].items():
            assert found["held"][name][2] == shape == (5, 12, 8)
            torch.testing.assert_close(found["held"][name][0], projector, atol=1e-10, rtol=0)
            torch.testing.assert_close(found["held"][name][1], S, atol=1e-10, rtol=0)
        for key in ("protected", "confined"):
            for mine, theirs in zip(found[key], alone[key], strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
