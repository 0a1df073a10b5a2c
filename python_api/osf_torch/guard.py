"""Guard: what keeps a model's updates out of its protected subspaces while it trains."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osf_kernels import Mode
from osf_torch import checks, measures, renewal
from osf_torch import protected as weights
from osf_torch.coverage import left_out, log_left_out
from osf_torch.hooks import Hooks
from osf_torch.lists import Lists
from osf_torch.protected import Protected, Together
from osf_torch.selection import Rank, Ranks
from osf_torch.sharding import step_left_out
from osf_torch.state import read_state, state_of
from osf_torch.subspaces import Subspace, Subspaces
from osf_torch.writes import Left

Restore = bool | Literal["deferred"]

# Guards whose hooks are on, so that protecting a parameter again replaces what was there.
_ATTACHED: weakref.WeakSet[Guard] = weakref.WeakSet()

log = logging.getLogger("osf_torch")


@dataclass(frozen=True)
class Leak:
    """The share ‖g − P(g)‖ / ‖g‖ of a gradient in the protected span, before and after."""

    raw: float
    applied: float


class Guard:
    """Hooks on a model and its optimizer; made by :func:`protect`.

    Attributes:
        when: "step" or "backward": where gradients are projected.
        restores: whether the protected part is pinned after each step (True), of sharded weights at
            the next one ("deferred"), or never (False).
        mode: "complement" or "core".
        projections: how many times gradients were projected so far.
        restorations: how many times weights were pinned so far.
        subspaces: what is protected, as it was given or made by ``next_task``.
    """

    def __init__(
        self,
        model: nn.Module,
        items: list[Protected],
        subspaces: Mapping[str, Subspace],
        optimizer: torch.optim.Optimizer | None,
        when: Literal["step", "backward"],
        restore: Restore,
        mode: Mode,
        record: bool,
    ) -> None:
        self.when = when
        self.restores: Restore = restore
        self.mode: Mode = mode
        self.projections = 0
        self.restorations = 0
        self.subspaces = subspaces
        self._model = model
        self._optimizer = optimizer
        self._items = {id(item.weight): item for item in items}
        self._record = record
        self._leaks: dict[str, Leak] = {}
        self._raw: dict[str, float] = {}  # shares of gradients before they were projected
        self._stepping: list[Protected] = []  # of the step under way: with gradients to project
        self._skipped = False  # the step under way, by GradScaler
        self._missed: set[str] = set()  # whose gradients some step used unprojected
        self._excess: dict[str, Tensor] = {}  # largest leak of a gradient that a step used
        self._written: set[str] = set()  # by something else, where nothing is pinned
        self._released: dict[str, float] = {}
        self._moved: dict[int, Protected] = {}  # by a step, and not pinned since
        self._look_anew()
        self._uncovered: set[str] = set()  # what trained at protect and no guard was on
        self._told = False  # of it, by verify
        self._hooks = Hooks(
            self,
            optimizer,
            self._after_accumulation if when == "backward" else None,
            self._before_step,
            self._after_step,
        )
        # A closure that is compiled with its step calls it.
        self._made = torch.compiler.disable(self._gradients_are_made)

    def __repr__(self) -> str:
        pinned = {
            True: "restored after each step",
            "deferred": "restored at the next step where sharded",
            False: "not restored",
        }[self.restores]
        count = len(self._items)
        return f"Guard({count} parameters, projected at {self.when}, {pinned}, mode={self.mode!r})"

    def _look_anew(self) -> None:
        """Takes the items as they are now, and their weights as they should be."""
        self._together = Together(self._items.values())
        self._left = Left(self._together.items, uncounted=bool(self.restores))
        self._lists = Lists(self.mode)

    def attach(self) -> None:
        """Puts the hooks on, and takes those of earlier guards off the same parameters."""
        self._hooks.attach(self._model, [item.weight for item in self._items.values()])
        for other in list(_ATTACHED):
            other._let_go(set(self._items))
        _ATTACHED.add(self)
        self._uncovered = set(left_out(self._model, _guarded()))

    def _let_go(self, keys: set[int]) -> None:
        """Takes the hooks off some weights; off the optimizer too where none is left."""
        lost = keys & self._items.keys()
        for key in lost:
            del self._items[key]
            self._moved.pop(key, None)
            self._hooks.release(key)
        if lost:
            self._look_anew()
        if not self._items:
            self.remove()

    # --- hooks ---

    @torch.no_grad()
    def _after_accumulation(self, parameter: Tensor) -> None:
        item = self._items.get(id(parameter))
        if item is None:
            return
        if parameter.grad is None:
            self._missed.add(item.name)
        else:
            self._project([item])

    def _before_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Projects the gradients there are, or lets the step's closure project those it makes."""
        if not self._owned(optimizer):
            return None
        checks.require_bases(self._together)
        changed = self._left.changed()
        if self.restores:
            checks.require_as_left(changed, self.mode)
        else:
            self._written |= checks.moved_by_others(changed, self.mode)
        self._stepping, self._skipped = [], False
        keywords = dict(kwargs or {})
        closure = args[1] if len(args) > 1 else keywords.get("closure")
        if not callable(closure):
            self._gradients_are_made(optimizer)
            return None
        evaluate: Callable[..., Any] = closure

        def projected(*inputs: Any, **options: Any) -> Any:
            loss = evaluate(*inputs, **options)
            self._made(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], projected, *args[2:]), keywords
        return args, keywords | {"closure": projected}

    @torch.no_grad()
    def _gradients_are_made(self, optimizer: torch.optim.Optimizer) -> None:
        """In a step, before the optimizer uses them; LBFGS evaluates its closure many times."""
        ready = self._ready(optimizer)
        # A fused optimizer under GradScaler is called for a step that it then leaves out.
        self._skipped = step_left_out(optimizer, (item.sharding for item in ready))
        self._stepping = [] if self._skipped else ready
        if self._skipped:
            return
        if self.when == "step":
            self._project(ready, pin=True)
        else:
            self._hooks.mend([item.weight for item in self._together.items])
            self._project(weights.unmet(ready))

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Judges the gradients that the step has used, and pins what it has moved."""
        owned = self._owned(optimizer)
        if not owned:
            return
        if not self._skipped:
            used = self._ready(optimizer)
            self._judge(used)
            if self.restores:
                for item in self._written_to(owned, [*self._stepping, *used]):
                    self._moved[id(item.weight)] = item
                self._pin(at_once=self.restores is True)
        self._left.take()

    def _written_to(
        self, owned: Sequence[Protected], trained: Sequence[Protected]
    ) -> list[Protected]:
        """Those that the step has written to: all that had gradients, and others where something
        tells, or where only a synchronisation would."""
        known = {id(item) for item in trained}
        others = [item for item in owned if id(item) not in known]
        if others:
            read = {id(item) for item in weights.readable(others)}
            known |= {id(item) for item in others} - read
            known |= {id(item) for item in self._left.changed(others)}
        return [item for item in owned if id(item) in known]

    def _owned(self, optimizer: torch.optim.Optimizer) -> list[Protected]:
        """The items that the optimizer steps: all, or those of an optimizer that wasn't named."""
        if self._optimizer is not None:
            return self._together.items
        owned = owned_by(optimizer)
        return [item for item in self._together.items if id(item.weight) in owned]

    def _ready(self, optimizer: torch.optim.Optimizer | None = None) -> list[Protected]:
        items = self._together.items if optimizer is None else self._owned(optimizer)
        return [item for item in items if item.weight.grad is not None]

    # --- projecting, judging, pinning ---

    def _project(self, items: list[Protected], pin: bool = False) -> None:
        """Projects the gradients that aren't yet, and pins what earlier steps have moved."""
        items = weights.unprojected(items)
        moved = list(self._moved.values()) if pin else []
        checks.require_dense_gradients(items)
        before = self._run(items, moved)
        weights.mark_projected(items)
        if not self.restores:
            after = measures.imprints(items)
            for item, raw, kept in zip(items, before, after, strict=True):
                item.raw, item.kept = raw, kept
        if moved:
            self._moved = {}
            self.restorations += 1
            self._left.take()
        self._note_leaks(items)
        self.projections += bool(items)

    def _run(self, items: Sequence[Protected], moved: Sequence[Protected]) -> list[Tensor]:
        """g ← P(g) for the gradients of some, W ← P(W) + what is pinned for the weights of others.

        Returns:
            The imprints of the gradients as they were, where nothing is pinned.
        """
        try:
            self._together.follow()
            if self._record:
                self._raw |= {item.name: self._share(item) for item in items}
            before = [] if self.restores else measures.imprints(items)
            self._lists.run_(
                [item.key for item in items] + [item.pinned_key for item in moved],
                weights.gradients_of(items) + weights.weights_of(moved),
                lambda: [
                    item.entry(self.mode, pinned=pinned)
                    for some, pinned in ((items, False), (moved, True))
                    for item in some
                ],
            )
        except (TypeError, ValueError) as error:
            raise checks.refused(error, [*items, *moved], self.mode) from None
        return before

    def _judge(self, used: Sequence[Protected]) -> None:
        """Notes the gradients that a step has used otherwise than they were projected.

        What the weights' protected part has taken from them is pinned where the guard restores;
        elsewhere their values tell, whoever wrote to them.
        """
        self._missed |= {item.name for item in weights.unmet(used)}
        if not self.restores:
            for item in measures.rewritten(used):
                excess = measures.leaking(item, self.mode)
                if excess is not None:
                    known = self._excess.get(item.name, excess)
                    self._excess[item.name] = torch.fmax(known, excess)
        self._note_leaks(used)

    def _note_leaks(self, items: Sequence[Protected]) -> None:
        if self._record:
            for item in items:
                applied = self._share(item)
                self._leaks[item.name] = Leak(self._raw.setdefault(item.name, applied), applied)

    def _share(self, item: Protected) -> float:
        assert item.weight.grad is not None
        return measures.share(item, item.view(item.weight.grad), self.mode)

    def _pin(self, at_once: bool = True) -> None:
        """W ← P(W) + protected of what has moved: now, or now where it takes no collective."""
        waiting = {} if at_once else {k: i for k, i in self._moved.items() if i.group is not None}
        now = [item for key, item in self._moved.items() if key not in waiting]
        self._run([], now)
        self._moved = waiting
        self.restorations += bool(now)

    # --- what a training loop calls ---

    @torch.no_grad()
    def project_grads(self) -> None:
        """g ← P(g) now, for every protected gradient there is; the step doesn't do it again
        unless a gradient was written since, or is a DTensor, where that can't be told.
        """
        self._require_moved_as_left()
        self._project(self._ready(), pin=True)

    @torch.no_grad()
    def restore(self) -> None:
        """W ← P(W) + protected now, for all weights that are otherwise than they were pinned.

        Whoever wrote to them: a step under ``restore="deferred"``, an optimizer outside of its step
        (schedule-free ones exchange weights for evaluation), an average that was copied in. Call it
        before such weights are evaluated or saved. Of sharded weights a collective: every rank
        calls it. Synchronises.

        Raises:
            RuntimeError: restore=False pinned nothing that could be restored; weights were replaced
                by others (a loaded checkpoint), of which restoring would undo the protected part.
        """
        if not self.restores:
            raise RuntimeError(
                "osf_torch.Guard.restore: expected protect(..., restore=True or 'deferred'), got "
                "restore=False"
            )
        changed = self._left.settled()
        checks.require_own(changed, self.mode)
        self._moved |= {id(item.weight): item for item in changed}
        self._pin()
        self._left.take()

    def _require_moved_as_left(self) -> None:
        """Refuses where weights that are still to be pinned were written to by something else."""
        checks.require_as_left(self._left.changed(list(self._moved.values())), self.mode)

    def _settle(self) -> None:
        """Pins what ``restore="deferred"`` has still to pin."""
        if self._moved:
            self._require_moved_as_left()
            self._pin()
            self._left.take()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips all gradients of the model by the norm of what is kept of them.

        ``torch.nn.utils.clip_grad_norm_`` before the projection counts what is then removed, and
        clips more than it says; this projects first. Under GradScaler call ``unscale_`` before.

        Returns:
            The norm before clipping, after projecting.
        """
        self.project_grads()
        stale = {id(item) for item in weights.unprojected(self._together.items)}
        known = [item for item in self._together.items if id(item) not in stale]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), max_norm, norm_type)
        weights.mark_projected(known)  # scaling commutes with P
        return norm

    def next_task(
        self, ranks: Ranks | None = None, *, widen: Rank | None = None, **options: Any
    ) -> Subspaces:
        """At the end of a task: decomposes the weights as they are now and protects that.

        The new bases hold the leading directions of W as it now is, which is the method's own step
        (arXiv 2504.07097) and no superset of the old ones: where what was learned since outgrows
        a direction that was protected, that direction may fall out, and the next task may move
        it. ``widen`` leaves room for both; ``released`` says what fell out all the same.

        Where the protected part was restored in mode "complement", the triplets of the last
        refresh are triplets still, and those of the low block alone are computed (method
        "deflated"), provided that both were kept (``keep="all", complement=True``).

        With restore=False an optimizer's momentum carries the last task's step on into directions
        that are protected only now: clear its state, or restore.

        Args:
            ranks: of the new bases, as in ``refresh``: another allocation, by hand or by
                ``allocate_ranks``. None keeps the ranks, or widens them:
            widen: how much every rank grows by, in directions (int, at least 0) or as a share of
                min(m, n) (float in [0, 1]); as far as min(m, n).
            options: of ``refresh``, such as tol, seed, keep or progress.

        Returns:
            The new subspaces, also in ``Guard.subspaces``; hooks stay where they are.

        Raises:
            ValueError: both ranks and widen, or as ``refresh``; a batched weight; subspaces that
                aren't triplets, such as those of ``input_subspaces``. The protection is as it was.
            TypeError: widen is neither int nor float.
        """
        protects = self.restores is not False and self.mode == "complement"
        items = list(self._items.values())
        chosen = renewal.ranks_of(items, self.subspaces, ranks, widen)
        self._settle()
        found, renewed = renewal.renewed(
            self._model, items, self.subspaces, chosen, deflate=protects, options=options
        )
        measures.pin(renewed, self.mode, bool(self.restores))
        pairs = zip(items, renewed, strict=True)
        self._released = {old.name: measures.released(old, new, self.mode) for old, new in pairs}
        self._items = {id(item.weight): item for item in renewed}
        self.subspaces = found
        self._begin()
        return found

    def _begin(self) -> None:
        """Forgets what was noted until now: the weights are as they should be."""
        self._leaks, self._raw, self._missed, self._excess = {}, {}, set(), {}
        self._written = set()
        self._look_anew()

    # --- what a user asks ---

    def leak(self) -> dict[str, Leak]:
        """Per parameter, the protected share of its last gradient before and after projecting.

        Computed in float64 when the gradient was projected, with ``record=True``. Gradients that
        are DTensors are projected by the step also where ``clip_grad_norm_`` has, and then read 0.

        Raises:
            RuntimeError: recording is off or no gradient was projected yet.
        """
        if not self._record:
            raise RuntimeError(
                "osf_torch.Guard.leak: expected protect(..., record=True), got record=False"
            )
        if not self._leaks:
            raise RuntimeError(
                "osf_torch.Guard.leak: expected a projected gradient, got none so far; run a "
                "backward pass and, with when='step', an optimizer step first"
            )
        return dict(self._leaks)

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Per parameter ‖H(W) − H_ref‖ / ‖H_ref‖, how far the protected part H(W) = W − P(W)
        has moved since it was protected; computed in float64, one matrix at a time.

        H_ref is that of the weight at ``protect``, never of its decomposition. With restore=False
        the figure is an estimate to a quarter, from a few random columns that were kept of it.

        Raises:
            RuntimeError: a weight was partitioned by DeepSpeed's ZeRO-3.
        """
        return {item.name: measures.drift(item, self.mode) for item in self._items.values()}

    def released(self) -> dict[str, float]:
        """Per parameter ‖P(H)‖ / ‖H‖ at the last ``next_task``: of the part H that was protected
        until then, the share that may move since, for the new bases don't hold it.

        0 to rounding where they hold all of it; 1 where none. Computed in float64 by ``next_task``.

        Raises:
            RuntimeError: there was no next_task yet.
        """
        if not self._released:
            raise RuntimeError(
                "osf_torch.Guard.released: expected next_task() to have been called, got none so "
                "far; the bases are those given to protect()"
            )
        return dict(self._released)

    @torch.no_grad()
    def verify(self, model: nn.Module | None = None, *, tol: float | None = None) -> None:
        """Raises RuntimeError when the protection isn't working.

        That is: another model is trained than the one protected (a deepcopy has no hooks), a
        parameter was replaced since (``load_state_dict(assign=True)``) or frozen at ``protect``
        and trains now without a guard, the optimizer has let it go, hooks were taken off or never
        fired, a step used gradients that weren't projected or were written to afterwards, something
        else than the guarded optimizer wrote to weights where that isn't undone, matrices train
        that were frozen at ``protect`` and that nothing covers, or weights moved in the protected
        span or aren't finite. Matrices that trained at ``protect`` uncovered are named in a log
        line.

        With restore=False an optimizer may move the protected part by itself (elementwise steps,
        momentum from before, weight decay). What has moved is then logged, and raises with ``tol``.

        Args:
            model: the one that is trained, to be compared with the one that was protected.
            tol: on ``drift()``; None is what rounding and bases of this dtype explain.
        """
        items = list(self._items.values())
        if model is not None and model is not self._model:
            checks.require_same_model(self._model, model)
        owned = None if self._optimizer is None else owned_by(self._optimizer)
        checks.require_present(self._model, items, owned)
        checks.require_bases(self._together)
        checks.require_hooks(items, self._hooks)
        checks.require_covered(self._model, self.subspaces, _guarded())
        checks.require_no_more(left_out(self._model, _guarded()), self._uncovered)
        if not self._told:
            log_left_out(self._model, _guarded(), "Guard.verify")
            self._told = True
        if self.when == "backward":
            ready = self._ready()
            stale = {id(item) for item in weights.unmet(ready)}
            self._judge([item for item in ready if id(item) not in stale])
        fired = self.projections + self.restorations
        leaking = {name for name, excess in self._excess.items() if float(excess) > 0}
        checks.require_projected(fired, self._missed, leaking)
        self._settle()
        if self.restores:
            checks.require_in_place(items, self.mode, tol)
            checks.require_guarded_writes(self._left.noticed(), restored=True)
            return
        written = checks.moved_by_others(self._left.settled(), self.mode) | self._written
        if self._optimizer is not None:
            checks.require_guarded_writes([i for i in items if i.name in written], restored=False)
        measurable = [item for item in items if checks.is_measurable(item)]
        if tol is not None:
            checks.require_in_place(measurable, self.mode, tol)
        else:
            checks.log_drift(measurable, self.mode)

    def state_dict(self) -> dict[str, Any]:
        """What resuming to the bit takes: bases, what is pinned, the settings, the count, and
        ``subspaces``, which ``next_task`` starts from. ``protect(model, state, optimizer=...)``
        makes a guard of it.

        Under "weights" the tensors that are used, of sharded weights as DTensors, so that
        ``torch.distributed.checkpoint`` saves and reshards them; under "subspaces" whole ones,
        which of unsharded weights are the same tensors. Nothing but tensors, numbers and strings.
        """
        return state_of(
            list(self._items.values()),
            list(self._moved.values()),
            self.subspaces,
            self.when,
            self.restores,
            self.mode,
            self.projections,
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state_dict` was called; the model and optimizer load their own,
        the model before this.

        Raises:
            ValueError: of another set of parameters, other shapes, another mode, when or restore,
                sharded over another number of ranks, or of other weights than the model has now;
                nothing is changed.
        """
        items = list(self._items.values())
        held, subspaces = read_state(state, items, self.when, self.restores, self.mode)
        before = [dict(vars(item)) for item in items]
        moved = state.get("moved", ())
        try:
            for item in items:
                item.take(held[item.name])
            checks.require_state_of_weights(items, moved, self.mode)
        except Exception:
            for item, earlier in zip(items, before, strict=True):
                vars(item).update(earlier)
            raise
        self.subspaces = subspaces
        self._moved = {key: item for key, item in self._items.items() if item.name in moved}
        self.projections = int(state["projections"])
        self._released = {}
        self._begin()

    def remove(self) -> None:
        """Takes every hook off; the model and the optimizer are as before. Idempotent.

        What ``restore="deferred"`` has still to pin is pinned, as by :meth:`restore`.
        """
        self._hooks.remove()
        _ATTACHED.discard(self)
        with torch.no_grad():
            self._settle()


def _guarded() -> set[int]:
    """The ids of the weights that some guard's hooks are on."""
    return {key for guard in _ATTACHED for key in guard._items}


def owned_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
