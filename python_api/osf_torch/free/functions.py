"""What autograd sees of a confined weight: a linear layer, and the current weight by itself.

Both bring the weight up to date before they use it. That changes which part of W₀ + U_l C V_lᵀ is
held in W and which is still to be added, and never the sum, so that the operators are functions of
their arguments; a compiled graph holds them as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from osf_kernels import free_block, free_gradient, free_matrix
from osf_torch.free.inputs import is_kept, is_packed
from osf_torch.free.merging import (
    cut_of,
    merge_one,
    part_of,
    part_of_update,
    require_fresh,
    require_together,
    whole_blocks,
    without_autocast,
)
from osf_torch.free.spec import Place, Spec, spec_of
from osf_torch.sharding import is_dtensor, local, sum_over

library = torch.library.Library("osf_torch", "DEF")


def _define(schema: str, implementation: Any, fake: Any) -> Any:
    """An operator of a compiled graph, whose results lie as its fake has them: one row after the
    other, however the products that made them left them."""
    name = schema.partition("(")[0]

    def whole(*operands: Any) -> Any:
        found = implementation(*operands)
        if isinstance(found, Tensor):
            return found.contiguous()
        return tuple(t.contiguous() for t in found)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, whole, "CompositeExplicitAutograd")
    torch.library.register_fake(f"osf_torch::{name}", fake, lib=library)
    return getattr(torch.ops.osf_torch, name).default


# --- a linear layer, of a weight that is merged ---


def linear(place: Place, x: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """x Wᵀ + bias, or with ``transposed`` x W + bias, for the current W.

    Its backward pass computes the gradient of C in the order that ``plan_free`` has for the number
    of tokens, and of W none. Beside W the sum is formed for the product, and anew for the backward
    pass, which is cheaper than to apply C to every token unless these are few.
    """
    spec = place.spec
    W, C = place.weight, place.get(spec.free)
    merged = place.get(spec.merged) if spec.update == "merge" else None
    base = place.get(spec.base) if spec.is_rounded else None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # as torch's own layers
        x = x.to(torch.get_autocast_dtype(kind))
    wanted = C.requires_grad and torch.is_grad_enabled()
    reduced = wanted and _reduces_inputs(spec, x, transposed)
    operands = x, W, C, merged, base, bias, place.handle, transposed, reduced
    if torch.compiler.is_compiling():
        compiled: Tensor = _linear(*operands)[0]
        return compiled
    if not torch.is_grad_enabled():
        return _linear_forward(*operands)[0]
    result: Tensor = _Linear.apply(*operands)
    return result


def _reduces_inputs(spec: Spec, x: Tensor, transposed: bool) -> bool:
    """Whether V_l is applied to the inputs in the forward pass, so that x V_l is kept and not x."""
    order = spec.order(math.prod(x.shape[:-1]))
    if order not in (("left", "both") if transposed else ("right", "both")):
        return False
    if torch.compiler.is_compiling():
        return True
    if is_packed():
        return False
    return not is_kept(x) and spec.inputs.width_of(spec, x, transposed) < x.shape[-1]


def _linear_forward(
    x: Tensor,
    W: Tensor,
    C: Tensor,
    merged: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    handle: int,
    transposed: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    spec = spec_of(handle)
    if merged is None:
        W = _formed(W, C, handle)
    elif handle > 0:
        merge_one(spec, W, C, merged, base)
    W, bias = W.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.linear(x, W.mT if transposed else W, bias)
    if not reduced:
        return y, x.new_empty(0)
    spec.follow(x.device)
    return y, (spec.left if transposed else spec.right).reduce(x.reshape(-1, x.shape[-1]))


def _linear_fake(
    x: Tensor,
    W: Tensor,
    C: Tensor,
    merged: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    handle: int,
    transposed: bool,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], W.shape[1 if transposed else 0])
    if not reduced:
        return y, x.new_empty(0)
    return y, x.new_empty(math.prod(x.shape[:-1]), C.shape[0 if transposed else 1])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W, C, merged, _, bias, ctx.handle, ctx.transposed, ctx.reduced = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.block_dtype = C.dtype
    held = output[1] if ctx.reduced else (x if ctx.needs_input_grad[2] else None)
    ctx.save_for_backward(W, held, C if merged is None else None)


def _linear_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 9
    return _gradients(ctx, dy, _form, _linear_gradient)


def _gradients(ctx: Any, dy: Tensor, form: Any, gradient: Any) -> tuple[Any, ...]:
    """Of the arguments of ``confined_linear``; ``form`` and ``gradient`` as operators or as the
    functions that these are."""
    W, held, C = ctx.saved_tensors
    dx = dC = dbias = None
    if ctx.needs_input_grad[0]:
        if C is not None:
            W = form(W, C, ctx.handle)
        dx = dy @ (W.mT if ctx.transposed else W).to(dy.dtype)
    if ctx.needs_input_grad[2]:
        dC = gradient(dy, held, ctx.handle, ctx.transposed, ctx.reduced, ctx.block_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, None, dC, None, None, dbias, None, None, None


class _Linear(torch.autograd.Function):
    """The operator ``confined_linear`` without what a compiled graph needs of it, which takes 0.2
    ms a layer and step on a CPU."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        output = _linear_forward(*operands)
        _linear_setup(ctx, operands, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _gradients(ctx, dy, _formed, _gradient)


def _formed(W: Tensor, C: Tensor, handle: int) -> Tensor:
    """W₀ + U_l C V_lᵀ, in the wider precision of both."""
    spec = spec_of(handle)
    spec.follow(W.device)
    return W + free_matrix(C, spec.left, spec.right).view(W.shape)


def _gradient(
    dy: Tensor, held: Tensor, handle: int, transposed: bool, reduced: bool, dtype: torch.dtype
) -> Tensor:
    spec = spec_of(handle)
    spec.follow(dy.device)
    outputs, inputs = dy.reshape(-1, dy.shape[-1]), held.reshape(-1, held.shape[-1])
    left, right = spec.left, spec.right
    if transposed:  # y = x W: the gradient of W is xᵀ ∂L/∂y, with the inputs on the left
        block = free_gradient(inputs, outputs, left, right, left_reduced=reduced)
    else:
        block = free_gradient(outputs, inputs, left, right, right_reduced=reduced)
    return block.to(dtype)


def _gradient_fake(
    dy: Tensor, held: Tensor, handle: int, transposed: bool, reduced: bool, dtype: torch.dtype
) -> Tensor:
    spec = spec_of(handle)
    return dy.new_empty(spec.left.width, spec.right.width, dtype=dtype)


_form = _define(
    "confined_sum(Tensor W, Tensor C, int handle) -> Tensor",
    _formed,
    lambda W, C, handle: W.new_empty(W.shape, dtype=torch.promote_types(W.dtype, C.dtype)),
)
_linear = _define(
    "confined_linear(Tensor x, Tensor W, Tensor C, Tensor? merged, Tensor? base, Tensor? bias, "
    "int handle, bool transposed, bool reduced) -> (Tensor, Tensor)",
    _linear_forward,
    _linear_fake,
)
_linear_gradient = _define(
    "confined_linear_gradient(Tensor dy, Tensor held, int handle, bool transposed, bool reduced, "
    "ScalarType dtype) -> Tensor",
    _gradient,
    _gradient_fake,
)
torch.library.register_autograd(
    "osf_torch::confined_linear", _linear_backward, setup_context=_linear_setup, lib=library
)


# --- the current weight by itself ---


def current(place: Place) -> Tensor:
    """W₀ + U_l C V_lᵀ, of which C gets its gradient from the dense one of the weight.

    Of a merged weight that is W itself, seen anew, and takes no memory; else it is a sum, which may
    be differentiated twice.
    """
    spec, W = place.spec, place.weight
    is_compiled = torch.compiler.is_compiling() and not is_dtensor(W)
    if spec.update == "beside":
        if is_dtensor(W):
            require_together(place)
            summed: Tensor = _Sum.apply(W, _replicated_block(place), place)
            return summed
        if is_compiled and spec.rank is None:
            formed: Tensor = _current_weight(W, place.block, None, None, place.handle)
            return formed
        return (W + update_of(place)).to(W.dtype)  # rounded once
    C, merged = place.get(spec.free), place.get(spec.merged)
    base = place.get(spec.base) if spec.is_rounded else None
    if is_substitute(place):
        if base is not None:
            return (base.to(C.dtype) + update_of(place, C)).to(W.dtype)
        return (W + update_of(place, C - merged)).to(W.dtype)
    if is_compiled:
        compiled: Tensor = _current_weight(W, C, merged, base, place.handle)
        return compiled
    if place.is_sharded:
        require_together(place)
        require_fresh(place)
    else:
        with torch.no_grad():
            merge_one(spec, W, C, merged, base)
    if not torch.is_grad_enabled():
        return W
    result: Tensor = _Current.apply(W, C, spec)
    return result


def is_substitute(place: Place) -> bool:
    """Whether C is in the place of the module's own, as ``functional_call`` has it.

    Then the module's W isn't brought up to date with it: graphs may hold W.
    """
    return any(not isinstance(t, nn.Parameter) for t in place.trained())


def update_of(place: Place, C: Tensor | None = None) -> Tensor:
    """U_l C V_lᵀ of the weight's shape, in C's precision, of the place's C or of another; of a
    sharded weight sharded alike, which is a collective and has no gradient."""
    spec = place.spec
    if is_dtensor(place.weight):
        require_together(place)
        with torch.no_grad():
            return _laid_as(place.weight, _local_update(place, _replicated_block(place)))
    spec.follow(place.device)
    with without_autocast(place.weight):
        if spec.rank is None:
            update = free_matrix(place.block if C is None else C, spec.left, spec.right)
        else:
            B, A = ambient(place)
            update = B @ A
    return update.view(spec.shape)


def ambient(place: Place) -> tuple[Tensor, Tensor]:
    """A weight's factors of rank s in its own space, U_l B (..., m, s) and A V_lᵀ (..., s, n)."""
    spec = place.spec
    B, A = (place.get(name) for name in spec.factors)
    with without_autocast(B):
        return spec.left.expand_rows(B), spec.right.expand(A)


def _replicated_block(place: Place) -> Any:
    """C of a sharded weight, as a DTensor that is whole on every rank."""
    from torch.distributed.tensor import Replicate

    factors: Any = place.trained()
    whole = [t.redistribute(placements=[Replicate()] * t.device_mesh.ndim) for t in factors]
    return whole[0] if place.spec.rank is None else whole[0] @ whole[1]


def _local_update(place: Place, block: Tensor) -> Tensor:
    (C,) = whole_blocks([place], [block])
    return part_of_update(place.spec, C, place.weight)


def _laid_as(weight: Any, part: Tensor) -> Tensor:
    """What this rank holds of a tensor that is sharded as the weight is, as a DTensor."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return made


class _Sum(torch.autograd.Function):
    """W₀ + U_l C V_lᵀ of a sharded weight; C is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, C: Tensor, place: Place) -> Tensor:
        ctx.spec, ctx.like, ctx.placed = place.spec, C, W
        part = local(W)
        return _laid_as(W, part + _local_update(place, C).to(part.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, _sharded_block(ctx.spec, g, ctx.placed, ctx.like), None


class _Current(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, C: Tensor, spec: Spec) -> Tensor:
        ctx.spec, ctx.like = spec, C
        ctx.placed = W if is_dtensor(W) else None
        return W.view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if ctx.placed is not None:
            return None, _sharded_block(ctx.spec, g, ctx.placed, ctx.like), None
        return None, _block_of(g, ctx.spec, ctx.like.dtype), None


def block_of(place: Place, matrix: Tensor) -> Tensor:
    """U_lᵀ X V_l of a tensor X like the weight; of a sharded one a collective, laid out as C."""
    C = place.get(place.spec.free)
    if is_dtensor(matrix):
        return _sharded_block(place.spec, matrix, place.weight, C)
    return _block_of(matrix, place.spec, C.dtype)


def _block_of(g: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    spec.follow(g.device)
    matrix = g.reshape(spec.matrix_shape).to(dtype)
    return free_block(matrix, spec.left, spec.right)


def _sharded_block(spec: Spec, g: Any, W: Any, C: Any) -> Tensor:
    """The free block of a DTensor's gradient, summed over the ranks that hold its parts."""
    from torch.distributed.tensor import DTensor, Replicate

    g = g.redistribute(W.device_mesh, W.placements)
    cut, part = cut_of(spec.name, W), local(g)
    spec.follow(part.device)
    left, right, rows, columns = part_of(spec, cut)
    part = part.to(C.dtype)
    if spec.is_flat:
        part = part.reshape(part.shape[0], spec.right.size)
    block = free_block(part, left, right, rows, columns)
    placements = [Replicate()] * W.device_mesh.ndim
    if cut is not None and rows is None and columns is None:  # a batch
        placements = W.placements
    elif cut is not None:
        (block,) = sum_over(cut.group, [block])
    made = DTensor.from_local(
        block.contiguous(),
        W.device_mesh,
        placements,
        run_check=False,
        shape=C.shape,
        stride=C.stride(),
    )
    placed: Tensor = made.redistribute(C.device_mesh, C.placements)
    return placed


def _current_forward(
    W: Tensor, C: Tensor, merged: Tensor | None, base: Tensor | None, handle: int
) -> Tensor:
    spec = spec_of(handle)
    if merged is None:
        return _formed(W, C, handle).to(W.dtype)
    if handle > 0:
        merge_one(spec, W, C, merged, base)
    return W.clone(memory_format=torch.contiguous_format)


def _current_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.handle, ctx.dtype = inputs[4], inputs[1].dtype


def _current_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return None, _current_gradient(g, ctx.handle, ctx.dtype), None, None, None


def _block_fake(g: Tensor, handle: int, dtype: torch.dtype) -> Tensor:
    spec = spec_of(handle)
    lead = spec.matrix_shape[:-2]
    return g.new_empty(*lead, spec.left.width, spec.right.width, dtype=dtype)


_current_weight = _define(
    "confined_weight(Tensor W, Tensor C, Tensor? merged, Tensor? base, int handle) -> Tensor",
    _current_forward,
    lambda W, C, merged, base, handle: W.new_empty(W.shape),
)
_current_gradient = _define(
    "confined_weight_gradient(Tensor g, int handle, ScalarType dtype) -> Tensor",
    lambda g, handle, dtype: _block_of(g, spec_of(handle), dtype),
    _block_fake,
)
torch.library.register_autograd(
    "osf_torch::confined_weight", _current_backward, setup_context=_current_setup, lib=library
)


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
