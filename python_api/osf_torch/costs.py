"""What one weight takes on a rank: bytes, FLOPs and collectives of a step, by method; no tensors
with values.

Bases, C and what is held beside them are counted as ``refresh``, ``protect`` and ``confine`` make
them, of tensors on the meta device where these functions take such. AdamW's state are two moments
of what is trained. On ranks of FSDP2 the first dimension of every parameter is cut, and figures are
those of the first rank, which has the most. Of a batch of matrices (experts) products with the
tokens are counted as if each token took one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from osf_kernels import FreeSide, SVDPlan, plan, plan_free, plan_svd
from osf_torch.bases import Held, columns_of, is_high, spans_of
from osf_torch.batching import BATCH
from osf_torch.free.drifting import PROBES
from osf_torch.free.summary import MOMENTS, factor_flops
from osf_torch.packing import Packed
from osf_torch.subspaces import Decomposition

WIDE = 4  # bytes a number of float32


@dataclass(frozen=True)
class Alike:
    """Weights of one kind.

    Attributes:
        shape: of the matrix (m, n), or of each of a batch.
        dtype: of the weights and of what is multiplied with them; of quantized ones of the latter.
        batch: the leading dimensions of a batch of matrices (experts); none of a matrix.
        rank: how many directions are protected.
        trained: whether it requires a gradient.
        shared: whether several modules have it, which ``confine`` refuses.
        linear: whether its layer has a forward pass of ``confine``'s own.
        transposed: whether it is held as (inputs, outputs).
        packed: what it is held in, where it is quantized.
    """

    shape: tuple[int, int]
    batch: tuple[int, ...]
    dtype: torch.dtype
    rank: int
    trained: bool
    shared: bool
    linear: bool
    transposed: bool
    packed: Packed | None = None

    @property
    def values(self) -> torch.dtype:
        """Of what ``refresh`` decomposes."""
        return self.dtype if self.packed is None else self.packed.dtype

    @property
    def matrices(self) -> int:
        """How many there are."""
        return math.prod(self.batch)


@dataclass(frozen=True)
class Takes:
    """Of one weight or of all.

    Attributes:
        weights: the weights, as the model has them.
        block: C, or its factors.
        copies: the C that is merged, and W₀ of half precision.
        bases: what projects, or U_l and V_l.
        whole_bases: of ``protect`` on several ranks, the subspaces as given, which the guard keeps.
        pinned: what restoring needs beside the bases.
        gradient, state: of what is trained; of state two moments.
        references: by which ``Confined.drift`` measures.
        inputs: what layers keep of their inputs for the backward pass, at most: that of layers
            which read the same is kept once.
        flops: of a step's products.
        gathered, scattered, reduced: bytes of the tensors that ranks gather, reduce and scatter,
            and all-reduce in a step.
    """

    weights: int = 0
    block: int = 0
    copies: int = 0
    bases: int = 0
    whole_bases: int = 0
    pinned: int = 0
    gradient: int = 0
    state: int = 0
    references: int = 0
    inputs: int = 0
    flops: int = 0
    gathered: int = 0
    scattered: int = 0
    reduced: int = 0

    def __add__(self, other: Takes) -> Takes:
        return Takes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: int) -> Takes:
        return Takes(*(getattr(self, f.name) * count for f in fields(self)))

    @property
    def nbytes(self) -> int:
        """Held at once by a rank, but for what layers keep of their inputs."""
        held = self.weights + self.block + self.copies + self.bases + self.whole_bases
        return held + self.pinned + self.gradient + self.state + self.references


class Costs:
    """What the methods take of weights alike.

    Args:
        subspace: what ``refresh`` leaves of one, on the meta device.
        tokens: a step and rank.
        world: how many ranks FSDP2 shards over.
        architecture: that projections are planned for.

    Attributes:
        sides: the free bases.
        planned: of the projection.
    """

    def __init__(
        self, alike: Alike, subspace: Decomposition, tokens: int, world: int, architecture: str
    ) -> None:
        self.alike, self.tokens, self.world = alike, tokens, world
        self.subspace = subspace
        m, n = alike.shape
        self._size = alike.dtype.itemsize
        # FSDP2 cuts the first dimension: rows, or the matrices of a batch.
        self._rows, self._count = -(-m // world), 1
        if alike.batch:
            self._rows = m
            self._count = -(-alike.batch[0] // world) * math.prod(alike.batch[1:])
        self.sides = _side(subspace.U, m), _side(subspace.V, n)
        self._forward = 2 * tokens * m * n
        W = torch.empty(*_lead(alike), m, n, dtype=alike.values, device="meta")
        self.planned = plan(W, subspace.U, subspace.V, architecture=architecture)

    # --- methods ---

    def plain(self) -> Takes:
        held, whole = self._held, self._whole
        shared = self.world > 1
        if not self.alike.trained:
            return Takes(held, flops=2 * self._forward, gathered=shared * 2 * whole)
        return Takes(
            weights=held,
            gradient=held,
            state=MOMENTS * held,
            inputs=self.tokens * self._read * self._size,
            flops=3 * self._forward,
            gathered=shared * 2 * whole,
            scattered=shared * whole,
        )

    def protect(self) -> Takes:
        plain = self.plain()
        if not self.alike.trained:
            return plain
        s = self.subspace
        _, n = self.alike.shape
        whole = sum(columns_of(basis).nbytes for basis in (s.U, s.V))
        S = 0 if s.S is None else s.S.nbytes
        cut, other = columns_of(s.U), columns_of(s.V)
        if self.alike.batch:  # both sides are cut with it, and nothing adds up
            bases, reduced = whole * self._count // self.alike.matrices, 0
        else:
            bases = self._rows * cut.shape[-1] * cut.element_size() + other.nbytes
            reduced = 2 * cut.shape[-1] * n * WIDE
        at_once = 2 * -(-self.planned.flops // self.world)
        return replace(
            plain,
            bases=bases + S,
            whole_bases=whole if self.world > 1 else 0,
            pinned=self._pinned(),
            flops=plain.flops + at_once,
            reduced=reduced if self.world > 1 else 0,
        )

    def confine(self, *, beside: bool = False) -> Takes:
        """``update="merge"``, or "beside"."""
        if self.alike.shared:
            return self.plain()
        left, right = self.sides
        item = self._item
        if not (left.width and right.width) or not (self.alike.trained or beside):
            return self._frozen()
        held, whole = self._held, self._whole
        half = self._size < WIDE or self.alike.packed is not None
        here = self._here(left.width) * right.width * item
        block = left.width * right.width * item * self.alike.matrices
        copies = 0 if beside else here + half * held
        sent = whole + block + (0 if beside else block + half * whole)
        shared = self.world > 1
        return Takes(
            weights=held,
            block=here,
            copies=copies,
            bases=self._base_bytes(),
            gradient=here,
            state=MOMENTS * here,
            references=self._references,
            inputs=self.tokens * self._kept * self._size,
            flops=self._confined_flops(beside=beside, half=half),
            gathered=shared * (2 * sent + (0 if beside or self.alike.batch else block)),
            scattered=shared * block,
        )

    def limited(self, rank: int) -> Takes:
        """Of C = B A of a rank, beside the weight."""
        if self.alike.shared:
            return self.plain()
        left, right = self.sides
        if not (left.width and right.width):
            return self._frozen()
        item, shared = self._item, self.world > 1
        here = (self._here(left.width) * rank + self._here(rank) * right.width) * item
        block = (left.width + right.width) * rank * item * self.alike.matrices
        held, whole = self._held, self._whole
        return Takes(
            weights=held,
            block=here,
            bases=self._base_bytes(),
            gradient=here,
            state=MOMENTS * here,
            references=self._references,
            inputs=self.tokens * self._read * self._size,
            flops=2 * self._forward
            + factor_flops(left, right, rank, self.tokens)
            + (self.alike.matrices - 1) * factor_flops(left, right, rank, 0),
            gathered=shared * 2 * (whole + block),
            scattered=shared * block,
        )

    def refresh(self, device: str) -> SVDPlan:
        s, (m, n) = self.subspace, self.alike.shape
        complement = not (is_high(s.U) and is_high(s.V))
        options: dict[str, Any] = {"device": device, "complement": complement}
        options["batch"] = min(BATCH, self.alike.matrices)
        return plan_svd(m, n, s.rank, dtype=self.alike.values, **options)

    # --- parts ---

    @property
    def _held(self) -> int:
        """Bytes of this rank's part of the weight."""
        if self.alike.packed is not None:
            return -(-self.alike.packed.nbytes // self.world)
        return self._count * self._rows * self.alike.shape[1] * self._size

    @property
    def _whole(self) -> int:
        if self.alike.packed is not None:
            return self.alike.packed.nbytes
        return self.alike.matrices * math.prod(self.alike.shape) * self._size

    def _here(self, rows: int) -> int:
        """Rows of this rank of a parameter that has so many, or of all its matrices'."""
        return self._count * rows if self.alike.batch else -(-rows // self.world)

    @property
    def _references(self) -> int:
        return 2 * self.alike.matrices * self.alike.shape[0] * PROBES * 8

    @property
    def _read(self) -> int:
        """Numbers that a layer reads of each token."""
        return self.alike.shape[0 if self.alike.transposed else 1]

    @property
    def order(self) -> str:
        """In which order the gradient of C is computed."""
        if not self.alike.linear:
            return "dense"
        return plan_free(self.tokens, *self.sides).order

    @property
    def _kept(self) -> int:
        """Numbers of each token that are kept for the gradient of C."""
        if not self.alike.linear:
            return self._read
        return plan_free(self.tokens, *self.sides).kept_of(transposed=self.alike.transposed)

    @property
    def _item(self) -> int:
        """Bytes of a number of C."""
        return 8 if self.alike.values == torch.float64 else WIDE

    def _base_bytes(self) -> int:
        bases = columns_of(self.subspace.U), columns_of(self.subspace.V)
        pairs = zip(self.sides, bases, strict=True)
        one = sum(side.elements * columns.element_size() for side, columns in pairs)
        return one * self.alike.matrices

    def _frozen(self) -> Takes:
        return replace(self.plain(), gradient=0, state=0, inputs=0, flops=2 * self._forward)

    def _pinned(self) -> int:
        """The dense protected part, or beside triplets what they are expected to miss."""
        s, (m, n), wide = self.subspace, self.alike.shape, max(WIDE, self._size)
        dense = self._count * self._rows * n * wide
        if not (is_high(s.U) and is_high(s.V)):
            return dense
        rough = self.refresh("cpu").method == "randomized"
        # Of 16 bits the rounding of the weight is above what right triplets miss. Of wider ones
        # that is held in bfloat16, and what rough triplets miss in float32.
        size = (2 if rough else 0) if self._size < WIDE else (wide if rough else 2)
        if m * n * wide < s.rank * (m + n) * size:
            return dense
        return self._count * s.rank * (n + self._rows) * size

    def _confined_flops(self, *, beside: bool, half: bool) -> int:
        left, right = self.sides
        found = plan_free(self.tokens, left, right)
        gradient = found.flops
        if not self.alike.linear:
            gradient = found.plain_flops + self.alike.matrices * found.reduce_flops
        if beside and half and self.alike.linear:  # on the tokens, forward and back
            once = 2 * (left.flops + right.flops) + 6 * left.width * right.width
            return 2 * self._forward + self.tokens * once
        # The sum is formed for the forward pass, and anew for the backward pass.
        sums = 2 * found.merge_flops * self.alike.matrices if beside else self._merge_flops()
        return 2 * self._forward + gradient + sums

    def _merge_flops(self) -> int:
        """Of this rank's rows of U_l C V_lᵀ."""
        left, right = self.sides
        rows = self._rows / left.size
        left_last = left.width * right.flops + right.size * left.flops * rows
        right_last = right.width * left.flops * rows + self._rows * right.flops
        return self._count * int(min(left_last, right_last))


def _lead(alike: Alike) -> tuple[int, ...]:
    """Batch dimensions, taken as one."""
    return (alike.matrices,) if alike.batch else ()


def _side(basis: Held, size: int) -> FreeSide:
    """As ``FreeBasis.of`` holds it."""
    columns = columns_of(basis)
    if spans_of(basis) == "low":
        return FreeSide(size, columns.shape[-1], "columns")
    return FreeSide.of(size, columns.shape[-1])
