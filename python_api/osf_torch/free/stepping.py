"""What every optimizer's step does to confined weights: two hooks of torch's, one process wide.

Before a step they refuse what it would move in vain or must not move; after it the weights are
brought up to date.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from osf_torch.free import drifting
from osf_torch.free.drifting import explained
from osf_torch.free.merging import is_written, merge, note_weight
from osf_torch.free.spec import OF_FSDP, Place, require_in_place
from osf_torch.steps import owned_by

if TYPE_CHECKING:
    from osf_torch.confined import Confined

_CONFINED: weakref.WeakSet[Confined] = weakref.WeakSet()
_REGISTERED: list[Any] = []
_ENDS: set[str] = set()  # what has ended free blocks in this process
_AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # of torch's optimizers, like what steps
_ENDED = "_osf_ended"  # of a free block that no weight has any more: what ended it


def watch(confined: Confined) -> None:
    """From here on the steps of its optimizers merge its weights."""
    if not _REGISTERED:
        before, after = (torch.compiler.disable(hook) for hook in (_before_step, _after_step))
        _REGISTERED.append(register_optimizer_step_pre_hook(before))
        _REGISTERED.append(register_optimizer_step_post_hook(after))
    _CONFINED.add(confined)


def unwatch(confined: Confined) -> None:
    _CONFINED.discard(confined)


def end(block: Tensor, what: str) -> None:
    """Marks a free block that no weight has since ``what``: its optimizer's steps are refused."""
    block.__dict__[_ENDED] = what
    _ENDS.add(what)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Refuses to step what no weight has any more, or weights that are frozen.

    Raises:
        RuntimeError: an optimizer of a released free block, or that was made before ``confine``;
            of a model that was made half precision since.
    """
    ended = None
    for group in optimizer.param_groups if _ENDS else ():
        for p in group["params"]:
            ended = p.__dict__.get(_ENDED, ended)
    if ended is not None:
        raise RuntimeError(
            f"osf_torch.confine: expected an optimizer that was made after Confined.{ended}, got "
            "one with free blocks that no weight has any more; make a new one of model.parameters()"
        )
    if not _CONFINED:
        return
    concerned, owned = _concerned(optimizer)
    for confined in concerned:
        for place in confined.places:
            _require_steppable(place, owned)
            _require_state(place, optimizer)
        if any(place.steps(owned) for place in confined.places):
            confined.told.clear()
            for place in confined.places:
                require_in_place(confined.model, place)
                _require_unwritten(place)


def _concerned(optimizer: torch.optim.Optimizer) -> tuple[list[Confined], set[int]]:
    """Whom an optimizer has parameters of, and the identities of all of its parameters.

    It is asked of every optimizer's steps, so that it makes no call for each that is confined. Of a
    module of FSDP2's an optimizer may have other parameters than the module shows now.
    """
    owned = owned_by(optimizer)
    found = []
    for confined in list(_CONFINED):
        for place in confined.held:
            held = map(id, place.module._parameters.values())
            if OF_FSDP in place.module.__dict__ or not owned.isdisjoint(held):
                found.append(confined)
                break
    return found, owned


def _require_unwritten(place: Place) -> None:
    """Refuses to go on from a weight whose protected part something has written to, where the host
    sees that it was written to: see ``merging.is_written``.

    Raises:
        RuntimeError: so it is.
    """
    if place.spec.is_opaque or place.is_sharded or not is_written(place):
        return
    moved, limit = drifting.drift(place, place.spec.reference)
    if moved <= limit:
        note_weight(place)
        return
    raise RuntimeError(
        f"osf_torch.confine: expected {place.name!r} to be as the last step left it, got one whose "
        f"protected part has moved by {moved:.1e} of its norm: {explained(place)}"
    )


def _require_steppable(place: Place, owned: set[int]) -> None:
    """Refuses a step that would move the weight itself, or C by less than it can hold."""
    spec, steps = place.spec, place.steps(owned)
    if not steps and id(place.module._parameters.get(spec.attribute)) not in owned:
        return
    weight = place.weight
    if weight.requires_grad:
        raise RuntimeError(
            f"osf_torch.confine: expected {spec.name!r} to stay frozen, got requires_grad=True: it "
            "was unfrozen, or another parameter stands in its place; freeze it, or "
            "Confined.release() before what replaces it"
        )
    if not steps:
        raise RuntimeError(
            "osf_torch.confine: expected an optimizer of the free blocks, got one that has "
            f"{spec.name!r}, which is frozen, and not its {spec.trainable[0]!r}: it was made "
            "before confine, or leaves free blocks to another optimizer; make it now, of those "
            "parameters alone that require a gradient"
        )
    dtypes = [(t.dtype, spec.dtype) for t in place.trained()]
    if spec.update == "merge" and not spec.is_rounded:
        dtypes.append((weight.dtype, torch.float32))
    for dtype, least in dtypes:
        if torch.finfo(dtype).eps > torch.finfo(least).eps:
            raise RuntimeError(
                f"osf_torch.confine: expected {spec.name!r} and its free block to stay of the "
                f"precision that they were confined with, {least}, got {dtype}, which steps are "
                "below the rounding of; convert the model first, then confine it"
            )


def _require_state(place: Place, optimizer: torch.optim.Optimizer) -> None:
    """Refuses a step with averages that are of another free block's shape: torch's fused steps
    read and write past their ends, and end the process or go on with another weight's.

    Raises:
        RuntimeError: so they are.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return  # others may keep averages of less, as GaLore's do
    for t in place.trained():
        state = optimizer.state.get(t, {})
        for key in _AVERAGES:
            average = state.get(key)
            if isinstance(average, Tensor) and average.shape != t.shape:
                raise RuntimeError(
                    f"osf_torch.confine: expected the optimizer's {key!r} of a free block of "
                    f"{place.name!r} to have its shape {tuple(t.shape)}, got "
                    f"{tuple(average.shape)}: it was saved with other subspaces; confine the model "
                    "by what Confined.state_dict() returned then, confine(model, state), before "
                    "the optimizer loads its own"
                )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Brings up to date what the step has moved: one list of all weights of a model."""
    if not _CONFINED:
        return
    concerned, owned = _concerned(optimizer)
    for confined in concerned:
        places = [place for place in confined.places if place.steps(owned)]
        merge(places, force=True)
        confined.reshard(places)
