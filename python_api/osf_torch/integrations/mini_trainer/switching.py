"""Putting ours in the place of mini_trainer's own, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from osf_torch.integrations._peer import require_peer
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
_replaced: list[tuple[ModuleType, str, Any]] = []
_classes: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def enable(*, low_bases: bool = True) -> None:
    """Puts the functions of this package in the place of mini_trainer's, wherever it looks them up.

    Call it before ``create_osft_model_class`` or ``setup_model``: the batched
    ``project_gradients`` and ``project_parameters`` are replaced in classes that are made while
    enabled; an earlier class takes only the three functions. Idempotent.

    Args:
        low_bases: keep the complement of a high basis where it is smaller; see the module.

    Raises:
        ImportError: mini_trainer is missing or of an unsupported version; nothing is changed.
    """
    peer = require_peer(PEER, DISTRIBUTION, VERSIONS, "mini_trainer")
    keep_low_bases(low_bases)
    if _replaced:
        return
    replacements = _REPLACEMENTS | {
        "create_osft_model_class": _adopting(peer.create_osft_model_class)
    }
    for name, replacement in replacements.items():
        original = getattr(peer, name)
        for module in list(sys.modules.values()):
            owner = getattr(module, "__name__", "").partition(".")[0]
            if owner == "mini_trainer" and vars(module).get(name) is original:
                _replaced.append((module, name, original))
                setattr(module, name, replacement)


def disable() -> None:
    """Puts mini_trainer's own functions and methods back, and drops the low bases. Idempotent."""
    while _replaced:
        module, name, original = _replaced.pop()
        setattr(module, name, original)
    for cls, originals in list(_classes.items()):
        for name, original in originals.items():
            setattr(cls, name, original)
    _classes.clear()
    drop_low_bases()


def _adopting(original: Callable[[type], type]) -> Callable[[type], type]:
    def create_osft_model_class(base_cls: type) -> type:
        cls = original(base_cls)
        _classes[cls] = {name: vars(cls)[name] for name in _METHODS}
        for name, method in _METHODS.items():
            setattr(cls, name, method)
        return cls

    return create_osft_model_class
