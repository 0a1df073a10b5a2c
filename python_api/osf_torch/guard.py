"""Guard: the hooks that keep a model's updates out of its protected subspaces."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osf_kernels import Mode
from osf_torch import checks, measures
from osf_torch import protected as weights
from osf_torch.protected import Protected
from osf_torch.refresh import refresh
from osf_torch.selection import Rank, Ranks
from osf_torch.sharding import step_left_out
from osf_torch.state import read_state, state_of
from osf_torch.subspaces import Subspace, Subspaces

Restore = bool | Literal["deferred"]

# Guards whose hooks are on, so that protecting a parameter again replaces what was there.
_ATTACHED: weakref.WeakSet[Guard] = weakref.WeakSet()


@dataclass(frozen=True)
class Leak:
    """The share ‖g − P(g)‖ / ‖g‖ of a gradient in the protected span, before and after."""

    raw: float
    applied: float


class Guard:
    """Hooks on a model and its optimizer; made by :func:`protect`.

    Attributes:
        when: "step" or "backward": where gradients are projected.
        restores: whether the protected part is pinned after each step (True), at the next one
            ("deferred") or never (False).
        mode: "complement" or "core".
        projections: how many times gradients were projected so far.
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
        self.subspaces = subspaces
        self._model = model
        self._optimizer = optimizer
        self._items = {id(item.weight): item for item in items}
        self._record = record
        self._leaks: dict[str, Leak] = {}
        self._stepping: list[Protected] = []  # of the step under way: with gradients to project
        self._skipped = False  # the step under way, by GradScaler
        self._missed: set[str] = set()  # whose gradients some step made within, unprojected
        self._released: dict[str, float] = {}
        self._moved: dict[int, Protected] = {}  # by a step, and not pinned since
        self._handles: dict[int | None, list[Any]] = {}  # of a weight's hooks; None: optimizer's

    def __repr__(self) -> str:
        pinned = {
            True: "restored after each step",
            "deferred": "restored at the next step",
            False: "not restored",
        }[self.restores]
        count = len(self._items)
        return f"Guard({count} parameters, projected at {self.when}, {pinned}, mode={self.mode!r})"

    def attach(self) -> None:
        """Puts the hooks on, and takes those of earlier guards off the same parameters."""
        for other in list(_ATTACHED):
            other._let_go(set(self._items))
        if self.when == "backward":
            for key, item in self._items.items():
                handle = item.weight.register_post_accumulate_grad_hook(self._after_accumulation)
                self._handles[key] = [handle]
        if self._optimizer is not None:
            self._handles[None] = [
                self._optimizer.register_step_pre_hook(self._before_step),
                self._optimizer.register_step_post_hook(self._after_step),
            ]
        _ATTACHED.add(self)

    def _let_go(self, keys: set[int]) -> None:
        """Takes the hooks off some weights; off the optimizer too where none is left."""
        for key in keys & self._items.keys():
            del self._items[key]
            self._moved.pop(key, None)
            for handle in self._handles.pop(key, []):
                handle.remove()
        if not self._items:
            self.remove()

    # --- hooks; Dynamo runs them as they are where a step is compiled ---

    @torch.compiler.disable
    @torch.no_grad()
    def _after_accumulation(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._prepare([self._items[id(parameter)]])

    @torch.compiler.disable
    def _before_step(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Projects the gradients there are, or lets the step's closure project those it makes."""
        if self.restores:
            checks.require_as_left(self._items.values(), self.mode)
        self._stepping, self._skipped = [], False
        keywords = dict(kwargs or {})
        closure = args[1] if len(args) > 1 else keywords.get("closure")
        if not callable(closure):
            self._gradients_are_made(optimizer)
            return None
        evaluate: Callable[..., Any] = closure

        def projected(*inputs: Any, **options: Any) -> Any:
            loss = evaluate(*inputs, **options)
            self._gradients_are_made(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], projected, *args[2:]), keywords
        return args, keywords | {"closure": projected}

    @torch.compiler.disable
    @torch.no_grad()
    def _gradients_are_made(self, optimizer: torch.optim.Optimizer) -> None:
        """In a step, before the optimizer uses them; LBFGS evaluates its closure many times."""
        ready = self._ready()
        # A fused optimizer under GradScaler is called for a step that it then leaves out.
        self._skipped = step_left_out(optimizer, (item.sharding for item in ready))
        self._stepping = [] if self._skipped else ready
        if self.when == "step" and not self._skipped:
            self._prepare(ready, pin=True)

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Pins what the step has moved; weights that had no gradient stood still."""
        if not self._skipped:
            made = self._ready()  # an optimizer may make gradients of its own
            if self.when == "step":
                self._missed |= {item.name for item in made if not item.has_met()}
            if self.restores:
                self._moved |= {id(item.weight): item for item in (*self._stepping, *made)}
        if self.restores is True:
            weights.restore_all_(self._take_moved(), self.mode)
        for item in self._items.values():
            item.mark_left()

    def _ready(self) -> list[Protected]:
        return [item for item in self._items.values() if item.weight.grad is not None]

    def _take_moved(self) -> list[Protected]:
        moved, self._moved = list(self._moved.values()), {}
        return moved

    def _prepare(self, items: list[Protected], pin: bool = False) -> None:
        """Projects the gradients that aren't yet, and pins what earlier steps have moved."""
        items = [item for item in items if not item.is_projected()]
        moved = list(self._moved.values()) if pin else []
        checks.require_dense_gradients(items)
        try:
            raw = [self._share(item) for item in items] if self._record else []
            weights.project_and_restore_all_(items, moved, self.mode)
        except (TypeError, ValueError) as error:
            raise checks.refused(error, [*items, *moved], self.mode) from None
        if pin:
            self._moved = {}
        for item, before in zip(items, raw, strict=False):
            self._leaks[item.name] = Leak(before, self._share(item))
        self.projections += bool(items)

    def _share(self, item: Protected) -> float:
        assert item.weight.grad is not None
        return measures.share(item, item.view(item.weight.grad), self.mode)

    # --- what a training loop calls ---

    @torch.no_grad()
    def project_grads(self) -> None:
        """g ← P(g) now, for every protected gradient there is; the step doesn't do it again
        unless a gradient was written since, or is a DTensor, where that can't be told.
        """
        checks.require_as_left(self._moved.values(), self.mode)
        self._prepare(self._ready(), pin=True)

    @torch.no_grad()
    def restore(self) -> None:
        """W ← P(W) + protected now, for what steps have moved since it was last pinned.

        For ``restore="deferred"``, before weights are evaluated or saved; ``verify``, ``next_task``
        and ``remove`` do it themselves. With restore=True nothing is left to do between steps. Of
        sharded weights a collective: every rank calls it.

        Raises:
            RuntimeError: restore=False pinned nothing that could be restored; something else wrote
                to a weight that is still to be pinned (a loaded checkpoint).
        """
        if not self.restores:
            raise RuntimeError(
                "osf_torch.Guard.restore: expected protect(..., restore=True or 'deferred'), got "
                "restore=False"
            )
        checks.require_as_left(self._moved.values(), self.mode)
        weights.restore_all_(self._take_moved(), self.mode)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clips all gradients of the model by the norm of what is kept of them.

        ``torch.nn.utils.clip_grad_norm_`` before the projection counts what is then removed, and
        clips more than it says; this projects first. Under GradScaler call ``unscale_`` before.

        Returns:
            The norm before clipping, after projecting.
        """
        self.project_grads()
        known = [item for item in self._items.values() if item.is_projected()]
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), max_norm, norm_type)
        for item in known:  # scaling commutes with P
            item.mark_projected()
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
        if ranks is not None and widen is not None:
            raise ValueError(
                "osf_torch.Guard.next_task: expected ranks or widen, got both; ranks says the new "
                "ranks, widen how much the present ones grow"
            )
        checks.require_renewable(self._items.values(), self.subspaces)
        chosen = self._widened(widen) if ranks is None else ranks
        if self.restores:
            self.restore()
        if self.restores and self.mode == "complement" and isinstance(self.subspaces, Subspaces):
            # Not a warm start from the triplets alone: pinned as they are, W maps their span to
            # itself, and iterating from it never finds what outgrew it.
            kept = [self.subspaces[item.name].svd for item in self._items.values()]
            if all(svd is not None and svd.U_low is not None for svd in kept):
                deflated = {"previous": self.subspaces, "keep": "all", "complement": True}
                options = deflated | options
        keys = set(self._items)
        found = refresh(
            self._model, chosen, filter=lambda _, parameter: id(parameter) in keys, **options
        )
        by_name = {item.name: item for item in self._items.values()}
        items = [Protected(name, by_name[name].weight, s) for name, s in found.items()]
        if self.restores:
            measures.pin(items, self.mode)
        self._released = {
            item.name: measures.released(by_name[item.name], item, self.mode) for item in items
        }
        self._items = {id(item.weight): item for item in items}
        self.subspaces = found
        self._leaks, self._missed = {}, set()
        return found

    def _widened(self, widen: Rank | None) -> dict[str, Rank]:
        ranks: dict[str, Rank] = {}
        for item in self._items.values():
            rank = measures.rank_of(self.subspaces[item.name], item.weight.shape)
            more = 0 if widen is None else widen
            ranks[item.name] = checks.widened(rank, min(item.weight.shape), more)
        return ranks

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

        Raises:
            RuntimeError: with restore=False nothing was kept to compare with, unless the
                subspace came with protected, or with S and both bases high.
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

    def verify(self, model: nn.Module | None = None, *, tol: float | None = None) -> None:
        """Raises RuntimeError when the protection isn't working.

        That is: another model is trained than the one protected (a deepcopy has no hooks), a
        parameter was replaced since (``load_state_dict(assign=True)``) or frozen at ``protect``
        and trains now, the optimizer has let it go, no hook ever fired, a step used gradients
        that weren't projected, or weights moved in the protected span or aren't finite. With
        restore=False also: something wrote to weights since the last step of the optimizer.

        Args:
            model: the one that is trained, to be compared with the one that was protected.
            tol: on ``drift()``; None is what rounding and bases of this dtype explain, where the
                guard restores, and looks at no weights where it doesn't.
        """
        items = self._items.values()
        if model is not None and model is not self._model:
            checks.require_same_model(self._model, model)
        owned = None if self._optimizer is None else owned_by(self._optimizer)
        checks.require_present(self._model, items, owned)
        if not self._handles:
            raise RuntimeError(
                "osf_torch.Guard.verify: expected hooks on the model, got none; remove() or a "
                "later protect() has taken them off"
            )
        guarded = {key for guard in _ATTACHED for key in guard._items}
        checks.require_covered(self._model, self.subspaces, guarded)
        checks.require_projected(self.projections, self._missed)
        if self.restores:
            self.restore()
        elif self._optimizer is not None:
            checks.require_guarded_writes(items)
        if self.restores or tol is not None:
            checks.require_in_place(items, self.mode, tol)

    def state_dict(self) -> dict[str, Any]:
        """What resuming to the bit takes: bases, S or the dense part, the count, and
        ``subspaces``, which ``next_task`` starts from.

        Under "weights" this rank's own tensors, as they are used; under "subspaces" whole ones,
        which of unsharded weights are the same tensors, and saved once. Nothing but tensors,
        numbers and strings.
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state_dict` was called; the model and optimizer load their own,
        the model before this.

        Raises:
            ValueError: of another set of parameters, other shapes, another mode, when or restore,
                or another number of ranks; nothing is changed.
        """
        items = list(self._items.values())
        held, self.subspaces = read_state(state, items, self.when, self.restores, self.mode)
        moved = state.get("moved", ())
        self._moved = {key: item for key, item in self._items.items() if item.name in moved}
        for item in items:
            item.held = held[item.name]
            item.mark_left()
        self.projections = int(state["projections"])
        self._leaks, self._missed, self._released = {}, set(), {}

    def remove(self) -> None:
        """Takes every hook off; the model and the optimizer are as before. Idempotent.

        What ``restore="deferred"`` has still to pin is pinned, as by :meth:`restore`.
        """
        attached, self._handles = self._handles, {}
        for handles in attached.values():
            for handle in handles:
                handle.remove()
        _ATTACHED.discard(self)
        if attached and self.restores:
            self.restore()


def owned_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
