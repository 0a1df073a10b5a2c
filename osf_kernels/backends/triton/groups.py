"""Which chains share a launch: what its kernel is compiled for, and which sums are in parts.

Imports torch, never triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from osf_kernels.backends.chains import Chain, Reduction, Step
from osf_kernels.backends.jobs import Matrix, Update
from osf_kernels.backends.operands import WORKSPACE, Arena, Operand, Placed

from . import configs
from .launches import split
from .views import View, ceil_div, dot_rule

__all__ = ["Cut", "Group", "Planned", "addend_width", "in_launches", "is_C", "plan_chain"]

BF16 = torch.bfloat16
Constants = dict[str, object]


class Cut(NamedTuple):
    """A sum in parts, of ``length`` but for the last.

    C may be one: then each tile of the coefficient that it is made from makes a part at its end.
    """

    parts: int
    length: int
    memory: Operand  # (count·q, rank) float32


class Planned(NamedTuple):
    """A chain, how its kernels are compiled, and what it takes of the workspace."""

    chain: Chain
    constants: list[Constants]  # of each link
    config: configs.Projection
    arena: Arena
    cuts: dict[int, Cut]  # by link

    @property
    def steps(self) -> list[Step]:
        return [link.step for link in self.chain]

    @property
    def of_C(self) -> dict[int | None, int]:
        """Of the link whose tiles make parts of C, that of C."""
        return {self.chain[i].after: i for i in self.cuts if is_C(self.chain[i].step)}

    def rows_of_C(self, i: int) -> int:
        """Of a tile of the C of that link."""
        return configs.BLOCK_C if i in self.cuts else self.config.block_q


def plan_chain(
    chain: Chain,
    arena: Arena,
    precision: str,
    choose: Callable[[Chain, configs.Math, int, bool], configs.Projection],
) -> Planned:
    """``choose(chain, math, largest rank, aligned)`` picks a config."""
    constants = [_constants(link.step, precision) for link in chain]
    rank = max((rank_of(link.step) for link in chain), default=0)
    aligned = all(view.layout.aligned for link in chain for view in _read_views(link.step))
    planned = Planned(chain, constants, choose(chain, _math(constants), rank, aligned), arena, {})
    for i, link in enumerate(chain):
        if is_C(link.step):
            _plan_C(planned, i, rank <= planned.config.block_r, precision)
    return planned


def _plan_C(planned: Planned, i: int, in_parts: bool, precision: str) -> None:
    """C has no tasks of its own: what makes it and what reads it do its work.

    Each part is as large as C, so that of ranks beyond a block, of which the parts would be larger
    than the matrix, C is a product of what is stored.
    """
    chain, constants = planned.chain, planned.constants
    step, after, _ = chain[i]
    assert isinstance(step, Reduction)
    assert step.x is not None
    assert step.basis is not None
    own, constants[i] = constants[i], {}
    x, basis = view_of(step.x).mT, view_of(step.basis)  # x as it is loaded
    dot, how = dot_rule(x.dtype, (basis.dtype,), (), precision)
    if x.dtype == torch.float32 and after is not None and constants[after].get("DOT") == BF16:
        # A or B of bfloat16 that C will correct. Two pieces of it, 16 bits, are more than is stored
        # at the end; in tf32x3 such kernels spilled 528 bytes a thread (sm_80, rank 128).
        dot, how = BF16, "ieee"
    products: Constants = {"FROM": x.dtype, "FROM_LAYOUT": int(x.layout), "C_DOT": dot}
    products |= {"C_PRECISION": how} | _basis("BY", basis)
    if planned.config.block_q % planned.config.block_k:
        raise ValueError(
            "osf_kernels.backends.triton: expected block_q to be a multiple of block_k, got "
            f"{planned.config}"
        )
    if in_parts:
        source = None if after is None else chain[after].step
        parts = 0 if source is None else ceil_div(source.out.shape[0], planned.config.block_q)
        rows, columns = step.out.shape
        memory = planned.arena.new(parts * rows, columns, torch.float32)
        planned.cuts[i] = Cut(parts, planned.config.block_q, memory)
        if after is not None:
            assert isinstance(source, Reduction)
            constants[after] |= products | {f"C_OF_{source.into}": True}
    own |= products | {"C_IN_PARTS": in_parts, "BLOCK_C": planned.rows_of_C(i)}
    for place, reader in enumerate(chain):
        if reader.c_after == i:
            assert isinstance(reader.step, Reduction)
            constants[place] |= own | {f"C_INTO_{reader.step.into}": True}


def is_C(step: Step) -> bool:
    return isinstance(step, Reduction) and step.into == "C"


def _math(constants: Iterable[Constants]) -> configs.Math:
    """The most accurate products of a matrix that any link takes; those of C are few beside."""
    taken = set()
    for each in constants:
        for dot, precision in (("DOT", "PRECISION"), ("UPDATE_DOT", "UPDATE_PRECISION")):
            if each.get(dot) == torch.float32:
                taken.add(each[precision])
    if taken - {"tf32"}:
        return "float32"
    return "tf32" if taken else "bfloat16"


def addend_width(chain: Chain) -> float:
    """Bytes of an element of what updates add over those of what they update; 0 where none does."""
    updates = [link.step for link in chain if isinstance(link.step, Update)]
    return max(
        (
            job.addend.dtype.itemsize / job.x.dtype.itemsize
            for job in updates
            if job.addend is not None
        ),
        default=0.0,
    )


def rank_of(step: Reduction | Update) -> int:
    if isinstance(step, Update):
        return max(0 if t is None else t.shape[1] for t in (step.L1, step.L2))
    return int(step.out.shape[1])


def view_of(t: Matrix) -> View:
    """A view; of what lies in the workspace, padding holds zeros."""
    place = t.data_ptr()
    return View.of(t, zeroed=isinstance(place, Placed) and place.argument == WORKSPACE)


def _read_views(step: Reduction | Update) -> list[View]:
    """The matrices of a step that its loops read."""
    if isinstance(step, Update):
        *matrices, _, beta, addend = step
        if not beta:
            matrices[1] = None
        matrices.append(addend)
    else:
        matrices = [step.x, step.basis] if step.x is not None else []
    return [view_of(t) for t in matrices if t is not None and t.numel()]


def _constants(step: Reduction | Update, precision: str) -> Constants:
    """What the kernel's code depends on."""
    return _of_update(step, precision) if isinstance(step, Update) else _of_sum(step, precision)


def _of_sum(step: Reduction, precision: str) -> Constants:
    into = step.into
    out = view_of(step.out)
    made: Constants = {f"{into}_LAYOUT": int(out.layout)}
    if into != "C":
        made |= {f"HAS_{into}": True, into: out.dtype}
    if into != "C" and step.x is not None and step.basis is not None:
        x, basis = view_of(step.x), view_of(step.basis)
        if into == "A":
            x = x.mT  # as it is loaded
        dot, how = dot_rule(x.dtype, (basis.dtype,), (), precision)
        made["HAS_SUM"] = True
        made |= {"X": x.dtype, "X_LAYOUT": int(x.layout), "DOT": dot, "PRECISION": how}
        made |= _basis("U" if into == "A" else "V", basis)
    if step.initial is not None:
        initial = view_of(step.initial)
        made |= {"HAS_INITIAL": True, "INITIAL": initial.dtype}
        made[f"{into}_INITIAL_LAYOUT"] = int(initial.layout)
    if step.S is not None:
        if step.S.dtype != torch.float32:
            raise TypeError(
                f"osf_kernels.backends.triton: expected S to be float32, got {step.S.dtype}"
            )
        made["HAS_OFFSET"] = True
    if step.other is not None and (step.S is not None or step.c is not None):
        made |= _basis("V" if into == "A" else "U", view_of(step.other))
        made["EXACT"] = "ieee" if precision == "ieee" else "tf32x3"
    return made


def _basis(name: str, view: View) -> Constants:
    return {name: view.dtype, f"{name}_LAYOUT": int(view.layout)}


def _of_update(job: Update, precision: str) -> Constants:
    if job.beta not in (0, 1, -1):
        raise ValueError(
            f"osf_kernels.backends.triton: expected beta to be 0, 1 or -1, got {job.beta}"
        )
    out, x = view_of(job.out), view_of(job.x)
    first, second = _terms(job)
    # A term's basis is on the left of the first and on the right of the second.
    bases = [t[i].dtype for t, i in ((first, 0), (second, 1)) if t]
    coefficients = [t[i].dtype for t, i in ((first, 1), (second, 0)) if t]
    source = x.dtype if job.beta else out.dtype
    dot, how = dot_rule(source, bases or (source,), coefficients or (source,), precision)
    made: Constants = {
        "HAS_UPDATE": True,
        "OUT": out.dtype,
        "OUT_LAYOUT": int(out.layout),
        "UPDATE_DOT": dot,
        "UPDATE_PRECISION": how,
        "NEGATIVE": job.beta < 0,
    }
    if job.beta:
        made |= {"READ": x.dtype, "READ_LAYOUT": int(x.layout)}
    for flag, names, term in (
        ("HAS_FIRST", ("L1", "R1"), first),
        ("HAS_SECOND", ("L2", "R2"), second),
    ):
        if term is not None:
            made[flag] = True
            for name, view in zip(names, term, strict=True):
                made |= {name: view.dtype, f"{name}_LAYOUT": int(view.layout)}
    made["HAS_ADDEND"] = job.addend is not None
    if job.addend is not None:
        addend = view_of(job.addend)
        made |= {"ADDEND": addend.dtype, "ADDEND_LAYOUT": int(addend.layout)}
    return made


def _terms(job: Update) -> list[tuple[View, View] | None]:
    """L and R of both terms; one of rank 0 is none."""
    return [
        (view_of(left), view_of(right)) if left is not None and left.shape[1] else None
        for left, right in ((job.L1, job.R1), (job.L2, job.R2))
    ]


# --- which chains share a launch -----------------------------------------------------------


class Group:
    """Parts of chains that one launch serves."""

    def __init__(self, config: configs.Projection) -> None:
        self.config = config
        self.constants: Constants = {}
        self.members: list[tuple[Planned, range]] = []

    def takes(self, constants: Constants, config: configs.Projection) -> bool:
        return config == self.config and not _conflict(self.constants, constants)

    def add(self, planned: Planned, links: range, constants: Constants) -> None:
        self.constants |= constants
        self.members.append((planned, links))

    @property
    def steps(self) -> list[Step]:
        return [planned.chain[i].step for planned, links in self.members for i in links]

    def tiles_of(self, step: Reduction) -> int:
        q, rank = step.out.shape
        return ceil_div(q, self.config.block_q) * ceil_div(rank, self.config.block_r)

    def split(self, fill: int) -> None:
        """Cuts sums, where the tiles of all of them are fewer than half of ``fill``.

        Half of the processors keep L2 busy: by ``bench traffic``, one 4096² at rank 64 takes as
        long in 64 tiles as in 128, for which partial sums would take .33 of its bytes, not .08.
        """
        busy = max(1, fill // 2)
        sums = [step for step in self.steps if isinstance(step, Reduction) and not is_C(step)]
        tiles = sum(map(self.tiles_of, sums))
        for planned, links in self.members:
            for i in links:
                step = planned.chain[i].step
                if not isinstance(step, Reduction) or step.x is None or is_C(step):
                    continue
                if i not in planned.cuts:
                    (q, length), rank = step.x.shape, step.out.shape[1]
                    count, part = split(tiles, length, self.config.block_k, busy)
                    if count > 1:
                        memory = planned.arena.new(count * q, rank, torch.float32)
                        planned.cuts[i] = Cut(count, part, memory)
                if i in planned.cuts:
                    self.constants["HAS_PARTS"] = True


def _conflict(some: Constants, more: Constants) -> bool:
    return any(name in some and some[name] != value for name, value in more.items())


def in_launches(planned: Iterable[Planned]) -> list[list[Group]]:
    """Groups of chains that agree on config, dtypes and layouts; where the links of a chain don't,
    the rest of it is of a later phase."""
    phases: list[list[Group]] = []
    for each in planned:
        first, phase = 0, 0
        while first < len(each.chain):
            constants = dict(each.constants[first])
            last = first + 1
            while last < len(each.chain) and not _conflict(constants, each.constants[last]):
                constants |= each.constants[last]
                last += 1
            if phase == len(phases):
                phases.append([])
            groups = phases[phase]
            group = next((g for g in groups if g.takes(constants, each.config)), None)
            if group is None:
                group = Group(each.config)
                groups.append(group)
            group.add(each, range(first, last), constants)
            first, phase = last, phase + 1
    return phases


# Of what a launch has no operand of.
DEFAULTS: Constants = {
    "BLOCK_C": configs.BLOCK_C,
    "C_IN_PARTS": True,
    **dict.fromkeys(("X", "U", "V", "A", "B", "INITIAL", "DOT", "FROM", "BY", "C_DOT"), BF16),
    **dict.fromkeys(("OUT", "READ", "L1", "R1", "L2", "R2", "ADDEND", "UPDATE_DOT"), BF16),
    **dict.fromkeys(("PRECISION", "C_PRECISION", "EXACT", "UPDATE_PRECISION"), "ieee"),
    **dict.fromkeys(
        (
            *("X_LAYOUT", "U_LAYOUT", "V_LAYOUT", "A_LAYOUT", "B_LAYOUT", "C_LAYOUT"),
            *("A_INITIAL_LAYOUT", "B_INITIAL_LAYOUT", "C_INITIAL_LAYOUT"),
            *("FROM_LAYOUT", "BY_LAYOUT", "OUT_LAYOUT", "READ_LAYOUT", "ADDEND_LAYOUT"),
            *("L1_LAYOUT", "R1_LAYOUT", "L2_LAYOUT", "R2_LAYOUT"),
        ),
        0,
    ),
    **dict.fromkeys(
        (
            *("HAS_A", "HAS_B", "C_OF_A", "C_OF_B", "C_INTO_A", "C_INTO_B", "HAS_UPDATE"),
            *("HAS_SUM", "HAS_PARTS", "HAS_OFFSET", "HAS_INITIAL"),
            *("HAS_FIRST", "HAS_SECOND", "HAS_ADDEND", "NEGATIVE"),
        ),
        False,
    ),
}
