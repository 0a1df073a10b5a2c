"""Guard: the hooks that keep a model's updates out of its protected subspaces."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osf_kernels import Mode
from osf_torch import protected as weights
from osf_torch.protected import Protected
from osf_torch.refresh import refresh
from osf_torch.selection import Rank, Ranks, named_weights
from osf_torch.sharding import any_rank
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
        self._stepping: list[Protected] = []
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
            self._handles[None] = [self._optimizer.register_step_pre_hook(self._before_step)]
            if self.restores:
                post = self._optimizer.register_step_post_hook(self._after_step)
                self._handles[None].append(post)
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
    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        ready = [item for item in self._items.values() if item.weight.grad is not None]
        # A fused optimizer under GradScaler is called for a step that it then leaves out.
        skipped = _overflowed(optimizer, ready)
        self._stepping = [] if skipped else ready
        if self.when == "step" and not skipped:
            self._prepare(ready, self._take_moved())

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Pins what the step has moved; weights that had no gradient stood still."""
        self._moved |= {id(item.weight): item for item in self._stepping}
        if self.restores is True:
            weights.restore_all_(self._take_moved(), self.mode)

    def _take_moved(self) -> list[Protected]:
        moved, self._moved = list(self._moved.values()), {}
        return moved

    def _prepare(self, items: list[Protected], moved: Sequence[Protected] = ()) -> None:
        """Projects the gradients that aren't yet, and pins what earlier steps have moved."""
        items = [item for item in items if not item.is_projected()]
        raw = [self._share(item) for item in items] if self._record else []
        weights.project_and_restore_all_(items, moved, self.mode)
        for item, before in zip(items, raw, strict=False):
            self._leaks[item.name] = Leak(before, self._share(item))
        self.projections += bool(items)

    def _share(self, item: Protected) -> float:
        assert item.weight.grad is not None
        return weights.share(item, item.view(item.weight.grad), self.mode)

    # --- what a training loop calls ---

    @torch.no_grad()
    def project_grads(self) -> None:
        """g ← P(g) now, for every protected gradient there is; the step doesn't do it again
        unless a gradient was written since.
        """
        ready = [item for item in self._items.values() if item.weight.grad is not None]
        self._prepare(ready, self._take_moved())

    @torch.no_grad()
    def restore(self) -> None:
        """W ← P(W) + protected now, for what steps have moved since it was last pinned.

        For ``restore="deferred"``, before weights are evaluated or saved; ``verify``, ``next_task``
        and ``remove`` do it themselves. With restore=True nothing is left to do between steps. Of
        sharded weights a collective: every rank calls it.

        Raises:
            RuntimeError: restore=False pinned nothing that could be restored.
        """
        if not self.restores:
            raise RuntimeError(
                "osf_torch.Guard.restore: expected protect(..., restore=True or 'deferred'), got "
                "restore=False"
            )
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

        Where the protected part was restored in mode "complement", the triplets of the last
        refresh are triplets still, and those of the low block alone are computed (method
        "deflated"), provided that both were kept (``keep="all", complement=True``).

        Args:
            ranks: of the new bases, as in ``refresh``: another allocation, by hand or by
                ``allocate_ranks``. None keeps the ranks, or widens them:
            widen: how much every rank grows by, in directions (int) or as a share of min(m, n)
                (float); as far as min(m, n).
            options: of ``refresh``, such as tol, seed, keep or progress.

        Returns:
            The new subspaces, also in ``Guard.subspaces``; hooks stay where they are.

        Raises:
            ValueError: both ranks and widen, or as ``refresh``; the protection is as it was.
        """
        if ranks is not None and widen is not None:
            raise ValueError(
                "osf_torch.Guard.next_task: expected ranks or widen, got both; ranks says the new "
                "ranks, widen how much the present ones grow"
            )
        chosen = self._widened(widen) if ranks is None else ranks
        if self.restores:
            self.restore()
        if self.restores and self.mode == "complement" and isinstance(self.subspaces, Subspaces):
            kept = [self.subspaces[item.name].svd for item in self._items.values()]
            if all(svd is not None for svd in kept):
                low = all(svd is not None and svd.U_low is not None for svd in kept)
                defaults = {"previous": self.subspaces, "keep": "all", "complement": low or None}
                options = defaults | options
        keys = set(self._items)
        found = refresh(
            self._model, chosen, filter=lambda _, parameter: id(parameter) in keys, **options
        )
        by_name = self._by_name()
        items = [Protected(name, by_name[name].weight, s) for name, s in found.items()]
        if self.restores:
            weights.pin(items, self.mode)
        self._items = {id(item.weight): item for item in items}
        self.subspaces = found
        self._leaks = {}
        return found

    def _widened(self, widen: Rank | None) -> dict[str, Rank]:
        ranks: dict[str, Rank] = {}
        for item in self._items.values():
            short = min(item.weight.shape[-2:])
            more = round(widen * short) if isinstance(widen, float) else widen or 0
            rank = weights.rank_of(self.subspaces[item.name], item.weight.shape)
            ranks[item.name] = max(1, min(short, rank + more))
        return ranks

    def _by_name(self) -> dict[str, Protected]:
        return {item.name: item for item in self._items.values()}

    # --- what a user asks ---

    def leak(self) -> dict[str, Leak]:
        """Per parameter, the protected share of its last gradient before and after projecting.

        Computed in float64 when the gradient was projected, with ``record=True``.

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
        drifts: dict[str, float] = {}
        for item in self._items.values():
            H = weights.reference(item)
            if H is None:
                raise RuntimeError(
                    f"osf_torch.Guard.drift: expected a reference for {item.name!r}, got a "
                    "subspace without S and protected and restore=False; give one of them"
                )
            moved = weights.remainder(item, item.view(item.weight), self.mode) - H
            drifts[item.name] = weights.norm(item, moved) / max(weights.norm(item, H), weights.TINY)
        return drifts

    def verify(self, model: nn.Module | None = None, *, tol: float | None = None) -> None:
        """Raises RuntimeError when the protection isn't working.

        That is: another model is trained than the one protected (a deepcopy has no hooks), a
        parameter was replaced since (``load_state_dict(assign=True)``), the optimizer has let it
        go, no hook ever fired, or weights moved in the protected span.

        Args:
            model: the one that is trained, to be compared with the one that was protected.
            tol: on ``drift()``; None is what rounding and bases of this dtype explain, where the
                guard restores, and looks at no weights where it doesn't.
        """
        if model is not None and model is not self._model:
            own = {id(p) for p in self._model.parameters()}
            if not {id(p) for p in model.parameters()} <= own:
                raise RuntimeError(
                    "osf_torch.Guard.verify: expected the model that was protected, got another; a "
                    "deepcopy has no hooks: protect the model that is trained"
                )
        parameters = named_weights(self._model)
        owned = None if self._optimizer is None else owned_by(self._optimizer)
        for item in self._items.values():
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
        if not self._handles:
            raise RuntimeError(
                "osf_torch.Guard.verify: expected hooks on the model, got none; remove() or a "
                "later protect() has taken them off"
            )
        if self.projections == 0:
            raise RuntimeError(
                "osf_torch.Guard.verify: expected projected gradients, got none so far; the hooks "
                "never fired: is this the model, and the optimizer, that is trained?"
            )
        if self.restores:
            self.restore()
        elif tol is None:
            return
        by_name = self._by_name()
        for name, drift in self.drift().items():
            item = by_name[name]
            limit = tol if tol is not None else weights.drift_limit(item)
            if not drift <= limit:
                raise RuntimeError(
                    f"osf_torch.Guard.verify: expected the protected part of {name!r} to be where "
                    f"it was to {limit:.0e}, got a drift of {drift:.1e}; something writes to the "
                    "weight outside of the optimizer's step"
                )

    def state_dict(self) -> dict[str, Any]:
        """What resuming to the bit takes: bases, S or the dense part, and the count.

        Tensors are this rank's own, as they are used; nothing but tensors, numbers and strings.
        """
        items, moved = list(self._items.values()), list(self._moved.values())
        return state_of(items, moved, self.when, self.restores, self.mode, self.projections)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state_dict` was called; the model and optimizer load their own.

        Raises:
            ValueError: of another set of parameters, other shapes, another mode, when or restore,
                or another number of ranks; nothing is changed.
        """
        held = read_state(state, list(self._items.values()), self.when, self.restores, self.mode)
        moved = state.get("moved", ())
        self._moved = {key: item for key, item in self._items.items() if item.name in moved}
        for item in self._items.values():
            item.held = held[item.name]
        self.projections = int(state["projections"])
        self._leaks = {}

    def remove(self) -> None:
        """Takes every hook off; the model and the optimizer are as before. Idempotent.

        What ``restore="deferred"`` has still to pin is pinned first.
        """
        if self._handles and self.restores:
            self.restore()
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles = {}
        _ATTACHED.discard(self)


def _overflowed(optimizer: torch.optim.Optimizer, items: list[Protected]) -> bool:
    """Whether GradScaler found Inf or NaN and left the decision to a fused optimizer."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    group = next((item.sharding.group for item in items if item.sharding is not None), None)
    return any_rank(group, found)


def owned_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
