"""input_subspaces of experts that FSDP2 shards: the tokens of all ranks, each by its own expert."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from osf_torch import input_subspaces
from tests.distributed.ranks import run_ranks
from tests.helpers import generator_for

EXPERTS, WIDTH, ENERGY = 3, 8, 0.9


class RouterAndExperts(nn.Module):
    """Each token is read by the expert whose score is highest."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(EXPERTS, WIDTH, dtype=torch.float64))  # a router
        self.up = nn.Parameter(torch.empty(EXPERTS, 6, WIDTH, dtype=torch.float64))
        self.down = nn.Parameter(torch.empty(EXPERTS, 6, WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, y = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = (flat @ self.weight.mT).argmax(-1)
        for e in chosen.unique():
            inner = (flat[chosen == e] @ self.up[e].mT).tanh()
            y[chosen == e] = inner @ self.down[e]
        return x + y.view(x.shape)


def mixture(*, shards: bool) -> nn.Module:
    model = nn.Sequential(RouterAndExperts(), RouterAndExperts())
    generator = generator_for("mixture")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    if shards:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    return model


def batch(rank: int, *, padded: bool) -> dict[str, torch.Tensor]:
    scale = 0.6 ** torch.arange(WIDTH, dtype=torch.float64)
    generator = generator_for("batch", rank)
    x = scale * torch.randn(2, 7 + rank, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    if padded and rank == 0:
        mask[1, 4:] = 0
    return {"x": x, "attention_mask": mask}


def bases(model: nn.Module, given: list[dict[str, torch.Tensor]]):
    found = input_subspaces(
        model,
        given,
        energy=ENERGY,
        progress=False,
        forward=lambda model, batch: model(batch["x"]),
    )
    return {
        name: (side, basis.columns)
        for name, s in found.items()
        for side, basis in (("U", s.U), ("V", s.V))
        if basis is not None
    }


def on_ranks(rank: int):
    return {
        padded: bases(mixture(shards=True), [batch(rank, padded=padded)])
        for padded in (False, True)
    }


@lru_cache
def results():
    return run_ranks(2, on_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_experts_grow_by_the_tokens_of_all_ranks(padded):
    together = [batch(rank, padded=padded) for rank in range(2)]
    expected = bases(mixture(shards=False), together)
    sides = {name: side for name, (side, _) in expected.items()}
    assert sides == {
        f"{i}.{part}": "U" if part == "down" else "V"
        for i in range(2)
        for part in ("weight", "up", "down")
    }
    first, second = (result[padded] for result in results())
    for name, (side, columns) in expected.items():
        for found in (first, second):
            assert found[name][0] == side
            other = found[name][1]
            assert other.shape == columns.shape
            apart = other @ other.mT - columns @ columns.mT
            assert float(apart.abs().max()) <= 1e-7
        assert torch.equal(first[name][1], second[name][1])
