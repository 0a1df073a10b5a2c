"""prepare: a list of matrices that is decided once and run at every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osf_kernels import backends
from osf_kernels.backends.forms import Coefficients, Problem, coefficient_dtype
from osf_kernels.backends.grouped import Ready
from osf_kernels.backends.precision import full_precision
from osf_kernels.errors import describe
from osf_kernels.ops._library import observed
from osf_kernels.ops._memory import (
    require_distinct,
    require_no_leaf,
    require_no_meta_among,
    require_own_memory,
    require_target,
    require_writable,
)
from osf_kernels.ops._names import Names
from osf_kernels.ops._pins import Pin, Residual, identities, pins_of, require_pins
from osf_kernels.ops._route import Route, decide, unbatch
from osf_kernels.ops._validation import (
    BasisLike,
    Choice,
    Decision,
    Meta,
    held,
    kind_of,
    meta,
    require_constant,
    require_lengths,
    require_tensor,
)
from osf_kernels.plan import Mode, Plan

_AS_HELD = kind_of("coefficients", "complement", "high", "high")  # coefficients know no span


def prepare(
    like: Sequence[Tensor],
    Us: Sequence[BasisLike],
    Vs: Sequence[BasisLike],
    *,
    mode: Mode = "complement",
    sharded: bool = False,
) -> Prepared:
    """Decides once what projecting or restoring a list of matrices runs, for all steps to come.

    ``prepare(like, Us, Vs).project_(grads)`` is ``project_many_(grads, Us, Vs)``, and
    ``.restore_(weights, S=...)`` is ``restore_many_(weights, Us, Vs, S=...)``; what shapes, dtypes
    and devices decide isn't decided again. ``print`` the result to see what it runs.

    Args:
        like: matrices (..., m, n) such as the weights or their gradients, of any mix of shapes and
            dtypes; only their shapes, dtypes and devices are kept.
        Us, Vs: a basis a matrix as in project, or None where a side is left alone. The tensors are
            kept; what is written to them later holds from the next call on.
        mode: "complement" or "core", for all.
        sharded: the matrices and Us are this rank's rows of larger ones, so that a basis may be
            wider than its side, and only ``coefficients``, ``apply_`` and ``restore_`` with
            coefficients run.

    Returns:
        A :class:`Prepared`. It runs on the backend that ``use_backend`` names now.

    Raises:
        TypeError, ValueError: as project_many_, naming the entry.

    Mutates nothing; doesn't synchronise; draws no random numbers.
    """
    names = Names("prepare", "like")
    require_lengths(names.op, like=like, Us=Us, Vs=Vs)
    for i, x in enumerate(like):
        require_tensor(names.op, f"like[{i}]", x)
    held_U, held_V, kinds = held(names, Us, Vs, mode)
    if not kinds:
        kind_of(names.op, mode, "high", "high")
    return Prepared(names, like, held_U, held_V, kinds, mode=mode, sharded=sharded)


class CoefficientList(NamedTuple):
    """A = Uᵀ x and B = x V of every matrix of a list.

    Attributes:
        A, B: a tensor (..., r, n) and (..., m, k) a matrix, float32 (float64 for float64 x).
        sums: flat tensors, one a device and dtype, which hold all of A: of matrices whose rows are
            sharded, all-reduce these in place.
    """

    A: list[Tensor]
    B: list[Tensor]
    sums: tuple[Tensor, ...]


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
    ) -> None:
        self.mode: Mode = mode
        self._sharded = sharded
        self._request = backends.requested()
        self._Us, self._Vs, self._kinds = list(Us), list(Vs), list(kinds)
        self._metas = [meta(x) for x in like]
        self._choice: Choice = "shard" if sharded else "any"
        self._decisions = self._decided(names, like, self._choice)
        self._coefficient_metas: list[tuple[Meta, Meta]] | None = None
        self._held = [t for t in (*self._Us, *self._Vs) if t is not None]
        self._stamp = _stamp(self._held)
        self._admitted: dict[str, list[Any]] = {}
        self._routes: dict[object, Route] = {}
        self._pinned: _Pinned | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        """What ``project_`` runs (where sharded: ``apply_``), and why."""
        device = str(self._metas[0][2]) if self._metas else "cpu"
        return backends.summary([d[:4] for d in self._decisions], self.mode, device)

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
        if observed():
            torch.ops.osf_kernels.project_many_(grads, self._Us, self._Vs, self._kinds)
        else:
            self.run_project_(Names("Prepared.project_", "grads"), grads)

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
            coefficients: of ``self.coefficients(weights)``, A summed over the shards; without, they
                are computed here. Their memory may be written to.

        Raises:
            TypeError, ValueError: as project_ and restore_many_.

        Mutates every matrix of weights; doesn't synchronise; draws no random numbers.
        """
        names = Names("Prepared.restore_", "weights")
        if coefficients is None:
            self._require_whole(names.op)
        if observed() and coefficients is None:
            pins = pins_of(names, len(self), S, residual, protected, self.mode)
            torch.ops.osf_kernels.restore_many_(
                weights, self._Us, self._Vs, *map(list, zip(*pins, strict=True)), self._kinds, False
            )
        else:
            self.run_restore_(names, weights, S, residual, protected, coefficients)

    def coefficients(self, xs: Sequence[Tensor]) -> CoefficientList:
        """A = Uᵀ x and B = x V of every matrix; as :func:`coefficients`, but not differentiable.

        Returns:
            Coefficients in memory of their own.

        Raises:
            TypeError, ValueError: as project_.

        Mutates nothing; doesn't synchronise; draws no random numbers.
        """
        names = Names("Prepared.coefficients", "xs")
        self._admit(names, xs, written=False)
        return self._run_coefficients(xs)

    def apply_(self, xs: Sequence[Tensor], coefficients: CoefficientList) -> None:
        """x ← P(x) in place from ready coefficients, A summed over the shards; as :func:`apply_`.

        Raises:
            TypeError, ValueError: as project_; coefficients of another list.

        Mutates every matrix of xs, not the coefficients; doesn't synchronise; draws no random
        numbers.
        """
        names = Names("Prepared.apply_", "xs")
        self._admit(names, xs)
        ready = self._ready(names.op, coefficients)
        route = self._route("apply", lambda: self._decided(names, xs, "shard"), xs, ready)
        self._run(route, xs, ready)

    # --- what a call checks ---

    def _require_whole(self, op: str) -> None:
        if self._sharded:
            got, remedy = "one of sharded matrices", "use coefficients and apply_"
            raise ValueError(describe(op, "the list", "of whole matrices", got, remedy))

    def _admit(self, names: Names, xs: Sequence[Tensor], *, written: bool = True) -> bool:
        """Refuses matrices that differ from those that were prepared; whether some lie elsewhere
        than those of the last call did."""
        stamp = _stamp(self._held)
        renewed = stamp != self._stamp
        try:
            found: list[Any] = [
                (type(x), x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x.is_inference())
                for x in xs
            ]
            recorded = torch.is_grad_enabled() and True in [x.requires_grad for x in xs]
        except (
            AttributeError,
            RuntimeError,
            NotImplementedError,
        ):  # no tensor, or none with memory
            found, recorded = [], False
        known = self._admitted.get(names.op)
        if found and not recorded and found == known and not renewed:
            return False
        self._judge(names, xs, written)
        if renewed:
            self._renew(names, xs, stamp)
        self._admitted[names.op] = found
        return True

    def _judge(self, names: Names, xs: Sequence[Tensor], written: bool) -> None:
        op = names.op
        require_lengths(op, **{names.xs: xs})
        if len(xs) != len(self):
            expected = f"as long as what was prepared ({len(self)})"
            raise ValueError(describe(op, names.xs, expected, f"{len(xs)} entries"))
        for i, (x, known) in enumerate(zip(xs, self._metas, strict=True)):
            name = names.entry(i)[0]
            require_target(op, name, x)
            if meta(x) != known:
                shape, dtype, device = known
                expected = f"{tuple(shape)} {dtype} on {device} as it was prepared"
                got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
                kind = TypeError if x.dtype != dtype else ValueError
                raise kind(describe(op, name, expected, got, "prepare the list again"))
            if written:
                require_no_leaf(op, name, x)
            require_constant(op, [name], x)
        if written:
            require_apart(names, xs, Us=self._Us, Vs=self._Vs)

    def _renew(self, names: Names, xs: Sequence[Tensor], stamp: list[object]) -> None:
        """Something was written to a basis, or it was given other memory."""
        self._decisions = self._decided(names, xs, self._choice)
        self._coefficient_metas = None
        self.__dict__.pop("plan", None)
        self._routes.clear()
        self._admitted.clear()
        self._pinned = None
        self._stamp = stamp

    # --- what runs ---

    def _decided(self, names: Names, xs: Sequence[Tensor], choice: Choice) -> list[Decision]:
        decisions = []
        lists = zip(xs, self._Us, self._Vs, self._kinds, strict=True)
        for i, (x, U, V, kind) in enumerate(lists):
            try:
                decisions.append(decide(names.op, "gUV", x, U, V, kind, choice, self._request))
            except (TypeError, ValueError):
                decide(names.op, names.entry(i), x, U, V, kind, choice, self._request)
                raise
        return decisions

    def _route(
        self,
        key: object,
        decided: Callable[[], Sequence[Decision]],
        xs: Sequence[Tensor],
        ready: Sequence[Ready] | None = None,
    ) -> Route:
        route = self._routes.get(key)
        if route is None:
            decisions = decided()
            pairs = ready or [(None, None)] * len(xs)
            problems = [
                Problem(x, x, U, V, decision.step, A=A, B=B)
                for x, U, V, decision, (A, B) in zip(
                    xs, self._Us, self._Vs, decisions, pairs, strict=True
                )
            ]
            route = self._routes[key] = Route(problems, [d.backend for d in decisions])
        return route

    def _run(
        self,
        route: Route,
        xs: Sequence[Tensor],
        ready: Sequence[Ready] | None = None,
    ) -> None:
        with full_precision():
            route.run(xs, ready)

    def run_project_(self, names: Names, grads: Sequence[Tensor]) -> None:
        """``project_`` as the operator that ``names`` says."""
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
        coefficients: CoefficientList | None = None,
    ) -> None:
        """``restore_`` as the operator that ``names`` says."""
        moved = self._admit(names, weights)
        ids, pinned = identities(S, residual, protected), self._pinned
        known = pinned is not None and pinned.holds(ids)
        if pinned is None or not known:
            pins = pins_of(names, len(self), S, residual, protected, self.mode)
            pinned = _Pinned(ids, pins, self._metas)
        if moved or not known:
            require_pins(names, weights, self._Us, self._Vs, self._kinds, pinned.pins)
            if pinned.pins:
                S, protected, first, second = map(list, zip(*pinned.pins, strict=True))
                rests = {"residual": first, "second of residual": second}
                require_apart(names, weights, S=S, protected=protected, **rests)
            self._pinned = pinned
        ready = None if coefficients is None else self._ready(names.op, coefficients)
        route = pinned.routes.get(ready is None)
        if route is None:
            route = self._restoring(names, weights, pinned.operands, ready)
            pinned.routes[ready is None] = route
        pinned.copy()
        self._run(route, weights, ready)

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
                choice = "pinned" if ready is None else "pinned shard"
            elif ready is not None:
                choice = "shard"
            elif W.element_size() == 2:
                choice = "once"
            decision = decide(names.op, names.entry(i), W, U, V, kind, choice, self._request)
            problems.append(Problem(W, W, U, V, decision.step, A=A, B=B, **pin._asdict()))
            backend_names.append(decision.backend)
        return Route(problems, backend_names)

    def _run_coefficients(self, xs: Sequence[Tensor]) -> CoefficientList:
        decisions = [
            decide("coefficients", "gUV", x, U, V, _AS_HELD, "shard", self._request)
            for x, U, V in zip(xs, self._Us, self._Vs, strict=True)
        ]
        found = _allocated(xs, self._Us, self._Vs)
        jobs: dict[str, list[Coefficients]] = {}
        for x, U, V, A, B, decision in zip(
            xs, self._Us, self._Vs, found.A, found.B, decisions, strict=True
        ):
            if x.numel() == 0:
                A.zero_()
                B.zero_()
                continue
            left = (U, A) if A.numel() else (None, None)
            right = (V, B) if B.numel() else (None, None)
            if A.numel() or B.numel():
                job = Coefficients(x, left[0], right[0], left[1], right[1])
                jobs.setdefault(decision.backend, []).extend(unbatch(job, decision.backend))
        with full_precision():
            for name, mine in jobs.items():
                backends.module(name).coefficients(mine)
        return found

    def _ready(self, op: str, coefficients: CoefficientList) -> list[Ready]:
        if not isinstance(coefficients, CoefficientList) or not (
            len(coefficients.A) == len(coefficients.B) == len(self)
        ):
            expected = f"those of {len(self)} matrices"
            remedy = "take them from coefficients(xs) of this prepared list"
            raise ValueError(describe(op, "coefficients", expected, "others", remedy))
        metas = self._coefficient_metas
        if metas is None:
            metas = self._coefficient_metas = self._metas_of_coefficients()
        found: list[Ready] = []
        lists = zip(coefficients.A, coefficients.B, metas, self._Us, self._Vs, strict=True)
        for i, (A, B, (of_A, of_B), U, V) in enumerate(lists):
            for name, t, known in (("A", A, of_A), ("B", B, of_B)):
                if meta(t) != known or t.requires_grad:
                    _refuse_coefficient(op, f"coefficients.{name}[{i}]", t, known)
            found.append((None if U is None else A, None if V is None else B))
        return found

    def _metas_of_coefficients(self) -> list[tuple[Meta, Meta]]:
        found = []
        for (shape, dtype, device), U, V in zip(self._metas, self._Us, self._Vs, strict=True):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            of_A, of_B = coefficient_shapes(shape, U, V)
            found.append(((of_A, wide, device), (of_B, wide, device)))
        return found


def _refuse_coefficient(op: str, name: str, t: Tensor, expected: Meta) -> None:
    require_constant(op, [name], t)
    if meta(t) != expected:
        shape, dtype, device = expected
        wanted, got = (f"{tuple(s)} {d} on {o}" for s, d, o in ((shape, dtype, device), meta(t)))
        remedy = "take them from coefficients(xs) of this prepared list"
        raise ValueError(describe(op, name, wanted, got, remedy))


class _Pinned:
    """The pins of the last call, what they run, and whether others are the very same tensors.

    Attributes:
        operands: the pins as problems of their weights take them.
        routes: by whether coefficients are computed.
    """

    def __init__(self, ids: list[int], pins: list[Pin], metas: Sequence[Meta]) -> None:
        self.ids, self.pins = ids, pins
        self.routes: dict[bool, Route] = {}
        self.operands = [
            pin.operands(dtype) for pin, (_, dtype, _) in zip(pins, metas, strict=True)
        ]
        self._copies = [
            (converted, t)
            for pin, operands in zip(pins, self.operands, strict=True)
            for t, converted in zip(pin, operands, strict=True)
            if t is not None and converted is not None and converted is not t
        ]
        self._held = [t for pin in pins for t in pin if t is not None]
        self._stamp = _stamp(self._held)

    def holds(self, ids: list[int]) -> bool:
        return ids == self.ids and _stamp(self._held) == self._stamp

    def copy(self) -> None:
        """What is held in another dtype follows writes that no version counts, and a graph's."""
        for converted, t in self._copies:
            converted.copy_(t)


def _stamp(tensors: Sequence[Tensor]) -> list[object]:
    """Where tensors lie and how often they were written to."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def require_apart(names: Names, written: Sequence[Tensor], **read: Sequence[Tensor | None]) -> None:
    """No matrix shares memory with itself, with another, nor with what is read."""
    if names.single:
        operands = ["U" if name == "Us" else "V" if name == "Vs" else name for name in read]
        require_writable(
            names.op, [names.xs, *operands], written[0], *(t[0] for t in read.values())
        )
        return
    for i, x in enumerate(written):
        require_own_memory(names.op, names.entry(i)[0], x)
    require_no_meta_among(names.op, names.xs, written)
    require_distinct(names.op, names.xs, written, read)


def coefficient_shapes(
    shape: Sequence[int], U: Tensor | None, V: Tensor | None
) -> tuple[torch.Size, torch.Size]:
    r = 0 if U is None else U.shape[-1]
    k = 0 if V is None else V.shape[-1]
    *batch, m, n = shape
    return torch.Size((*batch, r, n)), torch.Size((*batch, m, k))


def _allocated(
    xs: Sequence[Tensor], Us: Sequence[Tensor | None], Vs: Sequence[Tensor | None]
) -> CoefficientList:
    """Coefficients without values: all of A side by side."""
    shapes = [coefficient_shapes(x.shape, U, V) for x, U, V in zip(xs, Us, Vs, strict=True)]
    kinds = [(x.device, coefficient_dtype(x)) for x in xs]
    sums: dict[Any, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        total = sum(s[0].numel() for s, other in zip(shapes, kinds, strict=True) if other == kind)
        sums[kind] = torch.empty(total, dtype=kind[1], device=kind[0])
    A, B, starts = [], [], dict.fromkeys(sums, 0)
    for x, (shape_A, shape_B), kind in zip(xs, shapes, kinds, strict=True):
        start = starts[kind]
        starts[kind] = end = start + shape_A.numel()
        A.append(sums[kind][start:end].view(shape_A))
        B.append(x.new_empty(shape_B, dtype=kind[1]))
    return CoefficientList(A, B, tuple(sums.values()))
