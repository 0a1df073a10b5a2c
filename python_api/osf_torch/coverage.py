"""What is trained and not covered: protection holds for the weights that it names alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

from torch import nn

from osf_torch.free.spec import places_of
from osf_torch.kinds import described, is_vectors, owners, shape_of
from osf_torch.selection import listed, named_weights

log = logging.getLogger("osf_torch")
NAMED = 6  # how many the log line names; Subspaces.summary names all


def left_out(model: nn.Module, covered: Collection[int]) -> dict[str, str]:
    """The trained matrices whose id isn't in ``covered``: what they are, by parameter name.

    Every parameter that requires grad and has at least two dimensions and elements, in the model's
    order, a tied one once and by its first name. Frozen ones aren't named.
    """
    trained = _trained(model)
    having = owners(model)
    covered = {*covered, *_confined(model)}
    return {
        name: described(name, parameter, having.get(id(parameter), ()))
        for name, parameter in trained.items()
        if id(parameter) not in covered
    }


def log_left_out(model: nn.Module, covered: Collection[int], operator: str) -> dict[str, str]:
    """``left_out``, told in one line at WARNING by the logger "osf_torch", if there is anything."""
    found = left_out(model, covered)
    if found:
        sizes = {name: _elements(parameter) for name, parameter in _trained(model).items()}
        sizes |= {place.name: place.weight.numel() for place in places_of(model)}
        total = sum(sizes.values())
        covers = total - sum(sizes[name] for name in found)
        named = [f"{name} ({what})" for name, what in found.items()]
        log.warning(
            "osf_torch.%s: %s %% of the elements of the trained matrices are covered; left out "
            "and free to move: %s; take 2-D ones in by filter=, or freeze what is to stay",
            operator,
            f"{1000 * covers // max(1, total) / 10:g}",
            listed(named, NAMED),
        )
    return found


def _confined(model: nn.Module) -> set[int]:
    """The ids of the weights that ``confine`` covers."""
    return {id(place.weight) for place in places_of(model)}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad and aren't vectors, each by its first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named_weights(model).items():
        shape = shape_of(parameter)
        if parameter.requires_grad and (
            shape is None or (not is_vectors(name, shape) and min(shape) > 0)
        ):
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def _elements(parameter: nn.Parameter) -> int:
    shape = shape_of(parameter)
    return 0 if shape is None else math.prod(shape)
