"""What callbacks of training frameworks share: one model's protection from its bases to its files.

A framework makes the optimizer, wraps the model and writes checkpoints by itself.
:class:`Protection` holds what has to outlast that: bases are made when it is made, of the model
before it trains; :meth:`Protection.begin` is called when the optimizer is there, with the state of
a checkpoint in a run that is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osf_torch.bases import columns_of, spans_of
from osf_torch.confine import confine
from osf_torch.confined import Confined
from osf_torch.coverage import NAMED, require_told, tell
from osf_torch.free.state import is_state as is_confined_state
from osf_torch.grown import Grown
from osf_torch.guard import Guard
from osf_torch.integrations._state_files import (
    read_state,
    require_alike,
    require_same_weights,
    sums_of,
    world,
    write_state,
)
from osf_torch.protect import innermost, protect
from osf_torch.refresh import refresh
from osf_torch.selection import Ranks, listed, named_weights, unwrapped
from osf_torch.sharing import Ranks as Processes
from osf_torch.sharing import whole
from osf_torch.state import is_state as is_guard_state
from osf_torch.state import subspaces_of
from osf_torch.steps import owned_by
from osf_torch.subspaces import Subspace, Subspaces

__all__ = ["Method", "Protection", "innermost", "is_model_of", "read_state", "write_state"]


Method = Literal["confine", "protect"]


class Protection:
    """A model's weights confined or protected while a framework trains them.

    Args:
        model: the one that trains, before it is sharded or wrapped and before its optimizer is
            made. Of a model on a GPU the bases are computed there.
        subspaces: ranks as ``refresh`` takes them; or subspaces by parameter name; or the state of
            a checkpoint that :func:`read_state` read, of the weights that the model has.
        method: "confine" confines the model now, "protect" when training begins.
        operator: who asks, in messages: "integrations.transformers.SubspaceCallback".
        progress: of ``refresh``.
        options: of ``confine`` (update, rank, decay_to, dtype, ...) or ``protect`` (when, restore,
            mode, record); of either ``leave_out``, the names of what is to move freely.
        defaults: options where neither ``options`` nor a state says otherwise.

    Attributes:
        confined: what ``confine`` returned, or None.
        guard: what ``protect`` returned, from the beginning of training on, or None.

    Raises:
        ValueError, TypeError: as ``refresh``, ``confine`` and ``protect``; another method; ranks
            that hold weights which differ.

    Where a process group is there, ranks share out the decompositions, and every rank calls this.
    """

    def __init__(
        self,
        model: nn.Module,
        subspaces: Ranks | Mapping[str, Subspace] | Mapping[str, Any],
        method: Method = "confine",
        *,
        operator: str,
        progress: bool = True,
        options: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        if method not in ("confine", "protect"):
            raise ValueError(
                f'osf_torch.{operator}: expected method to be "confine" or "protect", got '
                f"{method!r}"
            )
        self.model, self.method, self._operator = model, method, operator
        self._options, self._defaults = dict(options or {}), dict(defaults or {})
        self.confined: Confined | None = None
        self.guard: Guard | None = None
        self._optimizer: torch.optim.Optimizer | None = None  # that the guard's hooks are on
        self.subspaces: Mapping[str, Any] = self._made(subspaces, progress)
        if method == "confine":
            self.confined = confine(model, self.subspaces, **self._defaults | self._options)
        self._imprint = _imprint(self.confined, self.subspaces)

    def _made(self, subspaces: Any, progress: bool) -> Mapping[str, Any]:
        """The subspaces, or the state, that were given, or those that ranks ask for."""
        if isinstance(subspaces, Mapping):
            self._require_method(subspaces)
            if _is_state(subspaces) or any(isinstance(s, Subspace) for s in subspaces.values()):
                return subspaces
        processes = Processes(world())
        require_same_weights(self.model, processes, self._operator)
        return refresh(
            self.model,
            subspaces,
            progress=progress,
            group=processes.group,
            leave_out=self._options.get("leave_out"),
        )

    def _require_method(self, state: Mapping[str, Any]) -> None:
        """Refuses what the other method has saved."""
        other = "protect" if self.method == "confine" else "confine"
        if _is_state(state) and is_confined_state(state) is (other == "confine"):
            raise ValueError(
                f'osf_torch.{self._operator}: expected a state of method="{self.method}", got one '
                f'of method="{other}"; go on with that method'
            )

    def begin(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None = None
    ) -> None:
        """Before the first step: the optimizer is there, and a checkpoint's weights are loaded.

        Called again, with another optimizer or after an interruption, it goes on with what is
        protected.

        Args:
            optimizer: the one that steps the model; one that wraps it is unwrapped.
            state: what :func:`read_state` read of the checkpoint that was loaded.

        Raises:
            ValueError: an optimizer without what is trained; a state of other weights; ranks whose
                bases differ.
            TypeError: as ``protect``.
        """
        optimizer = innermost(optimizer)
        require_alike(
            self._imprint,
            self._operator,
            "bases, of which each rank has computed its own",
            "start the processes' group before this is made (transformers' TrainingArguments and "
            "accelerate's Accelerator do), with the same weights on every rank",
        )
        if state is not None:
            self._require_method(state)
            self._require_asked(state)
        if self.confined is not None:
            self._require_owner(optimizer)
            if state is not None:
                self._load_confined(self.confined, state)
                self._require_loaded(state)
            return
        if state is None and self.guard is not None:
            if optimizer is self._optimizer:
                return
            state = self.guard.state_dict()
        source: Mapping[str, Any] = self.subspaces if state is None else state
        options = self._options if is_guard_state(source) else self._defaults | self._options
        self.guard = protect(self.model, source, optimizer, **options)
        self._optimizer = optimizer
        self._require_loaded(source)

    def _require_asked(self, state: Mapping[str, Any]) -> None:
        """Refuses a guard's state of other weights or ranks than this was made with: a guard is
        made of the state, whatever was asked for. ``Confined`` compares them by itself."""
        if self.method == "confine" or _is_state(self.subspaces):
            return
        weights, saved = named_weights(self.model), subspaces_of(state)
        asked = {
            id(weights[name]): (name, _widths(s))
            for name, s in self.subspaces.items()
            if name in weights and weights[name].requires_grad
        }
        held = {id(weights.get(name)): (name, _widths(s)) for name, s in saved.items()}
        off = [
            (asked.get(key) or held[key])[0]
            for key in {**asked, **held}
            if key not in asked or key not in held or asked[key][1] != held[key][1]
        ]
        if off:
            raise ValueError(
                f"osf_torch.{self._operator}: expected the checkpoint to protect what this was "
                f"asked for, got other weights or ranks, of {listed(off, NAMED)}; pass the ranks "
                "of the run that is resumed, or the checkpoint's folder as subspaces, which goes "
                "on with what it holds"
            )

    def _load_confined(self, confined: Confined, state: Mapping[str, Any]) -> None:
        try:
            confined.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"osf_torch.{self._operator}: {error}; a run that went on to another task "
                "(next_task) is resumed with a model made of the checkpoint's folder, and with "
                "that folder as subspaces"
            ) from error

    def _require_owner(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses an optimizer that wouldn't train all free blocks."""
        owned = owned_by(optimizer)
        lost = [
            p.name for p in self._of_confined.places if not all(id(t) in owned for t in p.trained())
        ]
        frozen = [p.name for p in self._of_confined.places if not p.is_trained]
        if frozen:
            raise ValueError(
                f"osf_torch.{self._operator}: expected what is trained of {listed(frozen, NAMED)} "
                "to require gradients, got frozen parameters: something else is trained instead, "
                "such as a LoRA adapter, whose factors nothing here covers; leave the adapter "
                "(peft_config=) out, or take PEFT's OSF tuner (osf_torch.integrations.peft)"
            )
        if lost:
            raise ValueError(
                f"osf_torch.{self._operator}: expected an optimizer of the free blocks, got "
                f"{type(optimizer).__name__} without those of {listed(lost, NAMED)}: it was made "
                "before the model was confined, or takes weights by the names of modules (GaLore, "
                "APOLLO, LOMO); make it afterwards, of the parameters that require gradients, or "
                'pass method="protect"'
            )

    @property
    def _of_confined(self) -> Confined:
        assert self.confined is not None
        return self.confined

    @property
    def _of_guard(self) -> Guard:
        if self.guard is None:
            raise RuntimeError(
                f"osf_torch.{self._operator}: expected training to have begun, got a model that "
                "nothing has protected yet; protect() is called where the optimizer is there"
            )
        return self.guard

    @property
    def is_deferred(self) -> bool:
        """Whether weights are restored later than after each step."""
        return self.guard is not None and self.guard.restores == "deferred"

    def settle(self) -> None:
        """The weights as they are to be evaluated and saved: what ``restore="deferred"`` has left
        is restored. Of sharded weights a collective."""
        if self.confined is not None:
            self.confined.merge()
        elif self.guard is not None and self.is_deferred:
            self.guard.restore()

    def state(self) -> dict[str, Any]:
        """For :func:`write_state`. Of sharded weights a collective."""
        weights = named_weights(self.model)
        trained = {id(p): name for name, p in weights.items() if p.requires_grad}  # tied ones once
        names = set(trained.values()) | set(self.guard.subspaces if self.guard else ())
        found = (self.confined or self._of_guard).state_dict()
        return found | {"sums": _sums(weights, names)}

    def _require_loaded(self, state: Mapping[str, Any]) -> None:
        """Refuses weights that aren't those of the checkpoint. The state of what is confined, and
        of the protected part elsewhere, tells of these; of all else that trains it knows nothing.
        """
        saved = state.get("sums")
        if saved is None:
            return
        weights = named_weights(self.model)
        now = _sums(weights, saved.keys() & weights.keys())
        off = [
            name
            for name, sums in saved.items()
            if name not in now
            or not torch.allclose(now[name], sums, rtol=1e-6, atol=1e-12, equal_nan=True)
        ]
        if off:
            raise ValueError(
                f"osf_torch.{self._operator}: expected the weights of the checkpoint, got others "
                f"of {listed(off, NAMED)}, which the trainer hasn't loaded (transformers saves "
                "some experts under other names than it loads them by): make the model of the "
                "checkpoint's folder, by from_pretrained, and resume then"
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from another checkpoint of the run, whose weights the model has been given."""
        (self.confined or self._of_guard).load_state_dict(state)
        self._require_loaded(state)

    def verify(self) -> None:
        """Of ``Confined`` or ``Guard``."""
        (self.confined or self._of_guard).verify()

    def drift(self) -> float:
        """The largest of all weights; NaN where one is. Of sharded weights a collective."""
        found = (self.confined or self._of_guard).drift().values()
        return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)

    def next_task(self, ranks: Ranks | None = None, **options: Any) -> Subspaces | Grown:
        """Of ``Confined`` or ``Guard``; the next optimizer is made afterwards."""
        options.setdefault("group", world())  # ranks share it out, and have the same bases
        holder: Any = self.confined or self._of_guard
        found: Subspaces | Grown = holder.next_task(ranks, **options)
        self.subspaces = found
        self._imprint = _imprint(self.confined, found)
        return found

    def tell(self, *, aloud: bool = True) -> None:
        """Before the first step: says in a log line what trains and is covered, at INFO, since
        whatever isn't was left out by name.

        Args:
            aloud: whether this process logs.

        Raises:
            RuntimeError: a matrix trains that nothing covers and that wasn't left out by name.
        """
        found = (self.confined or self._of_guard).coverage()
        require_told(found, self._operator)
        if aloud:
            tell(found, f"{self._operator}: {self.method}")


def _is_state(value: Mapping[str, Any]) -> bool:
    return is_confined_state(value) or is_guard_state(value)


def is_model_of(protection: Protection, model: nn.Module) -> bool:
    """Whether ``model`` is the protected one, bare, compiled or wrapped."""
    return unwrapped(model) is unwrapped(protection.model)


def _widths(s: Subspace) -> list[tuple[str, int] | None]:
    """How many columns each side has, and what they span."""
    return [
        None if side is None else (spans_of(side), columns_of(side).shape[-1])
        for side in (s.U, s.V)
    ]


def _sums(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Of each weight, whole, by which another one is told. Of sharded ones a collective."""
    return {name: sums_of([whole(weights[name].detach())])[0] for name in sorted(names)}


def _imprint(confined: Confined | None, subspaces: Mapping[str, Any]) -> Tensor:
    """A few sums of all bases, by which ranks tell that they have the same."""
    if confined is not None:
        bases = [(place.spec.left, place.spec.right) for place in confined.places]
        return sums_of([t for pair in bases for basis in pair for t in basis.tensors])
    found = [
        side if isinstance(side, Tensor) else side.columns
        for entry in subspaces.values()
        if isinstance(entry, Subspace)
        for side in (entry.U, entry.V)
        if side is not None
    ]
    return sums_of(found)
