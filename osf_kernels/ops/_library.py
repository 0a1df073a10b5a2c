"""The torch.library namespace ``osf_kernels`` and how an operator enters it.

``Library.define`` with ``impl`` costs about 3 µs a call, ``custom_op`` 25 to 50 µs: the former
is used, with fake, autograd and vmap rules registered on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from osf_kernels.backends.precision import full_precision, lowered
from osf_kernels.errors import ValueRefusal

NAMESPACE = "osf_kernels"
library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines an operator for every device and returns its callable overload."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _in_full_precision(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if vmap is not None:
        torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=library)
    overload: Callable[..., Any] = getattr(torch.ops.osf_kernels, name).default
    return overload


def _in_full_precision(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Operators choose what they multiply in, not autocast nor a setting of the process."""

    @wraps(implementation)
    def run(*arguments: Any) -> Any:
        if not lowered():
            return implementation(*arguments)
        with full_precision():
            return implementation(*arguments)

    return run


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_profiling = torch._C._autograd._profiler_enabled
_tracing = torch._C._get_tracing_state
_fake_mode = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether an operator's implementation may be called as the function it is.

    The dispatcher takes 4 µs to come back to it. It is needed where something would see the
    operator pass (``observed``) or where a tensor is of a subclass; and where float32 products
    would be rounded, which ``register`` keeps out. That autograd doesn't record the call is the
    caller's to know.
    """
    for t in tensors:
        if t is not None and type(t) not in _PLAIN:
            return False
    return not (observed() or lowered())


def observed() -> bool:
    """Whether something would see an operator pass: a compiler, a trace, a profile, torch.func,
    forward mode or another mode."""
    return torch.compiler.is_compiling() or bool(
        forward_ad._current_level >= 0
        or _dispatch_modes()
        or _function_modes()
        or _profiling()
        or _transform() is not None
        or _tracing() is not None
    )


def are_plain(tensors: Sequence[object]) -> bool:
    """Whether all are plain tensors, which have memory."""
    return False not in [type(t) in _PLAIN for t in tensors]


def within_fake_mode() -> bool:
    """Whether a mode is on in which new tensors have no values."""
    return _fake_mode(_FAKE) is not None


def within_trace() -> bool:
    """Whether torch.jit.trace is on, where sizes are tensors."""
    return _tracing() is not None


def within_transform() -> bool:
    """Whether torch.func or forward mode takes the call."""
    return forward_ad._current_level >= 0 or _transform() is not None


_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)


def transformed() -> bool:
    """Whether forward mode or torch.func differentiates here.

    The derivative that is registered with an operator is zero in the one and an error in the
    other; an autograd.Function serves both. Dynamo leaves its ``jvp`` out and is sent back to
    eager calls, or stops if it may not.
    """
    forward = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        if forward:
            raise NotImplementedError("osf_kernels: expected forward mode in eager calls only")
        return False
    if forward or _transform() is None:
        return forward
    return any(t.key() in _DERIVATIVES for t in torch._C._functorch.get_interpreter_stack() or ())


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward mode has a derivative of one of them."""
    if forward_ad._current_level < 0:
        return False
    for t in tensors:
        while t is not None and torch._C._functorch.is_batchedtensor(t):
            t = torch._C._functorch.get_unwrapped(t)
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            return True
    return False


def require_vmapped(op: str, name: str, dim: int | None) -> None:
    """What is written has an element for each of a batch that is read."""
    if dim is None:
        expected = "vmapped where an argument is"
        raise ValueRefusal.of(op, name, expected, "one for the whole batch")


def aligned(info: Any, in_dims: Any, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Operands with the vmapped dimension in front, and ones where a basis has fewer others."""
    g, g_dim = tensors[0], in_dims[0]
    assert g is not None
    rank = g.dim() - (g_dim is not None)
    aligned: list[Tensor | None] = []
    for t, dim in zip(tensors, in_dims, strict=False):
        if t is None:
            aligned.append(None)
        elif dim is None:
            aligned.append(t)
        else:
            t = t.movedim(dim, 0)
            missing = rank - (t.dim() - 1)
            aligned.append(t.reshape(t.shape[0], *[1] * missing, *t.shape[1:]) if missing else t)
    if g_dim is None:
        aligned[0] = g.expand(info.batch_size, *g.shape)
    return aligned
