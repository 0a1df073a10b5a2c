"""Switching PEFT's OSF tuner to ours and back, and attaching it to models that exist."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from osf_torch.integrations._peer import require_peer
from osf_torch.integrations._switch import Replacement, Switch
from osf_torch.integrations.peft.factors import forward
from osf_torch.integrations.peft.hooks import (
    attach_anew,
    attach_layer,
    cast_adapter_dtype,
    owned,
    projection_of,
    restore_hook,
)
from osf_torch.integrations.peft.targets import SIDES, project_gradient_to_orthogonal_space
from osf_torch.sharding import sharding_of

PEER = ("peft", "peft", ">=0.21,<0.22")

_MODULES = ("layer", "model", "utils")


_switch = Switch(*PEER[1:], "peft")
_restoring: Any = None  # the hook on all optimizers


def enable(*, restore: bool = False) -> None:
    """Switches PEFT's OSF tuner to this module, for layers made from now on. Idempotent.

    Layers that exist are switched by :func:`attach`.

    Args:
        restore: also project U_low and V_low after every step of every optimizer; a later call
            changes it.

    Raises:
        ImportError: peft isn't installed, in another version than those supported, or without
            something that is to be replaced; nothing is changed.

    Warns:
        RuntimeWarning: someone else has replaced what an earlier call put there, and is left there.
    """
    global _restoring
    require_peer(*PEER, "peft")
    layer, model, utils = map(
        importlib.import_module, (f"peft.tuners.osf.{name}" for name in _MODULES)
    )
    _switch.on(
        Replacement(owner, name, ours)
        for owner, name, ours in (
            (
                utils,
                "project_gradient_to_orthogonal_space",
                project_gradient_to_orthogonal_space,
            ),
            (layer.OSFLayer, "_attach_hooks", attach_layer),
            (layer.Linear, "forward", forward),
            (model.OSFModel, "_cast_adapter_dtype", cast_adapter_dtype),
        )
    )
    if restore and _restoring is None:
        _restoring = register_optimizer_step_post_hook(restore_hook)
    elif not restore:
        _stop_restoring()


def disable() -> None:
    """Gives PEFT its own functions back. Idempotent.

    Layers made or attached meanwhile keep their hooks, and so go on projecting; what
    ``enable(restore=True)`` restored is restored no more.

    Warns:
        RuntimeWarning: someone else has replaced what :func:`enable` put there, and is left there.
    """
    _switch.off()
    _stop_restoring()


def _stop_restoring() -> None:
    global _restoring
    if _restoring is not None:
        _restoring.remove()
        _restoring = None


def attach(model: nn.Module) -> int:
    """Hooks the parameters that the OSF layers of ``model`` have now. Idempotent.

    Call it after ``fully_shard``, after ``load_state_dict(assign=True)``, and for a model made
    before :func:`enable`, whose own hooks it takes off.

    Returns:
        How many parameters are hooked.

    Raises:
        ImportError: as enable.
        ValueError: the model has no OSF layer, or a parameter is sharded in a way that isn't
            one Shard; nothing is attached.
    """
    require_peer(*PEER, "peft")
    layers = _layers(model, "attach")
    for name, layer in layers:
        for adapter in layer.osf_svd_params:
            for side in SIDES:
                try:
                    sharding_of(layer.osf_svd_params[adapter][side])
                except ValueError as error:
                    raise ValueError(
                        f"osf_torch.integrations.peft.attach: {side} of {adapter!r} in {name!r}: "
                        f"{error}"
                    ) from None
    return sum(attach_anew(layer) for _, layer in layers)


def verify(model: nn.Module) -> None:
    """Raises RuntimeError where a trainable U_low or V_low isn't hooked, naming the layer.

    Raises:
        ValueError: the model has no OSF layer.
        RuntimeError: see above; call :func:`attach`.
    """
    for name, layer in _layers(model, "verify"):
        for adapter in layer.osf_svd_params:
            for side in SIDES:
                parameter = layer.osf_svd_params[adapter][side]
                if parameter.requires_grad and projection_of(parameter) is None:
                    raise RuntimeError(
                        "osf_torch.integrations.peft.verify: expected gradients to be projected, "
                        f"got no hook on {side} of {adapter!r} in {name!r}: the parameter was "
                        "replaced, or made before enable(); call attach(model)"
                    )


def restore_after(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Projects U_low and V_low of ``model`` after each step of ``optimizer``.

    U_low ← P_U U_low, V_low ← V_low P_V for those that had a gradient, as a whole in one list
    call, and in one collective where they are sharded. Attaches the model too.

    Returns:
        A handle; ``.remove()`` stops restoring, and leaves the gradients' hooks.

    Raises:
        ImportError, ValueError: as attach; the optimizer owns none of the parameters.
    """
    attach(model)
    ours = {
        id(layer.osf_svd_params[adapter][side])
        for _, layer in _layers(model, "restore_after")
        for adapter in layer.osf_svd_params
        for side in SIDES
    }
    if not any(id(p) in ours for p in owned(optimizer)):
        raise ValueError(
            "osf_torch.integrations.peft.restore_after: expected optimizer to own U_low and V_low "
            "of the model, got one that owns none; make it from this model's parameters, after "
            "fully_shard"
        )
    return optimizer.register_step_post_hook(restore_hook)


def _layers(model: nn.Module, operator: str) -> list[tuple[str, Any]]:
    layer = importlib.import_module("peft.tuners.osf.layer")
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, layer.OSFLayer)]
    if not found:
        raise ValueError(
            f"osf_torch.integrations.peft.{operator}: expected model to have OSF layers, got none; "
            "make it by peft.get_peft_model(model, peft.OSFConfig(...))"
        )
    return found
