"""Confined: a model whose weights are trained inside their free blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from osf_kernels import Basis, FreeBasis
from osf_torch.coverage import Coverage, coverage, named_by, require_told
from osf_torch.free import drifting, state, stepping, summary
from osf_torch.free.admission import Settings, admitted, made
from osf_torch.free.current import current
from osf_torch.free.drifting import cause, explained
from osf_torch.free.inputs import Inputs
from osf_torch.free.layers import attach, detach, require_frozen
from osf_torch.free.merging import merge, note_weight
from osf_torch.free.spec import AtRest, Place, is_fsdp, places_of, require_in_place
from osf_torch.grown import Grown, InputSubspace, Spectrum
from osf_torch.renewal import grown, ranks_of, renewed, require_by_inputs
from osf_torch.selection import Rank, Ranks, listed, unwrapped
from osf_torch.sharding import resharded
from osf_torch.subspaces import Subspaces

log = logging.getLogger("osf_torch")


class Confined:
    """Weights of a model with C in W₀ + U_l C V_lᵀ to train; made by :func:`confine`.

    Attributes:
        update, rank, decay_to: as ``confine`` has them.

    ``held``, ``told``, ``references`` and what isn't documented are for ``osf_torch.free``.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.update, self.rank, self.decay_to = settings.update, settings.rank, settings.decay_to
        self._settings = settings
        self._model = model
        self.held: list[Place] = []
        self._inputs = Inputs()
        self.told: set[str] = set()  # what a log line has said, until the next step
        self._frozen: set[str] = set()  # whose free blocks a log line has said to be frozen
        self.leave_out: frozenset[str] = frozenset()  # what else may train, by name
        self._released: dict[str, float] = {}

    def begin(self, places: Sequence[Place], tensors: Sequence[dict[str, nn.Parameter]]) -> None:
        """Gives the modules what they train; called by ``confine`` and ``next_task``."""
        for place in places:
            place.spec.reference = drifting.reference(place) if place.is_read else None
        for place, held in zip(places, tensors, strict=True):
            attach(place.module, [place.spec], held)
            place.spec.owner, place.spec.inputs = self, self._inputs
            if not place.spec.is_opaque:
                note_weight(place)
        self.held = list(places)
        stepping.watch(self)

    @classmethod
    def of(cls, model: nn.Module) -> Confined:
        """Of a confined model: what ``confine`` returned, of a copy of it one of its own.

        Raises:
            ValueError: nothing of the model is confined.
        """
        model = unwrapped(model)
        places: list[Place] = [AtRest(p.module, p.spec) for p in places_of(model)]
        if not places:
            raise ValueError(
                "osf_torch.Confined.of: expected a confined model, got one without confined weights"
            )
        owner: Any = places[0].spec.owner
        if {id(place.module) for place in places} <= {id(place.module) for place in owner.held}:
            found: Confined = owner
            return found
        made = cls(model, owner._settings)
        made.held = places
        made.leave_out, made._released = owner.leave_out, dict(owner._released)
        stepping.watch(made)
        return made

    @property
    def model(self) -> nn.Module:
        """The model that was confined, without what ``torch.compile`` or DDP put around it."""
        return self._model

    @property
    def places(self) -> list[Place]:
        """Where the weights are, in the order of the subspaces.

        Raises:
            RuntimeError: released.
        """
        if not self.held:
            raise RuntimeError(
                "osf_torch.Confined: expected a confined model, got one that was released; confine "
                "it anew"
            )
        return self.held

    @property
    def references(self) -> dict[str, drifting.Reference]:
        """By which ``drift`` measures, by the weights' names."""
        held = {place.name: place.spec.reference for place in self.held}
        return {name: reference for name, reference in held.items() if reference is not None}

    def tell(self, what: str, text: str) -> None:
        """Says something in a log line, once until the next step; ``what`` it is about."""
        if what not in self.told:
            self.told.add(what)
            log.warning("osf_torch.confine: %s", text)

    def tell_frozen(self, name: str) -> None:
        """Says once of each weight that its free block takes no gradient, in one line for all
        weights of which that is so by now."""
        if name in self._frozen:
            return
        names = [place.name for place in self.held if not place.is_trained]
        names = [name for name in names if name not in self._frozen]
        self._frozen.update(names)
        log.warning(
            "osf_torch.confine: the free blocks of some weights are frozen (each doesn't require a "
            "gradient), so that these weights aren't trained: %s; where that isn't meant (adding "
            "an adapter freezes a whole model), let Confined.parameters() require one",
            listed(names),
        )

    # --- what a training loop calls ---

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of the confined weights: C, or B and A; for an optimizer of their own."""
        return [t for place in self.places for t in place.trained()]  # type: ignore[misc]

    def merge(self) -> None:
        """Brings the weights up to date with C now. Idempotent; of sharded weights a collective.

        Steps of torch's optimizers, forward passes and ``state_dict`` do it by themselves. On a GPU
        a forward pass doesn't see what is written through ``.data``, as optimizers and averages do
        that aren't torch's: call this after such writes. With
        update="beside" there is nothing to do: W stays as it is, and ``module.weight`` and
        ``model.state_dict()`` are the sum.
        """
        places = self.places
        merge(places, force=any(place.is_sharded for place in places), looks=True)
        self.reshard(places)

    def reshard(self, places: Sequence[Place]) -> None:
        """Has FSDP2 let go of what it has gathered of weights that were merged since."""
        if any(place.weight is not Place(place.module, place.spec).weight for place in places):
            resharded(self._model)

    @torch.no_grad()
    def release(self) -> None:
        """The plain model again, with the weights as they have become and no C.

        An optimizer that was made for C refuses to step afterwards: make a new one. Where what is
        protected has moved, a log line says so.

        Raises:
            RuntimeError: released already; of quantized weights, to which nothing can be added; of
                a model that ``fully_shard`` was called on, which keeps the parameters that it has.
        """
        places = self.places
        self._require_changeable(places, "release")
        opaque = [place.spec.name for place in places if place.spec.is_opaque]
        if opaque:
            raise RuntimeError(
                "osf_torch.Confined.release: expected weights that can be written to, got "
                f"quantized ones, {listed(opaque)}; keep them confined, and save "
                "Confined.state_dict()"
            )
        moved = [
            f"{place.name} by {found.moved:.1e} of its norm: {cause(place)}"
            for place, found in self._drifts()
            if not found.moved <= found.limit
        ]
        if moved:
            log.warning(
                "osf_torch.Confined.release: what was protected has moved, of %s; the weights stay "
                "as they are: load an earlier checkpoint where that isn't meant",
                listed(moved),
            )
        self._end("release()")
        self.held = []
        stepping.unwatch(self)

    @overload
    def next_task(
        self,
        ranks: Ranks | None = None,
        *,
        batches: None = None,
        widen: Rank | None = None,
        **options: Any,
    ) -> Subspaces: ...
    @overload
    def next_task(
        self,
        ranks: None = None,
        *,
        batches: Iterable[Any],
        widen: None = None,
        **options: Any,
    ) -> Grown: ...
    @torch.inference_mode(False)
    def next_task(
        self,
        ranks: Ranks | None = None,
        *,
        batches: Iterable[Any] | None = None,
        widen: Rank | None = None,
        **options: Any,
    ) -> Subspaces | Grown:
        """At the end of a task: protects what was learned in it too.

        What was learned goes into the weights, and C starts anew, of the new size; one that was
        frozen, as of an earlier task's head, stays so. Make a new optimizer afterwards; the old one
        refuses to step. What was protected until now must be
        where it was, as ``verify`` has it: a turn takes the weights as they are for what is to be
        kept from then on.

        With ``batches`` of the task the bases grow by what the weights read on them, as of
        ``Guard.next_task``. Without, the weights are decomposed as they are now: the new bases are
        no superset of the old ones, and ``widen`` leaves room for both. Either way ``released``
        says what fell out all the same.

        Args:
            ranks, batches, widen, options: as of ``Guard.next_task``, but for ``optimizer_state``:
                no state of C outlives it.

        Returns:
            The new subspaces.

        Raises:
            ValueError, TypeError: as ``Guard.next_task``, of which options take ``previous``;
                without batches bases that protect other counts of rows and of columns, such as
                those of ``input_subspaces``; new ones that leave nothing free; everything is as it
                was.
            RuntimeError: as ``release``; what was protected has moved; update="beside", where W is
                left as it is.
        """
        places, operator = self.places, "Confined.next_task"
        self._require_changeable(places, "next_task")
        if self.update == "beside":
            got = '"beside"' if self.rank is None else f"rank={self.rank}"
            raise RuntimeError(
                f'osf_torch.{operator}: expected update="merge", got {got}, where W is left as it '
                "is; release(), and confine() anew outside of what refresh() or "
                "input_subspaces(previous=...) returns"
            )
        make: Callable[..., Subspaces | Grown]
        if batches is None:
            uneven = [place.name for place in places if not place.spec.is_even]
            if uneven:
                raise ValueError(
                    f"osf_torch.{operator}: expected matrices with bases of triplets, as many of "
                    f"rows as of columns, got others for {listed(uneven)}; pass batches=, which "
                    "extends them by what the weights read, or release(), make new bases and "
                    "confine() anew"
                )
            present = {p.name: p.spec.right.size - p.spec.right.width for p in places}
            chosen = ranks_of(places, present, ranks, widen, operator)
            make = partial(renewed, ranks=chosen, previous=None)
        else:
            require_by_inputs(ranks, widen, operator)
            make = partial(grown, batches=batches, previous=_protected(places))
        self._require_unmoved(operator)
        found = make(
            self._model, places, leave_out=self.leave_out, options=options, operator=operator
        )
        fresh = admitted(self._model, found, self._settings, anew=True)
        tensors = [made(place, self._settings) for place in fresh]
        pairs = zip(places, fresh, strict=True)
        let_go = {old.name: drifting.released(old.spec, new.spec, old.weight) for old, new in pairs}
        frozen = {place.name for place in places if not place.is_trained}
        self._end("next_task()")
        self.begin(fresh, tensors)
        for place in self.places:
            for t in place.trained() if place.name in frozen else ():
                t.requires_grad_(False)
        self.leave_out |= named_by(found)
        self._released = let_go
        return found

    def _require_changeable(self, places: Sequence[Place], method: str) -> None:
        if any(is_fsdp(place.module) for place in places):
            raise RuntimeError(
                f"osf_torch.Confined.{method}: expected a model that fully_shard wasn't called on, "
                "which keeps the parameters that it has; save model.state_dict(), and confine the "
                "plain model anew"
            )

    def _end(self, what: str) -> None:
        """Puts all of C into the weights, and leaves the modules as they were."""
        self.merge()
        with torch.no_grad():
            for place in self.places:
                if place.spec.update == "beside":
                    place.weight.copy_(current(place))
                for t in place.trained():
                    stepping.end(t, what)
                detach(place.module, place.spec)

    # --- what a user asks ---

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Per weight ‖H(W) − H(W₀)‖ / ‖H(W₀)‖, how far what is protected has moved.

        H(W) = W − U_l U_lᵀ W V_l V_lᵀ, and W₀ the weight at ``confine``. Computed in float64 from a
        few random columns that were kept of H(W₀), so that the figure is an estimate to a quarter.
        Of a weight of half precision it has the rounding of W as it is now. A quantized weight is
        dequantized for it, where that is known of its kind, and isn't among them otherwise. Of
        sharded weights a collective. Synchronises.
        """
        return {place.name: found.moved for place, found in self._drifts()}

    def _drifts(self) -> list[tuple[Place, drifting.Drift]]:
        self.merge()
        return [
            (place, drifting.drift(place, place.spec.reference))
            for place in self.places
            if place.spec.reference is not None
        ]

    @torch.no_grad()
    def verify(self, *, tol: float | None = None) -> None:
        """Raises RuntimeError where what is protected isn't: a confined module that isn't in the
        model any more, a weight that was unfrozen, or that something has written to; and where
        another matrix trains that nothing covers and that wasn't left out by name.

        Args:
            tol: on ``drift()``; None is what rounding explains: 1e-5 and two eps of the dtype, and
                for a weight that has grown past ‖H(W₀)‖ as much more.

        A quantized weight whose kind is known is dequantized for it, and one that can't be any more
        is refused with a TypeError. Of any other kind nothing is known but that it is frozen.
        """
        self._require_unmoved("Confined.verify", tol)
        require_told(self.coverage(), "Confined.verify")

    def _require_unmoved(self, operator: str, tol: float | None = None) -> None:
        """Refuses weights that aren't where they were, or whose protected part isn't. Of sharded
        weights a collective."""
        for place in self.places:
            require_in_place(self._model, place)
            require_frozen(place.spec, place.weight)
        for place, (moved, explicable) in self._drifts():
            limit = explicable if tol is None else tol
            if not moved <= limit:
                raise RuntimeError(
                    f"osf_torch.{operator}: expected what is protected of {place.name!r} to have "
                    f"moved by at most {limit:.1e} of its norm, got {moved:.1e}: {explained(place)}"
                )

    def released(self) -> dict[str, float]:
        """Per weight ‖P(H)‖ / ‖H‖ at the last ``next_task``: of the part H that was protected until
        then, the share that may move since, for the new bases don't hold it.

        0 to rounding where they hold all of it; 1 where none. Computed in float64 by ``next_task``,
        of the weights as they are when it is called.

        Raises:
            RuntimeError: there was no next_task yet.
        """
        if not self._released:
            raise RuntimeError(
                "osf_torch.Confined.released: expected next_task() to have been called, got none "
                "so far; the bases are those given to confine()"
            )
        return dict(self._released)

    def base_moved(self) -> dict[str, float]:
        """Per weight that C stands beside ‖W − W₀‖ / ‖W₀‖, how far the weight itself is from what
        it was at ``confine``: 0 to rounding, or something was loaded since."""
        return {
            p.name: drifting.base_moved(p, p.spec.reference)
            for p in self.places
            if p.spec.reference is not None and p.spec.update == "beside"
        }

    def coverage(self) -> Coverage:
        """Which of the parameters that train now are covered, and what the others are; print it,
        or its ``table()``."""
        return coverage(self._model, leave_out=self.leave_out)

    def plan(self, tokens: int) -> str:
        """How the gradients of C are computed for so many tokens a step, and why; in words."""
        return summary.plans(self.places, tokens)

    def summary(self) -> str:
        """Per weight and in sum: what is protected and free, and the bytes that training takes,
        beside those of plain fine-tuning and of PEFT's OSF; then what is covered and what not."""
        return f"{summary.table_of(self.places)}\n{self.coverage().table()}"

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"Confined({len(self.held)} weights, update={self.update!r}{rank})"

    def state_dict(self) -> dict[str, Any]:
        """What resuming takes beside the model's and the optimizer's states: C, the bases, and of
        weights of half precision W₀. All are copies, of sharded weights DTensors, which
        ``torch.distributed.checkpoint`` saves, and loads on any number of ranks: into what this
        returns, which :meth:`load_state_dict` then takes. Of sharded weights a collective.
        """
        self.merge()
        found = state.state_of(self.places, self._settings)
        return {**found, "leave_out": sorted(self.leave_out)}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes up where :meth:`state_dict` was called; the model and optimizer load their own, the
        model before this.

        Raises:
            ValueError: of other weights, shapes, update or rank than the model has; nothing is
                changed.
        """
        state.require_state(saved)
        places = self.places
        state.load(places, saved, self._settings)
        self.reshard(places)
        self._released = {}
        self.leave_out |= set(saved.get("leave_out", ()))


def _protected(places: Sequence[Place]) -> dict[str, InputSubspace]:
    """What the weights' bases leave no room for, with the spectra of what inputs made."""
    found = {}
    for place in places:
        spec = place.spec
        U, V = (
            _protected_side(free, spec.spectra.get(side))
            for side, free in (("U", spec.left), ("V", spec.right))
        )
        found[place.name] = InputSubspace(U=U, V=V, spectra=spec.spectra)
    return found


def _protected_side(free: FreeBasis, spectrum: Spectrum | None) -> Basis | None:
    """What is protected beside the free directions of a side, by the narrower basis; None where
    that is nothing."""
    protected = free.size - free.width
    if not protected:
        return None
    if spectrum is not None:
        return Basis(spectrum.directions)
    if free.width < protected:
        return Basis(free.columns(), "low")
    return Basis(FreeBasis.of(free.columns(), free.size).columns())
