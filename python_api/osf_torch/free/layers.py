"""The classes and hooks that a module with confined weights gets, and their way back.

A confined module is of a subclass of its class, made here, as ``torch.nn.utils.parametrize`` does
it. There the weight is a property: whoever reads ``module.weight`` gets the current weight, whose
gradient goes to C, however it is used (attention's ``out_proj``, tied calls, experts). What
iterates over parameters sees the frozen tensor itself. ``nn.Linear`` and transformers' ``Conv1D``
also get a forward pass of their own, which never forms the dense gradient. Of quantized weights
the layer's output is added to, or its module runs with plain ones; of weights that C stands beside
modules read the sum, made once a call: see ``formed``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osf_torch.free import formed
from osf_torch.free.current import block_of, current, is_substitute
from osf_torch.free.linear import beside, linear
from osf_torch.free.merging import (
    cut_of,
    merge,
    part_of,
    require_fresh,
    require_together,
    require_writable,
)
from osf_torch.free.spec import SPECS, AtRest, Place, Spec, resting, specs_of
from osf_torch.sharding import is_dtensor, local

ORIGINAL = "_osf_original"  # of a class made here: the one that it is a subclass of
_HOOKS = "_osf_free_hooks"  # of a module, in its __dict__
# Modules of torch that put another weight in the place of one that they read first.
_REPARAMETRIZE = frozenset(
    f"torch.nn.utils.{name}"
    for name in ("parametrize", "parametrizations", "prune", "spectral_norm", "weight_norm")
)
_GET_PARAMETER = nn.Module.get_parameter.__code__


# --- classes ---


@cache
def _confined_class(
    kind: type[nn.Module],
    attributes: frozenset[str],
    others: frozenset[str],
    runs: str,
    opaque: bool,
) -> type:
    """The subclass of ``kind`` whose ``attributes`` are current weights.

    Args:
        others: quantized weights that the module reads dequantized and that aren't confined.
        runs: "added", a layer that the free block is added to; "formed", a module for whose calls
            the sum of the weight and what stands beside it is made, quantized ones dequantized;
            else "".
        opaque: whether they are quantized.
    """

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self: nn.Module) -> Any:
        raise RuntimeError(
            f"osf_torch.confine: expected to save a confined {kind.__name__} by state_dict(), got "
            "a pickle of the module; save model.state_dict() and Confined.state_dict(), or "
            "release() first"
        )

    def __delattr__(self: nn.Module, name: str) -> None:
        spec = specs_of(self).get(name)
        if spec is not None and name in self._parameters:
            raise _reparametrized(spec, "its deletion, as by torch.nn.utils.parametrize")
        kind.__delattr__(self, name)

    members: dict[str, Any] = {
        ORIGINAL: kind,
        "__delattr__": __delattr__,
        "__deepcopy__": __deepcopy__,
        "__getstate__": __getstate__,
        "__module__": __name__,
    }
    if runs == "added":
        members["forward"] = _forward_added
    else:
        members |= {attribute: _property(attribute) for attribute in attributes}
        members |= {attribute: _other(attribute) for attribute in others}
        if runs == "formed":
            members["forward"] = _forward_dequantized if opaque else _forward_formed
        elif kind.forward is nn.Linear.forward:
            members["forward"] = _forward_linear
        elif _is_conv1d(kind):
            members["forward"] = _forward_conv1d
    return type(f"Confined{kind.__name__}", (kind,), members)


def _is_conv1d(kind: type[nn.Module]) -> bool:
    return any(base.__name__ == "Conv1D" and "forward" in vars(base) for base in kind.__mro__)


def _property(attribute: str) -> property:
    def get(self: nn.Module) -> Any:
        spec = specs_of(self).get(attribute)
        if attribute not in self._parameters:
            raise AttributeError(attribute)  # deleted: torch's own message follows
        weight = self._parameters[attribute]
        if spec is None or weight is None:  # released
            return weight
        if not torch.compiler.is_compiling():
            asking = sys._getframe(1)
            if asking.f_code is _GET_PARAMETER:  # which says what named_parameters() has
                return weight
            if asking.f_globals.get("__name__") in _REPARAMETRIZE:
                raise _reparametrized(spec, asking.f_globals["__name__"])
        if resting(self).get(attribute) is weight:  # FSDP2 reads what it put there
            require_together(Place(self, spec))
            part_of(spec, cut_of(spec.name, weight))
            return weight
        require_frozen(spec, weight)
        require_writable(Place(self, spec))
        tell_frozen_block(Place(self, spec))
        return formed.read(Place(self, spec))

    return property(get, _setter(attribute))


def _reparametrized(spec: Spec, by: str) -> RuntimeError:
    """Of a weight that something puts another in the place of; nothing has been changed yet."""
    return RuntimeError(
        f"osf_torch.confine: expected {spec.name!r} to stay as it is while it is confined, got "
        f"{by}, which puts another weight in its place, whose protected part that wouldn't hold; "
        "Confined.release() before it, and leave the weight out of the subspaces"
    )


def _other(attribute: str) -> property:
    def get(self: nn.Module) -> Any:
        return formed.read_other(self, attribute)

    return property(get, _setter(attribute))


def _setter(attribute: str) -> Any:
    def put(self: nn.Module, value: Any) -> None:
        # nn.Module.__setattr__ takes parameters before a property sees them.
        raise TypeError(
            f"osf_torch.confine: expected {attribute!r} of a confined module to be set to a "
            f"parameter, got {type(value).__name__}"
        )

    return put


def _forward_linear(self: Any, input: Tensor) -> Tensor:
    return _forward(self, input, transposed=False)


def _forward_conv1d(self: Any, x: Tensor) -> Tensor:
    return _forward(self, x, transposed=True)


def _forward(module: Any, x: Tensor, *, transposed: bool) -> Tensor:
    spec = specs_of(module).get("weight")
    if spec is None:
        weight = module._parameters["weight"]
        return F.linear(x, weight.mT if transposed else weight, module.bias)
    place = Place(module, spec)
    require_writable(place)
    tell_frozen_block(place)
    W, bias, is_sharded = place.weight, module.bias, place.is_sharded
    if is_sharded:
        require_together(place)
    require_frozen(spec, W)
    if is_dtensor(W) or is_dtensor(x) or is_substitute(place):
        weight = current(place)
        return F.linear(x, weight.mT if transposed else weight, bias)
    if spec.update == "beside" and (spec.rank is not None or not W.element_size() >= 4):
        y = F.linear(x, W.mT if transposed else W, bias)
        return y + beside(place, x, transposed=transposed).to(y.dtype)
    if is_sharded and spec.update == "merge":
        require_fresh(place)
    return linear(place, x, bias, transposed=transposed, is_sharded=is_sharded)


def _forward_added(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer whose weight can't be read, and what the free block adds to it."""
    y: Tensor = getattr(type(self), ORIGINAL).forward(self, x, *args, **kwargs)
    spec = specs_of(self).get("weight")
    if spec is None:
        return y
    return y + beside(Place(self, spec), x, transposed=False).to(y.dtype)


def _forward_dequantized(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A module that runs with plain weights in the place of quantized ones. It isn't compiled:
    what autograd keeps of them isn't theirs."""
    run: Any = formed.forward
    if torch.compiler.is_compiling():  # disabling imports the compiler, which takes seconds
        run = torch.compiler.disable(run)
    return run(self, getattr(type(self), ORIGINAL), *args, **kwargs)


def _forward_formed(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A module that reads the sum of a plain weight and what stands beside it."""
    kind = getattr(type(self), ORIGINAL)
    if torch.compiler.is_compiling():  # the graph says what is kept
        return kind.forward(self, *args, **kwargs)
    return formed.forward(self, kind, *args, **kwargs)


def tell_frozen_block(place: Place) -> None:
    """Says where gradients are wanted and C takes none: then the weight isn't trained at all."""
    if place.is_trained or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if is_substitute(place):  # whose own C may want none
        return
    owner: Any = place.spec.owner
    owner.tell_frozen(place.name)


def require_frozen(spec: Spec, weight: Tensor) -> None:
    """Raises RuntimeError where the weight itself would be trained."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"osf_torch.confine: expected {spec.name!r} to stay frozen, got requires_grad=True, "
            "with which an optimizer would move what is protected: it was unfrozen, or another "
            "parameter stands in its place; freeze it, or Confined.release() before it is "
            "replaced; torch.func takes those parameters alone that require a gradient"
        )


# --- putting them on and taking them off ---


def attach(module: nn.Module, specs: Iterable[Spec], tensors: dict[str, nn.Parameter]) -> None:
    """Confines weights of one module.

    Args:
        specs: of weights that aren't confined yet.
        tensors: what the module has beside them, by name.
    """
    held = module.__dict__.setdefault(SPECS, {})
    first = not held
    for spec in specs:
        held[spec.attribute] = spec
        weight = module._parameters.get(spec.attribute)
        if weight is not None:
            weight.requires_grad_(False)
            weight.grad = None
    for name, parameter in tensors.items():
        module.register_parameter(name, parameter)
    _reclass(module)
    if first:
        module.__dict__[_HOOKS] = [
            module.register_state_dict_pre_hook(_before_state_dict),
            module.register_state_dict_post_hook(_after_state_dict),
            module.register_load_state_dict_pre_hook(_before_load),
        ]


def detach(module: nn.Module, spec: Spec) -> None:
    """The module without one confined weight; what W holds stays."""
    held = module.__dict__[SPECS]
    del held[spec.attribute]
    for name in spec.beside:
        del module._parameters[name]
    weight = module._parameters.get(spec.attribute)
    if weight is not None:
        weight.requires_grad_(spec.trained)
    if not held:
        for handle in module.__dict__.pop(_HOOKS):
            handle.remove()
        del module.__dict__[SPECS]
    _reclass(module)


def _reclass(module: nn.Module) -> None:
    """Gives the module the class for what it has confined, unless something else made one since:
    properties and forward passes of a class know what isn't confined any more."""
    kind: Any = type(module)
    original = vars(kind).get(ORIGINAL)
    specs = specs_of(module)
    if original is None and any(ORIGINAL in vars(base) for base in kind.__mro__):
        return
    base = kind if original is None else original
    if not specs:
        module.__class__ = base
        return
    attributes, others, runs = frozenset(specs), frozenset[str](), ""
    dequantized = any(spec.is_dequantized for spec in specs.values())
    is_layer = base.forward is nn.Linear.forward or _is_conv1d(base)
    if dequantized:
        others, runs = formed.others_of(module, attributes), "formed"
    elif any(spec.is_opaque for spec in specs.values()):
        runs = "added"
    elif not is_layer and any(spec.update == "beside" for spec in specs.values()):
        runs = "formed"
    module.__class__ = _confined_class(base, attributes, others, runs, dequantized)


# --- states of a model: its plain names, and weights that are up to date ---


def _places(module: nn.Module) -> list[AtRest]:
    return [AtRest(module, spec) for spec in specs_of(module).values()]


def _before_state_dict(module: nn.Module, *_: Any) -> None:
    places = _places(module)
    for place in places:
        if place.spec.update == "merge" and place.is_sharded:
            require_fresh(place)
    merge((place for place in places if not place.is_sharded), looks=True)


def _after_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for spec in specs_of(module).values():
        if spec.is_opaque:  # which nothing can be added to: C stays, under its own name
            continue
        for name in spec.beside:
            state.pop(prefix + name, None)
        if spec.update == "beside" and prefix + spec.attribute in state:
            with torch.no_grad():
                state[prefix + spec.attribute] = current(AtRest(module, spec)).detach()


@torch.no_grad()
def _before_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is loaded is the current weight, and what training goes on from: C begins anew.

    ``Confined.load_state_dict`` puts back what C was of the weights that were saved with it.
    """
    merge((place for place in _places(module) if not place.is_sharded), looks=True)
    for place in _places(module):
        spec = place.spec
        if spec.is_opaque:
            continue
        loaded = state.get(prefix + spec.attribute)
        if loaded is not None and loaded.shape != place.weight.shape:
            loaded = None  # torch itself tells of that
        if loaded is not None:
            _tell_begun(place)
        # The parameters themselves, so that an optimizer still has them where others are assigned.
        for name in spec.trainable:
            if prefix + name not in state:
                if loaded is not None:
                    place.get(name).copy_(_begun(place, name, loaded))
                state[prefix + name] = place.get(name)
        if spec.update == "merge":
            merged = place.get(spec.merged)
            merged.copy_(state[prefix + spec.free])
            state[prefix + spec.merged] = merged
        if spec.is_rounded:
            base = place.get(spec.base) if loaded is None else loaded.detach().clone()
            state[prefix + spec.base] = base


def _begun(place: Place, name: str, weight: Tensor) -> Tensor:
    """What a free block, or a factor of it, is where training begins from a weight."""
    spec, held = place.spec, place.get(name).detach()
    if spec.rank is not None and name == spec.factors[1]:
        return held.clone()  # A of a product that B has zero
    if not spec.decays_to_zero:
        return torch.zeros_like(held)
    return block_of(place, weight.detach().to(held.dtype))


def _tell_begun(place: Place) -> None:
    """Says once a model and load that what C had learned is in the weights from now on."""
    owner: Any = place.spec.owner
    moved = any(bool(local(t.detach()).any()) for t in place.trained()[:1])
    if moved and not place.spec.decays_to_zero and owner is not None:
        owner.tell(
            "loaded",
            "weights were loaded while C had moved: they are what training goes on from, and C "
            "begins anew; Confined.load_state_dict() puts back what was saved with them",
        )
