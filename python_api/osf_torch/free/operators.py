"""Defines the operators of a compiled graph.

They bring the weight up to date before they use it. That changes which part of W₀ + U_l C V_lᵀ is
held in W and which is still to be added, and never the sum, so that the operators are functions of
their arguments; a compiled graph holds them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("osf_torch", "DEF")


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
