"""Guard: what keeps a model's updates out of its protected subspaces while it trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from osf_kernels import Mode
from osf_torch import checks, measures, renewal
from osf_torch import protected as weights
from osf_torch.coverage import ATTACHED, Coverage, coverage, guarded, log, named_by, require_told
from osf_torch.grown import Grown, covering
from osf_torch.hooks import Hooks
from osf_torch.optimizer_state import OptimizerState, renew_state, require_renewable
from osf_torch.protected import Protected
from osf_torch.selection import Rank, Ranks, listed
from osf_torch.state import read_state, state_of
from osf_torch.steps import Leak, Restore, Steps, owned_by, with_gradients
from osf_torch.subspaces import Subspace, Subspaces


class Guard:
    """Hooks on a model and its optimizer; made by :func:`protect`.

    Attributes:
        when: "step" or "backward": where gradients are projected.
        restores: whether the protected part is pinned after each step (True), of sharded weights at
            the next one ("deferred"), or never (False).
        mode: "complement" or "core".
        subspaces: what is protected, as it was given or made by ``next_task``.

    Once a later ``protect`` has taken all its weights over, what reads or writes weights through it
    raises RuntimeError, since it would be done to none.
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
        leave_out: Collection[str] = (),
    ) -> None:
        self.when = when
        self.restores: Restore = restore
        self.mode: Mode = mode
        self.subspaces = subspaces
        self._model = model
        self._optimizer = optimizer
        self._record = record
        self._released: dict[str, float] = {}
        self._leave_out = frozenset(leave_out)  # what else may train, by name
        self._steps = Steps(items, optimizer, when, restore, mode, record)
        accumulated = self._steps.accumulated if when == "backward" else None
        self._hooks = Hooks(
            self,
            optimizer,
            accumulated,
            self._steps.before,
            self._steps.after,
            self._steps.foreign,
        )
        self._steps.hooks = self._hooks

    @property
    def projections(self) -> int:
        """How many times gradients were projected so far."""
        return self._steps.projections

    @property
    def restorations(self) -> int:
        """How many times weights were pinned so far."""
        return self._steps.restorations

    @property
    def _items(self) -> dict[int, Protected]:
        return self._steps.items

    def __repr__(self) -> str:
        pinned = {
            True: "restored after each step",
            "deferred": "restored at the next step where sharded",
            False: "not restored",
        }[self.restores]
        count = len(self._items)
        return f"Guard({count} parameters, projected at {self.when}, {pinned}, mode={self.mode!r})"

    def attach(self) -> None:
        """Puts the hooks on, and takes those of earlier guards off the same parameters."""
        self._hooks.attach(self._model, [item.weight for item in self._items.values()])
        for other in list(ATTACHED):
            other._let_go(set(self._items))
        ATTACHED.add(self)

    def _require_held(self, operator: str) -> None:
        """Refuses what would be done to, or said of, no weight at all, and in silence."""
        if not self._items:
            raise RuntimeError(
                f"osf_torch.Guard.{operator}: expected a guard of at least one weight, got one "
                f"whose weights a later protect() has all taken over; call {operator}() of the "
                "guard that protect() returned last"
            )

    def _let_go(self, keys: set[int]) -> None:
        """Takes the hooks off some weights; off the optimizer too where none is left."""
        lost = keys & self._items.keys()
        self._tell_moved([self._items[key] for key in lost], "protect")
        for key in lost:
            self._hooks.release(key)
        if lost:
            self._steps.let_go(lost)
        if not self._items:
            self.remove()

    # --- what a training loop calls ---

    @torch.no_grad()
    def project_grads(self) -> None:
        """g ← P(g) now, for every protected gradient there is; the step doesn't do it again
        unless a gradient was written since, or is a DTensor, where that can't be told.
        """
        self._require_held("project_grads")
        self._steps.require_moved_as_left()
        self._steps.project(with_gradients(self._items.values()), pin=True)

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
        self._require_held("restore")
        if not self.restores:
            raise RuntimeError(
                "osf_torch.Guard.restore: expected protect(..., restore=True or 'deferred'), got "
                "restore=False"
            )
        changed = self._steps.left.settled()
        checks.require_own(changed, self.mode)
        self._steps.moved |= {id(item.weight): item for item in changed}
        self._steps.pin()
        self._steps.left.take()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips all gradients of the model by the norm of what is kept of them.

        ``torch.nn.utils.clip_grad_norm_`` before the projection counts what is then removed, and
        clips more than it says; this projects first. Under GradScaler call ``unscale_`` before.

        Returns:
            The norm before clipping, after projecting.
        """
        self._require_held("clip_grad_norm_")
        self.project_grads()
        items = self._items.values()
        stale = {id(item) for item in weights.unprojected(list(items))}
        known = [item for item in items if id(item) not in stale]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), max_norm, norm_type)
        weights.mark_projected(known)  # scaling commutes with P
        return norm

    @overload
    def next_task(
        self,
        ranks: Ranks | None = None,
        *,
        batches: None = None,
        widen: Rank | None = None,
        optimizer_state: OptimizerState = "keep",
        **options: Any,
    ) -> Subspaces: ...
    @overload
    def next_task(
        self,
        ranks: None = None,
        *,
        batches: Iterable[Any],
        widen: None = None,
        optimizer_state: OptimizerState = "keep",
        **options: Any,
    ) -> Grown: ...
    def next_task(
        self,
        ranks: Ranks | None = None,
        *,
        batches: Iterable[Any] | None = None,
        widen: Rank | None = None,
        optimizer_state: OptimizerState = "keep",
        **options: Any,
    ) -> Subspaces | Grown:
        """At the end of a task: protects what was learned in it too.

        What was protected until now must be where it was, as ``verify`` has it: a turn takes the
        weights as they are for what is to be kept from then on.

        With ``batches`` of the task the bases grow by what the weights read on them, as
        ``input_subspaces(model, batches, previous=guard.subspaces, **options)`` has it: the side
        that a weight reads by is extended, merged and kept to its floor, the other one stays as it
        is. The model runs as it is now, in eval mode. Of all that was measured this forgets least
        (bench/README.md: nothing over fourteen tasks).

        Without ``batches`` the weights are decomposed as they are now. The new bases then hold the
        leading directions of W as it now is, which is the method's own step (arXiv 2504.07097) and
        no superset of the old ones: where what was learned since outgrows a direction that was
        protected, that direction may fall out, and the next task may move it. ``widen`` leaves
        room for both. It serves where there are no inputs of the task, and forgets more (there 5
        points); a call that gives none of the three is told so by a log line. Either way
        ``released`` says what fell out all the same.

        Where the protected part was restored in mode "complement", the triplets of the last
        refresh are triplets still, and those of the low block alone are computed (method
        "deflated"), provided that both were kept (``keep="all", complement=True``).

        An optimizer's momentum carries the last task's step on into directions that are protected
        only now. Restoring undoes that; with restore=False project or clear its state, above all
        Muon's, whose steps scale up what is left of it (half of what 100 steps moved was in the
        protected span, and 1 % with either).

        Args:
            ranks: of the new bases, as in ``refresh``: another allocation, by hand or by
                ``allocate_ranks``. None keeps the ranks, or widens them:
            batches: inputs of the task that ends, as of ``input_subspaces``; in the place of ranks
                and widen.
            widen: how much every rank grows by, in directions (int, at least 0; 0 keeps the ranks)
                or as a share of min(m, n) (float in [0, 1]); as far as min(m, n).
            optimizer_state: what becomes of the optimizer's state of the guarded weights. "keep":
                nothing. "project": M ← P(M), by the new bases, for averages of gradients
                ("exp_avg", "momentum_buffer"); second moments and counts of steps stay, since
                steps divide by them. "clear": their states are emptied, and begin anew with the
                next step. Those of other parameters stay as they are.
            options: of ``refresh``, such as tol, seed, keep or progress; with batches of
                ``input_subspaces``, such as energy, min_free, max_tokens, forward or masks.

        Returns:
            The new subspaces, also in ``Guard.subspaces``; hooks stay where they are.

        Raises:
            ValueError: two of ranks, widen and batches; as ``refresh`` or ``input_subspaces``;
                without batches, subspaces that aren't triplets; another optimizer_state,
                one other than "keep" without an optimizer or of LBFGS, "project" of a state that
                isn't known (8 bits, schedule-free's). Protection and state are as they were.
            TypeError: widen is neither int nor float; an option of neither.
            RuntimeError: what was protected has moved, something else than the guarded optimizer
                has written to the weights, or hooks are off; with restore=False what an optimizer
                itself has moved is logged.
        """
        self._require_held("next_task")
        items = list(self._items.values())
        operator = "Guard.next_task"
        make: Callable[..., Subspaces | Grown]
        if batches is None:
            present = {
                item.name: measures.rank_of(self.subspaces[item.name], item.matrix_shape)
                for item in items
            }
            chosen = renewal.ranks_of(items, present, ranks, widen, operator)
            renewal.require_triplets(items, self.subspaces)
            protects = self.restores is not False and self.mode == "complement"
            previous = self.subspaces if protects else None
            make = partial(renewal.renewed, ranks=chosen, previous=previous)
        else:
            renewal.require_by_inputs(ranks, widen, operator)
            make = partial(renewal.grown, batches=batches, previous=self.subspaces)
        require_renewable(self._optimizer, items, optimizer_state)
        checks.agreed(items, operator, lambda: self._require_attached(operator))
        self._require_unmoved(operator)
        found = make(
            self._model, items, leave_out=self._leave_out, options=options, operator=operator
        )
        renewed = [
            Protected(item.name, item.weight, found[item.name], is_flat=item.is_flat)
            for item in items
        ]
        measures.pin(renewed, self.mode, bool(self.restores))
        pairs = zip(items, renewed, strict=True)
        self._released = {old.name: measures.released(old, new, self.mode) for old, new in pairs}
        self.subspaces = found
        self._leave_out |= named_by(found)
        self._steps.take(renewed)
        renew_state(self._optimizer, renewed, self.mode, optimizer_state)
        return found

    # --- what a user asks ---

    def coverage(self) -> Coverage:
        """Which of the parameters that train now are covered, by this guard, another one or
        ``confine``, and what the others are; print it, or its ``table()``."""
        return coverage(self._model, leave_out=self._leave_out)

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
        if not self._steps.leaks:
            raise RuntimeError(
                "osf_torch.Guard.leak: expected a projected gradient, got none so far; run a "
                "backward pass and, with when='step', an optimizer step first"
            )
        return dict(self._steps.leaks)

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Per parameter ‖H(W) − H_ref‖ / ‖H_ref‖, how far the protected part H(W) = W − P(W)
        has moved since it was protected; computed in float64, one matrix at a time.

        H_ref is that of the weight at ``protect``, never of its decomposition. With restore=False
        the figure is an estimate to a quarter, from a few random columns that were kept of it.

        Raises:
            RuntimeError: a weight was partitioned by DeepSpeed's ZeRO-3.
        """
        self._require_held("drift")
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
        that nothing covers and that weren't left out by name, or weights moved in the protected
        span or aren't finite.

        With restore=False an optimizer may move the protected part by itself (elementwise steps,
        momentum from before, weight decay). What has moved is then logged, and raises with ``tol``.

        Args:
            model: the one that is trained, to be compared with the one that was protected.
            tol: on ``drift()``; None is what rounding and bases of this dtype explain.
        """
        steps, items, operator = self._steps, self._steps.together.items, "Guard.verify"
        checks.agreed(items, operator, lambda: self._require_guarded(model, tol))
        if self.when == "backward":
            ready = with_gradients(items)
            stale = {id(item) for item in weights.unmet(ready)}
            steps.judge([item for item in ready if id(item) not in stale])
        fired = steps.projections + steps.restorations
        leaking = {name for name, excess in steps.excess.items() if float(excess) > 0}
        checks.agreed(
            items, operator, lambda: checks.require_projected(fired, steps.missed, leaking)
        )
        self._require_unmoved(operator, tol)

    def _require_unmoved(self, operator: str, tol: float | None = None) -> None:
        """Refuses weights whose protected part isn't where it was, or logs it with restore=False.
        Of sharded weights a collective."""
        steps, items = self._steps, self._steps.together.items
        steps.settle()
        if self.restores:
            drifts, noticed = checks.drifts(items, self.mode), steps.left.noticed()
            checks.agreed(
                items, operator, lambda: self._require_pinned(drifts, noticed, operator, tol)
            )
            return
        written = checks.moved_by_others(steps.left.settled(), self.mode) | steps.written
        drifts = checks.drifts(list(filter(checks.is_measurable, items)), self.mode)
        checks.agreed(items, operator, lambda: self._require_kept(drifts, written, operator, tol))

    # What one rank alone may refuse, without a collective: ``checks.agreed`` tells the others.

    def _require_guarded(self, model: nn.Module | None, tol: object) -> None:
        """Before gradients and weights are looked at."""
        if isinstance(tol, bool) or not (tol is None or isinstance(tol, Real)):
            raise TypeError(f"osf_torch.Guard.verify: expected tol to be a number, got {tol!r}")
        if model is not None and model is not self._model:
            checks.require_same_model(self._model, model)
        self._require_attached("Guard.verify")
        checks.require_covered(self._model, self.subspaces, guarded())
        require_told(self.coverage(), "Guard.verify")

    def _require_attached(self, operator: str) -> None:
        """Refuses weights, bases and hooks that aren't those of ``protect``."""
        items = self._steps.together.items
        owned = None if self._optimizer is None else owned_by(self._optimizer)
        checks.require_present(self._model, items, owned, operator)
        checks.require_bases(self._steps.together)
        checks.require_contents(items, operator)
        checks.require_hooks(items, self._hooks, operator)

    def _require_pinned(
        self,
        drifts: Sequence[checks.Drift],
        noticed: Sequence[Protected],
        operator: str,
        tol: float | None,
    ) -> None:
        """Of weights that are restored."""
        checks.require_in_place(drifts, tol, operator)
        checks.require_guarded_writes(noticed, operator, restored=True)

    def _require_kept(
        self,
        drifts: Sequence[checks.Drift],
        written: Collection[str],
        operator: str,
        tol: float | None,
    ) -> None:
        """Of weights that aren't restored."""
        if self._optimizer is not None:
            others = [item for item in self._steps.together.items if item.name in written]
            checks.require_guarded_writes(others, operator, restored=False)
        if tol is None:
            checks.log_drift(drifts, operator)
        else:
            checks.require_in_place(drifts, tol, operator)

    def state_dict(self) -> dict[str, Any]:
        """What resuming to the bit takes: bases, what is pinned, the settings, the count, and
        ``subspaces``, which ``next_task`` starts from. ``protect(model, state, optimizer=...)``
        makes a guard of it.

        Under "weights" the tensors that are used, of sharded weights as DTensors, so that
        ``torch.distributed.checkpoint`` saves and reshards them; under "subspaces" whole ones,
        which of unsharded weights are the same tensors. Nothing but tensors, numbers and strings.
        All are of the weights themselves, however these are sharded: it loads on any number of
        ranks and on other meshes, from DTensors or from whole tensors.
        """
        self._require_held("state_dict")
        return state_of(
            list(self._items.values()),
            list(self._steps.moved.values()),
            self.subspaces,
            self.when,
            self.restores,
            self.mode,
            self.projections,
        ) | {"leave_out": sorted(self._leave_out)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state_dict` was called; the model and optimizer load their own,
        the model before this.

        Raises:
            ValueError: of another set of parameters, other shapes, another mode, when or restore,
                one rank's part of a tensor, or of other weights than the model has now; nothing is
                changed.

        Of tensors that are sharded otherwise than the weights a collective.
        """
        self._require_held("load_state_dict")
        items = list(self._items.values())
        held, subspaces = read_state(state, items, self.when, self.restores, self.mode)
        before = [dict(vars(item)) for item in items]
        moved = state.get("moved", ())
        try:
            for item in items:
                item.take(held[item.name])
                measures.settle(item, self.mode)
            checks.require_state_of_weights(items, moved, self.mode)
        except Exception:
            for item, earlier in zip(items, before, strict=True):
                vars(item).update(earlier)
            raise
        self._leave_out |= set(state.get("leave_out", ()))
        covered = {id(item.weight) for item in items}
        self.subspaces = covering(subspaces, coverage(self._model, covered, self._leave_out))
        self._released = {}
        self._steps.moved = {k: item for k, item in self._items.items() if item.name in moved}
        self._steps.projections = int(state["projections"])
        self._steps.take(items)

    def remove(self) -> None:
        """Takes every hook off; the model and the optimizer are as before. Idempotent.

        What ``restore="deferred"`` has still to pin is pinned, as by :meth:`restore`. A protected
        part that something else has moved is logged, where the host sees it without waiting for
        a device or another rank.
        """
        was_on = self in ATTACHED
        self._hooks.remove()
        ATTACHED.discard(self)
        with torch.no_grad():
            self._steps.settle()
        if was_on:
            self._tell_moved(self._steps.together.items, "Guard.remove")

    @torch.no_grad()
    def _tell_moved(self, items: Sequence[Protected], operator: str) -> None:
        """Logs those of which something else has moved the protected part since the last step."""
        known = self._steps.moved
        left = weights.readable([item for item in items if id(item.weight) not in known])
        moved = checks.moved_by_others(self._steps.left.changed(left), self.mode)
        if moved:
            log.warning(
                "osf_torch.%s: what a guard has protected until now isn't where its last step left "
                "it, of %s: something else has written to these weights since",
                operator,
                listed(sorted(moved)),
            )
