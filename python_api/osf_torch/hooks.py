"""The hooks of a guard: on the weights whose gradients it projects, and on optimizers that step.

A guard lives as long as the model and its hooks do: the modules that own its weights hold it, where
Python's collector sees the cycle. torch's own hooks of a weight hold it weakly, since a reference
from a tensor's hooks is one that the collector can't see.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from osf_torch.kinds import owners

Hook = Callable[..., Any]
ANCHOR = "_osf_guard"  # of a module, in its __dict__


class Anchor:
    """Holds guards for a module; copies and pickles of the module hold none."""

    def __init__(self) -> None:
        self.guards: list[object] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()


class Hooks:
    """Puts the hooks of a guard on and takes them off.

    Args:
        accumulated: called with a weight whose gradient has been accumulated, or None.
        before, after: called around the steps of ``optimizer``, or of every optimizer where that is
            None, as torch calls step hooks.
        foreign: called before the steps of every other optimizer than ``optimizer``, likewise.
    """

    def __init__(
        self,
        guard: object,
        optimizer: torch.optim.Optimizer | None,
        accumulated: Hook | None,
        before: Hook,
        after: Hook,
        foreign: Hook,
    ) -> None:
        self._guard, self.optimizer = guard, optimizer
        self._accumulated = None if accumulated is None else _weakly(accumulated)
        self.before, self.after, self.foreign = before, after, foreign
        self._of_weights: dict[int, Any] = {}
        self._bodies: dict[int, int] = {}  # of weights when they were hooked
        self._of_steps: list[Any] = []
        self._modules: dict[int, list[nn.Module]] = {}

    def attach(self, model: nn.Module, weights: Iterable[Tensor]) -> None:
        having = owners(model)
        for weight in weights:
            self._modules[id(weight)] = [module for module, _ in having.get(id(weight), [])]
            for module in self._modules[id(weight)]:
                if not isinstance(module.__dict__.get(ANCHOR), Anchor):
                    module.__dict__[ANCHOR] = Anchor()
                module.__dict__[ANCHOR].guards.append(self._guard)
            self._hook(weight)
        if self.optimizer is not None:
            # Held by the optimizer, in a cycle that the collector sees.
            before, after = (torch.compiler.disable(hook) for hook in (self.before, self.after))
            self._of_steps = [
                self.optimizer.register_step_pre_hook(before),
                self.optimizer.register_step_post_hook(after),
            ]
        _watch(self)

    def _hook(self, weight: Tensor) -> None:
        """Puts the weight's hook on, before those of others: an optimizer that steps in another one
        would use the gradient before it is projected."""
        if self._accumulated is None:
            return
        handle = weight.register_post_accumulate_grad_hook(self._accumulated)
        hooks: Any = weight._post_accumulate_grad_hooks
        others = [(key, hook) for key, hook in hooks.items() if key != handle.id]
        hooks.clear()
        hooks[handle.id] = self._accumulated
        hooks.update(others)
        # Where torch has exchanged the weight's body, autograd knows of hooks once they are set.
        weight._post_accumulate_grad_hooks = hooks
        self._of_weights[id(weight)] = handle
        self._bodies[id(weight)] = weight._cdata

    def mend(self, weights: Iterable[Tensor]) -> None:
        """Puts hooks back on weights whose bodies were exchanged (``torch.utils.swap_tensors``)."""
        for weight in weights:
            if self._is_lost(weight):
                self._of_weights.pop(id(weight)).remove()
                self._hook(weight)

    def _is_lost(self, weight: Tensor) -> bool:
        handle = self._of_weights.get(id(weight))
        return handle is not None and (
            self._bodies[id(weight)] != weight._cdata
            or handle.id not in (weight._post_accumulate_grad_hooks or {})
        )

    def lost(self, weights: Iterable[Tensor]) -> set[int]:
        """The ids of the weights whose hooks something has taken off."""
        return {id(weight) for weight in weights if self._is_lost(weight)}

    @property
    def are_on(self) -> bool:
        """Whether steps are still hooked."""
        if self.optimizer is None:
            return self in _WATCHING
        tables = [handle.hooks_dict_ref() for handle in self._of_steps]
        return bool(tables) and all(
            table is not None and handle.id in table
            for handle, table in zip(self._of_steps, tables, strict=True)
        )

    def release(self, key: int) -> None:
        """Takes the hook off the weight of that id."""
        handle = self._of_weights.pop(key, None)
        if handle is not None:
            handle.remove()
        for module in self._modules.pop(key, []):
            anchor = module.__dict__.get(ANCHOR)
            if isinstance(anchor, Anchor) and self._guard in anchor.guards:
                anchor.guards.remove(self._guard)  # one of as many as it has weights there
                if not anchor.guards:
                    del module.__dict__[ANCHOR]

    def remove(self) -> None:
        for key in list(self._modules):
            self.release(key)
        for handle in self._of_steps:
            handle.remove()
        self._of_steps = []
        _WATCHING.discard(self)


# Hooks of guards, which watch every optimizer. torch iterates over the table of its global hooks
# while they run, so that two stay in it for good: one that went with its guard might go then.
_WATCHING: weakref.WeakSet[Hooks] = weakref.WeakSet()
_REGISTERED: list[Any] = []


def _watch(hooks: Hooks) -> None:
    if not _REGISTERED:
        _REGISTERED.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_any)))
        _REGISTERED.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_any)))
    _WATCHING.add(hooks)


def _before_any(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    changed = None
    for hooks in list(_WATCHING):
        if hooks.optimizer is None:
            found = hooks.before(optimizer, args, kwargs)
            if found is not None:
                changed = args, kwargs = found
        elif hooks.optimizer is not optimizer:
            hooks.foreign(optimizer, args, kwargs)
    return changed


def _after_any(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for hooks in list(_WATCHING):
        if hooks.optimizer is None:
            hooks.after(optimizer, args, kwargs)


def _weakly(method: Hook) -> Hook:
    """A hook that calls the method for as long as its object lives; Dynamo runs it as it is."""
    found = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> Any:
        alive = found()
        return None if alive is None else alive(*arguments)

    disabled: Hook = torch.compiler.disable(hook)
    return disabled
