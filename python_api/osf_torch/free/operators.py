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


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """As torch's ``once_differentiable``, with a message that says what to do about it."""

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        results = [t for t in found if isinstance(t, Tensor)]
        if not results or not torch.is_grad_enabled():
            return found
        # Whoever differentiates what is returned here gets the message: also where the gradient
        # that came in is a constant, since the result depends on C all the same.
        refusal = torch._C._functions.DelayedError(_TWICE.encode(), len(results))
        marked: Any = refusal(*(t.detach().requires_grad_() for t in results))
        rest = iter((marked,) if isinstance(marked, Tensor) else marked)
        return tuple(next(rest) if isinstance(t, Tensor) else t for t in found)

    return wrapped
