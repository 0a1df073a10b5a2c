"""confine: train a model inside its free block, where nothing protected can move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from osf_torch.confined import Confined
from osf_torch.coverage import named_in, require_others, tell
from osf_torch.free.admission import Origin, Settings, admitted, made
from osf_torch.free.spec import Update
from osf_torch.free.state import (
    is_state,
    require_of_weights,
    require_state,
    require_trained,
    sides_of,
)
from osf_torch.selection import Names, listed, unwrapped
from osf_torch.state import is_state as is_guard_state
from osf_torch.subspaces import Subspace


@torch.inference_mode(False)  # no backward pass takes tensors that are made in that mode
def confine(
    model: nn.Module,
    subspaces: Mapping[str, Subspace] | Mapping[str, Any],
    *,
    update: Update | None = None,
    rank: int | None = None,
    decay_to: Origin = "start",
    dtype: torch.dtype | None = None,
    mode: str = "complement",
    generator: torch.Generator | None = None,
    leave_out: Names = None,
) -> Confined:
    """W = W₀ + U_l C V_lᵀ, of which C (p, q) is trained and the weight itself is frozen.

    U_l (m, p) and V_l (n, q) are orthonormal bases of the directions that the subspaces leave free.
    All updates that leave the protected part of W alone are of this form, so that whatever an
    optimizer does to C, with momentum, weight decay or clipping, stays among them. Gradient,
    optimizer state and what ranks reduce of gradients shrink by pq/(mn).

    C is an ordinary parameter of the model, ``<weight>_free``, which ``model.parameters()`` has and
    ``model.state_dict()`` leaves out: that has the names and the values of the plain model's
    weights.

    ``module.weight`` is then the current weight as autograd sees it, and no parameter; nothing is
    written to it but by C, and ``nn.init``, pruning and tying come before ``confine``. A weight
    that something writes to all the same is refused by the next step where the host sees it, and by
    ``Confined.verify``. A state that is loaded is what training goes on from, with C as it began.
    Gradients of gradients through such a layer are refused; ``torch.func.functional_call`` with
    other tensors in the place of C has them, and so have the transforms of ``torch.func``. Other
    threads may read the model while one of them trains it.

    Call it before the optimizer is made and before ``fully_shard`` or DistributedDataParallel (make
    DistributedDataParallel anew after ``release`` and ``next_task``); after ``parallelize_module``,
    or before it where that is called under ``torch.no_grad()``. ``fully_shard`` takes
    trained parameters of one dtype a group: of a model of half precision freeze what else is
    trained, or pass ``dtype=``, or keep the model in float32 and let ``MixedPrecisionPolicy`` round
    what is gathered. It gathers C and what is merged of it along with W, 2pq numbers beside mn, and
    merging gathers C once a step, of all weights by one collective. DeepSpeed's ZeRO-3 takes
    ``update="beside"`` or a ``rank``, before ``deepspeed.initialize``.

    Args:
        model: the model to train.
        subspaces: what is protected, by parameter name: of ``refresh``, ``input_subspaces`` or a
            dict of ``Subspace``. A side that is None is free whole. A weight of more than two
            dimensions is a batch of matrices where U and V fit its last two, and else a matrix with
            all dimensions but the first in one (convolutions). Or what ``Confined.state_dict``
            returned, for a model that has the weights that were saved with it, or those it started
            from; update, rank, decay_to and dtype are then the state's.
        update: "merge", the default: W holds W₀ + U_l C V_lᵀ, brought up to date once after each
            step of an optimizer and wherever a forward pass or ``state_dict`` finds C changed.
            Weights of half precision keep a copy of W₀ and are rounded from the sum, once.
            "beside": W is never written to, and a layer multiplies by the sum, which is formed
            anew each time, so that what is written to ``module.weight`` or to a tensor of
            ``model.state_dict()`` is lost (averages that write there take "merge"); one of half
            precision, or that can't be read, adds ((x V_l) Cᵀ) U_lᵀ to what it returns; any other
            module reads the sum, made once a call and again for its backward pass. For frozen
            weights that other models have too, that are quantized or to be left as they are.
            Quantized experts (E, m, n), transformers' FP8Experts and tensor subclasses, run by the
            forward pass of their module on the sum, dequantized and rounded once to the dtype of
            the inputs or of autocast: E m n numbers for the time of the module's forward pass,
            and again for that of its backward pass, beside the dense gradient; of wider numbers
            one expert at a time. Such a module isn't compiled, and inputs aren't quantized.
        rank: s trains C = B A with B (p, s) and A (s, q), as LoRA does, beside the weight.
        decay_to: what weight decay of C pulls towards: "start", the weight as it is now, for C = 0
            there; or "zero", a weight without its free part, for C = U_lᵀ W V_l now. "zero" is for
            merged weights of float32 and float64. Optimizers whose steps are a share of the
            parameter (Adafactor, LAMB) take small ones from C = 0: give these "zero".
        dtype: of C; None is float32, and float64 for weights of that.
        mode: "complement" alone.
        generator: what A of a ``rank`` is drawn from, alike on every rank; None is seeded with 0.
        leave_out: names, or patterns of names, of what else trains and is to move freely, beside
            what was left out by name in making the subspaces; ``Confined.verify`` refuses others.

    Returns:
        A :class:`Confined`. The model holds it, whether or not the caller does.

    Raises:
        ValueError: an unknown name, one of the subspaces' in leave_out, bases that don't fit the
            weight or aren't orthonormal, a weight with nothing free or nothing protected, one that
            is shared by two modules, that is frozen, parametrized, guarded by ``protect`` or
            confined already, sharded by FSDP or ZeRO-3; mode="core", whose allowed updates are no
            block; nothing is changed.
        TypeError: subspaces isn't a mapping to Subspace; a weight whose values can't be read, with
            update="merge", or of experts whose module doesn't run with plain weights (MXFP4); a
            sparse embedding.

    Computes the bases in float64 and synchronises for each. Draws random numbers for A alone.

    Source: the free block is what ``osf_kernels.project`` leaves; rank-limited it is OPLoRA's
    update (arXiv 2510.13003), in coordinates in which no optimizer can leave it.
    """
    state = _require_arguments(model, subspaces, update, rank, decay_to, dtype, mode)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            "osf_torch.confine: expected generator to be a torch.Generator or None, got "
            f"{type(generator).__name__}; torch.Generator().manual_seed(0) makes one"
        )
    known = getattr(subspaces, "left_out", {})
    names = named_in(model, leave_out, subspaces, "confine")
    if state is not None:
        names += state.get("leave_out", ())
        subspaces = sides_of(state)
        update, rank, decay_to = state["update"], state["rank"], state["decay_to"]
    chosen: Update = update or ("beside" if rank is not None else "merge")
    settings = Settings(chosen, rank, decay_to, dtype)
    places = admitted(model, subspaces, settings)
    require_others(model, leave_out, {id(place.weight) for place in places}, "confine")
    if rank is not None and generator is None:
        generator = torch.Generator("cpu").manual_seed(0)
    tensors = [made(place, settings, generator) for place in places]
    if state is not None:
        for place, held in zip(places, tensors, strict=True):
            require_trained(place, held, state)
        require_of_weights(places, state)
    confined = Confined(unwrapped(model), settings)
    confined.begin(places, tensors)
    if state is not None:
        confined.load_state_dict(state)
    confined.leave_out = frozenset(names)
    found = confined.coverage()
    if not found.untold.keys() <= known.keys():  # which whoever made the subspaces has told
        tell(found, "confine")
    return confined


def _require_arguments(
    model: object,
    subspaces: object,
    update: object,
    rank: object,
    decay_to: object,
    dtype: object,
    mode: object,
) -> Mapping[str, Any] | None:
    """The state, where subspaces is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"osf_torch.confine: expected model to be an nn.Module, got {type(model).__name__}"
        )
    if not isinstance(subspaces, Mapping):
        raise TypeError(
            "osf_torch.confine: expected subspaces to be a mapping from parameter name to "
            f"Subspace, got {type(subspaces).__name__}; refresh makes one"
        )
    if mode == "core":
        raise ValueError(
            'osf_torch.confine: expected mode="complement", got "core", which lets a part of the '
            "protected rows and columns move: its updates g - U U'g V V' are no block U_l C V_l'; "
            'use protect(..., mode="core")'
        )
    if mode != "complement":
        raise ValueError(f'osf_torch.confine: expected mode to be "complement", got {mode!r}')
    if update not in (None, "merge", "beside"):
        raise ValueError(
            f'osf_torch.confine: expected update to be "merge" or "beside", got {update!r}'
        )
    if decay_to not in ("start", "zero"):
        raise ValueError(
            f'osf_torch.confine: expected decay_to to be "start" or "zero", got {decay_to!r}'
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            "osf_torch.confine: expected dtype to be a floating-point torch.dtype or None, got "
            f"{dtype!r}"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"osf_torch.confine: expected rank to be an int of at least 1 or None, got {rank!r}"
        )
    if rank is not None and update == "merge":
        raise ValueError(
            'osf_torch.confine: expected update="beside" with rank, got "merge": the factors of C '
            "are few, and a step of them would have to be merged by all of C; leave update out"
        )
    if decay_to == "zero" and (update == "beside" or rank is not None):
        raise ValueError(
            'osf_torch.confine: expected decay_to="start" where W is left as it is, got "zero", '
            "which takes the free part of W into C"
        )
    if not subspaces:
        raise ValueError(
            "osf_torch.confine: expected subspaces to name at least one parameter, got none"
        )
    if is_guard_state(subspaces):
        raise ValueError(
            "osf_torch.confine: expected subspaces or what Confined.state_dict() returned, got "
            "what Guard.state_dict() returned; protect(model, state, optimizer=...) takes it"
        )
    if not is_state(subspaces):
        return None
    require_state(subspaces)
    dtypes = {side.dtype for side in sides_of(subspaces).values()}
    for name, given, default, there in (
        ("update", update, None, {subspaces["update"]}),
        ("rank", rank, None, {subspaces["rank"]}),
        ("decay_to", decay_to, "start", {subspaces["decay_to"]}),
        ("dtype", dtype, None, dtypes),
    ):
        if given != default and there != {given}:
            raise ValueError(
                f"osf_torch.confine: expected {name} to be left out with a state, or as it is "
                f"there, {listed(sorted(map(repr, there)))}, got {given!r}"
            )
    return subspaces
