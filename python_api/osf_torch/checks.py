"""What a guard refuses: gradients, weights and subspaces that its protection doesn't hold for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from osf_kernels import Mode, plan
from osf_torch import measures
from osf_torch.protected import Protected
from osf_torch.selection import listed, named_weights
from osf_torch.subspaces import Subspace


def require_dense_gradients(items: Iterable[Protected]) -> None:
    for item in items:
        g = item.weight.grad
        if g is not None and g.layout != torch.strided:
            raise TypeError(
                f"osf_torch.Guard: expected a dense gradient of parameter {item.name!r}, got one "
                f"of layout {g.layout}; make it with nn.Embedding(sparse=False), or leave the "
                "weight unprotected"
            )


def require_as_left(items: Iterable[Protected], mode: Mode) -> None:
    """Refuses weights that were written to since the last step, where what is pinned has gone.

    Counts are compared; only a weight whose count differs is measured, which synchronises and, of
    a sharded weight, takes a sum: whatever writes to a DTensor does so on every rank.
    """
    for item in items:
        if item.is_as_left():
            continue
        drift, limit = measures.drift(item, mode), measures.drift_limit(item)
        if not drift <= limit:
            raise RuntimeError(
                f"osf_torch.Guard: expected the protected part of {item.name!r} to be where the "
                f"last step left it to {limit:.0e}, got a drift of {drift:.1e}; something else "
                "wrote to the weight since, and restoring would undo part of that: after loading "
                "a checkpoint load the guard's state too, or protect the model again; with "
                "restore='deferred' call Guard.restore() before exchanging weights"
            )
        item.mark_left()


def refused(error: Exception, items: Sequence[Protected], mode: Mode) -> Exception:
    """An operator's refusal of a list, with the name of the parameter that is at fault."""
    for item in items:
        for x in (item.weight, item.weight.grad):
            try:
                if x is not None:
                    plan(item.view(x), item.held.U, item.held.V, mode=mode)
            except (TypeError, ValueError) as found:
                return type(found)(
                    f"osf_torch.Guard: parameter {item.name!r}: {found}; after converting the "
                    "model protect it again"
                )
    return error


def require_renewable(items: Collection[Protected], subspaces: Mapping[str, Subspace]) -> None:
    """Refuses what ``refresh`` can't decompose, or would put something else in the place of."""
    batched = [item.name for item in items if item.weight.dim() != 2]
    if batched:
        raise ValueError(
            f"osf_torch.Guard.next_task: expected 2-D weights, got batched ones: {listed(batched)};"
            " refresh takes matrices: give such weights a guard of their own, and protect them "
            "again with bases of yours"
        )
    other = [item.name for item in items if subspaces[item.name].S is None]
    if other:
        raise ValueError(
            "osf_torch.Guard.next_task: expected subspaces with S, triplets of the weights, got "
            f"others for {listed(other)}; triplets of as many directions would take their place. "
            "Extend them by input_subspaces(..., previous=guard.subspaces), or call refresh, and "
            "protect the model with what you choose"
        )


def widened(rank: int, short: int, widen: object) -> int:
    """The rank and ``widen`` more directions, or a share of ``short``; at most ``short``."""
    if isinstance(widen, bool) or not isinstance(widen, Real):
        raise TypeError(
            "osf_torch.Guard.next_task: expected widen to be an int or a float in [0, 1], got "
            f"{widen!r}"
        )
    count = isinstance(widen, Integral)
    if not 0 <= float(widen) <= (math.inf if count else 1):
        raise ValueError(
            "osf_torch.Guard.next_task: expected widen to be an int of at least 0 or a float in "
            f"[0, 1], got {widen!r}; pass ranks for smaller ones"
        )
    more = float(widen) if count else round(float(widen) * short)
    return max(1, int(min(short, rank + more)))


# --- Guard.verify ---


def require_same_model(guarded: nn.Module, model: nn.Module) -> None:
    own = {id(p) for p in guarded.parameters()}
    if not {id(p) for p in model.parameters()} <= own:
        raise RuntimeError(
            "osf_torch.Guard.verify: expected the model that was protected, got another; a "
            "deepcopy has no hooks: protect the model that is trained"
        )


def require_present(model: nn.Module, items: Iterable[Protected], owned: set[int] | None) -> None:
    """Refuses weights that the model or the optimizer (None: there is none) has let go."""
    parameters = named_weights(model)
    for item in items:
        if parameters.get(item.name) is not item.weight:
            raise RuntimeError(
                f"osf_torch.Guard.verify: expected parameter {item.name!r} to be the one that "
                "was protected, got another; protect the model again after replacing it"
            )
        if owned is not None and id(item.weight) not in owned:
            raise RuntimeError(
                f"osf_torch.Guard.verify: expected the optimizer to own parameter "
                f"{item.name!r} still, got one that doesn't; protect again with the new one"
            )


def require_covered(
    model: nn.Module, subspaces: Mapping[str, Subspace], guarded: Collection[int]
) -> None:
    """Refuses a weight of ``subspaces`` that trains without a guard: frozen at ``protect``."""
    parameters: Mapping[str, Tensor] = named_weights(model)
    for name in subspaces:
        weight = parameters.get(name)
        if weight is not None and weight.requires_grad and id(weight) not in guarded:
            raise RuntimeError(
                f"osf_torch.Guard.verify: expected every trained weight of subspaces to be "
                f"guarded, got {name!r}, which was frozen at protect() or which a guard that was "
                "removed has taken over; protect the model again"
            )


def require_projected(count: int, missed: Collection[str]) -> None:
    """Refuses a run without projections, and steps that used gradients nobody projected."""
    if count == 0:
        raise RuntimeError(
            "osf_torch.Guard.verify: expected projected gradients, got none so far; the hooks "
            "never fired: is this the model, and the optimizer, that is trained? (A GradScaler "
            "that skipped every step so far doesn't call it.)"
        )
    if missed:
        raise RuntimeError(
            "osf_torch.Guard.verify: expected every step to use projected gradients, got a step "
            f"with others of {listed(sorted(missed))}: the optimizer makes gradients within its "
            'step, and not by its closure; protect with when="backward"'
        )


def require_guarded_writes(items: Iterable[Protected]) -> None:
    """Where nothing is pinned to compare with: refuses weights written to since the last step."""
    written = [item.name for item in items if not item.is_as_left()]
    if written:
        raise RuntimeError(
            "osf_torch.Guard.verify: expected the guarded optimizer's steps alone to write to "
            f"weights, got something else since the last one in {listed(written)}; is another "
            "optimizer stepping? Then protect again with that one; after loading a checkpoint "
            "load the guard's state too"
        )


def require_in_place(items: Iterable[Protected], mode: Mode, tol: float | None) -> None:
    """Refuses weights whose protected part has moved."""
    for item in items:
        drift = measures.drift(item, mode)
        if not math.isfinite(drift):
            raise RuntimeError(
                f"osf_torch.Guard.verify: expected finite weights, got NaN or Inf in {item.name!r};"
                " one such entry of a gradient spreads over the whole projected one: load an "
                "earlier checkpoint, and leave such steps out (GradScaler does, and "
                "clip_grad_norm_(error_if_nonfinite=True) refuses them)"
            )
        limit = tol if tol is not None else measures.drift_limit(item)
        if not drift <= limit:
            raise RuntimeError(
                f"osf_torch.Guard.verify: expected the protected part of {item.name!r} to be where "
                f"it was to {limit:.0e}, got a drift of {drift:.1e}; something writes to the "
                "weight outside of the optimizer's step"
            )
