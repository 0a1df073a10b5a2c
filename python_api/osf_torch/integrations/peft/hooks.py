"""Hooks on the parameters of PEFT's OSF layers: on gradients as they come, and after steps."""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from osf_kernels import Basis
from osf_torch.bases import columns_of, is_high
from osf_torch.integrations.peft.targets import SIDES, Target, project
from osf_torch.lists import Lists
from osf_torch.sharding import is_dtensor, sharding_of, step_left_out

_numbers = itertools.count(1)


class Projection:
    """Hook, and handle, of one parameter of one OSF layer; in the layer's ``hook_handles``.

    Attributes:
        lists: of this parameter alone, and those in which it is the first of many.
    """

    def __init__(self, layer: Any, adapter: str, side: str, parameter: Tensor) -> None:
        # Weakly: torch keeps hooks where the garbage collector can't see a cycle through them.
        self._layer, self.adapter, self.side = weakref.ref(layer), adapter, side
        self._inverse: tuple[Tensor, Tensor] | None = None
        self._number = next(_numbers)
        self.lists = Lists()
        # Hooks go onto what requires grad; an adapter that isn't active is to have its own too.
        trainable = parameter.requires_grad
        parameter.requires_grad_(True)
        self._handle = parameter.register_post_accumulate_grad_hook(self)
        parameter.requires_grad_(trainable)

    def live(self) -> bool:
        """Whether the layer's parameter is still the one that was hooked."""
        parameter = self._parameter()
        return parameter is not None and projection_of(parameter) is self

    def _parameter(self) -> Tensor | None:
        layer = self._layer() if self._handle is not None else None
        if layer is None or self.adapter not in layer.osf_svd_params:
            return None
        parameter: Tensor = layer.osf_svd_params[self.adapter][self.side]
        return parameter

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if is_dtensor(parameter.grad):
            _later(parameter)
        else:
            project([self.target(parameter.grad)], self.lists)

    def held(self) -> tuple[Tensor, Literal["high", "low"]]:
        """What projects: high where PEFT keeps it, else low, which is then the complement."""
        layer: Any = self._layer()  # alive, as what owns the parameter that is projected
        high = getattr(layer, f"_osf_{self.side[0]}_high")
        if self.adapter in high:
            return high[self.adapter], "high"
        return getattr(layer, f"_osf_{self.side}_init")[self.adapter], "low"

    def target(self, matrix: Tensor) -> Target:
        held, spans = self.held()
        basis = Basis(held if self.side == "U_low" else held.mT, spans)
        return Target(matrix, basis, SIDES[self.side], whose=self._number, held=held)

    def restoring_target(self, matrix: Tensor) -> Target:
        """With B (BᵀB)⁻¹ Bᵀ for a low basis: B Bᵀ scales what it keeps by 1 ± ‖BᵀB − I‖, rounding
        in float32 and 4e-3 in bfloat16, and this is applied at every step."""
        target = self.target(matrix)
        if is_high(target.basis):
            return target
        if self._inverse is None or self._inverse[0] is not target.held:
            assert target.held is not None
            B = columns_of(target.basis).double()
            self._inverse = target.held, torch.linalg.inv(B.mT @ B)
        return replace(target, inverse=self._inverse[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Projection:
        """Hooks the layer's copy, whose parameters, copied before, come without hooks."""
        layer, parameter = memo.get(id(self._layer())), memo.get(id(self._parameter()))
        if not self.live() or layer is None or parameter is None:
            return _unhooked()
        return Projection(layer, self.adapter, self.side, parameter)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _unhooked, ()  # a pickled parameter comes back without its hooks: attach(model)


def _unhooked() -> Projection:
    """A handle of nothing."""
    handle = Projection.__new__(Projection)
    handle._handle = None
    return handle


def attach_layer(self: Any, adapter_name: str) -> None:
    """OSFLayer._attach_hooks."""
    if adapter_name not in self.osf_svd_params:
        return
    for side in SIDES:
        parameter = self.osf_svd_params[adapter_name][side]
        if projection_of(parameter) is None:
            self.hook_handles.append(Projection(self, adapter_name, side, parameter))


def attach_anew(layer: Any) -> int:
    """Hooks the parameters that the layer has now, in place of whatever hooks it had."""
    kept = [h for h in layer.hook_handles if isinstance(h, Projection) and h.live()]
    for handle in layer.hook_handles:
        if handle not in kept:
            handle.remove()
    layer.hook_handles[:] = kept
    for adapter in layer.osf_svd_params:
        attach_layer(layer, adapter)
    return len(layer.hook_handles)


def cast_adapter_dtype(self: Any, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """OSFModel._cast_adapter_dtype, the last step of making and of loading an adapter: that of a
    bfloat16 model gets float32 parameters here, new ones, on which no hook is."""
    base = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    base._cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype)
    for module in self.model.modules():
        if hasattr(module, "osf_svd_params"):
            attach_anew(module)


def projection_of(parameter: Tensor) -> Projection | None:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return next((hook for hook in hooks.values() if isinstance(hook, Projection)), None)


def owned(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


@torch.no_grad()
def restore_hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    hooked = [
        (p, hook)
        for p in owned(optimizer)
        if p.grad is not None and (hook := projection_of(p)) is not None
    ]
    if not hooked or step_left_out(optimizer, (sharding_of(p) for p, _ in hooked)):
        return
    project([hook.restoring_target(p.detach()) for p, hook in hooked], hooked[0][1].lists)


# FSDP2 calls hooks as each group of parameters is reduced. Sharded gradients wait for the end of
# the backward pass, so that one collective serves them all.
_waiting: dict[int, tuple[Tensor, Any]] = {}


def _later(parameter: Tensor) -> None:
    ready = None
    if parameter.is_cuda:  # FSDP2 reduces on a stream of its own
        ready = torch.cuda.current_stream(parameter.device).record_event()
    _waiting[id(parameter)] = parameter, ready
    # Once a hook and not once a pass: a pass that raised would have left its callback uncalled.
    torch.autograd.Variable._execution_engine.queue_callback(_project_waiting)


@torch.no_grad()
def _project_waiting() -> None:
    waiting = list(_waiting.values())
    _waiting.clear()
    hooks, targets = [], []
    for parameter, ready in waiting:
        if ready is not None:
            torch.cuda.current_stream(parameter.device).wait_event(ready)
        hook = projection_of(parameter)
        if hook is not None and parameter.grad is not None:
            hooks.append(hook)
            targets.append(hook.target(parameter.grad))
    if hooks:
        project(targets, hooks[0].lists)
