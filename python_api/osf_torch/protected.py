"""A protected weight: what this rank holds of its subspace, and which gradient was projected.

A weight sharded by columns is seen transposed, so that the sharded dimension is always the rows:
there B = g V is local and A = Uᵀ g is summed. Of one that is sharded by both the rows are those
that the first of the mesh's dimensions cuts, and B is summed too. A convolution's weight is seen
with all dimensions but the first in one.

A step of training asks the same of all weights of a guard, so that what is asked at every step is
written for lists: one loop, and no call a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import Mode
from osf_torch.bases import Held, columns_of, constant, fitting, mapped, moved, of_shard
from osf_torch.grown import narrowest
from osf_torch.lists import Entry
from osf_torch.selection import matrix_of
from osf_torch.sharding import Group, Sharding, is_dtensor, local, part_like, sharding_of
from osf_torch.sharing import whole
from osf_torch.subspaces import Subspace

# An entry of UᵀU − I: 16-bit bases are off by up to 4e-3, and float32 bases of LAPACK by 2e-5.
ORTHONORMAL_LIMIT = {2: 1e-2, 4: 1e-4, 8: 1e-4}  # by bytes of an element

# Of the parts of a Pinned: which of their last dimensions are which of the weight's.
SIDES = {
    "U": {-2: -2},
    "V": {-2: -1},
    "S": {},
    "protected": {-2: -2, -1: -1},
    "rest_A": {-1: -1},
    "rest_B": {-2: -2},
    "sketch": {-2: -2},
}

_epochs = itertools.count(1)
_MARK = "_osf_projected"
_UNMARKED = (0, 0)


@dataclass(frozen=True)
class Pinned(Subspace):
    """The bases that belong to ``Protected.view``, and what the weight's protected part is.

    Attributes:
        rest_A, rest_B: with S, UᵀW = S Vᵀ + rest_A and W V = U S + rest_B; in mode "core"
            UᵀW V = diag(S) + rest_B. None where it is below the weight's rounding.
        sketch: (m, c) float64, the protected part times random columns, where nothing is pinned.
    """

    rest_A: Tensor | None = None
    rest_B: Tensor | None = None
    sketch: Tensor | None = None

    def to(self, device: torch.device) -> Pinned:
        """All of it on another device."""
        parts: dict[str, Any] = {
            field.name: moved(getattr(self, field.name), device) for field in fields(self)
        }
        return replace(self, **parts)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        parts = [getattr(self, field.name) for field in fields(self)]
        return [columns_of(part) for part in parts if part is not None]

    def residual(self, mode: Mode) -> tuple[Tensor, Tensor] | Tensor | None:
        """The argument of ``restore_many_``."""
        if self.rest_A is None or self.rest_B is None or mode == "core":
            return self.rest_B
        return self.rest_A, self.rest_B


class Protected:
    """A weight with what this rank needs of its subspace.

    Attributes:
        name: as in the model, without the names that wrappers add.
        weight: the parameter.
        is_flat: whether the matrix is the weight with all dimensions but the first in one, as of a
            convolution.
        sharding: how the matrix lies, None where it is whole.
        groups: over which coefficients A are summed, those of the ranks with other rows of
            ``view``; none where no sum is wanted.
        across: over which B are summed, those of the ranks with other columns of ``view``.
        is_plain: whether the weight is no DTensor.
        is_itself: whether ``view`` of the weight and its gradient is either itself.
        is_transposed: whether ``view`` is the transposed weight's.
        held: what is protected of ``view``: this rank's slice of a sharded side, and all of
            another one.
        key, pinned_key: the item and what it holds now, in lists of gradients and of weights.
        raw, kept: ``measures.imprints`` of the gradient that was projected last, before and after,
            where nothing is pinned.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, subspace: Subspace, *, is_flat: bool = False
    ) -> None:
        self.name, self.weight, self.is_flat = name, weight, is_flat
        self.sharding = _of_rows(weight, sharding_of(weight)) if is_flat else sharding_of(weight)
        cuts = [] if self.sharding is None else [c for c in self.sharding.cuts if c.dim >= -2]
        self.is_plain = not is_dtensor(weight)
        self.is_itself = self.is_plain and not is_flat
        self.is_transposed = bool(cuts) and cuts[0].dim == -1
        self.groups: tuple[Group, ...] = cuts[0].groups if cuts else ()
        self.across: tuple[Group, ...] = cuts[1].groups if len(cuts) > 1 else ()
        self._number = next(_epochs)
        self.take(self._held(subspace))

    def view(self, t: Tensor) -> Tensor:
        """What this rank holds of the weight or its gradient as a matrix or a batch of them, with
        the sharded dimension first.

        It lies in the tensor's own memory, but of a convolution with its channels last, whose
        matrix is a copy: what is done to that ``put_back`` does to the tensor.
        """
        t = local(t.detach())
        if self.is_flat:
            return t.flatten(1)
        return t.mT if self.is_transposed else t

    def entry(self, mode: Mode, *, pinned: bool) -> Entry:
        """What is done to the gradient, or where ``pinned`` to the weight."""
        held, groups, across = self.held, self.groups, self.across
        if not pinned:
            m, n = self.view_shape[-2:]
            U = of_shard(held.U, m) if self.groups else held.U
            V = of_shard(held.V, n) if self.across else held.V
            return Entry(U, V, groups, across=across)
        pins = held.S, held.residual(mode), held.protected
        return Entry(held.U, held.V, groups, *pins, across=across)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(..., m, n) of the whole weight."""
        return _matrix_shape(self.weight, self.is_flat)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Of the whole weight, as ``view`` has it."""
        *lead, m, n = self.matrix_shape
        return (*lead, n, m) if self.is_transposed else (*lead, m, n)

    def take(self, held: Pinned) -> None:
        """Holds something else from now on; what was projected with it before, isn't."""
        self._epoch = next(_epochs)
        self.raw: Tensor | None = None
        self.kept: Tensor | None = None
        self._hold(held)

    def _hold(self, held: Pinned) -> None:
        self.held = held
        self.tensors = [t for t in held.tensors() if not t.is_inference()]
        self.versions = [t._version for t in self.tensors]
        self.contents = contents(held.tensors())
        self.key = self._number, next(_epochs)
        self.pinned_key = *self.key, "pinned"

    def follow(self) -> None:
        """Brings what is held to the device that the weight was moved to since, and bases to double
        precision where it was converted to that, or back."""
        weight = local(self.weight)
        columns = columns_of(self.held.V if self.held.U is None else self.held.U)
        if columns.device != weight.device:
            self._hold(self.held.to(weight.device))
        if (columns.dtype == torch.float64) != (weight.dtype == torch.float64):
            U, V = (fitting(basis, weight.dtype) for basis in (self.held.U, self.held.V))
            self._hold(replace(self.held, U=U, V=V))

    def _held(self, s: Subspace) -> Pinned:
        device = local(self.weight).device
        U, V = (moved(constant(basis), device) for basis in narrowest(s))
        for side, basis in (("U", U), ("V", V)):
            require_orthonormal(side, basis)
            _require_apart(side, basis, self.weight)
        return self.hold({"U": U, "V": V, "S": s.S, "protected": s.protected})

    def hold(self, whole: Mapping[str, Any], *, core: bool = False) -> Pinned:
        """What this rank holds of the parts of a Pinned of the weight itself, each all of it, or a
        DTensor, which is gathered where it lies otherwise than the weight: a collective.

        Args:
            core: as in ``follows``.
        """
        device = local(self.weight).device
        found: dict[str, Any] = {"U": None, "V": None}
        for key, part in whole.items():
            if part is not None:
                follows = self.follows(key, columns_of(part).dim(), core=core)
                part = mapped(part, partial(part_like, like=self.weight, follows=follows))
                found[key] = moved(part, device)
        return self.turned(Pinned(**found))

    def turned(self, held: Pinned) -> Pinned:
        """What is held of the weight in terms of ``view``, or the other way round."""
        if not self.is_transposed:
            return held
        rest_A, rest_B = held.rest_B, held.rest_A
        if rest_A is not None and rest_B is None:  # of mode "core", where rest_B alone is held
            rest_A, rest_B = None, rest_A
        turned = (None if t is None else t.mT for t in (held.protected, rest_A, rest_B))
        protected, rest_A, rest_B = turned
        return Pinned(held.V, held.U, held.S, protected, rest_A, rest_B, held.sketch)

    def follows(self, key: str, dims: int, *, core: bool = False) -> dict[int, int]:
        """Of a part of a Pinned of the weight itself, of ``dims`` dimensions: which of them are cut
        as which of the weight, counted from the end.

        Args:
            core: as in ``sides``.
        """
        sides = self.sides(key, dims, core=core)
        if not self.is_flat:
            return sides
        return {mine: -self.weight.dim() for mine, theirs in sides.items() if theirs == -2}

    def sides(self, key: str, dims: int, *, core: bool = False) -> dict[int, int]:
        """Likewise which of them are as long as which of the matrix.

        Args:
            core: whether rest_B is that of mode "core", which has no side of the weight's.
        """
        sides = {} if core and key == "rest_B" else dict(SIDES[key])
        batch = len(self.matrix_shape) - 2
        last = 1 if key == "S" else 2
        if dims == batch + last:  # and not one for every matrix of a batch
            sides |= {-last - i: -2 - i for i in range(1, batch + 1)}
        return sides


class Together:
    """Items of one guard, and all that they hold as one flat list."""

    def __init__(self, items: Iterable[Protected]) -> None:
        self.items = list(items)
        self._weights = [item.weight for item in self.items]
        self._keys: list[tuple[int, int]] = []
        self._tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._places: list[tuple[torch.device, torch.dtype]] = []

    def written(self) -> list[Protected]:
        """Those whose bases or pinned parts something is known to have written to: the caller has
        the tensors."""
        keys = [item.key for item in self.items]
        if keys != self._keys:
            self._keys = keys
            self._tensors = [t for item in self.items for t in item.tensors]
            self._versions = [version for item in self.items for version in item.versions]
        if [t._version for t in self._tensors] == self._versions:
            return []
        return [item for item in self.items if [t._version for t in item.tensors] != item.versions]

    def follow(self, some: Sequence[Protected]) -> None:
        """Has some follow their weights, or all; see :meth:`Protected.follow`."""
        if len(some) == 1:  # as of a hook that projects each gradient as it comes
            some[0].follow()
            return
        places = [(weight.device, weight.dtype) for weight in self._weights]
        if places != self._places:
            for item in self.items:
                item.follow()
            self._places = places


# --- lists of items ---


def gradients_of(items: Sequence[Protected]) -> list[Tensor]:
    """The gradients, all of which there are."""
    grads = []
    for item in items:
        g = item.weight.grad
        assert g is not None
        grads.append(g)
    return grads


def matrices_of(
    items: Sequence[Protected], tensors: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """What this rank holds of weights, or of what has their shapes; see ``Protected.view``. Without
    gradients recorded.

    Args:
        tensors: None takes their gradients, all of which there are.
    """
    matrices = []
    for i, item in enumerate(items):
        t = item.weight.grad if tensors is None else tensors[i]
        assert t is not None
        matrices.append(t if item.is_itself else item.view(t))
    return matrices


def put_back(
    items: Sequence[Protected], tensors: Sequence[Tensor], matrices: Sequence[Tensor]
) -> None:
    """Writes those of the matrices to their tensors that don't lie in the tensors' memory.

    Args:
        matrices: of ``matrices_of``, written to since.
    """
    for item, t, x in zip(items, tensors, matrices, strict=True):
        if item.is_flat:
            held = local(t.detach())
            if x.data_ptr() != held.data_ptr():
                held.copy_(x.view(held.shape))


def repeats(t: Tensor) -> bool:
    """Whether two places of a tensor may be one in memory, as of one that was expanded."""
    reach = 1
    for step, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and step < reach:
            return True
        reach += (size - 1) * step
    return False


# Which gradient was projected is marked on the gradient itself: a weak reference from an item would
# keep torch from exchanging the bodies of parameters and gradients, as ``Module.to`` does with
# DTensors.


def mark_projected(items: Sequence[Protected]) -> None:
    """Their gradients, as they are now, are the projected ones."""
    for item in items:
        g = item.weight.grad
        assert g is not None
        g.__dict__[_MARK] = item._epoch, g._version


def unmet(items: Sequence[Protected]) -> list[Protected]:
    """Those whose gradients aren't the tensors that were projected last, written to since or not,
    or that have none."""
    return [
        item
        for item in items
        if (g := item.weight.grad) is None or g.__dict__.get(_MARK, _UNMARKED)[0] != item._epoch
    ]


def unprojected(items: Sequence[Protected]) -> list[Protected]:
    """Those whose gradients aren't projected, or not known to be: something may have written to
    them since.

    Always of DTensors: in-place operators count on them but not on their local tensors, writing to
    those the other way round, and ``torch._foreach_*_`` on neither (torch 2.13; the clipping
    functions use it). Projecting a gradient again is exact: P² = P.
    """
    return [
        item
        for item in items
        if (g := item.weight.grad) is None
        or not item.is_plain
        or g.__dict__.get(_MARK, _UNMARKED) != (item._epoch, g._version)
    ]


def readable(items: Sequence[Protected]) -> list[Protected]:
    """Those of whose weights the host reads figures without waiting for a device or a rank."""
    return [item for item in items if item.sharding is None and item.weight.device.type == "cpu"]


# --- what a subspace must be, and how it is cut ---


def _of_rows(weight: Tensor, sharding: Sharding | None) -> Sharding | None:
    """How the matrix (out, in·kh·kw) of a convolution lies, whose weight lies so.

    Raises:
        ValueError: the weight is cut along another dimension than the first, which is no slice of
            the matrix.
    """
    cuts = () if sharding is None else sharding.cuts
    others = [cut.dim + weight.dim() for cut in cuts if cut.dim != -weight.dim()]
    if others:
        raise ValueError(
            "expected a convolution's weight to be sharded by its first dimension, whose slices "
            f"are rows of its (out, in·kh·kw) matrix, got {tuple(weight.shape)} sharded by "
            f"dimension {others[0]}; shard it by Shard(0), as fully_shard does, or protect the "
            "model without it"
        )
    return Sharding(tuple(replace(cut, dim=-2) for cut in cuts)) if cuts else None


def contents(tensors: Iterable[Tensor]) -> Tensor:
    """Figures (2k,) of k tensors that are others when any value is: sums of their entries times
    random numbers, and norms, in float64 on their device."""
    figures = []
    for t in tensors:
        x = t.detach().double()
        figures.append(x.norm())
        for dim in range(x.dim()):
            x = x @ _random(x.shape[-1], dim, x.device)
        figures.append(x)
    return torch.stack(figures) if figures else torch.zeros(0, dtype=torch.float64)


@lru_cache(maxsize=64)
def _random(n: int, dim: int, device: torch.device) -> Tensor:
    """Others for each dimension: a square matrix and its transpose have different figures."""
    generator = torch.Generator("cpu").manual_seed(8 * n + dim)
    numbers = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(device)


def _require_apart(side: str, basis: Held, weight: Tensor) -> None:
    """Refuses a basis in the memory of its weight, which steps write to."""
    if basis is None or not columns_of(basis).numel() or not weight.numel():
        return
    (start, end), (first, last) = map(_memory, (columns_of(basis), weight))
    if max(start, first) < min(end, last):
        raise ValueError(
            f"expected {side} to have memory of its own, got a view of the weight, which training "
            f"moves; pass {side}.clone()"
        )


def _memory(t: Tensor) -> tuple[int, int]:
    t = local(t)
    reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()


def require_orthonormal(side: str, basis: Held) -> None:
    """Refuses columns that UᵀU = I doesn't hold for; with them P is no projection and grows."""
    if basis is None or not columns_of(basis).numel():
        return
    columns = columns_of(basis)
    itemsize = columns.element_size()
    columns = whole(columns).double()  # which autocast leaves alone
    gram = columns.mT @ columns
    off = float(
        (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max()
    )
    if not off <= ORTHONORMAL_LIMIT[itemsize]:
        raise ValueError(
            f"expected {side} to have orthonormal columns, got {side}'{side} off from I by "
            f"{off:.1e}; pass them through osf_kernels.orthonormalize first"
        )


def zero3_shape(weight: Tensor) -> tuple[int, ...] | None:
    """The whole shape of a weight that DeepSpeed's ZeRO-3 has partitioned, else None."""
    return tuple(getattr(weight, "ds_shape", ())) or None


def _matrix_shape(weight: Tensor, is_flat: bool) -> tuple[int, ...]:
    shape = zero3_shape(weight) or tuple(weight.shape)
    return matrix_of(shape, True) if is_flat else shape


def shapes_of(weight: Tensor, s: Subspace, *, is_flat: bool) -> tuple[Tensor, Held, Held]:
    """The whole weight, of a convolution its matrix, and its bases as meta tensors, for ``plan`` to
    judge."""
    W = torch.empty(_matrix_shape(weight, is_flat), dtype=weight.dtype, device="meta")
    return W, moved(s.U, W.device), moved(s.V, W.device)
