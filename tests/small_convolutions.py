"""What tests of convolutions share: each kind of them, and their matrices."""

from __future__ import annotations

import torch
from torch import nn

from osf_torch import Subspace
from tests.small_guard import drawn

KINDS = {
    "1d": lambda: nn.Conv1d(5, 8, 4, stride=2, dilation=2),
    "2d": lambda: nn.Conv2d(4, 9, 3, padding=1),
    "2d grouped": lambda: nn.Conv2d(6, 8, (2, 3), groups=2, padding="same"),
    "2d depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "2d of one place": lambda: nn.Conv2d(9, 7, 1),
    "3d": lambda: nn.Conv3d(3, 8, (2, 1, 2), padding=(1, 0, 1)),
    "2d transposed": lambda: nn.ConvTranspose2d(6, 5, 2, stride=2),
    "1d transposed, grouped": lambda: nn.ConvTranspose1d(8, 6, 3, groups=2),
}


def convolution(kind, *key, dtype=torch.float64):
    """A drawn one alone in its model, as ``0.weight``."""
    return drawn(nn.Sequential(KINDS[kind]()), "convolution", kind, *key).to(dtype)


def images(layer, count, generator, side=7):
    """Inputs of a layer, in its dtype."""
    dims = layer.weight.dim() - 2
    shape = (count, layer.in_channels, *[side] * dims)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(layer.weight.dtype)


def channels_last(t):
    """The same values, the channels of each place beside each other in memory."""
    order = (0, *range(2, t.dim()), 1)
    back = (0, t.dim() - 1, *range(1, t.dim() - 1))
    return t.permute(order).contiguous().permute(back)


def matrix(t):
    """(out, in/groups·kh·kw) in float64."""
    return t.detach().double().reshape(t.shape[0], -1).clone()


def bases(layer, rank):
    """Triplets of the layer's matrix in float64."""
    U, S, Vh = torch.linalg.svd(matrix(layer.weight), full_matrices=False)
    return Subspace(U[:, :rank].clone(), Vh[:rank].mT.clone(), S[:rank].clone())


def projected(x, s, mode):
    """P(x) by its formula."""
    U, V = s.U.double(), s.V.double()
    if mode == "core":
        return x - U @ (U.mT @ x @ V) @ V.mT
    x = x - U @ (U.mT @ x)
    return x - (x @ V) @ V.mT
