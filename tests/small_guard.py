"""What tests of guards share: models of drawn weights, and steps of training."""

from __future__ import annotations

import torch

from tests.helpers import generator_for


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
