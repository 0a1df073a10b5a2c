"""What each weight is multiplied with: rows of activations, seen as torch's operators run.

A weight is known by the memory that it lies in. Where a product of two matrices takes a view of
that memory, its offset and strides say which matrix of a batch of experts it is, and along which
side the product sums. So it needn't be known what a module does with its weights, whose forward
runs, or whether experts run one by one, gathered or grouped. A copy of a weight, as autocast makes
and as indexing by expert does, is followed like the weight. A convolution multiplies its matrix
with the patches of its input; a transposed one multiplies what is at each place with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from osf_torch.kinds import is_flat, owners
from osf_torch.masks import Padding
from osf_torch.patches import Patches, patches, places
from osf_torch.selection import matrix_of
from osf_torch.sharding import local
from osf_torch.views import Sources, View

Side = Literal["U", "V"]
SEEN = "a product of torch's operators (custom kernels can't be seen)"
SIDES: tuple[Side, ...] = ("U", "V")
Parts = list[tuple[int, Tensor]]  # the matrix of a batch, 0 where there is one, and its rows
Rows = Tensor | Patches

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
CONVOLUTIONS = {"aten::convolution", "aten::_convolution"}
# What gives a weight's values elsewhere, cast, copied, or with something added to them, each at its
# own place; and what scales them, which tells nothing of what is read unless by one number.
COPIES = {f"aten::{name}" for name in ("_to_copy", "clone", "add", "sub")}
SCALES = {"aten::mul", "aten::div"}


class Meter(Protocol):
    """What is done with the rows that a weight reads."""

    def add(self, side: Side, matrix: int, rows: Rows) -> None:
        """``rows`` (tokens, n) are multiplied with a matrix by V's side, (tokens, m) by U's; of a
        convolution with those of its rows or columns that ``Patches.others`` says."""


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
        self._flat = {name for name, w in weights.items() if is_flat(w, having[id(w)])}
        for name, weight in weights.items():
            for module, attribute in having[id(weight)]:
                self._owned.setdefault(module, []).append((attribute, name))

    @contextmanager
    def watching(self, padding: Padding) -> Iterator[None]:
        sources = Sources()
        running: dict[str, int] = {}  # calls of the modules that own a weight
        routed: dict[tuple[str, Side], Parts] = {}  # what these calls read so far

        def begin(module: nn.Module, *_: object) -> None:
            for attribute, name in self._owned[module]:
                running[name] = running.get(name, 0) + 1
                held = module._parameters.get(attribute)
                if held is not None and not sources.holds(name, held):
                    # As FSDP has just gathered it.
                    sources.hold(name, held, is_flat=name in self._flat)

        def end(module: nn.Module, *_: object) -> None:
            for _attribute, name in self._owned[module]:
                running[name] = running.get(name, 1) - 1
                for side in SIDES if not running[name] else ():
                    parts = routed.pop((name, side), [])
                    for matrix, rows in padding.routed((name, side), parts):
                        self._meters[name].add(side, matrix, rows)

        def take(name: str, side: Side, parts: Parts) -> None:
            self._require_whole(name, side, parts)
            if name in self._flat or self._weights[name].dim() == 2:
                for matrix, rows in parts:
                    self._meters[name].add(side, matrix, *padding.rows((name, side), rows))
            elif padding.found and running.get(name):
                routed.setdefault((name, side), []).extend(parts)
            elif not padding.probing:
                for matrix, rows in parts:
                    self._meters[name].add(side, matrix, rows)

        def convolved(name: str, side: Side, groups: Sequence[Patches]) -> None:
            for rows in groups:
                self._require_width(name, side, rows.width)
                self._meters[name].add(side, 0, padding.patches((name, side), rows))

        for name, weight in self._weights.items():
            sources.hold(name, weight, is_flat=name in self._flat)
        torch.clear_autocast_cache()  # of copies that were made unseen
        with ExitStack() as stack:
            for module in self._owned:
                stack.enter_context(module.register_forward_pre_hook(begin))
                stack.enter_context(module.register_forward_hook(end, always_call=True))
            stack.enter_context(_Products(sources, take, convolved, self._refuse_part))
            yield

    def _require_whole(self, name: str, side: Side, parts: Parts) -> None:
        for _, rows in parts:
            self._require_width(name, side, rows.shape[-1])

    def _require_width(self, name: str, side: Side, width: int) -> None:
        letter, size = ("m", 0) if side == "U" else ("n", 1)
        wanted = matrix_of(self._weights[name].shape, name in self._flat)[size]
        if width != wanted:
            raise ValueError(
                f"{self._operator}: expected inputs of {name!r} to have {letter}={wanted} "
                f"features, got {width}; of a tensor-parallel layer call this before "
                "parallelizing, else leave it out by filter="
            )

    def _refuse_part(self, name: str, weight: Tensor) -> None:
        raise ValueError(
            f"{self._operator}: expected convolutions to use whole rows of {name!r}, "
            f"{tuple(self._weights[name].shape)}, got a part or a view of it, "
            f"{tuple(weight.shape)}; leave it out by filter="
        )


class _Products(TorchDispatchMode):
    """Tells of every product with a weight: its name, the side that is summed over, the rows."""

    supports_higher_order_operators = True  # flex_attention is one

    def __init__(
        self,
        sources: Sources,
        take: Callable[[str, Side, Parts], None],
        convolved: Callable[[str, Side, Sequence[Patches]], None],
        refuse: Callable[[str, Tensor], None],
    ) -> None:
        super().__init__()
        self._sources, self._take, self._convolved = sources, take, convolved
        self._refuse = refuse
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
        elif kind == "convolution":
            self._convolution(*args[:9])
        elif kind == "copy" or (kind == "scale" and _is_number(args[1])):
            for taken in args[: 1 if kind == "scale" else 2]:
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

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: object,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: object,
        groups: int,
    ) -> None:
        x, weight = local(x), local(weight)
        if not self._sources.knows(weight):
            return
        found = self._sources.kernel(weight)
        first = 0 if found is None else found[1]
        if transposed:
            of = places(x, groups)
        else:
            rows = range(first, first + weight.shape[0])
            of = patches(x, weight.shape[2:], stride, padding, dilation, groups, rows)
        if found is None:
            self._of_a_view(weight, of, transposed)
            return
        self._convolved(found[0], "U" if transposed else "V", of)

    def _of_a_view(self, weight: Tensor, of: Sequence[Patches], transposed: bool) -> None:
        """A convolution with what isn't the weight of one as it is, or whole rows of it: with the
        matrix of another layer, or another shape of the same matrix."""
        view = self._sources.view(weight.flatten(1))
        summed, free = (0, 1) if transposed else (1, 0)
        side = None if view is None else _side(view, summed, free)
        if view is not None and side is not None:
            inner = dict.fromkeys(view.jumps(free))
            rows = [x[torch.arange(len(x), device=x.device)] for x in of]
            self._take(view.source.name, side, [(view.matrix(j), x) for j in inner for x in rows])
            return
        part = self._sources.part_of_kernel(weight)
        if part is not None:
            self._refuse(part, weight)

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


def _side(view: View, summed: int, free: int) -> Side | None:
    """Over which side of the weight a product sums; None over something else."""
    along = [piece.axis for piece in view.dims[summed]]
    if not along:  # of one: not what the other dimension runs along
        return "U" if 2 in [piece.axis for piece in view.dims[free]] else "V"
    if len(along) > 1 or along[0] == 0:
        return None
    return "U" if along[0] == 1 else "V"


def _is_number(value: object) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _is_integers(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


def _kind(func: Any) -> str:
    """What is done about an operator."""
    if not isinstance(func, torch._ops.OpOverload):
        return "other"
    name = func._schema.name
    if name in PRODUCTS:
        return "product"
    if name in CONVOLUTIONS:
        return "convolution"
    if "grouped_mm" in name and "backward" not in name:
        return "grouped"
    if name in COPIES:
        return "copy"
    if name in SCALES:
        return "scale"
    if name in ("aten::index", "aten::index_select"):
        return "index"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key
    return "composite" if composite(func.name(), "CompositeImplicitAutograd") else "other"
