"""What a guard does in an optimizer's steps: projects gradients, judges them, pins weights.

All of it goes over lists of items, and no function is called an item where nothing is amiss.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from osf_kernels import Mode
from osf_torch import checks, measures
from osf_torch import protected as weights
from osf_torch.hooks import Hooks
from osf_torch.lists import Entry, Key, Lists
from osf_torch.protected import Protected, Together
from osf_torch.sharding import step_left_out
from osf_torch.writes import Left

Restore = bool | Literal["deferred"]

_sharding = operator.attrgetter("sharding")


@dataclass(frozen=True)
class Leak:
    """The share ‖g − P(g)‖ / ‖g‖ of a gradient in the protected span, before and after."""

    raw: float
    applied: float


class Steps:
    """The steps of a guard's optimizer, or of every optimizer where it names none.

    Attributes:
        items: by the ids of their weights; see ``take``.
        together: the same as one list.
        moved: of them those that a step has moved and that weren't pinned since.
        left: how the weights were left.
        hooks: the guard's.
        projections: how many times gradients were projected so far.
        restorations: how many times weights were pinned so far.
        leaks: by name, with ``record``.
        missed: the names of those whose gradients some step used unprojected.
        excess: by name the largest leak of a gradient that a step used.
        written: the names of those that something else wrote to, where nothing is pinned.
    """

    hooks: Hooks

    def __init__(
        self,
        items: Iterable[Protected],
        optimizer: torch.optim.Optimizer | None,
        when: Literal["step", "backward"],
        restore: Restore,
        mode: Mode,
        record: bool,
    ) -> None:
        self._optimizer, self._when, self._mode = optimizer, when, mode
        self._restores, self._record = restore, record
        self.projections = self.restorations = 0
        self._stepping: list[Protected] = []  # of the step under way: with gradients to project
        self._skipped = False  # the step under way, by GradScaler
        # A closure that is compiled with its step calls it.
        self._made = torch.compiler.disable(self._gradients_are_made)
        self.moved: dict[int, Protected] = {}
        self.take(items)

    def take(self, items: Iterable[Protected]) -> None:
        """Begins with these items: their weights are as they should be, nothing is noted yet."""
        self.leaks: dict[str, Leak] = {}
        self._raw: dict[str, float] = {}  # shares of gradients before they were projected
        self.missed: set[str] = set()
        self.excess: dict[str, Tensor] = {}
        self.written: set[str] = set()
        self._look_at(items)

    def let_go(self, keys: Iterable[int]) -> None:
        """Leaves the weights of these ids alone from now on."""
        for key in keys:
            self.moved.pop(key, None)
        self._look_at([item for key, item in self.items.items() if key not in keys])

    def _look_at(self, items: Iterable[Protected]) -> None:
        self.items = {id(item.weight): item for item in items}
        self.together = Together(self.items.values())
        self.left = Left(self.together.items, uncounted=bool(self._restores))
        self._lists = Lists(self._mode)

    # --- hooks ---

    @torch.no_grad()
    def accumulated(self, parameter: Tensor) -> None:
        """A gradient has been accumulated."""
        item = self.items.get(id(parameter))
        if item is None:
            return
        if parameter.grad is None:
            self.missed.add(item.name)
        else:
            self.project([item])

    def before(
        self,
        optimizer: torch.optim.Optimizer,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Projects the gradients there are, or lets the step's closure project those it makes."""
        if not self._owned(optimizer):
            return None
        checks.require_bases(self.together)
        changed = self.left.changed()
        if changed and self._restores:
            checks.require_as_left(changed, self._mode)
        elif changed:
            self.written |= checks.moved_by_others(changed, self._mode)
        self._stepping, self._skipped = [], False
        keywords = dict(kwargs or {})
        closure = closure_of(args, keywords)
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

    def _gradients_are_made(self, optimizer: torch.optim.Optimizer) -> None:
        """In a step, before the optimizer uses them; LBFGS evaluates its closure many times."""
        ready = with_gradients(self._owned(optimizer))
        # A fused optimizer under GradScaler is called for a step that it then leaves out.
        self._skipped = step_left_out(optimizer, map(_sharding, ready))
        self._stepping = [] if self._skipped else ready
        if self._skipped:
            return
        with torch.no_grad():
            if self._when == "step":
                self.project(ready, pin=True)
            else:
                self.hooks.mend([item.weight for item in self.together.items])
                self.project(weights.unmet(ready))

    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Judges the gradients that the step has used, and pins what it has moved."""
        owned = self._owned(optimizer)
        if not owned:
            return
        with torch.no_grad():
            if not self._skipped:
                used = with_gradients(owned)
                self.judge(used)
                if self._restores:
                    for item in self._written_to(owned, [*self._stepping, *used]):
                        self.moved[id(item.weight)] = item
                    self.pin(at_once=self._restores is True)
            self.left.take()
        self._stepping = []

    def foreign(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Refuses a step of another optimizer than the guarded one that would move weights, unless
        one of both steps within the other."""
        guarded = self._optimizer
        assert guarded is not None
        owned = owned_by(optimizer)
        items = [item for item in self.together.items if id(item.weight) in owned]
        if not callable(closure_of(args, kwargs)):  # which makes gradients
            items = with_gradients(items)
        if items and not (_holds(optimizer, guarded) or _holds(guarded, optimizer)):
            raise checks.stepped_by_another(optimizer, guarded, items)

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
            known |= {id(item) for item in self.left.changed(others)}
        return [item for item in owned if id(item) in known]

    def _owned(self, optimizer: torch.optim.Optimizer) -> list[Protected]:
        """The items that the optimizer steps: all, or those of an optimizer that wasn't named."""
        if self._optimizer is not None:
            return self.together.items
        owned = owned_by(optimizer)
        return [item for item in self.together.items if id(item.weight) in owned]

    # --- projecting, judging, pinning; without gradients recorded ---

    def project(self, items: Sequence[Protected], pin: bool = False) -> None:
        """Projects the gradients that aren't yet, and pins what earlier steps have moved."""
        items = weights.unprojected(items)
        moved = list(self.moved.values()) if pin else []
        checks.require_dense_gradients(items)
        before = self._run(items, moved)
        weights.mark_projected(items)
        if not self._restores:
            after = measures.imprints(items)
            for item, raw, kept in zip(items, before, after, strict=True):
                item.raw, item.kept = raw, kept
        if moved:
            self.moved = {}
            self.restorations += 1
            self.left.take()
        if self._record:
            self._note_leaks(items)
        self.projections += bool(items)

    def judge(self, used: Sequence[Protected]) -> None:
        """Notes the gradients that a step has used otherwise than they were projected.

        What the weights' protected part has taken from them is pinned where the guard restores;
        elsewhere their values tell, whoever wrote to them.
        """
        for item in weights.unmet(used):
            self.missed.add(item.name)
        if not self._restores:
            for item in measures.rewritten(used):
                excess = measures.leaking(item, self._mode)
                if excess is not None:
                    known = self.excess.get(item.name, excess)
                    self.excess[item.name] = torch.fmax(known, excess)
        if self._record:
            self._note_leaks(used)

    def pin(self, at_once: bool = True) -> None:
        """W ← P(W) + protected of what has moved: now, or now where it takes no collective."""
        now = list(self.moved.values())
        if not at_once:
            now = [item for item in now if not (item.groups or item.across)]
        self._run([], now)
        for item in now:
            del self.moved[id(item.weight)]
        self.restorations += bool(now)

    def require_moved_as_left(self) -> None:
        """Refuses where weights that are still to be pinned were written to by something else."""
        checks.require_as_left(self.left.changed(list(self.moved.values())), self._mode)

    def settle(self) -> None:
        """Pins what ``restore="deferred"`` has still to pin."""
        if self.moved:
            self.require_moved_as_left()
            self.pin()
            self.left.take()

    def _run(self, items: Sequence[Protected], moved: Sequence[Protected]) -> list[Tensor]:
        """g ← P(g) for the gradients of some, W ← P(W) + what is pinned for the weights of others.

        Returns:
            The imprints of the gradients as they were, where nothing is pinned.
        """
        try:
            self.together.follow([*items, *moved])
            if self._record:
                for item in items:
                    self._raw[item.name] = self._share(item)
            before = [] if self._restores else measures.imprints(items)
            keys: list[Key] = [item.key for item in items]
            together, tensors = [*items, *moved], weights.gradients_of(items)
            if moved:
                keys += [item.pinned_key for item in moved]
                tensors += [item.weight for item in moved]
            xs = weights.matrices_of(together, tensors)

            def entries() -> list[Entry]:
                grads = [item.entry(self._mode, pinned=False) for item in items]
                return grads + [item.entry(self._mode, pinned=True) for item in moved]

            self._lists.run_(keys, xs, entries)
            weights.put_back(together, tensors, xs)
        except (TypeError, ValueError) as error:
            raise checks.refused(error, [*items, *moved]) from None
        return before

    def _note_leaks(self, items: Sequence[Protected]) -> None:
        for item in items:
            applied = self._share(item)
            self.leaks[item.name] = Leak(self._raw.setdefault(item.name, applied), applied)

    def _share(self, item: Protected) -> float:
        assert item.weight.grad is not None
        return measures.share(item, item.view(item.weight.grad), self._mode)


def with_gradients(items: Iterable[Protected]) -> list[Protected]:
    return [item for item in items if item.weight.grad is not None]


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """Of a step, as torch hands its arguments to hooks: the optimizer first."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def _holds(outer: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has another one, or several, that it steps."""
    held = vars(outer).values()
    several = [one for found in held if isinstance(found, list | tuple) for one in found]
    return any(found is inner for found in (*held, *several))


def owned_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
