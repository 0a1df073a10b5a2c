"""project_grad: the projection as a layer that only the backward pass sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from osf_kernels import Basis, Mode, plan, project
from osf_torch.bases import Held, columns_of, spans_of


def project_grad(
    x: Tensor,
    U: Tensor | Basis | None = None,
    V: Tensor | Basis | None = None,
    *,
    mode: Mode = "complement",
) -> Tensor:
    """x forward, P(gradient) backward: y = x, ∂L/∂x = (I − U Uᵀ) ∂L/∂y (I − V Vᵀ).

    For a weight that is used through a function call, or for a wrapper that has no hook to hang
    on: ``F.linear(h, project_grad(weight, U, V))``.

    Args:
        x: (..., m, n), the weight.
        U, V, mode: as in ``osf_kernels.project``; no gradient reaches U and V.

    Returns:
        A view of x.

    Raises:
        TypeError, ValueError: as osf_kernels.project, before the forward pass.

    Mutates nothing; doesn't synchronise; draws no random numbers.
    """
    if not torch.compiler.is_compiling():
        try:  # refuse here, where the caller's stack is, not in backward
            plan(x, U, V, mode=mode)
        except (TypeError, ValueError) as error:
            raise type(error)(f"osf_torch.project_grad: {error}") from None
    result: Tensor = _ProjectGrad.apply(x, *_split(U), *_split(V), mode)
    return result


def _split(basis: Held) -> tuple[Tensor | None, str]:
    return None if basis is None else columns_of(basis), spans_of(basis)


class _ProjectGrad(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, U: Tensor | None, u_spans: str, V: Tensor | None, v_spans: str, mode: str
    ) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, U, ctx.u_spans, V, ctx.v_spans, ctx.mode = inputs
        ctx.save_for_backward(U, V)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        U, V = ctx.saved_tensors
        bases = _held(U, ctx.u_spans), _held(V, ctx.v_spans)
        return project(grad, *bases, mode=ctx.mode), None, None, None, None, None


def _held(columns: Tensor | None, spans: Any) -> Basis | None:
    return None if columns is None else Basis(columns, spans)
