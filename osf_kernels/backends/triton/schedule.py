"""Host side of a grouped launch: which jobs share one, and the int64 records their tiles read.

Pure arithmetic on addresses, sizes and strides. Imports torch, never triton.

A launch's metadata is one int64 array. Of an update: problems + 1 prefix sums of tiles, then one
record a problem. Of products: two counters, zero (``kernels.ordered``), then the same, then the
same of the sums of their parts. The counters lie here because each call has its metadata to
itself: calls in flight on several streams share none (``launch`` keeps one a stream), a graph has
its own or those of the very same tensors, and a kernel that is aborted leaves no context to launch
another in.

The records (field: meaning; a view is an address and two strides in elements):

OnePass    0 x, 3 m, 4 n, 5 U, 8 r, 9 V, 12 k, 13 offset of the parts of Aᵀ, 14 of B,
           15 rows a split
Reduction  0 x, 3 q, 4 summed length, 5 basis, 8 rank, 9 parts, 10 length of a part, 11 side
           (0 A, 1 B), 12 offset of the parts, 13 out (q, rank), 16 S or 0, 17 the other basis
           (q, rank), 20 stride of S; of a sum: the same, without x and basis
Update     0 out, 3 x, 6 m, 7 n, 8 alpha's float32 bits, 9 beta, 10 L1, 13 R1, 16 r,
           17 L2, 20 R2, 23 k, 24 addend

A matrix that runs down its columns is scheduled as its transpose: (xᵀ, V, U, Bᵀ, Aᵀ) for
(x, U, V, A, B), and R2ᵀ, L2ᵀ, R1ᵀ, L1ᵀ for L1, R1, L2, R2. The kernels see rows only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.backends.jobs import Coefficients, Update

from . import configs

__all__ = [
    "Launch",
    "Layout",
    "SummedGroup",
    "View",
    "accurate_rule",
    "ceil_div",
    "coefficients_launches",
    "dot_rule",
    "update_launches",
]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LONGEST = 2**31 - 2**12  # of one dimension; tile indices are int32


class Layout(IntEnum):
    """What the compiler may assume of a view's strides."""

    GENERAL = 0
    ROW = 1  # unit stride along dim 1; address, other stride and width multiples of 16 bytes
    COLUMN = 2  # the same along dim 0
    UNALIGNED_ROW = 3  # unit stride along dim 1 and no more
    UNALIGNED_COLUMN = 4  # unit stride along dim 0 and no more
    # As ROW and COLUMN but for the width. The last 16 bytes of a line hold padding, which may be
    # read (it is in the storage) and holds anything.
    PADDED_ROW = 5
    PADDED_COLUMN = 6

    @property
    def aligned(self) -> bool:
        """Whether every line can be read in aligned pieces of 16 bytes."""
        return self in (Layout.ROW, Layout.COLUMN, Layout.PADDED_ROW, Layout.PADDED_COLUMN)


class View(NamedTuple):
    """A 2-D tensor's address, shape and strides, and whether its last line has its padding."""

    address: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    dtype: torch.dtype
    padded: bool = False  # looked up only where the layout depends on it

    @staticmethod
    def of(tensor: Tensor) -> View:
        (rows, columns), (row_stride, column_stride) = tensor.shape, tensor.stride()
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                "osf_kernels.backends.triton: expected bfloat16, float16 or float32, got "
                f"{str(tensor.dtype).removeprefix('torch.')}; float64 runs on the torch backend"
            )
        if max(rows, columns) > _LONGEST:
            raise ValueError(
                "osf_kernels.backends.triton: expected no dimension beyond "
                f"{_LONGEST}, got {tuple(tensor.shape)}; use the torch backend"
            )
        width = columns if column_stride == 1 else rows
        ragged = width * tensor.itemsize % _padding.VECTOR_BYTES != 0
        padded = ragged and _padding.is_padded(tensor)
        address = tensor.data_ptr()
        return View(address, rows, columns, row_stride, column_stride, tensor.dtype, padded)

    @property
    def mT(self) -> View:
        return View(
            self.address,
            self.columns,
            self.rows,
            self.column_stride,
            self.row_stride,
            self.dtype,
            self.padded,
        )

    @property
    def fields(self) -> tuple[int, int, int]:
        return self.address, self.row_stride, self.column_stride

    @property
    def layout(self) -> Layout:
        vector = _padding.VECTOR_BYTES // self.dtype.itemsize
        if self.address % _padding.VECTOR_BYTES == 0:
            if self.column_stride == 1 and not self.row_stride % vector:
                if not self.columns % vector:
                    return Layout.ROW
                if self.padded:
                    return Layout.PADDED_ROW
            if self.row_stride == 1 and not self.column_stride % vector:
                if not self.rows % vector:
                    return Layout.COLUMN
                if self.padded:
                    return Layout.PADDED_COLUMN
        if self.column_stride == 1:
            return Layout.UNALIGNED_ROW
        return Layout.UNALIGNED_COLUMN if self.row_stride == 1 else Layout.GENERAL

    @property
    def runs_down(self) -> bool:
        """Whether neighbours in memory are neighbours in a column."""
        return self.column_stride != 1 and (
            self.row_stride == 1 or 0 < self.row_stride < self.column_stride
        )


class Launch(NamedTuple):
    """One kernel launch, but for the device."""

    kernel: str  # "one_pass", "two_pass", "gram" or "update"
    config: configs.Config
    constants: dict[str, object]  # constexpr arguments; dtypes are torch's
    metadata: list[int]
    problems: int
    tiles: int
    sums: int = 0  # of parts, by tiles of configs.sum_block
    sum_tiles: int = 0
    workspace_elements: int = 0  # of float32 parts


def dot_rule(
    x: torch.dtype,
    bases: Sequence[torch.dtype],
    coefficients: Sequence[torch.dtype],
    float32_precision: str,
) -> tuple[torch.dtype, str]:
    """(operand dtype, input_precision) of a kernel's products; sums are always float32.

    16-bit operands of one dtype multiply as they are, and bfloat16 takes float32 coefficients
    rounded to it. float16 cannot (a coefficient may pass 65504), so those products, and those of
    16-bit values of two dtypes, are taken in TF32, in which every 16-bit value is exact. All
    else follows ``float32_precision``.
    """
    sources = {x, *bases}
    if sources == {torch.bfloat16} or sources | set(coefficients) == {torch.float16}:
        return x, "ieee"
    if torch.float32 not in sources and float32_precision != "ieee":
        return torch.float32, "tf32"
    return torch.float32, float32_precision


def accurate_rule(x: torch.dtype, float32_precision: str) -> tuple[torch.dtype, str]:
    """As :func:`dot_rule`, for x times float32 in float32 accuracy.

    16-bit x: in bfloat16 pieces, whose products are exact.
    """
    if x == torch.float32:
        return x, "ieee" if float32_precision == "ieee" else "tf32x3"
    return torch.bfloat16, "ieee"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _parts(tiles: int, length: int, step: int, fill: int) -> tuple[int, int]:
    """(parts, length of a part, a multiple of step) of the sums of a launch of so many ``tiles``.

    A launch that has a tile for every processor splits none.
    """
    parts = max(1, min(ceil_div(fill, tiles), length // configs.SHORTEST_SPLIT))
    part = ceil_div(ceil_div(length, parts), step) * step
    return max(1, ceil_div(length, part)) if part else 1, part


class Group:
    """Problems of one launch under construction."""

    def __init__(self) -> None:
        self.starts = [0]
        self.records: list[int] = []

    def add(self, tiles: int, record: Sequence[int]) -> None:
        self.starts.append(self.starts[-1] + tiles)
        self.records.extend(record)

    @property
    def problems(self) -> int:
        return len(self.starts) - 1

    @property
    def tiles(self) -> int:
        return self.starts[-1]

    @property
    def metadata(self) -> list[int]:
        return [*self.starts, *self.records]


class SummedGroup:
    """Problems of one launch under construction, and the sums of their parts."""

    def __init__(self) -> None:
        self.products = Group()
        self.sums = Group()
        self.workspace_elements = 0

    def reserve(self, parts: int, rows: int, columns: int) -> int:
        """Where so many parts start in the workspace."""
        offset = self.workspace_elements
        self.workspace_elements += parts * rows * ceil_div(columns, 4) * 4
        return offset

    def launch(self, kernel: str, config: configs.Config, constants: dict[str, object]) -> Launch:
        return Launch(
            kernel,
            config,
            constants,
            [0, 0, *self.products.metadata, *self.sums.metadata],
            self.products.problems,
            self.products.tiles,
            self.sums.problems,
            self.sums.tiles,
            self.workspace_elements,
        )


_NO_VIEW = (0, 0, 0)


def coefficients_launches(
    jobs: Sequence[Coefficients],
    *,
    fill: int,
    float32_precision: str,
    choose: Callable[[Coefficients, int, int, int, bool], configs.OnePass | configs.TwoPass],
    accurate: bool = False,
) -> list[Launch]:
    """Group jobs into launches; ``choose(job, operand bytes, r, k, aligned)`` picks a config.

    Jobs share a launch when they agree on config, dtypes, layouts and which sides they ask for.
    Sums are split only where the tiles of a launch are fewer than ``fill``, so that a list may have
    other bits than a loop over it. ``accurate`` asks for float32 accuracy whatever the dtype of x;
    it is for float32 bases, ``choose`` then returns a TwoPass, and each job is split by itself, so
    that it has the same bits in every list.
    """
    groups: dict[tuple[object, ...], _CoefficientsGroup] = {}
    for job in jobs:
        x = View.of(job.x)
        u = View.of(job.U) if job.U is not None else None
        v = View.of(job.V) if job.V is not None else None
        a = View.of(job.A).mT if job.A is not None and job.A.numel() else None  # (n, r)
        b = View.of(job.B) if job.B is not None and job.B.numel() else None
        if a is None and b is None:
            continue
        scale_b = (job.S.data_ptr(), job.S.stride(0)) if job.S is not None else (0, 0)
        scale_a = scale_b if job.root else (0, 0)
        if x.runs_down:
            x, u, v, a, b, scale_a, scale_b = x.mT, v, u, b, a, scale_b, scale_a
        if job.S is not None and job.S.dtype != torch.float32:
            raise TypeError(
                f"osf_kernels.backends.triton: expected S to be float32, got {job.S.dtype}"
            )
        # An absent side borrows the other's dtype, so that it makes no launch of its own.
        u_dtype, v_dtype = (u or v).dtype, (v or u).dtype  # type: ignore[union-attr]
        if accurate:
            dot, precision = accurate_rule(x.dtype, float32_precision)
        else:
            dot, precision = dot_rule(x.dtype, (u_dtype, v_dtype), (), float32_precision)
        r, k = (a.columns if a else 0), (b.columns if b else 0)
        aligned = all(view.layout.aligned for view in (x, u, v, a, b) if view)
        if accurate:
            aligned = x.layout.aligned
        config = choose(job, dot.itemsize, r, k, aligned)
        if isinstance(config, configs.OnePass) and not 0 < min(r, k) <= max(r, k) <= config.block_r:
            raise ValueError(
                "osf_kernels.backends.triton: expected two sides of ranks up to "
                f"{config.block_r} for this one_pass config, got r={r}, k={k}; use two_pass"
            )
        constants: dict[str, object] = {
            "X": x.dtype,
            "U": u_dtype,
            "V": v_dtype,
            "OUT": (a or b).dtype,  # type: ignore[union-attr]
            "DOT": dot,
            "PRECISION": precision,
            "X_LAYOUT": int(x.layout),
            "U_LAYOUT": int(u.layout) if u else 0,
            "V_LAYOUT": int(v.layout) if v else 0,
            "A_LAYOUT": int(a.layout) if a else 0,
            "B_LAYOUT": int(b.layout) if b else 0,
            "HAS_A": a is not None,
            "HAS_B": b is not None,
            "HAS_OFFSET": job.S is not None,
            "ACCURATE": accurate,
        }
        key = (config, *constants.values())
        if key not in groups:
            groups[key] = _CoefficientsGroup(config, constants, fill, apart=accurate)
        groups[key].jobs.append(_Job(x, u, v, a, b, scale_a, scale_b))
    return [group.launch() for group in groups.values()]


class _Job(NamedTuple):
    """The views of a job of coefficients."""

    x: View
    u: View | None
    v: View | None
    a: View | None  # Aᵀ (n, r)
    b: View | None
    scale_a: tuple[int, int]  # address and stride of the S that is taken off A, or zeros
    scale_b: tuple[int, int]

    @property
    def sides(self) -> list[tuple[int, View, View, View | None, tuple[int, int]]]:
        """(0 for A or 1 for B, basis, out, the other basis, scale) of each that is asked for."""
        u, v = self.u, self.v
        sides = [(0, u, self.a, v, self.scale_a), (1, v, self.b, u, self.scale_b)]
        return [
            (side, basis, out, other, scale)
            for side, basis, out, other, scale in sides
            if basis is not None and out is not None
        ]


class _CoefficientsGroup:
    """One launch of coefficients under construction."""

    def __init__(
        self,
        config: configs.OnePass | configs.TwoPass,
        constants: dict[str, object],
        fill: int,
        *,
        apart: bool,
    ) -> None:
        self.config = config
        self.constants = constants
        self.fill = fill
        self.apart = apart
        self.jobs: list[_Job] = []
        self.group = SummedGroup()

    def launch(self) -> Launch:
        """Cuts the sums by how many tiles there are of all jobs, or of each."""
        tiles = [self._tiles(job) for job in self.jobs]
        total = sum(tiles)
        for job, own in zip(self.jobs, tiles, strict=True):
            of = own if self.apart else total
            if isinstance(self.config, configs.OnePass):
                self._add_one_pass(self.config, job, of)
                continue
            for side, basis, out, other, scale in job.sides:
                mine = self._tiles_of(out, self.config) if self.apart else of
                self._add_reduction(self.config, side, job.x, basis, out, other, scale, mine)
        kernel = "one_pass" if isinstance(self.config, configs.OnePass) else "two_pass"
        return self.group.launch(kernel, self.config, self.constants)

    def _tiles(self, job: _Job) -> int:
        if isinstance(self.config, configs.OnePass):
            return ceil_div(job.x.columns, self.config.block_n)
        return sum(self._tiles_of(out, self.config) for _, _, out, *_ in job.sides)

    @staticmethod
    def _tiles_of(out: View, config: configs.TwoPass) -> int:
        return ceil_div(out.rows, config.block_q) * ceil_div(out.columns, config.block_r)

    def _add_one_pass(self, config: configs.OnePass, job: _Job, tiles: int) -> None:
        x, u, v, a, b, scale_a, scale_b = job
        assert u is not None
        assert v is not None
        assert a is not None
        assert b is not None
        m, n, r, k = x.rows, x.columns, u.columns, v.columns
        strips = ceil_div(n, config.block_n)
        splits, split_rows = _parts(tiles, m, config.block_m, self.fill)
        a_offset = self.group.reserve(splits, n, r)
        b_offset = self.group.reserve(strips, m, k)
        record = (*x.fields, m, n, *u.fields, r, *v.fields, k, a_offset, b_offset, split_rows)
        self.group.products.add(strips * splits, record)
        self._add_sum(0, n, m, r, splits, split_rows, a_offset, a, scale_a, v)
        self._add_sum(1, m, n, k, strips, config.block_n, b_offset, b, scale_b, u)

    def _add_reduction(
        self,
        config: configs.TwoPass,
        side: int,
        x: View,
        basis: View,
        out: View,
        other: View | None,
        scale: tuple[int, int],
        tiles: int,
    ) -> None:
        q, length, rank = out.rows, basis.rows, basis.columns
        parts, part = _parts(tiles, length, config.block_k, self.fill)
        offset = self.group.reserve(parts, q, rank) if parts > 1 else 0
        tail = _tail(side, q, length, rank, parts, part, offset, out, scale, other)
        record = (*x.fields, *tail[3:5], *basis.fields, *tail[8:])
        self.group.products.add(self._tiles_of(out, config) * parts, record)
        if parts > 1:
            self._add_sum(side, q, length, rank, parts, part, offset, out, scale, other)

    def _add_sum(
        self,
        side: int,
        q: int,
        length: int,
        rank: int,
        parts: int,
        part: int,
        offset: int,
        out: View,
        scale: tuple[int, int],
        other: View | None,
    ) -> None:
        block = configs.sum_block(self.config)
        tiles = ceil_div(q, block) * ceil_div(rank, block)
        record = _tail(side, q, length, rank, parts, part, offset, out, scale, other)
        self.group.sums.add(tiles, record)


def _tail(
    side: int,
    q: int,
    length: int,
    rank: int,
    parts: int,
    part: int,
    offset: int,
    out: View,
    scale: tuple[int, int],
    other: View | None,
) -> tuple[int, ...]:
    """A reduction record with no x and no basis."""
    return (
        *_NO_VIEW,
        q,
        length,
        *_NO_VIEW,
        rank,
        parts,
        part,
        side,
        offset,
        *out.fields,
        scale[0],
        *(other.fields if other else _NO_VIEW),
        scale[1],
    )


def update_launches(
    jobs: Sequence[Update],
    *,
    float32_precision: str,
    choose: Callable[[Update, int, int, bool], configs.Update],
) -> list[Launch]:
    """Group jobs into launches; ``choose(job, operand bytes, larger rank, aligned)`` as above."""
    groups: dict[tuple[object, ...], tuple[configs.Update, dict[str, object], Group]] = {}
    for job in jobs:
        if job.beta not in (0, 1, -1):
            raise ValueError(
                f"osf_kernels.backends.triton: expected beta to be 0, 1 or -1, got {job.beta}"
            )
        out, x = View.of(job.out), View.of(job.x)
        if not (out.rows and out.columns):
            continue
        terms = [
            (View.of(left), View.of(right)) if left is not None and right is not None else None
            for left, right in ((job.L1, job.R1), (job.L2, job.R2))
        ]
        first, second = (term if term and term[0].columns else None for term in terms)
        addend = View.of(job.addend) if job.addend is not None else None
        if out.runs_down:
            out, x = out.mT, x.mT
            addend = addend.mT if addend else None
            first, second = ((term[1].mT, term[0].mT) if term else None for term in (second, first))
        # A term's basis is on the left of the first and on the right of the second; a missing
        # term borrows the other's dtypes, so that it makes no launch of its own.
        bases = [t[i].dtype for t, i in ((first, 0), (second, 1)) if t]
        coefficients = [t[i].dtype for t, i in ((first, 1), (second, 0)) if t]
        basis = bases[0] if bases else x.dtype
        coefficient = coefficients[0] if coefficients else x.dtype
        dot, precision = dot_rule(
            x.dtype if job.beta else out.dtype,
            bases or (basis,),
            coefficients or (coefficient,),
            float32_precision,
        )
        ranks = [term[0].columns if term else 0 for term in (first, second)]
        views = [out, x if job.beta else out, *(first or ()), *(second or ()), addend or out]
        aligned = all(view.layout.aligned for view in views)
        config = choose(job, dot.itemsize, max(ranks), aligned)
        constants: dict[str, object] = {
            "OUT": out.dtype,
            "X": x.dtype,
            "L1": first[0].dtype if first else basis,
            "R1": first[1].dtype if first else coefficient,
            "L2": second[0].dtype if second else coefficient,
            "R2": second[1].dtype if second else basis,
            "ADDEND": addend.dtype if addend else out.dtype,
            "DOT": dot,
            "PRECISION": precision,
            "OUT_LAYOUT": int(out.layout),
            "X_LAYOUT": int(x.layout),
            "L1_LAYOUT": int(first[0].layout) if first else 0,
            "R1_LAYOUT": int(first[1].layout) if first else 0,
            "L2_LAYOUT": int(second[0].layout) if second else 0,
            "R2_LAYOUT": int(second[1].layout) if second else 0,
            "ADDEND_LAYOUT": int(addend.layout) if addend else 0,
            "HAS_ADDEND": addend is not None,
            "NEGATIVE": job.beta < 0,
        }
        key = (config, *constants.values())
        if key not in groups:
            groups[key] = (config, constants, Group())
        record: list[int] = [*out.fields, *x.fields, out.rows, out.columns]
        record += [struct.unpack("<i", struct.pack("<f", job.alpha))[0], int(job.beta)]
        for term, rank in zip((first, second), ranks, strict=True):
            record += [*term[0].fields, *term[1].fields] if term else [*_NO_VIEW, *_NO_VIEW]
            record.append(rank)
        record += addend.fields if addend else _NO_VIEW
        tiles = ceil_div(out.rows, config.block_m) * ceil_div(out.columns, config.block_n)
        groups[key][2].add(tiles, record)
    return [
        Launch("update", config, constants, group.metadata, group.problems, group.tiles)
        for config, constants, group in groups.values()
    ]
