"""prepare: a list of matrices that is decided once and run at every step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels._padding import padded
from osf_kernels.backends import choosing
from osf_kernels.backends.grouped import WORKSPACE_BYTES, Ready
from osf_kernels.backends.jobs import Problem
from osf_kernels.backends.precision import full_precision, lowered
from osf_kernels.errors import Refusal, TypeRefusal, ValueRefusal
from osf_kernels.ops._admission import Admission, require_apart
from osf_kernels.ops._coefficient_list import Allocation, CoefficientList, Origin
from osf_kernels.ops._library import (
    are_plain,
    observed,
    within_fake_mode,
    within_trace,
    within_transform,
)
from osf_kernels.ops._memory import Range
from osf_kernels.ops._names import Names
from osf_kernels.ops._pinned import Pinned
from osf_kernels.ops._pins import Pin, Residual, identities, pins_of, require_pins
from osf_kernels.ops._route import CoefficientRoute, Route, decide
from osf_kernels.ops._summary import summary
from osf_kernels.ops._validation import (
    BasisLike,
    Choice,
    Decision,
    check_basis,
    held,
    kind_of,
    meta,
    require_lengths,
    require_tensor,
)
from osf_kernels.plan import Mode, Plan

_NUMBERS = itertools.count()  # of prepared lists
_AS_HELD = kind_of("coefficients", "complement", "high", "high")  # coefficients know no span


def prepare(
    like: Sequence[Tensor],
    Us: Sequence[BasisLike],
    Vs: Sequence[BasisLike],
    *,
    mode: Mode = "complement",
    sharded: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Prepared:
    """Decides once what projecting or restoring a list of matrices runs, for all steps to come.

    ``prepare(like, Us, Vs).project_(grads)`` is ``project_many_(grads, Us, Vs)``, and
    ``.restore_(weights, S=...)`` is ``restore_many_(weights, Us, Vs, S=...)``; what shapes, dtypes
    and devices decide isn't decided again. ``print`` the result to see what it runs.

    Args:
        like: matrices (..., m, n) such as the weights or their gradients, of any mix of shapes and
            dtypes; only their shapes, dtypes and devices are kept.
        Us, Vs: a basis a matrix as in project, or None where a side is left alone. The tensors are
            kept; what is written to them later holds from the next call on. On a GPU those whose
            rows (or columns, where these are contiguous) aren't of whole 16 bytes are copied once,
            and again when torch has counted a write to them: a write through ``.data`` it doesn't.
        mode: "complement" or "core", for all.
        sharded: the matrices and Us are this rank's rows of larger ones, so that a basis may be
            wider than its side, and only ``coefficients``, ``apply_`` and ``restore_`` with
            coefficients run.
        workspace_bytes: what coefficients and partial sums may take at once on Triton and CUDA
            (256 MiB); a list that needs more uses it several times, and a matrix that does gets
            more. What ``coefficients`` returns is beside it.

    Returns:
        A :class:`Prepared`. It runs on the backend that ``use_backend`` names now.

    Raises:
        TypeError, ValueError: as project_many_, naming the entry.

    Nothing differentiates through what it runs: it refuses what autograd records, and calls inside
    of torch.func; ``project_many_`` is differentiable.

    Mutates nothing; doesn't synchronise; draws no random numbers.
    """
    names = Names("prepare", "like")
    _require_values(names.op)
    require_lengths(names.op, like=like, Us=Us, Vs=Vs)
    for i, x in enumerate(like):
        require_tensor(names.op, f"like[{i}]", x)
    held_U, held_V, kinds = held(names, Us, Vs, mode)
    if not kinds:
        kind_of(names.op, mode, "high", "high")
    if not isinstance(sharded, bool):
        raise TypeRefusal.of(names.op, "sharded", "True or False", repr(sharded))
    if type(workspace_bytes) is not int or workspace_bytes < 1:
        expected, got = "a positive number of bytes", repr(workspace_bytes)
        raise ValueRefusal.of(names.op, "workspace_bytes", expected, got)
    prepared = Prepared(
        names,
        like,
        held_U,
        held_V,
        kinds,
        mode=mode,
        sharded=sharded,
        copies=True,
        workspace_bytes=workspace_bytes,
    )
    if not sharded:
        prepared.make(like)
    return prepared


class Prepared:
    """A list of matrices with what is decided of it; made by :func:`prepare`.

    Every call checks what can have changed since: how many matrices there are, their shapes,
    dtypes, devices and strides, and where their addresses are new, that their memory is apart. It
    refuses before anything is written, naming the entry. Calls from several threads and on several
    streams may overlap. In a CUDA graph keep the object as long as the graph.

    Attributes:
        mode: "complement" or "core".
    """

    def __init__(
        self,
        names: Names,
        like: Sequence[Tensor],
        Us: Sequence[Tensor | None],
        Vs: Sequence[Tensor | None],
        kinds: Sequence[str],
        *,
        mode: Mode,
        sharded: bool = False,
        copies: bool = False,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        self.mode: Mode = mode
        self._number = next(_NUMBERS)
        self._workspace_bytes = workspace_bytes
        self._sharded, self._copies = sharded, copies
        self._request = choosing.requested()
        self._given, self._kinds = (list(Us), list(Vs)), list(kinds)
        self._Us, self._Vs = self._laid_out()
        self._metas = [meta(x) for x in like]
        self._choice: Choice = "shard" if sharded else "any"
        self._halves: Choice = "shard" if sharded else "once"
        self._decisions = self._decided(names, like, self._choice)
        self._admission = Admission(self._metas, Us, Vs)
        self._routes: dict[str, Any] = {}
        self._pinned: Pinned | None = None
        self._allocation: Allocation | None = None

    @property
    def plan(self) -> Plan:
        """What ``project_`` runs, and why; where sharded, what ``coefficients`` and ``apply_`` do,
        of which launches and workspace on Triton and CUDA are told once they have run."""
        device = str(self._metas[0][2]) if self._metas else "cpu"
        keys = ("coefficients", "apply") if self._sharded else ("project",)
        told = [self._routes[key].grouped for key in keys if key in self._routes]
        grouped = sum(calls for calls, _ in told), max((held for _, held in told), default=0)
        pairs = zip((*self._Us, *self._Vs), (*self._given[0], *self._given[1]), strict=True)
        copied = sum(used is not given for used, given in pairs)
        note = f"{copied} bases are copied once: their rows aren't of whole 16 bytes"
        notes = [note] if copied else []
        return summary([d[:4] for d in self._decisions], self.mode, device, grouped, notes)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a list of its own."""
        self.__dict__.update(state)
        self._number = next(_NUMBERS)

    def __len__(self) -> int:
        return len(self._metas)

    def __str__(self) -> str:
        return str(self.plan)

    def project_(self, grads: Sequence[Tensor]) -> None:
        """g ← P(g) in place for every matrix; as :func:`project_many_`, but not differentiable.

        Raises:
            TypeError, ValueError: another count, shape, dtype or device than was prepared;
                overlapping memory; a gradient that autograd differentiates; a sharded list.

        Mutates every matrix of grads; doesn't synchronise; draws no random numbers.
        """
        names = Names("osf_kernels.Prepared.project_", "grads")
        if self._is_traced(names, grads):
            self._require_whole(names.op)
            torch.ops.osf_kernels.project_many_(list(grads), *self._given, self._kinds)
        else:
            self.run_project_(names, grads)

    def restore_(
        self,
        weights: Sequence[Tensor],
        *,
        S: Sequence[Tensor | None] | None = None,
        residual: Sequence[Residual | None] | None = None,
        protected: Sequence[Tensor | None] | None = None,
        coefficients: CoefficientList | None = None,
    ) -> None:
        """W ← P(W) + the protected part that S or ``protected`` names; as :func:`restore_many_`.

        Args:
            S, residual, protected: as in restore_many_; what the same tensors decide is kept from
                one call to the next.
            coefficients: of ``self.coefficients(weights, S=...)``, with the values that the weights
                have now, as for apply_, A summed over the shards; in place of S, residual and
                protected. Without, they are computed here.

        Raises:
            TypeError, ValueError: as project_ and restore_many_; coefficients of another list, or
                of bases or pins that were written to since.

        Mutates every matrix of weights, not the coefficients; doesn't synchronise; draws no random
        numbers.
        """
        names = Names("osf_kernels.Prepared.restore_", "weights")
        if coefficients is not None:
            given = {"S": S, "residual": residual, "protected": protected}
            self._finish_(names, weights, coefficients, given)
            return
        self._require_whole(names.op)
        if self._is_traced(names, weights):
            pins = pins_of(names, len(self), S, residual, protected, self.mode)
            columns = [[pin[j] for pin in pins] for j in range(len(Pin._fields))]
            torch.ops.osf_kernels.restore_many_(
                list(weights), *self._given, *columns, self._kinds, False
            )
        else:
            self.run_restore_(names, weights, S, residual, protected)

    def coefficients(
        self,
        xs: Sequence[Tensor],
        *,
        S: Sequence[Tensor | None] | None = None,
        residual: Sequence[Residual | None] | None = None,
        protected: Sequence[Tensor | None] | None = None,
        root: bool = True,
    ) -> CoefficientList:
        """A = Uᵀ x and B = x V of every matrix; as :func:`coefficients`, but not differentiable.

        Args:
            S, residual, protected: as in restore_, for whose ``coefficients=`` the result is then.
                In mode "complement" A and B are less what S and residual pin them to.
            root: of the shards whose A are summed exactly one takes S Vᵀ and the residual off; this
                one does.

        Returns:
            Coefficients in memory of their own. All-reduce their ``sums`` in place where rows are
            sharded.

        Raises:
            TypeError, ValueError: as project_ and restore_many_.

        Mutates nothing; doesn't synchronise; draws no random numbers.
        """
        names = Names("osf_kernels.Prepared.coefficients", "xs")
        _require_eager(names.op, alone=True)
        if not isinstance(root, bool):
            raise TypeRefusal.of(names.op, "root", "True or False", repr(root))
        pinned = None
        if S is None and residual is None and protected is None:
            self._admit(names, xs, written=False)
            routes, key = self._routes, "coefficients"
        else:
            pinned = self._pin(names, xs, S, residual, protected, written=False)
            routes, key = pinned.routes, "root" if root else "other"
        found = self._places(xs).new(Origin(self._number, self._Us, pinned, xs))
        route = routes.get(key)
        if route is None:
            decisions = self._decided(names, xs, "shard", _AS_HELD)
            route = routes[key] = CoefficientRoute(
                xs,
                self._Us,
                self._Vs,
                found,
                [decision.backend for decision in decisions],
                self._workspace_bytes,
                # In mode "core" Uᵀ x V is pinned, which there is when A is summed.
                None if pinned is None or self.mode == "core" else pinned.operands,
                root=root,
            )
        if pinned is not None:
            pinned.copy()
        self._run(route, xs, found)
        return found

    def apply_(self, xs: Sequence[Tensor], coefficients: CoefficientList) -> None:
        """x ← P(x) in place from ready coefficients, A summed over the shards; as :func:`apply_`.

        Args:
            xs: the matrices with the values that they had in ``coefficients``, or copies. A write
                since is refused where one is the very same tensor and no part of a buffer.

        Raises:
            TypeError, ValueError: as project_; coefficients of another list, or of bases that were
                written to since.

        Mutates every matrix of xs, not the coefficients; doesn't synchronise; draws no random
        numbers.
        """
        names = Names("osf_kernels.Prepared.apply_", "xs")
        _require_eager(names.op, alone=True)
        self._admit(names, xs)
        ready, pinned = self._ready(names, xs, coefficients)
        if pinned is not None:
            expected, got = "of coefficients(xs) without S or protected", "of pinned matrices"
            raise ValueRefusal.of(names.op, "coefficients", expected, got, "pass them to restore_")
        route = self._route("apply", lambda: self._decided(names, xs, self._halves), xs, ready)
        self._run(route, xs, ready)

    # --- what a call checks ---

    def _is_traced(self, names: Names, xs: Sequence[Tensor]) -> bool:
        """Whether a compiler or a mode of tensors without values takes the call, to which it is an
        operator of its own: then nothing is known of memory."""
        _require_eager(names.op)
        if not torch.compiler.is_compiling() and (not observed() or are_plain(xs)):
            _require_values(names.op)
            return False
        self._admission.require_alike(names, xs, written=True)
        return True

    def _require_whole(self, op: str) -> None:
        if self._sharded:
            got = "one of sharded matrices"
            remedy = "use coefficients, and apply_ or restore_ with them"
            raise ValueRefusal.of(op, "the list", "of whole matrices", got, remedy)

    def _admit(
        self,
        names: Names,
        xs: Sequence[Tensor],
        read: Sequence[Range] | None = None,
        *,
        written: bool = True,
    ) -> bool:
        """Refuses matrices that differ from those that were prepared; as ``Admission.admit``."""
        renewed = not self._admission.bases.is_as_noted()
        looked = self._admission.admit(names, xs, read, written=written, anew=renewed)
        if renewed:
            self._renew(names, xs)
        return looked

    def _renew(self, names: Names, xs: Sequence[Tensor]) -> None:
        """Something was written to a basis, or it was given other memory."""
        self._Us, self._Vs = self._laid_out()
        self._decisions = self._decided(names, xs, self._choice)
        self._allocation = None
        self._routes.clear()
        self._pinned = None
        self._admission.bases.note()

    def _laid_out(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The bases, those that kernels would read element by element as copies."""
        if not self._copies:
            Us, Vs = map(list, self._given)
            return Us, Vs
        Us, Vs = ([None if t is None else _aligned(t) for t in side] for side in self._given)
        return Us, Vs

    # --- what runs ---

    def _places(self, xs: Sequence[Tensor]) -> Allocation:
        if self._allocation is None:
            self._allocation = Allocation(xs, self._Us, self._Vs)
        return self._allocation

    def _decided(
        self, names: Names, xs: Sequence[Tensor], choice: Choice, kind: str | None = None
    ) -> list[Decision]:
        if self._sharded:
            for i, (x, V) in enumerate(zip(xs, self._Vs, strict=True)):
                if V is not None:  # whole on every shard
                    with Refusal.of_entry(i):
                        check_basis(names.op, names.entry(i)[2], meta(V), meta(x), left=False)
        decisions = []
        kinds = self._kinds if kind is None else [kind] * len(xs)
        for i, (x, U, V, kind) in enumerate(zip(xs, self._Us, self._Vs, kinds, strict=True)):
            try:
                decisions.append(decide(names.op, "gUV", x, U, V, kind, choice, self._request))
            except Refusal:
                with Refusal.of_entry(i):  # with the caller's names
                    decide(names.op, names.entry(i), x, U, V, kind, choice, self._request)
                raise
        return decisions

    def _route(
        self,
        key: str,
        decided: Callable[[], Sequence[Decision]],
        xs: Sequence[Tensor],
        ready: Sequence[Ready] | None = None,
    ) -> Route:
        route: Route | None = self._routes.get(key)
        if route is None:
            decisions = decided()
            pairs = ready or [(None, None)] * len(xs)
            problems = [
                Problem(x, x, U, V, decision.step, A=A, B=B)
                for x, U, V, decision, (A, B) in zip(
                    xs, self._Us, self._Vs, decisions, pairs, strict=True
                )
            ]
            route = self._routes[key] = Route(
                problems, [d.backend for d in decisions], self._workspace_bytes
            )
        return route

    def _run(
        self,
        route: Any,
        xs: Sequence[Tensor],
        ready: Sequence[Ready] | CoefficientList | None = None,
    ) -> None:
        if not lowered():
            route.run(xs, ready)
            return
        with full_precision():
            route.run(xs, ready)

    def make(self, like: Sequence[Tensor]) -> None:
        """Makes what ``project_`` runs for matrices that lie as these do."""
        self._route("project", lambda: self._decisions, like)

    def run_project_(self, names: Names, grads: Sequence[Tensor]) -> None:
        """``project_`` for the library's own operators, by whose ``names`` it refuses."""
        self._require_whole(names.op)
        self._admit(names, grads)
        self._run(self._route("project", lambda: self._decisions, grads), grads)

    def run_restore_(
        self,
        names: Names,
        weights: Sequence[Tensor],
        S: Sequence[Tensor | None] | None,
        residual: Sequence[Residual | None] | None,
        protected: Sequence[Tensor | None] | None,
    ) -> None:
        """``restore_`` for the library's own operators, by whose ``names`` it refuses."""
        pinned = self._pin(names, weights, S, residual, protected)
        route = pinned.routes.get("whole")
        if route is None:
            route = self._restoring(names, weights, pinned.operands, None)
            pinned.routes["whole"] = route
        pinned.copy()
        self._run(route, weights)

    def _finish_(
        self,
        names: Names,
        weights: Sequence[Tensor],
        coefficients: CoefficientList,
        given: Mapping[str, object],
    ) -> None:
        """``restore_`` from coefficients, which know what the weights are pinned to."""
        _require_eager(names.op, alone=True)
        for name, value in given.items():
            if value is not None:
                got, remedy = "both", "pass it to coefficients alone"
                raise ValueRefusal.of(names.op, name, "None beside coefficients", got, remedy)
        origin = getattr(coefficients, "origin", None)
        pinned = None if origin is None else origin.pinned
        looked = self._admit(names, weights, None if pinned is None else pinned.read)
        ready, pinned = self._ready(names, weights, coefficients)
        if pinned is None:
            expected, got = "of coefficients(weights, S=...)", "of weights that aren't pinned"
            remedy = "pass S, residual or protected to coefficients"
            raise ValueRefusal.of(names.op, "coefficients", expected, got, remedy)
        if looked or not pinned.is_apart:
            self._require_apart(names, weights, pinned)
        route = pinned.routes.get("shard")
        if route is None:
            route = self._restoring(names, weights, pinned.operands, ready)
            pinned.routes["shard"] = route
        self._run(route, weights, ready)

    def _ready(
        self, names: Names, xs: Sequence[Tensor], given: CoefficientList
    ) -> tuple[list[Ready], Pinned | None]:
        """A and B of each matrix, and what they are pinned to."""
        ready = self._places(xs).checked(names.op, given)
        origin = given.origin
        if origin is None or given.A is not origin.made[0] or given.B is not origin.made[1]:
            require_apart(names, xs, **{"coefficients.A": given.A, "coefficients.B": given.B})
        if origin is None:
            return ready, None
        pinned: Pinned | None = origin.pinned
        got, remedy = "", "compute them again"
        beside = " (or something beside them in one buffer)"  # torch counts these writes together
        if origin.number != self._number:
            got = "of another prepared list, or a copy"
            remedy = "take them from coefficients(xs) of this one"
        elif given.sums is not origin.made[2]:
            got, remedy = "with sums of their own", "all-reduce coefficients.sums in place"
        elif origin.bases is not self._Us:
            got = f"of bases that were written to since{beside}"
        elif pinned is not None and not pinned.is_as_noted():
            got = f"of S, residual or protected that were written to since{beside}"
        elif (i := origin.written(xs)) is not None:
            got = f"of {names.entry(i)[0]} as it was before something was written to it"
        if got:
            raise ValueRefusal.of(names.op, "coefficients", f"of these {names.xs}", got, remedy)
        return ready, pinned

    def _pin(
        self,
        names: Names,
        xs: Sequence[Tensor],
        S: Sequence[Tensor | None] | None,
        residual: Sequence[Residual | None] | None,
        protected: Sequence[Tensor | None] | None,
        *,
        written: bool = True,
    ) -> Pinned:
        """What matrices are pinned to, once they and that are admitted."""
        ids, pinned = identities(S, residual, protected), self._pinned
        if pinned is not None and not pinned.holds(ids):
            pinned = None
        read = None if pinned is None else pinned.read
        looked = self._admit(names, xs, read, written=written)
        if pinned is None or pinned is not self._pinned:
            looked = True
            pins = pins_of(names, len(self), S, residual, protected, self.mode)
            dtypes = [dtype for _, dtype, _ in self._metas]
            pinned = Pinned(ids, pins, dtypes, self._admission.bases.ranges)
        if looked:
            require_pins(names, xs, self._Us, self._Vs, self._kinds, pinned.pins)
        if written and (looked or not pinned.is_apart):
            self._require_apart(names, xs, pinned)
        self._pinned = pinned
        return pinned

    def _require_apart(self, names: Names, weights: Sequence[Tensor], pinned: Pinned) -> None:
        if pinned.pins:
            S, protected, first, second = map(list, zip(*pinned.pins, strict=True))
            rests = {"residual": first, "second of residual": second}
            require_apart(names, weights, S=S, protected=protected, **rests)
        pinned.is_apart = True

    def _restoring(
        self,
        names: Names,
        weights: Sequence[Tensor],
        pins: Sequence[Pin],
        ready: Sequence[Ready] | None,
    ) -> Route:
        """``pins`` as problems take them."""
        problems, backend_names = [], []
        pairs = ready or [(None, None)] * len(weights)
        lists = zip(weights, self._Us, self._Vs, self._kinds, pins, pairs, strict=True)
        for i, (W, U, V, kind, pin, (A, B)) in enumerate(lists):
            # Two updates would round a 16-bit weight twice.
            choice: Choice = "any"
            if pin.S is not None:
                choice = "pinned" if not self._sharded else "pinned shard"
            elif ready is not None:
                choice = self._halves
            elif W.element_size() == 2:
                choice = "once"
            decision = decide(names.op, names.entry(i), W, U, V, kind, choice, self._request)
            problems.append(Problem(W, W, U, V, decision.step, A=A, B=B, **pin._asdict()))
            backend_names.append(decision.backend)
        return Route(problems, backend_names, self._workspace_bytes)


def _require_eager(op: str, *, alone: bool = False) -> None:
    """torch.func would differentiate, or batch, and see nothing of what is written.

    ``alone``: the call is no operator that a compiler or a trace could take instead.
    """
    if torch.compiler.is_compiling():
        return
    got = "a call inside" if within_transform() else ""
    if alone:
        _require_values(op)
        got = got or ("a call inside of torch.jit.trace" if within_trace() else "")
    if got:
        expected = "outside of torch.func, of forward mode and of traces"
        remedy = "use the operators of one matrix: project_, restore_, coefficients, apply_"
        raise ValueRefusal.of(op, "the call", expected, got, remedy)


def _require_values(op: str) -> None:
    """What is decided and allocated now is kept, and has to have memory."""
    if within_fake_mode() and not torch.compiler.is_compiling():
        expected, got = "outside of FakeTensorMode", "a call inside"
        raise ValueRefusal.of(op, "the call", expected, got, "use plan, or meta tensors")


def _aligned(t: Tensor) -> Tensor:
    # Of a tensor of inference mode nobody would know when its copy is out of date.
    return t if t.is_inference() else padded(t)
