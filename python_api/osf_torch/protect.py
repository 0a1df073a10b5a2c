"""protect: keep a model's updates out of its protected subspaces while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from osf_kernels import Mode, plan
from osf_torch import measures
from osf_torch import protected as weights
from osf_torch.coverage import named_in, require_others, tell
from osf_torch.free.spec import places_of
from osf_torch.free.state import is_state as is_confined_state
from osf_torch.guard import Guard
from osf_torch.kinds import is_flat, owners, reparametrized
from osf_torch.protected import Protected
from osf_torch.quantized import stored
from osf_torch.selection import (
    Names,
    named_weights,
    require_matrices,
    require_values,
    unheld_weights,
    unknown,
)
from osf_torch.state import is_state, require_state, subspaces_of
from osf_torch.steps import Restore, owned_by
from osf_torch.subspaces import Subspace

When = Literal["auto", "step", "backward"]


def protect(
    model: nn.Module,
    subspaces: Mapping[str, Subspace] | Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    when: When = "auto",
    restore: Restore = True,
    mode: Mode = "complement",
    record: bool = False,
    leave_out: Names = None,
) -> Guard:
    """Projects the gradients of ``model`` and pins what its optimizer moves all the same.

    Each step g ← P(g) before the optimizer, and with ``restore`` W ← P(W) + protected after it:
    elementwise optimizers and weight decay reach into the protected span even from a
    projected gradient, and momentum from before, where the optimizer has stepped already.
    Gradients that ``optimizer.step(closure)`` makes, LBFGS's too, are projected after each
    evaluation.

    Call it when the parameters are those that will be trained: after ``fully_shard``,
    ``parallelize_module`` or a move to another device, and before DeepSpeed's ``initialize``.
    Sharded weights (DTensor) keep a slice of the basis of a sharded side; a step takes one
    all-reduce on the group of each mesh dimension that shards rows or columns, and a second one to
    restore at once, for what an optimizer moves isn't known before it has: ``restore="deferred"``
    shares the next step's. Bases of V alone under FSDP2 take none, nor do replicated gradients
    (DistributedDataParallel). Of weights whose rows and columns are both sharded (FSDP2 over tensor
    parallelism) the protected part is pinned densely.

    Args:
        model: its 2-D (or batched) parameters named in ``subspaces`` are protected, and the weights
            of convolutions by their (out, in/groups·kh·kw) matrices; frozen ones are left out,
            shared ones protected once. It may be compiled or wrapped. A convolution's weight may be
            sharded by its first dimension; one with its channels last is copied into its matrix
            and back at each step.
        subspaces: by parameter name as in ``model.named_parameters()``, without what wrappers
            add; ``refresh`` makes them. Bases are moved to the weight's device. Or what
            ``Guard.state_dict`` returned, in a run that is resumed: the guard is then the one that
            was saved, with its bases, what it had pinned, its when, restore and mode. Subspaces
            that a resumed run computes of trained weights would protect something else.
        optimizer: the one that steps the model; required for when="step" and for restore. Without
            one the steps of any torch optimizer that owns a protected weight are watched.
        when: "step" projects all gradients in one list call in the optimizer's step pre-hook;
            "backward" projects each gradient when it has been accumulated; "auto" takes "step"
            with an optimizer and "backward" without (and for DeepSpeed's ZeRO-3, where a step sees
            flat pieces), and ``Guard.when`` says which.
        restore: True pins the protected part in the optimizer's step post-hook, of every weight
            that the step has written to, whether it had a gradient or not. "deferred" does so of
            weights whose restoring takes no collective, and pins sharded ones in the next step's
            pre-hook, together with that step's projection (when="step" alone): nothing adds up, but
            in between they carry the drift of one step; ``Guard.restore`` pins it at once, before
            weights are evaluated, averaged or saved. Either way a step refuses (RuntimeError)
            weights whose protected part something else has replaced since the last one, such as a
            checkpoint loaded without ``Guard.load_state_dict``.
        mode: "complement" or "core", for projecting and restoring.
        record: measure the leak at every projection for ``Guard.leak()``; costs two more
            projections in float64 and a synchronisation per matrix.
        leave_out: names, or patterns of names, of what else trains and is to move freely, beside
            what was left out by name in making the subspaces; ``Guard.verify`` refuses others.

    Returns:
        A :class:`Guard`, attached. Hooks of an earlier guard on the same parameters are taken off
        then, and not where something is refused. The model holds the guard, whether or not the
        caller does.

    Raises:
        ValueError: no subspace, an unknown parameter name, one of the subspaces' in leave_out, a
            shape that doesn't fit, an optimizer that is missing or doesn't own a protected
            parameter, S or ``protected`` of another weight, columns that aren't orthonormal, a
            state that isn't of these weights, a convolution sharded by another dimension than the
            first, a parameter that a parametrization or a hook (pruning, the older weight_norm and
            spectral_norm) computes a layer's weight from; nothing is attached.
        TypeError: subspaces isn't a mapping to Subspace, or optimizer no torch optimizer, or one
            whose steps can't be hooked; a weight without values (meta), in FSDP1's flat parameters
            or of another kind of tensor (quantized).

    What is pinned is the weight as it stands, however rough the bases are: with triplets their S
    and, in as few bits as that takes, what UᵀW and W V have beside S Vᵀ and U S; else the dense
    protected part. A step that changes nothing moves the weight by its rounding at most.
    Synchronises for each basis.
    """
    if not isinstance(subspaces, Mapping):
        raise TypeError(
            "osf_torch.protect: expected subspaces to be a mapping from parameter name to "
            f"Subspace, got {type(subspaces).__name__}; refresh makes one"
        )
    if not subspaces:
        raise ValueError(
            "osf_torch.protect: expected subspaces to name at least one parameter, got none"
        )
    if is_confined_state(subspaces):
        raise ValueError(
            "osf_torch.protect: expected subspaces or what Guard.state_dict() returned, got what "
            "Confined.state_dict() returned; confine(model, state) takes it"
        )
    if when not in ("auto", "step", "backward"):
        raise ValueError(
            f'osf_torch.protect: expected when to be "auto", "step" or "backward", got {when!r}'
        )
    if restore != "deferred" and not isinstance(restore, bool):
        raise ValueError(
            f'osf_torch.protect: expected restore to be True, False or "deferred", got {restore!r}'
        )
    _require_optimizer(optimizer, when, restore if not is_state(subspaces) else False)
    optimizer = innermost(optimizer)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "osf_torch.protect: expected optimizer to be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; where several step one model, protect it once for each, "
            "with the subspaces of the weights that it owns"
        )
    if optimizer is not None:
        _require_hooks(optimizer)
    known = getattr(subspaces, "left_out", {})
    names = named_in(model, leave_out, subspaces, "protect")
    state: Mapping[str, Any] | None = None
    if is_state(subspaces):
        state = subspaces
        require_state(state, "protect")
        settings: Any = state
        for name, given, default in (
            ("when", when, "auto"),
            ("restore", restore, True),
            ("mode", mode, "complement"),
        ):
            if given not in (default, settings[name]):
                raise ValueError(
                    f"osf_torch.protect: expected {name} to be left out with a guard's state, or "
                    f"as it is there, {settings[name]!r}, got {given!r}; the state says it"
                )
        when, restore, mode = settings["when"], settings["restore"], settings["mode"]
        subspaces = subspaces_of(state)
        _require_optimizer(optimizer, when, restore)
    items = _items(model, subspaces, mode)
    require_others(model, leave_out, {id(item.weight) for item in items}, "protect")
    zero3 = next((item.name for item in items if weights.zero3_shape(item.weight)), None)
    if zero3 is not None and (restore or when == "step"):
        raise ValueError(
            f"osf_torch.protect: expected whole weights for restoring and for when='step', got "
            f"parameter {zero3!r} partitioned by DeepSpeed's ZeRO-3; pass restore=False and "
            "when='backward', or call confine(..., update='beside') before deepspeed.initialize, "
            "where nothing protected moves whatever the optimizer does"
        )
    if optimizer is not None:
        _require_owner(optimizer, items)
    chosen: Literal["step", "backward"]
    if when == "auto":
        chosen = "backward" if optimizer is None or zero3 is not None else "step"
    else:
        chosen = when
    if restore == "deferred" and chosen != "step":
        raise ValueError(
            'osf_torch.protect: expected when="step" with restore="deferred", which pins weights '
            f'with the projection of a step, got when={when!r}; pass when="step" or restore=True'
        )
    if state is None:
        measures.pin(items, mode, bool(restore))
    guard = Guard(model, items, subspaces, optimizer, chosen, restore, mode, record, names)
    if state is not None:
        guard.load_state_dict(state)
    guard.attach()
    found = guard.coverage()
    if not found.untold.keys() <= known.keys():  # which whoever made the subspaces has told
        tell(found, "protect")
    return guard


def _require_optimizer(
    optimizer: torch.optim.Optimizer | None, when: object, restore: object
) -> None:
    for need, wanted in ((f"restore={restore!r}", restore), ('when="step"', when == "step")):
        if wanted and optimizer is None:
            raise ValueError(
                f"osf_torch.protect: expected optimizer to be given with {need}, got None; "
                'pass optimizer=, or restore=False and when="backward"'
            )


def _require_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that doesn't call hooks, since it never ran Optimizer.__init__."""
    tables = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooked = getattr(type(optimizer).step, "hooked", False)
    if not hooked or any(name not in vars(optimizer) for name in tables):
        raise TypeError(
            "osf_torch.protect: expected an optimizer whose steps call hooks, got "
            f"{type(optimizer).__name__}, which didn't run torch.optim.Optimizer.__init__; pass "
            "the optimizer within it, or have its __init__ call super().__init__"
        )


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, where another one (accelerate's, Lightning's) stands around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _items(model: nn.Module, subspaces: Mapping[str, Subspace], mode: Mode) -> list[Protected]:
    require_matrices(model, "protect")
    parameters, having = named_weights(model), owners(model)
    confined = {id(place.weight) for place in places_of(model)}
    items: dict[int, Protected] = {}
    for name, subspace in subspaces.items():
        _require_subspace(name, subspace)
        weight = parameters.get(name)
        if weight is None:
            raise unknown("protect", name, parameters, unheld_weights(model))
        if id(weight) in confined:
            raise ValueError(
                f"osf_torch.protect: expected parameter {name!r} to be trained itself, got one "
                "that confine() trains inside its free block, where nothing protected moves; "
                "leave it out, or Confined.release() first"
            )
        owned = having.get(id(weight), ())
        source = reparametrized(owned)
        if source is not None:
            raise ValueError(
                f"osf_torch.protect: expected parameter {name!r} to be a plain weight, got {source}"
            )
        packed = stored(weight, owned)
        if packed is not None:
            raise TypeError(
                f"osf_torch.protect: expected parameter {name!r} to be a plain tensor or a "
                f"DTensor, got {packed.kind}, which is quantized; train beside it: "
                'confine(model, subspaces, update="beside")'
            )
        require_values(name, weight, "protect")
        flat = is_flat(weight, owned)
        try:
            W, U, V = weights.shapes_of(weight, subspace, is_flat=flat)
            plan(W, U, V, mode=mode)
            if weight.requires_grad and id(weight) not in items:
                items[id(weight)] = Protected(name, weight, subspace, is_flat=flat)
        except (TypeError, ValueError) as error:
            raise type(error)(f"osf_torch.protect: parameter {name!r}: {error}") from None
    if not items:
        raise ValueError(
            "osf_torch.protect: expected a protected parameter that requires grad, got none; "
            "every named parameter is frozen"
        )
    return list(items.values())


def _require_subspace(name: str, subspace: object) -> None:
    if not isinstance(subspace, Subspace):
        raise TypeError(
            f"osf_torch.protect: expected a Subspace for parameter {name!r}, got "
            f"{type(subspace).__name__}; of triplets that is Subspace(U, V, S), of a guard's state "
            "pass all of Guard.state_dict()"
        )
    if subspace.U is None and subspace.V is None:
        raise ValueError(
            f"osf_torch.protect: expected a basis of parameter {name!r} on one side at least, got "
            "U=None and V=None, which protects nothing; leave the name out"
        )


def _require_owner(optimizer: torch.optim.Optimizer, items: list[Protected]) -> None:
    owned = owned_by(optimizer)
    for item in items:
        if id(item.weight) not in owned:
            raise ValueError(
                f"osf_torch.protect: expected optimizer to own parameter {item.name!r}, got one "
                "that doesn't; build the optimizer from this model's parameters"
            )
