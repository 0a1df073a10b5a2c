"""A linear layer whose weight is confined: what autograd sees of it, merged and beside.

The dense gradient of the weight is formed where that is the cheapest way to the gradient of C, and
never kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from osf_kernels import free_gradient
from osf_torch.free.current import ambient, formed
from osf_torch.free.inputs import is_kept, is_packed
from osf_torch.free.merging import merge_one
from osf_torch.free.operators import (
    anchors_of,
    define,
    differentiable_once,
    differentiate,
    refused,
)
from osf_torch.free.spec import Place, Spec, spec_of


def linear(
    place: Place, x: Tensor, bias: Tensor | None, *, transposed: bool, is_sharded: bool
) -> Tensor:
    """x Wᵀ + bias, or with ``transposed`` x W + bias, for the current W.

    Its backward pass computes the gradient of C in the order that ``plan_free`` has for the number
    of tokens, and of W none. Beside W the sum is formed for the product, and anew for the backward
    pass, which is cheaper than to apply C to every token unless these are few.
    """
    spec = place.spec
    W, C = place.weight, place.get(spec.free)
    merged = place.get(spec.merged) if spec.update == "merge" else None
    base = place.base
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # as torch's own layers
        x = x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != W.dtype:
        raise RuntimeError(
            f"osf_torch.confine: expected inputs of {spec.name!r} to be {W.dtype}, as its weight "
            f"is, got {x.dtype}; convert them, or run the model under torch.autocast"
        )
    handle = -spec.handle if is_sharded else spec.handle
    wanted = C.requires_grad and torch.is_grad_enabled()
    order = spec.order(math.prod(x.shape[:-1])) if wanted else "none"
    reduced = _reduces_inputs(spec, order, x, transposed)
    held = W, merged, base, handle, transposed, reduced
    if torch.compiler.is_compiling():
        compiled: Tensor = _linear(x, bias, C, *held)[0]
        return compiled
    if not torch.is_grad_enabled():
        return _linear_forward(x, bias, C, *held)[0]
    shares = order in ("left", "right") and not is_sharded
    block = _shared(spec, C, order, x.dtype) if shares else C
    # The gradient of x depends on C too, and that of C on x. Where x takes none, that of C depends
    # on the gradient that comes in alone.
    anchors = anchors_of(x, block) if x.requires_grad else ()
    result: Tensor = _Linear.apply(x, bias, block, (C, *held), anchors)
    return result


def _reduces_inputs(spec: Spec, order: str, x: Tensor, transposed: bool) -> bool:
    """Whether V_l is applied to the inputs in the forward pass, so that x V_l is kept and not x."""
    if order not in (("left", "both") if transposed else ("right", "both")):
        return False
    if torch.compiler.is_compiling():
        return True
    if is_packed():
        return False
    return not is_kept(x) and spec.inputs.width_of(spec, x, transposed) < x.shape[-1]


# --- forward and backward ---


def _linear_forward(
    x: Tensor,
    bias: Tensor | None,
    C: Tensor,
    W: Tensor,
    merged: Tensor | None,
    base: Tensor | None,
    handle: int,
    transposed: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs, and x V_l where that is what is kept of x."""
    spec = spec_of(handle)
    if merged is None:
        W = formed(W, C, handle)
    elif handle > 0:
        merge_one(spec, W, C, merged, base)
    if reduced:
        spec.follow(x.device)
        kept = (spec.left if transposed else spec.right).reduce(x.reshape(-1, x.shape[-1]))
    else:
        kept = x.new_empty(0)
    W, bias = W.to(x.dtype), None if bias is None else bias.to(x.dtype)
    # The outputs come last, so that they are in a cache for what reads them next.
    return F.linear(x, W.mT if transposed else W, bias), kept


def _keep(ctx: Any, x: Tensor, bias: Tensor | None, held: tuple[Any, ...], output: Any) -> None:
    """What the backward pass needs; x where nothing of it is reduced and C takes a gradient."""
    C, W, merged, _, ctx.handle, ctx.transposed, ctx.reduced = held
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.block_dtype = C.dtype
    inputs = output[1] if ctx.reduced else (x if ctx.needs_input_grad[2] else None)
    ctx.save_for_backward(W, inputs, C if merged is None else None)


def _gradients(
    ctx: Any, saved: Sequence[Any], dy: Tensor, form: Any, gradient: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, bias and C, from what ``_keep`` has saved; ``form`` and ``gradient`` as operators, or
    as the functions that these are.

    That of x comes last, so that it is in a cache for what reads it next.
    """
    W, inputs, C = saved
    dx = dC = dbias = None
    if ctx.needs_input_grad[2]:
        dC = gradient(dy, inputs, ctx.handle, ctx.transposed, ctx.reduced, ctx.block_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[1]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    if ctx.needs_input_grad[0]:
        if C is not None:
            W = form(W, C, ctx.handle)
        dx = dy @ (W.mT if ctx.transposed else W).to(dy.dtype)
    return dx, dbias, dC


def _gradient(
    dy: Tensor,
    inputs: Tensor,
    handle: int,
    transposed: bool,
    reduced: bool,
    dtype: torch.dtype,
    finish: bool = True,
) -> Tensor:
    spec = spec_of(handle)
    spec.follow(dy.device)
    a, b = dy.reshape(-1, dy.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    sides = spec.left, spec.right
    if transposed:  # y = x W: the gradient of W is xᵀ ∂L/∂y, with the inputs on the left
        found = free_gradient(b, a, *sides, left_reduced=reduced, finish=finish)
    else:
        found = free_gradient(a, b, *sides, right_reduced=reduced, finish=finish)
    return found.to(dtype)


class _Linear(torch.autograd.Function):
    """The operator ``confined_linear`` without what a compiled graph needs of it, which takes 0.2
    ms a layer and step on a CPU. ``block`` is C, or what ``_Shared`` has made of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        block: Tensor,
        held: tuple[Any, ...],
        anchors: tuple[Tensor, ...],
    ) -> Tensor:
        output = _linear_forward(x, bias, *held)
        ctx.finish, ctx.anchors = block is held[0], anchors
        _keep(ctx, x, bias, held, output)
        return output[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gradient = partial(_gradient, finish=ctx.finish)
        return *_gradients(ctx, ctx.saved_tensors, dy, formed, gradient), None, None


# --- weights that are used more than once ---


def _shared(spec: Spec, C: Tensor, order: str, dtype: torch.dtype) -> Tensor:
    """What the layers that use a weight before the next backward pass give their gradients to.

    Args:
        dtype: of the products, as autocast may have it. The sum is of C's.
    """
    key = C._version, order, dtype
    if spec.shared is None or spec.shared[0] is not C or spec.shared[1] != key:
        spec.shared = C, key, _Shared.apply(C, spec.handle, order, dtype)
    shared: Tensor = spec.shared[2]
    return shared


class _Shared(torch.autograd.Function):
    """Of the shape of U_l C (m, q), or of C V_lᵀ (p, n), without values or memory.

    Autograd sums what all uses of a weight contribute to its gradient, and the last basis is
    applied to the sum: once for two sentences of a pair, which are two passes. The spec is held by
    its handle alone, since it holds this in turn.
    """

    @staticmethod
    def forward(ctx: Any, C: Tensor, handle: int, order: str, dtype: torch.dtype) -> Tensor:
        ctx.handle, ctx.order, ctx.dtype, ctx.block_dtype = handle, order, dtype, C.dtype
        left, right = spec_of(handle).left, spec_of(handle).right
        shape = (left.size, right.width) if order == "right" else (left.width, right.size)
        return C.new_empty(()).expand(shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        spec = spec_of(ctx.handle)
        spec.shared = None  # what is computed from here on belongs to another backward pass
        spec.follow(g.device)
        g = g.to(ctx.dtype)
        block = spec.left.reduce_rows(g) if ctx.order == "right" else spec.right.reduce(g)
        return block.to(ctx.block_dtype), None, None, None


# --- as operators of a compiled graph ---


def _linear_fake(
    x: Tensor,
    bias: Tensor | None,
    C: Tensor,
    W: Tensor,
    merged: Tensor | None,
    base: Tensor | None,
    handle: int,
    transposed: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], W.shape[1 if transposed else 0])
    if not reduced:
        return y, x.new_empty(0)
    return y, x.new_empty(math.prod(x.shape[:-1]), C.shape[0 if transposed else 1])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, *held = inputs
    _keep(ctx, x, bias, tuple(held), output)
    ctx.merged_block = None if held[2] is None else held[0]


def _linear_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: a checkpoint computes them anew
    found: tuple[Any, ...] = _gradients(ctx, saved, dy, _form, _linear_gradient)
    if ctx.merged_block is not None:  # which is in W, where a graph of gradients doesn't see it
        found = refused(found, (dy, *saved, ctx.merged_block))
    return *found, None, None, None, None, None, None


def _gradient_fake(
    dy: Tensor, inputs: Tensor, handle: int, transposed: bool, reduced: bool, dtype: torch.dtype
) -> Tensor:
    spec = spec_of(handle)
    return dy.new_empty(spec.left.width, spec.right.width, dtype=dtype)


_form = define(
    "confined_sum(Tensor W, Tensor C, int handle) -> Tensor",
    formed,
    lambda W, C, handle: W.new_empty(W.shape, dtype=torch.promote_types(W.dtype, C.dtype)),
)
_linear = define(
    "confined_linear(Tensor x, Tensor? bias, Tensor C, Tensor W, Tensor? merged, Tensor? base, "
    "int handle, bool transposed, bool reduced) -> (Tensor, Tensor)",
    _linear_forward,
    _linear_fake,
)
_linear_gradient = define(
    "confined_linear_gradient(Tensor dy, Tensor inputs, int handle, bool transposed, bool reduced, "
    "ScalarType dtype) -> Tensor",
    _gradient,
    _gradient_fake,
)
differentiate(_linear, _linear_backward, _linear_setup)


# --- beside a layer ---


def beside(place: Place, x: Tensor, *, transposed: bool) -> Tensor:
    """What the free block adds to the outputs of a linear layer, ((x V_l) Cᵀ) U_lᵀ."""
    spec = place.spec
    spec.follow(x.device)
    if spec.rank is None:
        inner, outer = (spec.left, spec.right) if transposed else (spec.right, spec.left)
        C = place.block
        return outer.expand(inner.reduce(x) @ _as(C if transposed else C.mT, x))
    # As a LoRA, whose factors in the weight's own space are small.
    B, A = ambient(place)
    first, second = (B, A) if transposed else (A.mT, B.mT)
    return (x @ _as(first, x)) @ _as(second, x)


def _as(factor: Tensor, x: Tensor) -> Tensor:
    """Of x's dtype; autocast, where it is on, has it so by itself."""
    return factor if torch.is_autocast_enabled(x.device.type) else factor.to(x.dtype)
