"""Weights that a module reads as a sum with what stands beside them, made once a call.

What a batch of experts computes is its module's: the product with an update has to stand before the
activation. So the module's own forward pass runs, and where it reads a weight it gets

    W = round(W₀ + U_l C V_lᵀ)

whose gradient goes to C. W₀ is read and never written to. A quantized one is dequantized for it,
and W is then of the dtype that the module multiplies in.

What autograd would keep of W for the backward pass, which is all of it, for every layer of a model,
is kept as what it was made of, and made again when the backward pass asks for it: of one expert
where the module multiplies by one at a time, else of all. So a module's weights are whole for the
time of its forward pass, and again of its backward pass, with the dense gradient of W there. Where
something else already says what is kept (checkpoints, ``save_on_cpu``), that does.
"""

from __future__ import annotations

import importlib
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osf_kernels import FreeBasis, free_block, free_matrix
from osf_torch.free.current import ambient, current, is_substitute, update_of
from osf_torch.free.merging import without_autocast
from osf_torch.free.operators import anchors_of, differentiable_once
from osf_torch.free.spec import Place, Spec, specs_of
from osf_torch.kinds import is_plain
from osf_torch.quantized import Stored, stored
from osf_torch.sharding import is_dtensor

OPERATOR = "confine"
# Of transformers' ways to run experts those that multiply by plain weights on every device.
_WAYS = ("batched_mm", "grouped_mm")

Factors = tuple[Tensor, ...]


def is_float8_experts(module: nn.Module) -> bool:
    """Whether it is transformers' batch of experts in float8, whose forward pass multiplies by
    weights of wider dtypes as they are."""
    return any(
        kind.__name__ == "FP8Experts" and kind.__module__.split(".")[0] == "transformers"
        for kind in type(module).__mro__
    )


def runs_plain(module: nn.Module, packed: Stored) -> bool:
    """Whether a module runs with a plain tensor in the place of a quantized weight: the weight is a
    tensor to torch's operators, or the module is known to."""
    return packed.is_tensor or is_float8_experts(module)


def others_of(module: nn.Module, attributes: frozenset[str]) -> frozenset[str]:
    """The other weights that such a module then reads dequantized too: all of experts in float8,
    whose ways to run take weights of one kind."""
    if not is_float8_experts(module):
        return frozenset()
    return frozenset(
        name
        for name, parameter in module._parameters.items()
        if name not in attributes
        and parameter is not None
        and stored(parameter, [(module, name)]) is not None
    )


# --- a call of the module ---


class _Calls(threading.local):
    """The calls that this thread is in, by module."""

    def __init__(self) -> None:
        self.now: dict[int, _Call] = {}


_calls = _Calls()


class _Call:
    """One forward pass of a module.

    Attributes:
        dtype: that the module multiplies in; None where nothing says so.
        made: the weights that were read, by attribute.
        sources: what each was made of, by where it lies.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.made: dict[str, Tensor] = {}
        self.sources: dict[int, _Source] = {}

    def pack(self, t: Tensor) -> _Kept | tuple[Tensor, int]:
        source = None
        if is_plain(t) and t.layout is torch.strided:
            source = self.sources.get(t.untyped_storage().data_ptr())
        if source is None:
            return t.detach(), t._version
        return _Kept(source, int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))


class _Kept(NamedTuple):
    """A view of a weight, as what the weight was made of."""

    source: _Source
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _unpack(kept: _Kept | tuple[Tensor, int]) -> Tensor:
    if isinstance(kept, _Kept):
        return kept.source.again(kept.offset, kept.shape, kept.strides)
    t, version = kept
    if t._version != version:
        raise RuntimeError(
            "osf_torch.confine: expected what autograd keeps of a forward pass to stay as it was, "
            f"got a tensor of shape {tuple(t.shape)} that was written to in place before the "
            "backward pass; run the forward pass again, or write to a copy"
        )
    return t


def forward(module: Any, kind: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """What the class ``kind`` computes of the module, with plain weights."""
    if not specs_of(module):
        return kind.forward(module, *args, **kwargs)
    calls, key = _calls.now, id(module)
    before, call = calls.get(key), _Call(_dtype_of(args, kwargs))
    calls[key] = call
    run = _plain_forward(module, kind)
    try:
        if _is_free_to_keep():
            with torch.autograd.graph.saved_tensors_hooks(call.pack, _unpack):
                return run(module, *args, **kwargs)
        return run(module, *args, **kwargs)
    finally:
        call.made.clear()  # a graph has the call, by its hooks
        call.sources.clear()
        if before is None:
            del calls[key]
        else:
            calls[key] = before


def _dtype_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """That the products are of: of the first inputs, or what autocast has."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor) and t.is_floating_point():
            if torch.is_autocast_enabled(t.device.type) and t.dtype != torch.float64:
                return torch.get_autocast_dtype(t.device.type)
            return t.dtype
    return None


def _is_free_to_keep() -> bool:
    """Whether nothing else says what autograd keeps: a checkpoint keeps nothing, transforms of
    ``torch.func`` let nobody say it."""
    autograd: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(False) is None
    )


def _plain_forward(module: Any, kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward pass that multiplies by plain weights: of experts in float8 transformers' own of
    plain experts, in the way that the model's config says, where it runs on every device."""
    if not is_float8_experts(module):
        return kind.forward
    way = getattr(module.config, "_experts_implementation", None)
    if way in (None, "eager"):
        # Under what chooses another way: it multiplies by one expert at a time.
        eager: Callable[..., Any] = inspect.unwrap(kind.forward)
        return eager
    ways = importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    chosen: Callable[..., Any] = ways[way if way in _WAYS else "grouped_mm"]
    return chosen


# --- the weight ---


def read(place: Place) -> Tensor:
    """The current weight as its module reads it, within a call and elsewhere."""
    if not place.spec.is_dequantized:
        return _read_plain(place)
    spec, packed = place.spec, place.stored
    if packed is None:
        raise TypeError(
            f"osf_torch.confine: expected {spec.name!r} to be quantized as it was, got "
            f"{type(place.weight).__name__} of {place.weight.dtype}; confine the model as it is now"
        )
    packed.require(spec.name, OPERATOR)
    call = _calls.now.get(id(place.module))
    if call is not None and spec.attribute in call.made:
        return call.made[spec.attribute]
    dtype = packed.dtype if call is None or call.dtype is None else call.dtype
    if is_substitute(place):
        values = packed.values(spec.name, OPERATOR, 0, _count(spec.shape, spec))
        W = (values + update_of(place)).to(dtype)
        if call is not None:
            call.made[spec.attribute] = W
        return W
    source = _source(place, packed, dtype)
    factors = source.factors
    if any(t.requires_grad for t in factors) and torch.is_grad_enabled():
        W = _Formed.apply(source, anchors_of(*factors), *factors)
    else:
        W = source.whole()
    return _noted(call, spec.attribute, source, W)


def _read_plain(place: Place) -> Tensor:
    """Of a weight that is no codes: a sum by torch's own operators, where C stands beside it."""
    spec, weight = place.spec, place.weight
    call = _calls.now.get(id(place.module)) if spec.update == "beside" else None
    # What DeepSpeed or a mesh gathers of a weight isn't there any more in the backward pass.
    if call is None or is_dtensor(weight) or hasattr(weight, "ds_id"):
        return current(place)
    if spec.attribute in call.made:
        return call.made[spec.attribute]
    W = current(place)
    if is_substitute(place) or not W.is_contiguous():  # which lies as the weight does
        call.made[spec.attribute] = W
        return W
    return _noted(call, spec.attribute, _source(place, weight.detach(), weight.dtype), W)


def _source(place: Place, base: Stored | Tensor, dtype: torch.dtype) -> _Source:
    spec, held = place.spec, tuple(place.trained())
    with without_autocast(held[0]):
        factors = held if spec.rank is None else ambient(place)
    return _Source(spec.name, spec.shape, base, dtype, spec, factors, held)


def read_other(module: nn.Module, attribute: str) -> Any:
    """A quantized weight of such a module that isn't confined: within a call dequantized."""
    weight, call = module._parameters[attribute], _calls.now.get(id(module))
    if call is None or weight is None:
        return weight
    if attribute in call.made:
        return call.made[attribute]
    name, packed = f"{type(module).__name__}.{attribute}", stored(weight, [(module, attribute)])
    if packed is None:
        return weight
    packed.require(name, OPERATOR)
    source = _Source(name, packed.shape, packed, call.dtype or packed.dtype, None, (), ())
    return _noted(call, attribute, source, source.whole())


def _noted(call: _Call | None, attribute: str, source: _Source, W: Tensor) -> Tensor:
    if call is not None:
        call.made[attribute] = W
        call.sources[W.untyped_storage().data_ptr()] = source
    return W


def _is_batch(shape: tuple[int, ...], spec: Spec | None) -> bool:
    """Whether its matrices are made one after the other; others are made as a whole."""
    return len(shape) == 3 and not (spec is not None and spec.is_flat)


def _count(shape: tuple[int, ...], spec: Spec | None) -> int:
    return shape[0] if _is_batch(shape, spec) else 1


@dataclass(frozen=True, eq=False)
class _Source:
    """What a weight is made of.

    Attributes:
        name, shape: of the weight.
        base: W₀, or what it is stored in.
        dtype: of the weight.
        spec: None of one that isn't confined.
        factors: C, or of rank s the factors in the weight's own space, U_l B and A V_lᵀ.
        held: the parameters that these are made of.
    """

    name: str
    shape: tuple[int, ...]
    base: Stored | Tensor
    dtype: torch.dtype
    spec: Spec | None
    factors: Factors
    held: Factors

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", [t._version for t in self.held])

    @torch.no_grad()
    def matrices(self, first: int, count: int) -> Tensor:
        """Some of the batch (count, m, n), made one after the other."""
        found: Tensor | None = None
        with without_autocast(self.factors[0] if self.factors else torch.empty(0)):
            for i in range(count):
                W = self._base(first + i)
                if self.spec is not None:
                    W = W + _update(self.spec, self.factors, first + i)
                if found is None:
                    found = W.new_empty(count, *W.shape, dtype=self.dtype)
                found[i] = W
        assert found is not None
        return found

    def _base(self, index: int) -> Tensor:
        if not isinstance(self.base, Tensor):
            return self.base.matrix(self.name, index, OPERATOR)
        return self.base[index] if _is_batch(self.shape, self.spec) else self.base

    def whole(self) -> Tensor:
        return self.matrices(0, _count(self.shape, self.spec)).view(self.shape)

    def again(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """A view of the weight, made anew of the matrices that it is of.

        Raises:
            RuntimeError: C was written to since the forward pass.
        """
        if [t._version for t in self.held] != self.versions:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"osf_torch.confine: expected the free block of {self.name!r} to be as it was in "
                "the forward pass until the backward pass has ended, got one that was written to, "
                "as by a step of an optimizer; run the forward pass again"
            )
        size = math.prod(self.shape) // _count(self.shape, self.spec)
        last = offset + sum((n - 1) * by for n, by in zip(shape, strides, strict=True))
        first = offset // size
        part = self.matrices(first, last // size - first + 1)
        return part.as_strided(shape, strides, offset - first * size)


def _sides(spec: Spec, index: int) -> tuple[FreeBasis, FreeBasis]:
    """The bases of one matrix of a batch, as a batch of one; of any other weight all."""
    if not _is_batch(spec.shape, spec):
        return spec.left, spec.right
    part = slice(index, index + 1)
    return spec.left.of_batch(-3, part), spec.right.of_batch(-3, part)


def _one(spec: Spec, t: Tensor, index: int) -> Tensor:
    return t[index : index + 1] if _is_batch(spec.shape, spec) else t


def _update(spec: Spec, factors: Factors, index: int) -> Tensor:
    """U_l C V_lᵀ of one matrix of a batch; of any other weight all."""
    spec.follow(factors[0].device)
    one = [_one(spec, t, index) for t in factors]
    if spec.rank is None:
        update: Tensor = free_matrix(one[0], *_sides(spec, index))
    else:
        update = one[0] @ one[1]
    return update[0] if _is_batch(spec.shape, spec) else update.view(spec.shape)


class _Formed(torch.autograd.Function):
    """The weight, of which C gets its gradient from the dense one, a matrix at a time."""

    @staticmethod
    def forward(ctx: Any, source: _Source, anchors: Factors, *factors: Tensor) -> Tensor:
        ctx.source, ctx.anchors = source, anchors
        ctx.save_for_backward(*(factors if len(factors) > 1 else ()))
        ctx.like = [(t.shape, t.dtype) for t in factors]
        return source.whole()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        spec, factors = ctx.source.spec, ctx.saved_tensors
        found = [g.new_empty(shape, dtype=dtype) for shape, dtype in ctx.like]
        spec.follow(g.device)
        for i in range(_count(spec.shape, spec)):
            one = _one(spec, g, i).to(found[0].dtype)
            for into, part in zip(found, _gradients(spec, factors, one, i), strict=True):
                _one(spec, into, i).copy_(part)
        return None, None, *found


def _gradients(spec: Spec, factors: Factors, g: Tensor, index: int) -> Iterator[Tensor]:
    """Of what one matrix's update is made of, by its dense gradient."""
    if spec.rank is None:
        yield free_block(g, *_sides(spec, index))
    else:
        B, A = (_one(spec, t, index) for t in factors)
        yield g @ A.mT
        yield B.mT @ g
