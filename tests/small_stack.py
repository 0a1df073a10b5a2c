"""What tests of layer importance share: a stack of residual blocks and inputs for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import generator_for, randn

WIDTH = 12


class Residual(nn.Module):
    """x + up(gelu(down x)), token by token: a block whose every row stands alone."""

    def __init__(self, width: int = WIDTH, *, in_place: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.in_place = in_place

    def forward(self, x):
        y = self.down(F.gelu(self.up(x)))
        return x.add_(y) if self.in_place else x + y


class Stack(nn.Module):
    """Blocks with a projection before and a head after them, called as Hugging Face's models."""

    def __init__(self, blocks, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x, attention_mask=None):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(depth: int = 3, dtype: torch.dtype = torch.float64, **options) -> Stack:
    model = Stack([Residual(**options) for _ in range(depth)])
    return randomised(model, dtype)


def randomised(model: nn.Module, dtype: torch.dtype, *key: object) -> nn.Module:
    """Weights with a share of the identity, so that some similarities are above zero."""
    generator = generator_for(dtype, *key)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(randn(*p.shape, dtype=p.dtype, generator=generator) * 0.4)
            if p.dim() == 2:
                p.add_(torch.eye(*p.shape, dtype=p.dtype), alpha=0.5)
    return model.to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return randn(*shape, dtype=dtype, generator=generator_for(shape))
