"""The current weight by itself, as whoever reads ``module.weight`` gets it.

It is brought up to date before that. C gets its gradient from the dense one of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import free_block, free_matrix
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
from osf_torch.free.operators import define, differentiable_once, differentiate
from osf_torch.free.spec import Place, Spec, spec_of
from osf_torch.sharding import is_cut, is_dtensor, local, sum_over


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
            beside: Tensor = _current_weight(W, place.block, None, None, place.handle)
            return beside
        return (W + update_of(place)).to(W.dtype)  # rounded once
    C, merged = place.get(spec.free), place.get(spec.merged)
    base = place.base
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


def formed(W: Tensor, C: Tensor, handle: int) -> Tensor:
    """W₀ + U_l C V_lᵀ, in the wider precision of both."""
    spec = spec_of(handle)
    spec.follow(W.device)
    return W + free_matrix(C, spec.left, spec.right).view(W.shape)


def is_substitute(place: Place) -> bool:
    """Whether C is in the place of the module's own, as ``functional_call`` has it, or a transform
    of ``torch.func`` is at work.

    Then the weight is a sum by operators of torch alone, which all transforms and derivatives of
    any order pass through. The module's W isn't brought up to date, since graphs may hold it.
    """
    if torch._C._are_functorch_transforms_active():
        return True
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
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, _sharded_block(ctx.spec, g, ctx.placed, ctx.like), None


class _Current(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, C: Tensor, spec: Spec) -> Tensor:
        ctx.spec, ctx.like = spec, C
        ctx.placed = W if is_dtensor(W) else None
        return W.view_as(W)

    @staticmethod
    @differentiable_once
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
    # A sum over those that hold other rows and columns; a batch stays where it is.
    batch = () if spec.is_flat else tuple(range(len(spec.shape) - 2))
    placements = [p if is_cut(p) and p.dim in batch else Replicate() for p in W.placements]
    if cut is not None:
        sides = [part for part in cut.cuts if spec.is_flat or part.dim >= -2]
        (block,) = sum_over([group for part in sides for group in part.groups], [block])
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
        return formed(W, C, handle).to(W.dtype)
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


_current_weight = define(
    "confined_weight(Tensor W, Tensor C, Tensor? merged, Tensor? base, int handle) -> Tensor",
    _current_forward,
    lambda W, C, merged, base, handle: W.new_empty(W.shape),
)
_current_gradient = define(
    "confined_weight_gradient(Tensor g, int handle, ScalarType dtype) -> Tensor",
    lambda g, handle, dtype: _block_of(g, spec_of(handle), dtype),
    _block_fake,
)
differentiate(_current_weight, _current_backward, _current_setup)
