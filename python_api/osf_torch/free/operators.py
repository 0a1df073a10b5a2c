"""Defines the operators of a compiled graph, and refuses second derivatives.

The operators bring the weight up to date before they use it. That changes which part of
W₀ + U_l C V_lᵀ is held in W and which is still to be added, and never the sum, so that they are
functions of their arguments; a compiled graph holds them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("osf_torch", "DEF")
_TWICE = (
    "osf_torch.confine: expected one derivative through a confined layer, got two; run the model "
    "by torch.func.functional_call(model, {name: p * 1 for name, p in model.named_parameters() if "
    "p.requires_grad}, inputs), where layers are of torch's own operators, or use protect"
)


def define(schema: str, implementation: Any, fake: Any) -> Any:
    """An operator of a compiled graph, whose results lie as its fake has them: one row after the
    other, however the products that made them left them."""
    name = schema.partition("(")[0]

    def whole(*operands: Any) -> Any:
        found = implementation(*operands)
        if isinstance(found, Tensor):
            return found.contiguous()
        return tuple(t.contiguous() for t in found)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, whole, "CompositeExplicitAutograd")
    torch.library.register_fake(f"osf_torch::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.osf_torch, name).default


def differentiate(operator: Any, backward: Any, setup_context: Any) -> None:
    """Gives an operator its backward pass, as ``torch.library.register_autograd`` has it."""
    name = operator.name()
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)


def anchors_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors without elements or memory that hang in the graph where these do."""
    return tuple(t.narrow(0, 0, 0).clone() for t in tensors)


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """As torch's ``once_differentiable``, of whose results further derivatives are refused however
    they are asked for, by ``torch.autograd.grad`` of some inputs too.

    The results depend on the gradients that come in. A backward pass whose results depend on more
    has tensors in ``ctx.anchors`` that hang in the graph where that does.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        return refused(found, (*gradients, *getattr(ctx, "anchors", ())))

    return wrapped


def refused(found: tuple[Any, ...], sources: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a backward pass has found, of which derivatives by its sources are refused, where a
    graph of the backward pass is made."""
    results = [t for t in found if isinstance(t, Tensor)]
    if not results or not torch.is_grad_enabled():
        return found
    held = (t for t in sources if isinstance(t, Tensor))
    marked = iter(_Refused.apply(len(results), *results, *held))
    return tuple(next(marked) if isinstance(t, Tensor) else t for t in found)


class _Refused(torch.autograd.Function):
    """Hands on the first ``count`` tensors, and refuses their derivatives by all that follow."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(_TWICE)
