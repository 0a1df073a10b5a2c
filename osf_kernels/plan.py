"""Which form of the projection runs, what it costs and why: pure Python, no tensors.

The forms are those of ``osf_kernels/backends/forms.py``. With H the protected projector of a
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

Source of the costs: FLOPs are counted (2 m n k a product); bytes are the passes over g and the
bases and coefficients read and written once a step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

Mode = Literal["complement", "core"]
Side = Literal["nothing", "everything", "high", "low"]
Form = Literal[
    "identity",
    "zero",
    "left",
    "right",
    "dual",
    "sequential",
    "mixed",
    "inner",
    "mixed in turn",
    "inner in turn",
]

MODES: tuple[Mode, ...] = ("complement", "core")

# FLOPs a device does in the time it moves one byte; it only weighs a pass over g against extra
# FLOPs. GPUs: bf16 ridge ranks 117 (sm_80) and 155 (sm_90) of three passes, times 4/3.
FLOPS_PER_BYTE = 156.0
# Two AVX-512/AMX cores: 0.19 TFLOP/s fp32 and 0.6 bf16 against copies of 16 GB/s, of which large
# in-place updates reach 25 (bench/results/projection_cpu.csv).
CPU_FLOPS_PER_BYTE = {"bfloat16": 24.0}
CPU_FLOPS_PER_BYTE_ELSE = 12.0

# A matrix this small stays in a CPU's caches, where passes over it cost nothing beside the calls.
# Measured, dual over sequential time: fp32 1.0-2 at 384² to 2048², 0.9 at 3072²; bf16 1.0-1.4 at
# 384² to 1024², 0.7-0.98 at 2048² with r ≤ n/8.
CPU_CACHE_BYTES = {"bfloat16": 4 * 2**20}
CPU_CACHE_BYTES_ELSE = 32 * 2**20

# Above this many columns a side a grouped hand-written kernel is FLOP-bound and library GEMMs
# are ahead of it: the bf16 ridge rank of sm_90. To be replaced by a measured table.
GROUPED_RANK_LIMIT = 160

# Without a kernel of our own, two updates joined into one cost a copy of their factors and save a
# read and a write of g: worth it while the joined rank is under this part of the smaller side.
JOIN_LIMIT = 0.25

# Both sides in turn on all of g, as a person writes the formula, err less for a gradient that lies
# where both sides hold. It is taken on a CPU where it costs no more than this beside the fewest
# products: so many FLOPs (3 µs of a core), or this part of them; in float64 always.
IN_TURN_FLOPS = 3 * 10**5
IN_TURN_PART = 0.1

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

    form: Form
    first: Literal["left", "right"]
    alpha: float
    beta: float
    flops: int
    bytes: int
    passes: int  # reads and writes of g itself; before a backend is chosen, the least of them
    why: str
    label: str  # the form in the words a person uses
    joined: bool = False  # dual: both terms in one product of [U, B] and [A; Vᵀ]


@dataclass(frozen=True)
class Plan:
    """What a call would run, and why. ``print`` it.

    Attributes:
        form: the form, or the forms of a list, joined by " + ".
        flops: floating-point operations of all matrices (a multiply-add is two).
        bytes: bytes read and written, each operand once a step.
        launches: calls of the two grouped kernels for the whole list, each one launch for the
            matrices that agree on dtypes, layouts and tile config (cuda: on dtype and class of
            ranks, 127 at a time), in every slice that the workspace holds; on the torch backend,
            matmuls.
        workspace_bytes: coefficients and partial sums that live at once.
        backend: the backend, or the backends of a list, joined by " + ".
        why: the reason for the form and for the backend.
        notes: what else a list is prepared by, such as bases that are copied.
        matrices: (Matrix, Step, backend) of each matrix in order.
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

    def __str__(self) -> str:
        kinds = Counter((_shape(x), step.label, backend) for x, step, backend in self.matrices)
        lines = [f"{self.mode} projection on {self.device}, {_plural(len(self.matrices))}"]
        lines += [
            f"  {count:4d} × {shape:<44} {label} [{backend}]"
            for (shape, label, backend), count in kinds.items()
        ]
        lines += [
            f"  form      {self.form}",
            f"  FLOPs     {self.flops / 1e9:.3f} G",
            f"  bytes     {self.bytes / 2**20:.1f} MiB",
            f"  launches  {self.launches}",
            f"  workspace {self.workspace_bytes / 2**20:.1f} MiB",
            f"  backend   {self.backend}",
            f"  why       {self.why}",
            *[f"  note      {note}" for note in self.notes],
        ]
        return "\n".join(lines)


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
    ``shard`` g is a part of the matrix: that a basis is as wide as it says nothing.
    """
    core = mode == "core"
    # A missing basis leaves its side alone: in (I − H) g (I − H') that is H = 0, in g − H g H'
    # it is H = I.
    missing: Side = "everything" if core and not (x.r is None and x.k is None) else "nothing"
    left = _protected(x.r, x.u_spans, None if shard else x.m, missing)
    right = _protected(x.k, x.v_spans, None if shard else x.n, missing)
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


def _trivial(x: Matrix, form: Form, why: str) -> Step:
    passes = 0 if form == "identity" else 2
    moved = passes * x.batch * x.m * x.n * BYTES[x.dtype]
    return Step(form, "left", 0.0, 1.0 if form == "identity" else 0.0, 0, moved, passes, why, form)


def _one_sided(x: Matrix, form: Literal["left", "right"], side: Side) -> Step:
    beta, alpha = (1.0, -1.0) if side == "high" else (0.0, 1.0)
    flops, moved, passes = cost(x, form, form, beta)
    why = "one side only: two products" + ("" if beta else "; a low basis needs no subtraction")
    return Step(form, form, alpha, beta, flops, moved, passes, why, f"one-sided ({form}, {side})")


def choose_pinned(x: Matrix, mode: Mode, device: str) -> Step:
    """The form that pins high bases to their singular values: never simplified away.

    Even a side that is protected whole has a value to be pinned to, so only r = k = 0 is trivial.
    """
    if not (x.r or x.k) or x.m == 0 or x.n == 0 or x.batch == 0:
        return _trivial(x, "identity", "nothing is protected: W stays")
    return _two_sided(x, "high", "high", flip=mode == "core", device=device, once=True)


def _two_sided(x: Matrix, left: Side, right: Side, *, flip: bool, device: str, once: bool) -> Step:
    """Complement of (left, right), or for core g minus the complement of the flipped sides."""
    high_left, high_right = (left == "high") != flip, (right == "high") != flip
    candidates: list[tuple[Form, Literal["left", "right"]]]
    joined = (x.r or 0) + (x.k or 0) <= JOIN_LIMIT * min(x.m, x.n)
    if high_left and high_right:
        beta, alpha = (0.0, 1.0) if flip else (1.0, -1.0)
        # E g + g F − E g F of wide low bases adds three terms of g's own size: float32 error 2.3
        # times eager's at p = 0.9 m. Beyond half a side g minus the rest is subtracted instead.
        wide = flip and (2 * (x.r or 0) > x.m or 2 * (x.k or 0) > x.n)
        # On a CPU always: dual erred 2.4 times as much as eager for g where both sides hold it.
        # Without the join, dual's two updates on a CPU are as many passes as sequential's.
        if once:
            candidates = [("dual", "left")]
        elif flip:
            candidates = [("sequential" if wide or device == "cpu" else "dual", "left")]
        elif device == "cpu" and not joined:
            candidates = [("sequential", "left")]
        else:
            candidates = [("dual", "left"), ("sequential", "left")]
    else:
        beta, alpha = (1.0, -1.0) if flip else (0.0, 1.0)
        if high_left or high_right:
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
        in_cache = CPU_CACHE_BYTES.get(x.dtype, CPU_CACHE_BYTES_ELSE)
        balance = CPU_FLOPS_PER_BYTE.get(x.dtype, CPU_FLOPS_PER_BYTE_ELSE)
        balance = 0.0 if x.m * x.n * BYTES[x.dtype] <= in_cache else balance
    costs = [cost(x, form, first, beta) for form, first in candidates]
    times = [flops + balance * moved for flops, moved, _ in costs]
    best = times.index(min(times))
    form, first = candidates[best]
    flops, moved, passes = costs[best]
    if device == "cpu" and not once and x.dtype in ("float32", "float64"):
        in_turn: Form | None = None
        if form == "inner" and (min(x.r or 0, x.k or 0) < 8 or x.dtype == "float64"):
            in_turn = "inner in turn"  # of more columns, left first errs no more than 1.5 times
        elif form == "mixed" and first == "right":
            in_turn = "mixed in turn"
        if in_turn is not None:
            dearer = cost(x, in_turn, first, beta)
            affordable = max(IN_TURN_FLOPS, IN_TURN_PART * flops)
            if x.dtype == "float64" or dearer[0] - flops <= affordable:
                form, first, (flops, moved, passes) = in_turn, "left", dearer
    label = {
        ("inner", 0.0): f"low/low, {first} first",
        ("inner", 1.0): f"core, {first} first",
        ("dual", 0.0): "dual of two low bases",
        ("sequential", 0.0): "g less its sequential complement",
        ("inner in turn", 0.0): "low/low in turn",
        ("inner in turn", 1.0): "core in turn",
    }.get((form, beta), f"{form}, {first} first" if form == "mixed" else form)
    return Step(form, first, alpha, beta, flops, moved, passes, _reason(form, beta), label, joined)


def _reason(form: Form, beta: float) -> str:
    return {
        "dual": "both coefficients of g as it is, one update: the extra r·k products cost "
        "less than two more passes over g",
        "sequential": "FLOP-bound: one side after the other needs no r·k correction",
        "mixed": "the low side goes first and shrinks what the high side works on",
        "inner": "both sides on the smaller block"
        + ("; nothing is subtracted" if beta == 0.0 else ", then one update"),
        "mixed in turn": "small, or float64: left, then right on all of g errs least",
        "inner in turn": "small, or float64: left, then right on all of g errs least",
    }[form]


def cost(x: Matrix, form: Form, first: str, beta: float) -> tuple[int, int, int]:
    """(flops, bytes, passes over g) of a form; bytes count each operand of each step once."""
    m, n, r, k = x.m, x.n, x.r or 0, x.k or 0
    element, held, f32 = BYTES[x.dtype], BYTES[x.basis_dtype], 4
    read = 1 if beta else 0  # does the update read g?
    if form == "left":
        flops, passes, small = 4 * m * n * r, 2 + read, 2 * r * n
    elif form == "right":
        flops, passes, small = 4 * m * n * k, 2 + read, 2 * m * k
    elif form == "dual":
        flops = 4 * m * n * (r + k) + 2 * r * k * (m + n)
        passes, small = 2 + read, 3 * r * n + 4 * m * k + 2 * r * k
    elif form == "sequential":
        passes = 6 if beta else 11  # with beta = 0 the rest is kept in a workspace
        flops, small = 4 * m * n * (r + k), 2 * r * n + 2 * m * k
    elif form.endswith("in turn"):
        flops, passes = 4 * m * n * (r + k), 4 + read + (form == "mixed in turn")
        small = 2 * r * n + 2 * m * k
    elif form == "mixed" and first == "left":
        flops, passes, small = 4 * m * n * r + 4 * r * n * k, 2 + read, 5 * r * n + 2 * r * k
    elif form == "mixed":
        flops, passes, small = 4 * m * n * k + 4 * r * m * k, 2 + read, 5 * m * k + 2 * r * k
    elif first == "left":  # inner
        flops, passes, small = 4 * m * n * r + 4 * r * n * k, 2 + read, 4 * r * n + 2 * r * k
    else:
        flops, passes, small = 4 * m * n * k + 4 * r * m * k, 2 + read, 4 * m * k + 2 * r * k
    steps = 2  # each basis is read once to reduce and once to expand
    moved = passes * m * n * element + steps * (m * r + n * k) * held + small * f32
    return flops * x.batch, moved * x.batch, passes


def on_backend(x: Matrix, step: Step, reads: int, composed: bool) -> Step:
    """A step with the passes over g that a backend makes.

    Args:
        reads: how often the backend reads g for the coefficients of both sides.
        composed: whether it adds the two terms of an update one after another, where they aren't
            joined.
    """
    if step.form != "dual":
        return step
    more = reads - 1 + (2 if composed and not step.joined else 0)
    moved = more * x.batch * x.m * x.n * BYTES[x.dtype]
    return replace(step, passes=step.passes + more, bytes=step.bytes + moved)


def coefficient_bytes(x: Matrix, step: Step) -> int:
    """What the coefficients of one matrix take at once where they are composed from matmuls."""
    m, n, r, k = x.m, x.n, x.r or 0, x.k or 0
    left, right = r * n, m * k
    if step.form == "dual":
        elements = left + right + r * k + (r + k) * (m + n) * step.joined
    elif step.form in ("sequential", "left", "right"):
        elements = max(left, right)
    elif step.form.endswith("in turn"):
        elements = m * n + max(left, right)
    elif step.form in ("mixed", "inner"):
        elements = 2 * (left if step.first == "left" else right) + r * k
    else:
        elements = 0
    same = x.dtype == x.basis_dtype != "float16"
    return elements * x.batch * (BYTES[x.dtype] if same else 4)
