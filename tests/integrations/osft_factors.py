"""Factors and models as mini_trainer has them, for the tests of integrations.mini_trainer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from osf_kernels.testing import matrix_with_spectrum, random_basis
from osf_torch.integrations import mini_trainer as osft
from tests.helpers import generator_for, randn

KEYS = ["U_high", "S_high", "V_high", "U_low", "S_low", "V_low", "rank_high"]
SHAPES = [(160, 160, 96), (200, 144, 72), (144, 200, 120), (300, 130, 65), (130, 300, 65)]


def spans(d: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    U, V = d["U_high"].double(), d["V_high"].double()
    return U @ U.mT, V.mT @ V


def gapped(m: int, n: int, k: int, *key: object, dtype: torch.dtype = torch.float64) -> Tensor:
    """σ from 2 to 1, then from .5 to .01: the leading k directions are well defined."""
    lead = torch.linspace(2, 1, k, dtype=torch.float64)
    tail = torch.logspace(-0.3, -2, min(m, n) - k, dtype=torch.float64)
    A, _, _ = matrix_with_spectrum(
        m, n, torch.cat([lead, tail]), dtype=dtype, generator=generator_for(m, n, k, *key)
    )
    return A


def drawn(m: int, n: int, k: int, dtype: torch.dtype, *key: object) -> dict[str, Tensor]:
    """Random factors with gradients that are mostly in the protected spans, on every factor."""
    gen = generator_for(m, n, k, *key)
    p = min(m, n) - k
    U = random_basis(m, k, dtype=dtype, generator=gen).columns
    V = random_basis(n, k, dtype=dtype, generator=gen).columns.mT.contiguous()
    d = {"U_high": U, "S_high": randn(k, dtype=dtype, generator=gen), "V_high": V}
    for name, shape in (("U_low", (m, p)), ("S_low", (p,)), ("V_low", (p, n))):
        d[name] = nn.Parameter(randn(*shape, dtype=dtype, generator=gen))
        d[name].grad = randn(*shape, dtype=dtype, generator=gen)
    return d | {"rank_high": k}


def by_formula(d: dict[str, Tensor], pick, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    U, V = d["U_high"].to(dtype), d["V_high"].to(dtype)
    dU, dV = pick(d["U_low"]).to(dtype), pick(d["V_low"]).to(dtype)
    return dU - U @ (U.mT @ dU), dV - (dV @ V.mT) @ V


FUNCTIONS = {
    "gradient": (osft.project_gradient_to_orthogonal_space, lambda p: p.grad),
    "parameter": (osft.project_parameter_to_orthogonal_space, lambda p: p.data),
}


class HeldShard:
    """No tensor, but has one: what mini_trainer calls ``to_local()`` on."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def to_local(self) -> Tensor:
        return self.tensor


class OSFTLinear(nn.Module):
    """A module laid out as mini_trainer lays out a decomposed linear layer."""

    def __init__(self, d: dict[str, Tensor]) -> None:
        super().__init__()
        for letter in "USV":
            high = nn.Parameter(d[f"{letter}_high"], requires_grad=False)
            self.register_parameter(f"osft_{letter}_high", high)
        self.osft_params = nn.Module()
        for letter in "USV":
            self.osft_params.register_parameter(f"{letter}_low", d[f"{letter}_low"])


class OSFTModel(nn.Module):
    def __init__(self, dicts: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OSFTLinear(d) for d in dicts)
        self.head = nn.Linear(3, 3)

    def get_svd_dict_for_module(self, module: nn.Module) -> dict[str, Tensor]:
        high = {f"{c}_high": getattr(module, f"osft_{c}_high") for c in "USV"}
        low = {f"{c}_low": getattr(module.osft_params, f"{c}_low") for c in "USV"}
        return high | low | {"rank_high": module.osft_S_high.shape[0]}
