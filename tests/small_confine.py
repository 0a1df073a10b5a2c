"""A small model to confine, what is protected of it, and the same training written out in full."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from osf_kernels import Basis, FreeBasis
from osf_kernels.testing import random_basis
from osf_torch import Subspace, refresh
from osf_torch.confined import Confined
from osf_torch.free.spec import Place
from tests.helpers import generator_for


class Net(nn.Module):
    """A tall, a wide and another wide linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 28), nn.Linear(28, 20), nn.Linear(20, 6)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(hidden)))


class Conv1D(nn.Module):
    """transformers' linear layer with its weight as (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view((*x.size()[:-1], self.nf))


def filled(model: nn.Module, *key: object, scale: float = 0.4) -> nn.Module:
    """The model with random parameters, the same ones for the same key."""
    generator = generator_for("filled", *key)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def net(*key: object) -> nn.Module:
    return filled(Net(), *key)


def bases(model: nn.Module, ratio: float = 0.4, **options):
    return refresh(model, ratio, progress=False, compute_dtype=torch.float64, **options)


def drawn(m: int, n: int, rho: float, sides: str, spans: str, *key: object) -> Subspace:
    """Random orthonormal bases that protect a share ``rho`` of the directions."""
    generator = generator_for("drawn", m, n, rho, sides, spans, *key)
    r = max(1, round(rho * min(m, n)))

    def side(size: int) -> Basis:
        return random_basis(size, r, spans=spans, dtype=torch.float32, generator=generator)

    return Subspace(side(m) if "U" in sides else None, side(n) if "V" in sides else None)


def batches(count: int, *key: object, size: int = 16, width: int = 20) -> list[Tensor]:
    generator = generator_for("batches", *key)
    return [torch.randn(size, width, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[..., :6].sin()).square().mean()


def adamw(parameters, **options):
    options = {"lr": 1e-2, "weight_decay": 0.1} | options
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], **options)


def train(model: nn.Module, xs, optimizer, loss=loss_of) -> list[float]:
    losses = []
    for x in xs:
        optimizer.zero_grad()
        value = loss(model, x)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


# --- what is protected, in float64 ---


def _inside(x: Tensor, basis: Tensor | Basis | None) -> Tensor:
    """What a basis leaves of the columns of x free, in float64."""
    if basis is None:
        return x
    columns = basis.columns if isinstance(basis, Basis) else basis
    Q = torch.linalg.qr(columns.double())[0]
    spanned = Q @ (Q.mT @ x)
    low = isinstance(basis, Basis) and basis.spans == "low"
    return spanned if low else x - spanned


def protected_part(W: Tensor, subspace: Subspace) -> Tensor:
    """W without what U and V leave free of it; W may be flat in the bases' space."""
    W = W.detach().double()
    for size, basis in zip(W.shape[-2:], (subspace.U, subspace.V), strict=True):
        columns = basis.columns if isinstance(basis, Basis) else basis
        if columns is not None and columns.shape[-2] != size:
            W = W.flatten(1)
            break
    return W - _inside(_inside(W, subspace.U).mT, subspace.V).mT


def moved(start: Tensor, now: Tensor, subspace: Subspace) -> float:
    """How far what is protected has moved, of its norm."""
    before = protected_part(start, subspace)
    return float((protected_part(now, subspace) - before).norm() / before.norm())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The plain model's parameters as they are now, copied."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def worst(start: Mapping[str, Tensor], model: nn.Module, subspaces) -> float:
    """The largest of ``moved`` over the protected weights."""
    now = weights_of(model)
    return max(moved(start[name], now[name], s) for name, s in subspaces.items())


def relative(x: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach().double()
    return float((x.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


# --- the same training by plain autograd ---


def columns(basis: FreeBasis) -> Tensor:
    """A free basis as a matrix of float64, whatever it is held as."""
    one = torch.eye(basis.width, dtype=torch.float64)
    return basis.to(dtype=torch.float64).expand(one).mT


def gradients_by(place: Place, g: Tensor) -> list[Tensor]:
    """Of what a place trains, by the dense gradient g of its weight, in float64."""
    G = columns(place.spec.left).mT @ g.double() @ columns(place.spec.right)
    if place.spec.rank is None:
        return [G]
    B, A = (t.detach().double() for t in place.trained())
    return [G @ A.mT, B.mT @ G]


def block_of(place: Place) -> Tensor:
    return place.block.detach()


class Explicit(nn.Module):
    """W₀ + U_l C V_lᵀ of every confined weight by dense products of float64, C a parameter.

    Made of a model before it was confined, and of the ``Confined``, whose bases it takes.
    """

    def __init__(self, plain: nn.Module, confined: Confined) -> None:
        super().__init__()
        self.plain = copy.deepcopy(plain).double()
        self.places = {place.name: place for place in confined.places}
        self.bases = {n: (columns(p.spec.left), columns(p.spec.right)) for n, p in self._specs()}
        self.base = {}
        self.blocks = nn.ParameterDict()
        for name, place in self.places.items():
            W = self.plain.get_parameter(name)
            W.requires_grad_(False)
            start = place.block.detach().double()
            U, V = self.bases[name]
            self.base[name] = W.reshape(place.spec.matrix_shape) - U @ start @ V.mT
            for key, t in zip(place.spec.trainable, place.trained(), strict=True):
                self.blocks[self._key(name, key)] = nn.Parameter(t.detach().double().clone())

    def _specs(self):
        return self.places.items()

    @staticmethod
    def _key(name: str, trained: str) -> str:
        return f"{name}/{trained}".replace(".", "|")

    def trained(self) -> list[nn.Parameter]:
        """C or its factors in the order of ``Confined.parameters``."""
        return list(self.blocks.values())

    def weight(self, name: str) -> Tensor:
        place = self.places[name]
        held = [self.blocks[self._key(name, key)] for key in place.spec.trainable]
        C = held[0] if len(held) == 1 else held[0] @ held[1]
        U, V = self.bases[name]
        return (self.base[name] + U @ C @ V.mT).reshape(place.spec.shape)

    def forward(self, *inputs, **options):
        inputs = [x.double() if torch.is_floating_point(x) else x for x in inputs]
        weights = {name: self.weight(name) for name in self.places}
        return functional_call(self.plain, weights, tuple(inputs), options)
