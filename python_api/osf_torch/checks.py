"""What a guard refuses: gradients, weights and subspaces that its protection doesn't hold for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from osf_kernels import Mode, Refusal
from osf_torch import measures
from osf_torch.hooks import Hooks
from osf_torch.protected import Protected, Together, contents, repeats, zero3_shape
from osf_torch.selection import listed, named_weights
from osf_torch.sharding import any_rank, groups_of, local
from osf_torch.subspaces import Subspace

log = logging.getLogger("osf_torch")


def require_dense_gradients(items: Iterable[Protected]) -> None:
    for item in items:
        g = item.weight.grad
        if g is not None and g.layout != torch.strided:
            raise TypeError(
                f"osf_torch.Guard: expected a dense gradient of parameter {item.name!r}, got one "
                f"of layout {g.layout}; make it with nn.Embedding(sparse=False), or leave the "
                "weight unprotected"
            )
        if g is not None and item.is_flat and repeats(local(g)):
            raise ValueError(
                f"osf_torch.Guard: expected a gradient of parameter {item.name!r} with an element "
                "in memory for each of its own, got one that repeats some (an expanded tensor); "
                "give it grad.contiguous()"
            )


def require_as_left(changed: Iterable[Protected], mode: Mode) -> None:
    """Refuses weights that something else has written to where what is pinned has moved.

    Only those that are known to be otherwise are measured, which synchronises and, of a sharded
    weight, takes a sum: what torch counts of a DTensor's writes it counts on every rank alike.
    """
    for item in changed:
        _require_drift(item, mode, measures.drift_limit(item, mode))


def stepped_by_another(
    other: torch.optim.Optimizer, guarded: torch.optim.Optimizer, items: Sequence[Protected]
) -> RuntimeError:
    """What refuses a step of another optimizer than the one that weights were protected with."""
    return RuntimeError(
        "osf_torch.Guard: expected the optimizer that the weights were protected with, "
        f"{type(guarded).__name__}, to step them, got another one, {type(other).__name__}, with "
        f"{listed([item.name for item in items])}: nothing projects its gradients or restores the "
        "weights after it; guard the model for it, guard = protect(model, guard.state_dict(), "
        "optimizer=it), or guard.remove() to end the protection"
    )


def moved_by_others(changed: Iterable[Protected], mode: Mode) -> set[str]:
    """The names of those that something else wrote to and whose protected part isn't where it was,
    where nothing is pinned; weights that were put back are no error."""
    found = set()
    for item in changed:
        still = is_measurable(item) and (
            measures.drift(item, mode) <= measures.drift_limit(item, mode)  # NaN is at no place
        )
        if not still:
            found.add(item.name)
    return found


def is_measurable(item: Protected) -> bool:
    """Whether this rank holds the weight, and something to compare it with."""
    return item.held.sketch is not None and not zero3_shape(item.weight)


def require_bases(items: Together) -> None:
    """Refuses bases and pinned parts that something has written to: they are the tensors that were
    given, and those of ``Guard.state_dict``."""
    written = items.written()
    if written:
        names = [item.name for item in written]
        raise RuntimeError(
            "osf_torch.Guard: expected the tensors that say what is protected to be as they were "
            f"given, got ones that something has written to, of {listed(names)}; after "
            "torch.distributed.checkpoint has loaded into Guard.state_dict() give that to "
            "Guard.load_state_dict, or protect the model again"
        )


def require_contents(items: Sequence[Protected], operator: str) -> None:
    """Refuses bases and pinned parts whose values aren't those that were taken, whoever wrote them:
    torch counts no writes through ``.data``, numpy or another storage."""
    others = [item.name for item in items if not _is_as_taken(item)]
    if others:
        raise RuntimeError(
            f"osf_torch.{operator}: expected the tensors that say what is protected to be as they "
            f"were given, got others of {listed(others)}: something has written to them in a way "
            "that torch doesn't count (.data, numpy), and steps since have protected what they say "
            "now; protect the model again"
        )


def _is_as_taken(item: Protected) -> bool:
    then, now = item.contents.view(-1, 2), contents(item.held.tensors()).view(-1, 2)
    # Sums in another order, as other numbers of threads take them, are off by rounding.
    near = (then - now).abs() <= 1e-9 * then[:, :1]
    return bool((near | (then == now) | (then.isnan() & now.isnan())).all())


def require_own(changed: Iterable[Protected], mode: Mode) -> None:
    """Refuses weights that were replaced: restoring would mix two of them."""
    for item in changed:
        _require_drift(item, mode, measures.FOREIGN_LIMIT)


def _require_drift(item: Protected, mode: Mode, limit: float) -> None:
    drift = measures.drift(item, mode)
    if not drift <= limit:
        raise RuntimeError(
            f"osf_torch.Guard: expected the protected part of {item.name!r} to be where the "
            f"last step left it to {limit:.0e}, got a drift of {drift:.1e}; something else "
            "wrote to the weight since, and restoring would undo part of that: after loading "
            "a checkpoint load the guard's state too, or protect the model again; after an "
            "optimizer has exchanged weights outside of its step call Guard.restore(); with "
            "restore='deferred' call it before exchanging weights"
        )


def require_state_of_weights(
    items: Iterable[Protected], moved: Collection[str], mode: Mode
) -> None:
    """Refuses a guard's state where the weights aren't those that it was saved with."""
    for item in items:
        if zero3_shape(item.weight):
            continue
        pinned = item.held.sketch is None and item.name not in moved
        limit = measures.drift_limit(item, mode) if pinned else measures.FOREIGN_LIMIT
        drift = measures.drift(item, mode)
        if not drift <= limit:
            raise ValueError(
                f"osf_torch.Guard.load_state_dict: expected a state of the weights that the model "
                f"has, got one from which the protected part of {item.name!r} is off by "
                f"{drift:.1e}; load the model's own checkpoint before this, and the state that was "
                "saved with it"
            )


def refused(error: Exception, items: Sequence[Protected]) -> Exception:
    """An operator's refusal of a list, with the name of the parameter that is at fault."""
    if not isinstance(error, Refusal) or not isinstance(error.index, int):
        return error
    text = f"osf_torch.Guard: parameter {items[error.index].name!r}: {error}"
    if error.remedy.startswith("prepare"):
        text += "; after converting the model protect it again"
    return type(error)(text)


# --- Guard.verify and Guard.next_task ---


def agreed(items: Sequence[Protected], operator: str, check: Callable[[], None]) -> None:
    """Runs a check that one rank alone may fail, and refuses on all ranks of sharded weights where
    it does: those that went on would wait in the next collective."""
    refusal: Exception | None = None
    try:
        check()
    except Exception as error:
        refusal = error
    groups = groups_of(item.sharding for item in items)
    device = next((item.contents.device for item in items), torch.device("cpu"))
    flag = torch.tensor(float(refusal is not None), device=device)
    told = any_rank(groups, flag)
    if refusal is not None:
        raise refusal
    if told:
        raise RuntimeError(
            f"osf_torch.{operator}: expected every rank to find the protection in place, got a "
            "refusal on another rank, whose own message says why"
        )


def require_same_model(guarded: nn.Module, model: nn.Module) -> None:
    own = {id(p) for p in guarded.parameters()}
    if not {id(p) for p in model.parameters()} <= own:
        raise RuntimeError(
            "osf_torch.Guard.verify: expected the model that was protected, got another; a "
            "deepcopy has no hooks: protect the model that is trained"
        )


def require_present(
    model: nn.Module, items: Iterable[Protected], owned: set[int] | None, operator: str
) -> None:
    """Refuses weights that the model or the optimizer (None: there is none) has let go."""
    parameters = named_weights(model)
    for item in items:
        if parameters.get(item.name) is not item.weight:
            raise RuntimeError(
                f"osf_torch.{operator}: expected parameter {item.name!r} to be the one that "
                "was protected, got another; protect the model again after replacing it"
            )
        if owned is not None and id(item.weight) not in owned:
            raise RuntimeError(
                f"osf_torch.{operator}: expected the optimizer to own parameter "
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


def require_hooks(items: Iterable[Protected], hooks: Hooks, operator: str) -> None:
    """Refuses a guard whose hooks are off, or not on the tensors that train."""
    if not hooks.are_on:
        raise RuntimeError(
            f"osf_torch.{operator}: expected hooks on the model, got none; remove() or a "
            "later protect() has taken them off, or the optimizer was made anew"
        )
    lost = hooks.lost(item.weight for item in items)
    names = [item.name for item in items if id(item.weight) in lost]
    if names:
        raise RuntimeError(
            f"osf_torch.{operator}: expected hooks on {listed(names)}, got tensors without: "
            "torch has exchanged their bodies (Module.to, load_state_dict under "
            "swap_module_params_on_conversion) or something took the hooks off; protect the model "
            "again after that"
        )


def require_projected(fired: int, missed: Collection[str], leaking: Collection[str]) -> None:
    """Refuses a run in which nothing was projected or restored, and steps that used gradients which
    reach into the protected span."""
    if fired == 0:
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
    if leaking:
        raise RuntimeError(
            "osf_torch.Guard.verify: expected every step to use projected gradients, got a step "
            f"with gradients of {listed(sorted(leaking))} that were written to after they were "
            "projected; write to them before (a step hook: register it before protect), or "
            "protect with restore=True"
        )


def require_guarded_writes(items: Iterable[Protected], operator: str, *, restored: bool) -> None:
    """Refuses weights that something else than the guarded optimizer's steps has written to."""
    names = [item.name for item in items]
    if names and restored:
        raise RuntimeError(
            f"osf_torch.{operator}: expected the guarded optimizer's steps alone to write to "
            f"weights, got something else that wrote to {listed(names)} between two steps, after "
            "which their protected part was restored to what it had been; after loading a "
            "checkpoint protect the model again, or load the guard's state too"
        )
    if names:
        raise RuntimeError(
            f"osf_torch.{operator}: expected the guarded optimizer's steps alone to write to "
            f"weights, got something else since the last one in {listed(names)}; is another "
            "optimizer stepping? Then protect again with that one; after loading a checkpoint "
            "load the guard's state too"
        )


class Drift(NamedTuple):
    """How far a weight's protected part has moved, and what rounding explains of it."""

    item: Protected
    drift: float
    limit: float


def drifts(items: Sequence[Protected], mode: Mode) -> list[Drift]:
    """Of every weight; sharded ones take sums over their ranks."""
    return [
        Drift(item, measures.drift(item, mode), measures.drift_limit(item, mode)) for item in items
    ]


def require_in_place(found: Sequence[Drift], tol: float | None, operator: str) -> None:
    """Refuses weights whose protected part has moved; logs those that can't hold it any more."""
    for item, drift, limit in found:
        _require_finite(item, drift, operator)
        limit = limit if tol is None else tol
        if not drift <= limit:
            raise RuntimeError(
                f"osf_torch.{operator}: expected the protected part of {item.name!r} to be where "
                f"it was to {limit:.2e}, got a drift of {drift:.2e}; something writes to the "
                "weight outside of the optimizer's step: call Guard.restore() after it, or protect "
                "again where it replaced the weight"
            )
    lost = {item.name: drift for item, drift, _ in found if drift > measures.TOLD_DRIFT}
    if tol is None and lost:
        worst = max(lost, key=lost.__getitem__)
        log.warning(
            "osf_torch.%s: the protected part of %d of %d weights is off by more than "
            "%.0e, most in %r by %.1e of itself, which rounding of the weight explains: the weight "
            "has grown until its dtype holds no more of a part that is so much smaller; train in "
            "float32, or pass tol= to refuse it",
            *(operator, len(lost), len(found), measures.TOLD_DRIFT, worst, lost[worst]),
        )


def log_drift(found: Sequence[Drift], operator: str) -> None:
    """Logs weights whose protected part has moved where that isn't undone; refuses NaN and Inf."""
    for item, drift, _ in found:
        _require_finite(item, drift, operator)
    moved = {item.name: drift for item, drift, limit in found if drift > limit}
    if moved:
        worst = max(moved, key=moved.__getitem__)
        log.warning(
            "osf_torch.%s: the protected part of %d of %d weights has moved since "
            "protect(), most in %r by %.1e of itself; restore=False leaves what an optimizer "
            "itself does to it (elementwise steps, momentum, weight decay): protect with "
            "restore=True, or pass tol= to refuse it",
            *(operator, len(moved), len(found), worst, moved[worst]),
        )


def _require_finite(item: Protected, drift: float, operator: str) -> None:
    if not math.isfinite(drift):
        raise RuntimeError(
            f"osf_torch.{operator}: expected finite weights, got NaN or Inf in {item.name!r};"
            " one such entry of a gradient spreads over the whole projected one: load an "
            "earlier checkpoint, and leave such steps out (GradScaler does, and "
            "clip_grad_norm_(error_if_nonfinite=True) refuses them)"
        )
