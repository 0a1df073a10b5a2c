"""What an operator may write to: memory of its own, which torch lets it write to.

Everything is looked at before anything is written, since torch refuses one tensor of a list when
those before it have changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from osf_kernels.errors import Refusal, TypeRefusal, ValueRefusal
from osf_kernels.ops._validation import require_dense, require_tensor

_autograd = torch._C._autograd
_functorch = torch._C._functorch


def require_target(op: str, name: str, g: object) -> None:
    """What is written is a dense tensor, and no wrapper of others that refuses on its own."""
    require_tensor(op, name, g)
    kind = type(g)
    if kind is not Tensor and is_traceable_wrapper_subclass(g):
        remedy = "pass the tensor that it holds here, as .to_local() of a DTensor"
        raise TypeRefusal.of(op, name, "a plain tensor", kind.__name__, remedy)


def require_no_meta_among(op: str, name: str, written: Sequence[Tensor]) -> None:
    """A list is of tensors with memory or of none: a meta tensor would have the others left out."""
    meta = [t.is_meta for t in written]
    if any(meta) and not all(meta):
        expected = f"on a device with memory, as {name}[{meta.index(False)}] is"
        got, remedy = "a meta tensor", "leave it out"
        raise ValueRefusal.of(op, f"{name}[{meta.index(True)}]", expected, got, remedy)


def require_writable(op: str, names: Sequence[str], g: Tensor, *read: Tensor | None) -> None:
    """What is written has memory of its own, apart from what is read beside it.

    ``names`` are those of g and of what is read, in order.
    """
    try:
        storage = g.untyped_storage().data_ptr()
        for i, t in enumerate(read, 1):
            if t is not None and t.untyped_storage().data_ptr() == storage and _share(g, t):
                remedy = (
                    "use the in-place operator" if names[i] == "g" else f"clone {names[i]} first"
                )
                _refuse_overlap(op, names[0], names[i], remedy)
    except NotImplementedError:  # no storage
        for name, t in zip(names, (g, *read), strict=False):
            if t is not None:
                require_dense(op, name, t)
        raise
    if not g.is_contiguous() or g.is_inference():  # a call less for a small matrix
        require_own_memory(op, names[0], g)


def require_own_memory(op: str, name: str, g: Tensor) -> None:
    """Every element of what is written has memory of its own, and torch lets it be written."""
    if not g.is_contiguous() and _overlaps_itself(g):
        expected = "a tensor whose elements have memory of their own"
        got = f"{tuple(g.shape)} by strides {g.stride()}"
        raise ValueRefusal.of(op, name, expected, got, "write to .clone()")
    if g.is_inference() and not torch.is_inference_mode_enabled():
        expected, got = "a tensor that may be written here", "one of inference mode outside of it"
        remedy = "call inside torch.inference_mode() or write to .clone()"
        raise ValueRefusal.of(op, name, expected, got, remedy)


def require_distinct(
    op: str, name: str, written: Sequence[Tensor], read: Mapping[str, Sequence[Tensor | None]]
) -> None:
    """No matrix of a list shares memory with another that is written, nor with what is read.

    Only tensors whose bytes lie in overlapping ranges are compared: gradients that are views of
    one buffer cost a sort, as does everything else.
    """
    names = [f"{name}[{i}]" for i in range(len(written))]
    tensors = list(written)
    seen = set()
    for other, values in read.items():
        for j, t in enumerate(values):
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                names.append(f"{other}[{j}]")
                tensors.append(t)
    layouts: dict[int, _Layout] = {}
    reaching: list[tuple[int, int, int]] = []  # those before that reach beyond where one starts
    for here in sorted((*_range(t), i) for i, t in enumerate(tensors)):
        start, end, i = here
        if start == end or tensors[i].is_meta:
            continue
        reaching = [there for there in reaching if there[1] > start]
        for there in reaching:
            first, second = sorted((i, there[2]))
            if first >= len(written):
                continue
            for k in (first, second):
                if k not in layouts:
                    layouts[k] = _layout(tensors[k])
            if _meet(start - there[0], layouts[there[2]], layouts[i]):
                if second < len(written):
                    with Refusal.of_entry(second):
                        _refuse_overlap(op, names[second], names[first], "pass a tied weight once")
                with Refusal.of_entry(first):
                    _refuse_overlap(op, names[first], names[second], f"clone {names[second]} first")
        reaching.append(here)


Range = tuple[int, int]  # addresses of a first byte and of the one past a last


def ranges(tensors: Sequence[Tensor]) -> list[Range]:
    """The memory of tensors as ranges that lie apart."""
    found: list[Range] = []
    for start, end in sorted(_range(t) for t in tensors):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif end > start:
            found.append((start, end))
    return found


def span(t: Tensor) -> int:
    """Bytes from a tensor's first one to the last."""
    start, end = _range(t)
    return end - start


def are_apart(addresses: Sequence[int], spans: Sequence[int], read: Sequence[Range]) -> bool:
    """Whether matrices at these addresses reach over no other, nor over what is read; where they
    do, ``require_distinct`` tells whether they share memory."""
    written = [(a, a + size) for a, size in zip(addresses, spans, strict=True) if size]
    reach = 0
    for start, end in sorted([*written, *read]):
        if start < reach:
            return False
        reach = end
    return True


def _refuse_overlap(op: str, name: str, other: str, remedy: str) -> NoReturn:
    raise ValueRefusal.of(op, name, f"apart from {other}", "overlapping memory", remedy)


def _range(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and of the one past the last."""
    start, size = t.data_ptr(), t.element_size()
    if t.is_contiguous():
        return start, start + t.numel() * size
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return start, start + (int(last) + 1) * size


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    (start_a, end_a), (start_b, end_b) = _range(a), _range(b)
    if not max(start_a, start_b) < min(end_a, end_b) or a.is_meta:
        return False
    return _meet(start_b - start_a, _layout(a), _layout(b))


_Layout = tuple[int, tuple[tuple[int, int], ...]]  # bytes of an element; (bytes, how many) of steps


def _layout(t: Tensor) -> _Layout:
    size = t.element_size()
    dimensions = zip(t.shape, t.stride(), strict=True)
    return size, tuple((s * size, n - 1) for n, s in dimensions if n > 1 and s)


def _meet(distance: int, a: _Layout, b: _Layout) -> bool:
    """Whether tensors, b so many bytes behind a, may share memory.

    Views of different rows, or of different columns, of one matrix or of a batch of them don't:
    modulo a pitch each lies in an interval. Interleaved views that no pitch tells apart may.
    """
    for pitch, width_a, width_b in _pitches(a, b):
        if width_a <= distance % pitch <= pitch - width_b:
            return False
    return True


@lru_cache(maxsize=1024)
def _pitches(a: _Layout, b: _Layout) -> list[tuple[int, int, int]]:
    """Divisors of the strides from one on, and how wide the rest of both tensors is."""
    steps = a[1] + b[1]
    found = []
    for floor in {stride for stride, _ in steps}:
        pitch = math.gcd(*(stride for stride, _ in steps if stride >= floor))
        width_a, width_b = (
            size + sum(stride * count for stride, count in inner if stride < floor)
            for size, inner in (a, b)
        )
        if width_a + width_b <= pitch:
            found.append((pitch, width_a, width_b))
    return found


def _overlaps_itself(t: Tensor) -> bool:
    """Whether elements may share memory: a step in one dimension leads beyond all smaller ones."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


# --- autograd ------------------------------------------------------------------------------


def require_no_leaf(op: str, name: str, g: Tensor) -> None:
    if g.requires_grad and g.is_leaf and torch.is_grad_enabled():
        _refuse_in_place(op, name, "a leaf that requires grad")


def require_recordable(op: str, names: Sequence[str], g: Tensor, *read: Tensor | None) -> None:
    """What autograd records as written in place may be: nothing of what torch refuses by itself.

    Compiled calls write in a graph that functions make; of what torch.func wraps, the tensors
    inside are looked at.
    """
    require_no_leaf(op, names[0], g)
    if torch.compiler.is_compiling():
        return
    require_writable(op, names, *map(unwrapped, (g, *read)))
    if not g._is_view() or _functorch.is_functorch_wrapped_tensor(g):
        return
    base = g._base
    if g.requires_grad and base is not None and base.is_leaf:
        _refuse_in_place(op, names[0], "a view of a leaf that requires grad")
    made = _autograd._get_creation_meta(g)
    if made != _autograd.CreationMeta.DEFAULT:
        _refuse_in_place(op, names[0], f"a view that autograd can't follow ({made.name})")


def _refuse_in_place(op: str, name: str, got: str) -> NoReturn:
    expected = "a tensor that may be written in place"
    remedy = "use torch.no_grad() or the out-of-place operator"
    raise ValueRefusal.of(op, name, expected, got, remedy)


def unwrapped(t: Any) -> Any:
    """The tensor inside of what torch.func wraps, the one with memory; None of None."""
    while t is not None and _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t
