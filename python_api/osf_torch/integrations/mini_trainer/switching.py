"""Putting ours in the place of mini_trainer's own, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from osf_torch.integrations._peer import require_peer
from osf_torch.integrations._switch import Replacement, Switch, holders
from osf_torch.integrations.mini_trainer.decomposition import create_svd_dict
from osf_torch.integrations.mini_trainer.low_bases import drop_low_bases, keep_low_bases
from osf_torch.integrations.mini_trainer.projections import (
    PEER,
    project_gradient_to_orthogonal_space,
    project_gradients,
    project_parameter_to_orthogonal_space,
    project_parameters,
)

DISTRIBUTION = "rhai-innovation-mini-trainer"
VERSIONS = ">=0.9,<0.10"

_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "create_svd_dict": create_svd_dict,
    "project_gradient_to_orthogonal_space": project_gradient_to_orthogonal_space,
    "project_parameter_to_orthogonal_space": project_parameter_to_orthogonal_space,
}
_METHODS: dict[str, Callable[[Any], None]] = {
    "project_gradients": project_gradients,
    "project_parameters": project_parameters,
}
_switch = Switch(DISTRIBUTION, VERSIONS, "mini_trainer")


def enable(*, low_bases: bool = True) -> None:
    """Puts the functions of this package in the place of mini_trainer's, wherever it looks them up.

    Call it before ``create_osft_model_class`` or ``setup_model``: the batched
    ``project_gradients`` and ``project_parameters`` are replaced in classes that are made while
    enabled; an earlier class takes only the three functions. Idempotent.

    Args:
        low_bases: keep the complement of a high basis where it is smaller; see the module.

    Raises:
        ImportError: mini_trainer is missing, of an unsupported version, or without something that
            is to be replaced; nothing is changed.

    Warns:
        RuntimeWarning: someone else has replaced what an earlier call put there, and is left there.
    """
    peer = require_peer(PEER, DISTRIBUTION, VERSIONS, "mini_trainer")
    functions = _REPLACEMENTS | {"create_osft_model_class": create_osft_model_class}
    replacements = [
        Replacement(module, name, ours)
        for name, ours in functions.items()
        for module in {peer: None} | dict.fromkeys(holders(PEER, name))
    ]
    _switch.require(replacements)
    _switch.require(_methods(_switch.own(peer, "create_osft_model_class")(nn.Module)))
    _switch.on(replacements)
    keep_low_bases(low_bases)


def disable() -> None:
    """Puts mini_trainer's own functions and methods back, and drops the low bases. Idempotent.

    Warns:
        RuntimeWarning: someone else has replaced what :func:`enable` put there, and is left there.
    """
    _switch.off()
    drop_low_bases()


def create_osft_model_class(base_cls: type) -> type:
    """mini_trainer's class, with the methods that project all of a model's factors at once."""
    peer = importlib.import_module(PEER)
    cls: type = _switch.own(peer, "create_osft_model_class")(base_cls)
    if _switch:
        _switch.on(_methods(cls))
    return cls


def _methods(cls: type) -> list[Replacement]:
    return [Replacement(cls, name, method) for name, method in _METHODS.items()]
