"""Decomposed weights and wrapped models, for the tests of integrations.peft."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels.testing import matrix_with_spectrum
from osf_torch.integrations import peft as osf_peft
from tests.helpers import generator_for, randn

SIDES = ("U_low", "V_low")
TARGETS = ["0", "2", "4"]


def spectrum(kind: str, size: int) -> Tensor:
    i = torch.arange(1, size + 1, dtype=torch.float64)
    return {
        "flat": 1 + 0.5 / i,
        "steep": i**-0.5 * 10.0 ** (-5 * i / size),
        "deficient": torch.where(i > 0.6 * size, 0.0, i**-0.5),
        "outlier": torch.where(i == 1, 300.0, 1 / i**0.5),
    }[kind]


def drawn(m: int, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    A, _, _ = matrix_with_spectrum(
        m, n, spectrum(kind, min(m, n)), dtype=dtype, generator=generator_for(m, n, kind)
    )
    return A


def formula(d: dict[str, Any], side: str, X: Tensor) -> Tensor:
    high = d["U_high"] if side == "U_low" else d["V_high"].mT
    H = high.double() @ high.double().mT
    P = torch.eye(len(H), dtype=torch.float64) - H
    return P @ X.double() if side == "U_low" else X.double() @ P


def with_gradients(m: int, n: int, k: int, *key: object) -> dict[str, Any]:
    d = osf_peft.decompose_weight_matrix(drawn(m, n, "flat", torch.float32), k)
    for side in SIDES:
        d[side].grad = randn(
            *d[side].shape, dtype=torch.float32, generator=generator_for(m, n, side, *key)
        )
    return d


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A square, a tall and a wide weight."""
    model = nn.Sequential(
        nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, dtype=torch.float64, generator=generator_for(i)) / 5)
    return model.to(dtype)


def wrapped(peft: ModuleType, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    cast = options.pop("autocast_adapter_dtype", True)
    config = peft.OSFConfig(target_modules=TARGETS, **({"effective_rank": 0.5} | options))
    return peft.get_peft_model(plain(dtype), config, autocast_adapter_dtype=cast)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "osf_svd_params")]


def inputs(step: int, rows: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(rows, 24, dtype=dtype, generator=generator_for("inputs", step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :16]).square().mean()


def optimizer_of(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.2, momentum=0.9)
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def protected(layer: Any, side: str, adapter: str = "default") -> Tensor:
    """I − P in float64, from what the layer keeps of its decomposition."""
    high = getattr(layer, f"_osf_{side[0]}_high")
    if adapter in high:
        B = high[adapter].double()
        B = torch.linalg.qr(B if side == "U_low" else B.mT)[0]
        return B @ B.mT
    B = getattr(layer, f"_osf_{side}_init")[adapter].double()
    B = torch.linalg.qr(B if side == "U_low" else B.mT)[0]
    return torch.eye(len(B), dtype=torch.float64) - B @ B.mT


def share(layer: Any, side: str, X: Tensor, adapter: str = "default") -> float:
    """How much of X lies in the protected span."""
    H = protected(layer, side, adapter)
    X = X.detach().double()
    inside = H @ X if side == "U_low" else X @ H
    return float(inside.norm() / X.norm())


def shares(model: nn.Module, of: str) -> list[float]:
    found = []
    for layer in layers(model):
        for side in SIDES:
            parameter = layer.osf_svd_params["default"][side]
            found.append(share(layer, side, parameter.grad if of == "grad" else parameter))
    return found
