"""What each weight is multiplied with: rows of activations, seen as torch's operators run.

A weight is known by the memory that it lies in. Where a product of two matrices takes a view of
that memory, its offset and strides say which matrix of a batch of experts it is, and along which
side the product sums. So it needn't be known what a module does with its weights, whose forward
runs, or whether experts run one by one, gathered or grouped. A copy of a weight, as autocast makes
and as indexing by expert does, is followed like the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from osf_torch.kinds import owners
from osf_torch.masks import Padding
from osf_torch.sharding import is_dtensor, local, sharding_of

Side = Literal["U", "V"]
SEEN = "a product of torch's operators (a kernel of its own isn't one)"
SIDES: tuple[Side, ...] = ("U", "V")
Parts = list[tuple[int, Tensor]]  # the matrix of a batch, 0 where there is one, and its rows

# Which arguments are the factors of a product.
PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::addbmm": (1, 2),
    "aten::addmv": (1, 2),
}
# What gives a weight's values elsewhere, cast, copied or scaled, each at its own place.
COPIES = {f"aten::{name}" for name in ("_to_copy", "clone", "mul", "div", "add", "sub")}


class Meter(Protocol):
    """What is done with the rows that a weight reads."""

    def add(self, side: Side, matrix: int, rows: Tensor) -> None:
        """``rows`` (tokens, n) are multiplied with a matrix by V's side, (tokens, m) by U's."""


class Reads:
    """Hands every row that a weight is multiplied with to the weight's meter.

    It sees the products that torch's operators make. What a kernel of its own reads (a fused
    layer, a quantized one) it doesn't see.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        meters: Mapping[str, Meter],
        operator: str,
    ) -> None:
        self._weights, self._meters, self._operator = weights, meters, operator
        self._owned: dict[nn.Module, list[tuple[str, str]]] = {}  # attributes and names
        having = owners(model)
        for name, weight in weights.items():
            for module, attribute in having[id(weight)]:
                self._owned.setdefault(module, []).append((attribute, name))

    @contextmanager
    def watching(self, padding: Padding) -> Iterator[None]:
        sources = _Sources()
        running: dict[str, int] = {}  # calls of the modules that own a weight
        routed: dict[tuple[str, Side], Parts] = {}  # what these calls read so far

        def begin(module: nn.Module, *_: object) -> None:
            for attribute, name in self._owned[module]:
                running[name] = running.get(name, 0) + 1
                held = module._parameters.get(attribute)
                if held is not None and not sources.holds(name, held):
                    sources.hold(name, held)  # as FSDP has just gathered it

        def end(module: nn.Module, *_: object) -> None:
            for _attribute, name in self._owned[module]:
                running[name] -= 1
                for side in SIDES if not running[name] else ():
                    parts = routed.pop((name, side), [])
                    for matrix, rows in padding.routed((name, side), parts):
                        self._meters[name].add(side, matrix, rows)

        def take(name: str, side: Side, parts: Parts) -> None:
            self._require_whole(name, side, parts)
            if self._weights[name].dim() == 2:
                for matrix, rows in parts:
                    self._meters[name].add(side, matrix, *padding.rows((name, side), rows))
            elif padding.found and running.get(name):
                routed.setdefault((name, side), []).extend(parts)
            elif not padding.probing:
                for matrix, rows in parts:
                    self._meters[name].add(side, matrix, rows)

        for name, weight in self._weights.items():
            sources.hold(name, weight)
        torch.clear_autocast_cache()  # of copies that were made unseen
        with ExitStack() as stack:
            for module in self._owned:
                stack.enter_context(module.register_forward_pre_hook(begin))
                stack.enter_context(module.register_forward_hook(end, always_call=True))
            stack.enter_context(_Products(sources, take))
            yield

    def _require_whole(self, name: str, side: Side, parts: Parts) -> None:
        letter, size = ("m", -2) if side == "U" else ("n", -1)
        width = self._weights[name].shape[size]
        for _, rows in parts:
            if rows.shape[-1] != width:
                raise ValueError(
                    f"{self._operator}: expected inputs of {name!r} to have {letter}={width} "
                    f"features, got {rows.shape[-1]}; of a tensor-parallel layer call this before "
                    "parallelizing, else leave it out by filter="
                )


@dataclass(frozen=True)
class _Source:
    """Memory that holds matrices of a weight, or a copy of them.

    Attributes:
        storage: a weak reference, so that memory is let go of as ever and no other storage goes by
            its address meanwhile.
        start: the first element.
        matrices: which of the weight's lie one after another.
        sizes, strides: along matrices, rows and columns.
    """

    name: str
    storage: StorageWeakRef
    start: int
    matrices: Sequence[int]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def matrix_at(self, offset: int) -> int | None:
        """Which of the matrices an element is of; None of one outside."""
        rest, found = offset - self.start, 0
        for axis in sorted(range(3), key=lambda axis: -self.strides[axis]):
            place, rest = divmod(rest, self.strides[axis])
            if not 0 <= place < self.sizes[axis]:
                return None
            found = place if axis == 0 else found
        return found


@dataclass(frozen=True)
class _Piece:
    """A dimension of a view, or a part of one, along an axis of the source."""

    axis: int  # 0 along matrices, 1 along rows, 2 along columns
    size: int
    stride: int


@dataclass(frozen=True)
class _View:
    """A tensor in a source's memory.

    Attributes:
        first: the matrix of the source in which it starts.
        dims: what each dimension runs along: nothing (of one, or repeated), or one axis, or
            several where matrices, rows and columns are one dimension.
    """

    source: _Source
    first: int
    dims: tuple[tuple[_Piece, ...], ...]

    def jumps(self, dim: int) -> list[int]:
        """How many matrices further each place along a dimension lies; [0] where none does."""
        step = self.source.strides[0]
        for at, piece in enumerate(self.dims[dim]):
            if piece.axis == 0:
                within = math.prod(inner.size for inner in self.dims[dim][at + 1 :])
                return [
                    i * (piece.stride // step) for i in range(piece.size) for _ in range(within)
                ]
        return [0]

    def matrix(self, jump: int) -> int:
        """Of the weight."""
        return self.source.matrices[self.first + jump]


class _Sources:
    """Where weights and copies of them lie."""

    def __init__(self) -> None:
        self._by_storage: dict[int, list[_Source]] = {}
        self._limit = 256

    def holds(self, name: str, weight: Tensor) -> bool:
        """Whether the weight is known where it lies."""
        return any(s.name == name for s in self._by_storage.get(_address(local(weight)), ()))

    def hold(self, name: str, weight: Tensor) -> None:
        """A weight (..., m, n), or what this rank has of one."""
        cut = sharding_of(weight) if is_dtensor(weight) else None
        first = cut.start if cut is not None and cut.dim == -3 else 0
        held = local(weight.detach())
        if held.dim() < 2 or not held.numel():
            return
        batch = held[None] if held.dim() == 2 else held.flatten(0, -3)
        if _address(batch) == _address(held):
            layout = [
                (i, k, s) for i, (k, s) in enumerate(zip(batch.shape, batch.stride(), strict=True))
            ]
            self._add(name, batch, range(first, first + len(batch)), layout)

    def copied(self, taken: Tensor, made: Tensor) -> None:
        """``made`` holds at each place what was made of the value of ``taken`` there."""
        view = self.view(taken)
        if view is None or made.shape != taken.shape or self._knows(made):
            return
        layout: list[tuple[int, int, int]] = []
        jumps = [0]
        for dim, pieces in enumerate(view.dims):
            stride = made.stride(dim)
            for piece in reversed(pieces):
                layout.append((piece.axis, piece.size, stride))
                stride *= piece.size
                if piece.axis == 0:
                    jumps = list(dict.fromkeys(view.jumps(dim)))
        self._add(view.source.name, made, [view.matrix(j) for j in jumps], layout)

    def indexed(self, taken: Tensor, index: Tensor, made: Tensor) -> None:
        """``made`` are the matrices of ``taken`` that ``index`` (any dimensions) names."""
        view = self.view(taken)
        if view is None or self._knows(made) or [p.axis for p in view.dims[0]] != [0]:
            return
        if index.dtype in (torch.bool, torch.uint8):
            index = index.nonzero().flatten()
        jumps = view.jumps(0)
        matrices = [view.matrix(jumps[i]) for i in index.flatten().tolist()]
        laid = made.reshape(-1, *taken.shape[1:])
        if _address(laid) == _address(made) and all(len(pieces) < 2 for pieces in view.dims):
            layout = [(0, laid.shape[0], laid.stride(0))]
            for dim, pieces in enumerate(view.dims[1:], 1):
                layout += [(piece.axis, piece.size, laid.stride(dim)) for piece in pieces]
            self._add(view.source.name, laid, matrices, layout)

    def view(self, t: object) -> _View | None:
        """What a tensor is of a weight; None of one that is no part of any."""
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            return None
        for source in self._by_storage.get(_address(t), ()):
            first = source.matrix_at(int(t.storage_offset()))
            if first is None:
                continue
            dims = [_pieces(source, k, s) for k, s in zip(t.shape, t.stride(), strict=True)]
            if all(dim is not None for dim in dims):
                return _View(source, first, tuple(dim for dim in dims if dim is not None))
        return None

    def _knows(self, t: Tensor) -> bool:
        return _address(t) in self._by_storage

    def _add(
        self,
        name: str,
        t: Tensor,
        matrices: Sequence[int],
        layout: Sequence[tuple[int, int, int]],
    ) -> None:
        """``layout``: the axis, size and stride of every dimension of t."""
        sizes, strides = [1, 1, 1], [0, 0, 0]
        for axis, size, stride in layout:
            if size > 1:
                if sizes[axis] > 1:
                    return  # rows cut into heads, whose strides alone don't tell what they are
                sizes[axis], strides[axis] = size, stride
        reach = 1
        for axis in sorted(range(3), key=lambda axis: strides[axis]):
            if sizes[axis] > 1:
                if strides[axis] < reach:
                    return  # elements that lie on each other, or between
                reach += (sizes[axis] - 1) * strides[axis]
        for axis in range(3):  # nothing lies along an axis of one: no step within reach is one
            if sizes[axis] == 1:
                strides[axis] = reach + axis
        self._drop_expired()
        storage = StorageWeakRef(t.untyped_storage())
        source = _Source(
            name, storage, int(t.storage_offset()), matrices, tuple(sizes), tuple(strides)
        )
        held = self._by_storage.setdefault(_address(t), [])
        held[:] = [other for other in held if other.start != source.start] + [source]

    def _drop_expired(self) -> None:
        if len(self._by_storage) > self._limit:
            for address, held in list(self._by_storage.items()):
                if held[0].storage.expired():
                    del self._by_storage[address]
            self._limit = max(self._limit, 2 * len(self._by_storage))


def _address(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address


def _pieces(source: _Source, size: int, stride: int) -> tuple[_Piece, ...] | None:
    """What a dimension of a tensor runs along; None where that isn't known."""
    if size == 1 or stride == 0:
        return ()
    fitting = [axis for axis in range(3) if stride % source.strides[axis] == 0]
    if not fitting:
        return None
    axis = max(fitting, key=lambda axis: source.strides[axis])
    last = (size - 1) * (stride // source.strides[axis])
    if last < source.sizes[axis]:
        return (_Piece(axis, size, stride),)
    # Matrices laid end to end, or rows: the dimension runs along two axes.
    inner = source.sizes[axis]
    outer = inner * stride
    if stride != source.strides[axis] or size % inner or outer not in source.strides:
        return None
    rest = _pieces(source, size // inner, outer)
    return None if rest is None else (*rest, _Piece(axis, inner, stride))


class _Products(TorchDispatchMode):
    """Tells of every product with a weight: its name, the side that is summed over, the rows."""

    supports_higher_order_operators = True  # flex_attention is one

    def __init__(self, sources: _Sources, take: Callable[[str, Side, Parts], None]) -> None:
        super().__init__()
        self._sources, self._take = sources, take
        self._kinds: dict[Any, str] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap every operator's call, and load its compiler for that."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "composite":  # as in inference mode
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if kind == "product":
            left, right = PRODUCTS[func._schema.name]
            self._product(local(args[left]), local(args[right]), None)
        elif kind == "grouped":
            ends = [a for a in (*args[2:], *kwargs.values()) if _is_integers(a)]
            self._product(local(args[0]), local(args[1]), ends[0] if ends else None)
        elif kind == "copy":
            for taken in args[:2]:
                if isinstance(taken, Tensor):
                    self._sources.copied(local(taken), local(out))
        elif kind == "index":
            self._indexed(func, args, out)
        return out

    def _indexed(self, func: Any, args: Sequence[Any], out: Tensor) -> None:
        if func._schema.name == "aten::index_select":
            first, index = args[1] % args[0].dim() == 0, args[2]
        else:
            first, index = args[1][0] is not None and len(args[1]) == 1, args[1][0]
        if first:
            self._sources.indexed(local(args[0]), local(index), local(out))

    def _product(self, left: Tensor, right: Tensor, ends: Tensor | None) -> None:
        weight, view = right, self._sources.view(right)
        other = self._sources.view(left)
        if (view is None) == (other is None):
            return
        if view is None:
            view, weight, rows = other, left, right if right.dim() == 1 else right.mT
        else:
            rows = left
        assert view is not None
        if weight.dim() == 1 or (ends is not None and (weight is left or weight.dim() < 3)):
            return
        summed, free = (-1, -2) if weight is left else (-2, -1)
        side = _side(view, summed, free)
        if side is None:
            return
        inner = dict.fromkeys(view.jumps(free))  # more than one of matrices laid side by side
        if ends is not None:
            outer = view.jumps(0)
            cuts = [0, *ends.tolist()]
            parts = [
                (jump, rows[start:end])
                for jump, start, end in zip(outer, cuts, cuts[1:], strict=False)
                if end > start
            ]
        elif weight.dim() == 2:
            parts = [(0, rows[None] if rows.dim() == 1 else rows)]
        else:
            parts = _apart(view.jumps(0), rows)
        found = [(view.matrix(outer + j), x) for outer, x in parts for j in inner]
        self._take(view.source.name, side, found)


def _apart(jumps: Sequence[int], rows: Tensor) -> Parts:
    """Rows (b, tokens, width) by the matrices that read them, each matrix once."""
    if len(jumps) == 1:
        return [(jumps[0], rows.flatten(0, 1))]
    having: dict[int, list[int]] = {}
    for i, jump in enumerate(jumps):
        having.setdefault(jump, []).append(i)
    return [(jump, rows[which].flatten(0, 1)) for jump, which in having.items()]


def _side(view: _View, summed: int, free: int) -> Side | None:
    """Over which side of the weight a product sums; None over something else."""
    along = [piece.axis for piece in view.dims[summed]]
    if not along:  # of one: not what the other dimension runs along
        return "U" if 2 in [piece.axis for piece in view.dims[free]] else "V"
    if len(along) > 1 or along[0] == 0:
        return None
    return "U" if along[0] == 1 else "V"


def _is_integers(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


def _kind(func: Any) -> str:
    """What is done about an operator."""
    if not isinstance(func, torch._ops.OpOverload):
        return "other"
    name = func._schema.name
    if name in PRODUCTS:
        return "product"
    if "grouped_mm" in name and "backward" not in name:
        return "grouped"
    if name in COPIES:
        return "copy"
    if name in ("aten::index", "aten::index_select"):
        return "index"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key
    return "composite" if composite(func.name(), "CompositeImplicitAutograd") else "other"
