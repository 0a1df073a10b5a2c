"""Which form of the projection runs, what it costs and why: pure Python, no tensors.

The forms are those of ``osf_kernels/forms.py``. With H the protected projector of a
side (H = U Uᵀ for high columns, I − U Uᵀ for low ones), E = U Uᵀ and F = V Vᵀ of the columns
as held, the two modes reduce to the same four expressions:

==============  ===========================  ==============================
columns held    complement (I−H) g (I−H')    core g − H g H'
==============  ===========================  ==============================
high, high      g − (E g + g F − E g F)      g − E g F
low, high       E g (I − F)                  g − (I − E) g F
high, low       (I − E) g F                  g − E g (I − F)
low, low        E g F                        E g + g F − E g F
==============  ===========================  ==============================

Source of the costs: the calls of a form in that table. FLOPs are counted (2 m n k a product), and
bytes are those of g, the bases and the coefficients, each read or written once a call.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from osf_kernels import cpu
from osf_kernels.forms import FORMS, Call, Expand, First, Name, Work, calls_of, in_halves, work

Mode = Literal["complement", "core"]
Side = Literal["nothing", "everything", "high", "low"]

MODES: tuple[Mode, ...] = ("complement", "core")

# FLOPs a device does in the time it moves one byte; it only weighs a pass over g against extra
# FLOPs. GPUs: bf16 ridge ranks 117 (sm_80) and 155 (sm_90) of three passes, times 4/3.
FLOPS_PER_BYTE = 156.0

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Matrix:
    """What the planner knows of one matrix (or of a batch of equal ones)."""

    m: int
    n: int
    r: int | None  # columns held on the left, None where U is missing
    k: int | None
    u_spans: str = "high"
    v_spans: str = "high"
    dtype: str = "float32"
    basis_dtype: str = "float32"
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One matrix's plan: result = beta·g + alpha·X(form)."""

    form: Name
    first: First
    alpha: float
    beta: float
    flops: int
    bytes: int
    passes: int  # reads and writes of g itself; before a backend is chosen, the least of them
    why: str
    label: str  # the form in the words a person uses
    joined: bool = False  # dual: both terms in one product of [U, B] and [A; Vᵀ]
    halves: str = ""  # of coefficients and apply_: which coefficients there are, "A", "B" or "AB"

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the two kernels, in order."""
        calls = calls_of(self.form, self.first)
        return in_halves(calls, self.halves) if self.halves else calls


@dataclass(frozen=True)
class Plan:
    """What a call would run, and why. ``print`` it.

    Attributes:
        form: the form, or the forms of a list, joined by " + ".
        flops: floating-point operations of all matrices (a multiply-add is two).
        bytes: bytes read and written, each operand once a step.
        launches: on triton, launches: one for all matrices that agree on dtypes, layouts and tile
            config; on cuda, calls of its two kernels, each one launch for the matrices that agree
            on dtype and class of ranks, 127 at a time, in every slice that the workspace holds; on
            the torch backend, matmuls.
        workspace_bytes: coefficients and partial sums that live at once.
        backend: the backend, or the backends of a list, joined by " + ".
        why: the reason for the form and for the backend.
        notes: what else a list is prepared by, such as bases that are copied.
        matrices: (Matrix, Step, backend) of each matrix in order.
        architecture: "cpu" or a GPU's, where the plan was asked for one by name.
    """

    form: str
    flops: int
    bytes: int
    launches: int
    workspace_bytes: int
    backend: str
    why: str
    mode: Mode
    device: str
    matrices: tuple[tuple[Matrix, Step, str], ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    architecture: str | None = None

    @property
    def _passes(self) -> str:
        """The least and the most reads and writes of a matrix in the list."""
        found = sorted({step.passes for _, step, _ in self.matrices}) or [0]
        return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"

    @property
    def _each_launch(self) -> str:
        """Why a list takes more than one of Triton's."""
        if self.backend != "triton" or self.launches < 2:
            return ""
        return ": one a kind of dtypes, layouts and tile config; of bfloat16 in a mixed form two"

    def __str__(self) -> str:
        kinds = Counter((_shape(x), step.label, backend) for x, step, backend in self.matrices)
        where = self.architecture or self.device
        lines = [f"{self.mode} projection on {where}, {_plural(len(self.matrices))}"]
        width = max((len(shape) for shape, _, _ in kinds), default=0)
        lines += [
            f"  {count:4d} × {shape:<{width}}  {label} [{backend}]"
            for (shape, label, backend), count in kinds.items()
        ]
        lines += [
            f"  form      {self.form}",
            f"  FLOPs     {_scaled(self.flops, 1000, ('', 'k', 'M', 'G', 'T', 'P'))}",
            f"  bytes     {_scaled(self.bytes, 1024, _BYTE_UNITS)}",
            f"  passes    {self._passes} over the matrices, of memory",
            f"  launches  {self.launches}{self._each_launch}",
            f"  workspace {_scaled(self.workspace_bytes, 1024, _BYTE_UNITS)}",
            f"  backend   {self.backend}",
            f"  why       {self.why}",
            *[f"  note      {note}" for note in self.notes],
        ]
        return "\n".join(lines)


_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    """With one digit behind the point, in the largest unit of which there is one."""
    power = 0
    while value >= step and power + 1 < len(units):
        value, power = value / step, power + 1
    return f"{value:.{0 if power == 0 else 1}f} {units[power]}".rstrip()


def _plural(count: int) -> str:
    return "1 matrix" if count == 1 else f"{count} matrices"


def _shape(x: Matrix) -> str:
    def side(name: str, width: int | None, spans: str) -> str:
        return f"{name} -" if width is None else f"{name} {width} {spans}"

    lead = f"{x.batch}×" if x.batch != 1 else ""
    left, right = side("U", x.r, x.u_spans), side("V", x.k, x.v_spans)
    return f"{lead}{x.m}×{x.n} {x.dtype}, {left}, {right}"


def _protected(width: int | None, spans: str, size: int | None, missing: Side) -> Side:
    """What a side protects; one without columns to multiply is nothing or everything."""
    if width is None:
        return missing
    if width == 0:
        return "nothing" if spans == "high" else "everything"
    if width == size:
        return "everything" if spans == "high" else "nothing"
    return "high" if spans == "high" else "low"


@lru_cache(maxsize=4096)
def choose(x: Matrix, mode: Mode, device: str, once: bool = False, shard: bool = False) -> Step:
    """The cheapest form for one matrix: min over forms of FLOPs/rate + bytes/bandwidth.

    With ``once`` the result is written in one update (restore rounds once; a caller's ready
    coefficients are all of the g before it), which rules the sequential form out. With
    ``shard`` the matrix and U are some rows of larger ones: a U of m columns may not be all of
    its side.
    """
    step = _chosen(x, mode, device, once, shard)
    return _in_halves(x, step) if shard else step


def _in_halves(x: Matrix, step: Step) -> Step:
    """The step with what coefficients and apply_ cost."""
    sides = ("" if x.r is None else "A") + ("" if x.k is None else "B")
    without_calls = not calls_of(step.form)
    return _priced(x, replace(step, halves=sides), step.passes if without_calls else 0)


def _chosen(x: Matrix, mode: Mode, device: str, once: bool, shard: bool) -> Step:
    core = mode == "core"
    # A missing basis leaves its side alone: in (I − H) g (I − H') that is H = 0, in g − H g H'
    # it is H = I.
    missing: Side = "everything" if core and not (x.r is None and x.k is None) else "nothing"
    left = _protected(x.r, x.u_spans, None if shard else x.m, missing)
    right = _protected(x.k, x.v_spans, x.n, missing)
    if x.m == 0 or x.n == 0 or x.batch == 0:
        return _trivial(x, "identity", "nothing to project: a dimension is zero")
    alone, removed = ("everything", "nothing") if core else ("nothing", "everything")
    if removed in (left, right):
        if core:
            return _trivial(x, "identity", "a side protects nothing: the result is g")
        return _trivial(x, "zero", "a side is protected whole: the result is exactly zero")
    if left == alone and right == alone:
        if core:
            return _trivial(x, "zero", "everything is protected: the result is exactly zero")
        return _trivial(x, "identity", "nothing is protected: the result is g")
    if right == alone:
        return _one_sided(x, "left", left)
    if left == alone:
        return _one_sided(x, "right", right)
    return _two_sided(x, left, right, flip=core, device=device, once=once)


def _trivial(x: Matrix, form: Literal["identity", "zero"], why: str) -> Step:
    passes, beta = (0, 1.0) if form == "identity" else (2, 0.0)
    return _priced(x, Step(form, "left", 0.0, beta, 0, 0, 0, why, form), passes)


def _one_sided(x: Matrix, form: Literal["left", "right"], side: Side) -> Step:
    beta, alpha = (1.0, -1.0) if side == "high" else (0.0, 1.0)
    return _step(x, form, form, alpha, beta)


def _step(
    x: Matrix, form: Name, first: First, alpha: float, beta: float, joined: bool = False
) -> Step:
    """The form with its cost."""
    told, at = FORMS[form], int(beta)
    label = told.labels[at].format(first=first)
    step = Step(form, first, alpha, beta, 0, 0, 0, told.reasons[at], label, joined)
    return _priced(x, step)


def _work(x: Matrix, step: Step) -> Work:
    return work(step.calls, step.beta, x.m, x.n, x.r or 0, x.k or 0)


def _priced(x: Matrix, step: Step, more: int = 0) -> Step:
    """With the figures of the step's calls, and so many passes over g beside them."""
    does = _work(x, step)
    passes = does.passes + more
    moved = passes * x.m * x.n * BYTES[x.dtype]
    moved += does.bases * BYTES[x.basis_dtype] + does.coefficients * 4
    return replace(step, flops=does.flops * x.batch, bytes=moved * x.batch, passes=passes)


def choose_pinned(x: Matrix, mode: Mode, device: str, shard: bool = False) -> Step:
    """The form that pins high bases to their singular values: never simplified away.

    Even a side that is protected whole has a value to be pinned to, so only r = k = 0 is trivial.
    """
    if not (x.r or x.k) or x.m == 0 or x.n == 0 or x.batch == 0:
        step = _trivial(x, "identity", "nothing is protected: W stays")
    else:
        step = _two_sided(x, "high", "high", flip=mode == "core", device=device, once=True)
    return _in_halves(x, step) if shard else step


def _two_sided(x: Matrix, left: Side, right: Side, *, flip: bool, device: str, once: bool) -> Step:
    """Complement of (left, right), or for core g minus the complement of the flipped sides."""
    high_left, high_right = (left == "high") != flip, (right == "high") != flip
    candidates: list[tuple[Name, First]]
    joined = (x.r or 0) + (x.k or 0) <= cpu.JOIN_LIMIT * min(x.m, x.n)
    both_high = high_left and high_right
    # Either g less X, or X itself.
    alpha, beta = (-1.0, 1.0) if both_high != flip else (1.0, 0.0)
    if both_high:
        # E g + g F − E g F of wide low bases adds three terms of g's own size: float32 error 2.3
        # times eager's at p = 0.9 m. Beyond half a side g minus the rest is subtracted instead.
        wide = flip and (2 * (x.r or 0) > x.m or 2 * (x.k or 0) > x.n)
        # On a CPU always: dual erred 2.4 times as much as eager for g where both sides hold it.
        # Without the join, dual's two updates on a CPU are as many passes as sequential's.
        if once:
            candidates = [("dual", "left")]
        elif flip:
            candidates = [("dual in turn" if wide or device == "cpu" else "dual", "left")]
        elif device == "cpu" and not joined:
            candidates = [("sequential", "left")]
        else:
            candidates = [("dual", "left"), ("sequential", "left")]
    elif high_left or high_right:
        candidates = [("mixed", "right" if high_left else "left")]
    else:
        # On a tie in bf16 right first: g V needs no transpose, and on a CPU took 0.6 of Uᵀ g.
        # Else left first, as eager torch: errors of Uᵀ g are random along its rows, and V keeps
        # few of them; right first errs up to 2.7 times as much as eager, left first 1.5.
        candidates = [("inner", "left"), ("inner", "right")]
        if x.dtype == "bfloat16":
            candidates.reverse()
    balance = FLOPS_PER_BYTE
    if device == "cpu":
        balance = cpu.flops_per_byte(x.dtype, x.m * x.n * BYTES[x.dtype])
    steps = [_step(x, form, first, alpha, beta, joined) for form, first in candidates]
    step = min(steps, key=lambda step: step.flops + balance * step.bytes)
    if device == "cpu" and not once and x.dtype in ("float32", "float64"):
        in_turn: Name | None = None
        if step.form == "inner" and (min(x.r or 0, x.k or 0) < 8 or x.dtype == "float64"):
            in_turn = "inner in turn"  # of more columns, left first errs no more than 1.5 times
        elif step.form == "mixed" and step.first == "right":
            in_turn = "mixed in turn"
        if in_turn is not None:
            dearer = _step(x, in_turn, "left", alpha, beta, joined)
            affordable = max(cpu.IN_TURN_FLOPS, cpu.IN_TURN_PART * step.flops)
            if x.dtype == "float64" or dearer.flops - step.flops <= affordable:
                return dearer
    return step


def on_backend(x: Matrix, step: Step, reads: int, composed: bool, kept: bool = False) -> Step:
    """A step with the passes over g that a backend makes.

    Args:
        reads: how often the backend reads g for the coefficients of both sides.
        composed: whether torch runs it, product by product: a sum into a matrix of its own copies
            g there first, and the terms of an update that aren't joined are added one by one.
        kept: whether all calls are one launch in which g is in the cache whenever it is read again:
            memory sees one read and one write.
    """
    more = 0
    for call in step.calls:
        if call.into == "AB":
            more += reads - 1
        elif composed and isinstance(call, Expand):
            copies = (call.into == "w" and call.beta != 0.0) + (call.plus != "")
            more += 2 * (copies + (call.by == "AB" and not step.joined))
    if kept and step.calls and not step.halves:
        if step.passes > 2:
            step = replace(step, why=f"{step.why}; g is in L2 when the update reads it again")
        more = 2 - step.passes
    moved = more * x.batch * x.m * x.n * BYTES[x.dtype]
    return replace(step, passes=step.passes + more, bytes=step.bytes + moved)


def coefficient_bytes(x: Matrix, step: Step) -> int:
    """What the coefficients of one matrix take at once where they are composed from matmuls."""
    r, k = x.r or 0, x.k or 0
    elements = _work(x, step).held
    if step.form == "dual" and step.joined:
        elements += (r + k) * (x.m + x.n)
    same = x.dtype == x.basis_dtype != "float16"
    return elements * x.batch * (BYTES[x.dtype] if same else 4)
