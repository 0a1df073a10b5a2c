"""What tests of guards share: models of drawn weights, and steps of training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from tests.helpers import generator_for

# What computes the weight that a module uses from another parameter.
REPARAMETRIZE = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": nn.utils.parametrizations.spectral_norm,
    "parametrizations.orthogonal": nn.utils.parametrizations.orthogonal,
    "register_parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m, "weight", nn.Tanh()
    ),
    "prune": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "prune.identity": lambda m: prune.identity(m, "weight"),
}


def drawn(model, *key):
    """The model with parameters drawn by ``key``."""
    gen = generator_for(*key)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
    return model


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def train(model, optimizer, steps, *key):
    gen = generator_for("data", *key)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(16, 18, generator=gen).to(dtype)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone: what is sharded over it is whole, and a DTensor."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model):
    """The model, each of its weights a DTensor of one shard."""
    for module in model:
        if list(module.parameters()):
            fully_shard(module)
    return fully_shard(model)


def local(p):
    """What this rank holds of a parameter, detached."""
    p = p.detach()
    return p.to_local() if hasattr(p, "to_local") else p
