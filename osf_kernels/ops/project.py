"""project, project_, project_many_ and plan: the projection itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from osf_kernels import gpu
from osf_kernels.backends import choosing
from osf_kernels.errors import ValueRefusal
from osf_kernels.ops._library import (
    aligned,
    has_tangent,
    observed,
    register,
    require_vmapped,
    transformed,
    unobserved,
)
from osf_kernels.ops._memory import (
    require_distinct,
    require_no_meta_among,
    require_recordable,
    require_target,
    require_writable,
    unwrapped,
)
from osf_kernels.ops._names import Names
from osf_kernels.ops._route import decide, execute_one
from osf_kernels.ops._summary import summary
from osf_kernels.ops._validation import (
    BasisLike,
    columns,
    held,
    kind_of,
    meta,
    parts_of,
    require_lengths,
    require_tensor,
    shape_check,
)
from osf_kernels.ops.coefficients import product, product_of_shared
from osf_kernels.ops.prepared import Prepared
from osf_kernels.plan import Matrix, Mode, Plan

_FLIPPED = {"high": "low", "low": "high"}


def project(
    g: Tensor,
    U: BasisLike = None,
    V: BasisLike = None,
    *,
    mode: Mode = "complement",
    out: Tensor | None = None,
) -> Tensor:
    """P(g) = (I − U Uᵀ) g (I − V Vᵀ), or in mode "core" g − U Uᵀ g V Vᵀ.

    P is linear, idempotent and self-adjoint, so its backward is P. A missing basis leaves its
    side alone: with one of U and V missing both modes are one-sided, with both missing P is
    the identity. NaN and Inf propagate.

    Args:
        g: (..., m, n) float32, bfloat16, float16 or float64, any strides.
        U: (..., m, r) orthonormal columns, a Basis, or None. Batch dimensions broadcast.
        V: (..., n, k) likewise; a caller that holds rows passes ``Vh.mT``, read without a copy.
        mode: "complement" or "core".
        out: like g, written and returned; it shares memory with no input.

    Returns:
        (..., m, n) of g's dtype: new, or ``out``. Uᵀ P(g) = 0 and P(g) V = 0 to rounding.

    Raises:
        TypeError: a complex or integer dtype, or float64 mixed with others.
        ValueError: shapes, devices or overlapping memory, before anything is written.
        BackendUnavailableError: a backend chosen by name can't serve the call.

    Mutates ``out`` alone; doesn't synchronise; draws no random numbers. Differentiable in g, U
    and V (not through ``out``), to any order: in reverse mode, compiled too; and in eager calls in
    forward mode and by torch.func.

    Source: "Sculpting Subspaces", arXiv 2504.07097; its own update rule is mode "core".
    """
    require_tensor("project", "g", g)
    U, V, kind = _held("project", U, V, mode)
    if out is None:
        if unobserved(g, U, V) and not _needs_grad(g, U, V):
            return _project_impl(g, U, V, kind)
        return _projected(g, U, V, kind)
    require_target("project", "out", out)
    if _needs_grad(g, U, V, out) or has_tangent(g, U, V, out):
        raise ValueRefusal.of(
            "project",
            "out",
            "used without autograd",
            "an argument that requires grad or has a tangent",
            "use torch.no_grad() or leave out unset",
        )
    _project_out(g, U, V, kind, out)
    return out


def project_(
    g: Tensor, U: BasisLike = None, V: BasisLike = None, *, mode: Mode = "complement"
) -> Tensor:
    """g ← P(g) in place; see :func:`project`.

    The fastest way for one matrix: no allocation of g's size. Where autograd records and an
    argument requires grad, and in forward mode, the result is computed apart and copied in.

    Returns:
        g itself.

    Raises:
        ValueError: as project; also a leaf that requires grad (outside torch.no_grad()), an
            expanded g, or a basis that shares g's memory.

    Mutates g; doesn't synchronise; draws no random numbers.
    """
    if type(g) is not Tensor:
        require_tensor("project_", "g", g)
    U, V, kind = _held("project_", U, V, mode)
    recorded = _needs_grad(g, U, V)
    if unobserved(g, U, V) and not recorded:
        _project__impl(g, U, V, kind)
        return g
    require_target("project_", "g", g)
    if recorded or transformed():
        require_recordable("project_", "gUV", g, U, V)
        g.copy_(_projected(_kept(g, U, V), U, V, kind))
    else:
        _project_(g, U, V, kind)
    return g


def project_many_(
    grads: Sequence[Tensor],
    Us: Sequence[BasisLike],
    Vs: Sequence[BasisLike],
    *,
    mode: Mode = "complement",
) -> None:
    """g ← P(g) in place for every matrix of a list, of any mix of shapes and dtypes.

    The primary path: a whole model's gradients in a handful of launches on a GPU. On Triton all
    matrices that agree on dtypes, layouts and tile config share one launch; a mixed form whose
    operands are all bfloat16 takes two. All or nothing: when one matrix is refused, none has
    changed. An empty list is valid.

    Args:
        grads: matrices (..., m, n), each with memory of its own.
        Us, Vs: a basis a matrix, or None where a side is left alone; as long as grads.
        mode: "complement" or "core", for all.

    Raises:
        TypeError, ValueError: as project_, naming the entry; lists of unequal length.

    Mutates every matrix of grads; doesn't synchronise; draws no random numbers.
    """
    names = Names("project_many_", "grads")
    op = names.op
    require_lengths(op, grads=grads, Us=Us, Vs=Vs)
    for i, g in enumerate(grads):
        require_target(op, f"grads[{i}]", g)
    require_no_meta_among(op, "grads", grads)
    held_U, held_V, kinds = held(names, Us, Vs, mode)
    if transformed() or _needs_grad(*grads, *held_U, *held_V):
        for i, (g, U, V) in enumerate(zip(grads, held_U, held_V, strict=True)):
            require_recordable(op, names.entry(i), g, U, V)
        if not torch.compiler.is_compiling():
            written, Us, Vs = ([*map(unwrapped, side)] for side in (grads, held_U, held_V))
            require_distinct(op, "grads", written, {"Us": Us, "Vs": Vs})
        arguments = zip(grads, held_U, held_V, kinds, strict=True)
        results = [_projected(_kept(g, U, V), U, V, kind) for g, U, V, kind in arguments]
        for g, result in zip(grads, results, strict=True):
            g.copy_(result)
        return
    if observed():
        _project_many_(list(grads), held_U, held_V, kinds)
    else:
        Prepared(names, grads, held_U, held_V, kinds, mode=mode).run_project_(names, grads)


def plan(
    g: Tensor | Sequence[Tensor],
    U: BasisLike | Sequence[BasisLike] = None,
    V: BasisLike | Sequence[BasisLike] = None,
    *,
    mode: Mode = "complement",
    architecture: str | None = None,
) -> Plan:
    """What :func:`project` or :func:`project_many_` would run with these arguments, and why.

    Args:
        g, U, V, mode: as for project, or lists as for project_many_; meta tensors are allowed
            and planned as if on a GPU, with the backend that "auto" takes on this machine.
        architecture: plan for "cpu", "sm_80", "sm_86", "sm_90", "sm_100" or "gfx942", whatever the
            machine has, with the backend that "auto" takes there where Triton is installed. Of
            Triton neither launches nor workspace are told then, but its tile configs.

    Returns:
        A :class:`Plan`: form, flops, bytes, launches, backend, why; ``print`` it.

    Raises:
        TypeError, ValueError: as the operator itself.

    Mutates nothing, computes nothing, doesn't synchronise.
    """
    many = isinstance(g, (list, tuple))
    grads: list[Any] = list(g) if many else [g]
    Us = _as_list(U, many, len(grads))
    Vs = _as_list(V, many, len(grads))
    names = Names("plan", "g", "U", "V", single=not many)
    require_lengths(names.op, g=grads, U=Us, V=Vs)
    kind_of(names.op, mode, "high", "high")
    for i, matrix in enumerate(grads):
        require_tensor(names.op, names.entry(i)[0], matrix)
    if architecture is not None:
        return _planned_for(architecture, names, grads, *held(names, Us, Vs, mode), mode)
    prepared = Prepared(names, grads, *held(names, Us, Vs, mode), mode=mode)
    prepared.make(grads)
    return prepared.plan


def _planned_for(
    architecture: str,
    names: Names,
    grads: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    kinds: Sequence[str],
    mode: Mode,
) -> Plan:
    from osf_kernels.backends.triton import configs

    known = ("cpu", *gpu.ARCHITECTURES)
    if architecture not in known:
        expected = f"one of {', '.join(known)}"
        raise ValueRefusal.of(names.op, "architecture", expected, repr(architecture))
    entries = [
        decide(names.op, names.entry(i), g, U, V, kind, request="auto", architecture=architecture)
        for i, (g, U, V, kind) in enumerate(zip(grads, Us, Vs, kinds, strict=True))
    ]
    notes = dict.fromkeys(
        f"{x.dtype} of rank {rank}: {configs.projection_config(architecture, _math(x), rank)}"
        for x, step, backend, *_ in entries
        if backend == "triton"
        for rank in [max(x.r or 0, x.k or 0)]
    )
    told = summary([d[:4] for d in entries], mode, str(grads[0].device), (0, 0), list(notes))
    return replace(told, architecture=architecture)


def _math(x: Matrix) -> Literal["bfloat16", "float32"]:
    """What Triton multiplies: a 16-bit matrix by halves of 16 bits, float32 by parts of TF32."""
    return "float32" if x.dtype == "float32" else "bfloat16"


def _as_list(basis: Any, many: bool, count: int) -> list[Any]:
    if not many:
        return [basis]
    return [None] * count if basis is None else basis


# What follows is written for the few microseconds that a small matrix has: a generator, or a call
# more, costs it 0.2 to 0.4.


def _held(
    op: str, U: BasisLike, V: BasisLike, mode: str
) -> tuple[Tensor | None, Tensor | None, str]:
    """The columns of both bases, and what ``kind_of`` says of mode and spans."""
    u_spans = v_spans = "high"
    if U is not None and type(U) is not Tensor:
        U, u_spans = columns(op, "U", U)
    if V is not None and type(V) is not Tensor:
        V, v_spans = columns(op, "V", V)
    return U, V, kind_of(op, mode, u_spans, v_spans)


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _kept(g: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """g as the derivatives in the bases read it, once g itself is written over."""
    return g.clone() if transformed() or _needs_grad(U, V) else g


# --- torch.library -------------------------------------------------------------------------


def _project_impl(g: Tensor, U: Tensor | None, V: Tensor | None, kind: str) -> Tensor:
    decided = decide("project", "gUV", g, U, V, kind)
    out = torch.empty_like(g)
    execute_one(decided, g, out, U, V)
    return out


def _require_like(out: Tensor, g: Tensor) -> None:
    if meta(out) != meta(g):
        expected = f"{tuple(g.shape)} {g.dtype} on {g.device} like g"
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise ValueRefusal.of("project", "out", expected, got)


def _project_out_impl(
    g: Tensor, U: Tensor | None, V: Tensor | None, kind: str, out: Tensor
) -> None:
    decided = decide("project", "gUV", g, U, V, kind)
    _require_like(out, g)
    require_writable("project", ("out", "g", "U", "V"), out, g, U, V)
    execute_one(decided, g, out, U, V)


def _project__impl(g: Tensor, U: Tensor | None, V: Tensor | None, kind: str) -> None:
    decided = decide("project_", "gUV", g, U, V, kind)
    require_writable("project_", "gUV", g, U, V)
    execute_one(decided, g, g, U, V)


def _project_many__impl(
    grads: list[Tensor],
    Us: list[Tensor | None],
    Vs: list[Tensor | None],
    kinds: list[str],
) -> None:
    if not grads:
        return
    names = Names("project_many_", "grads")
    mode, _, _ = parts_of(names.op, kinds[0])
    Prepared(names, grads, Us, Vs, kinds, mode=mode).run_project_(names, grads)


def _project_fake(g: Tensor, U: Tensor | None, V: Tensor | None, kind: str) -> Tensor:
    shape_check("project", g, U, V, kind)
    return torch.empty_like(g)


def _project_out_fake(g: Tensor, U: Any, V: Any, kind: str, out: Tensor) -> None:
    shape_check("project", g, U, V, kind)
    _require_like(out, g)


def _project__fake(g: Tensor, U: Any, V: Any, kind: str) -> None:
    shape_check("project_", g, U, V, kind)


def _project_many__fake(grads: Any, Us: Any, Vs: Any, kinds: list[str]) -> None:
    names = Names("project_many_", "grads")
    for i, (g, U, V, kind) in enumerate(zip(grads, Us, Vs, kinds, strict=True)):
        shape_check("project_many_", g, U, V, kind, names=names.entry(i))


def _project_vmap(info: Any, in_dims: Any, g: Any, U: Any, V: Any, kind: str) -> tuple[Tensor, int]:
    g, U, V = aligned(info, in_dims, (g, U, V))
    return _projected(g, U, V, kind), 0


def _project__vmap(info: Any, in_dims: Any, g: Any, U: Any, V: Any, kind: str) -> tuple[None, None]:
    require_vmapped("project_", "g", in_dims[0])
    g, U, V = aligned(info, in_dims, (g, U, V))
    _project_(g, U, V, kind)
    return None, None


def _project_out_vmap(
    info: Any, in_dims: Any, g: Any, U: Any, V: Any, kind: str, out: Any
) -> tuple[None, None]:
    require_vmapped("project", "out", in_dims[4])
    g, U, V = aligned(info, in_dims, (g, U, V))
    _project_out(g, U, V, kind, out.movedim(in_dims[4], 0))
    return None, None


_ARGUMENTS = "Tensor? U, Tensor? V, str kind"
_project = register(
    f"project(Tensor g, {_ARGUMENTS}) -> Tensor", _project_impl, _project_fake, _project_vmap
)
_project_out = register(
    f"project_out(Tensor g, {_ARGUMENTS}, Tensor(a!) out) -> ()",
    _project_out_impl,
    _project_out_fake,
    _project_out_vmap,
)
_project_ = register(
    f"project_(Tensor(a!) g, {_ARGUMENTS}) -> ()", _project__impl, _project__fake, _project__vmap
)
_project_many_ = register(
    "project_many_(Tensor(a!)[] grads, Tensor?[] Us, Tensor?[] Vs, str[] kinds) -> ()",
    _project_many__impl,
    _project_many__fake,
)


# --- derivatives ---------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, U, V, ctx.kind = inputs
    ctx.backend = choosing.requested()  # backward of CUDA tensors runs in a thread of autograd's
    # g itself is needed only for the bases' gradients: in training nothing of its size is kept.
    bases = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(g if bases else None, U, V)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """P is self-adjoint: the gradient in g is P(grad). In U, with s = −1 for high columns and 1
    for low ones and h = g on its right side done, it is s·(grad hᵀ U + h gradᵀ U)."""
    g, U, V = ctx.saved_tensors
    _, u_spans, v_spans = parts_of("project", ctx.kind)
    for_g = for_U = for_V = None
    with choosing.use_backend(ctx.backend):
        if ctx.needs_input_grad[0]:
            for_g = _projected(grad, U, V, ctx.kind)
        if ctx.needs_input_grad[1]:
            for_U = _basis_gradient(grad, _beside_U(g, V, ctx.kind), U, u_spans)
        if ctx.needs_input_grad[2]:
            for_V = _basis_gradient(grad.mT, _beside_V(g, U, ctx.kind).mT, V, v_spans)
    return for_g, for_U, for_V, None


def _tangent(ctx: Any, dg: Any, dU: Any, dV: Any, _: Any) -> Tensor:
    """P(dg), and s·(dU Uᵀ + U dUᵀ) h of U, with s and h as in ``_backward``; of V likewise."""
    g, U, V = ctx.saved_tensors
    _, u_spans, v_spans = parts_of("project", ctx.kind)
    parts = []
    if dg is not None:
        parts.append(_projected(dg, U, V, ctx.kind))
    if dU is not None:
        parts.append(_basis_tangent(dU, _beside_U(g, V, ctx.kind), U, u_spans))
    if dV is not None:
        parts.append(_basis_tangent(dV, _beside_V(g, U, ctx.kind).mT, V, v_spans).mT)
    return sum(parts[1:], parts[0]).to(g.dtype)


def _beside_U(g: Tensor, V: Tensor | None, kind: str) -> Tensor:
    """What U's side of P is multiplied with: g, V's side done."""
    mode, _, v_spans = parts_of("project", kind)
    return g if V is None else _projected(g, None, V, _one_side(mode, "high", v_spans))


def _beside_V(g: Tensor, U: Tensor | None, kind: str) -> Tensor:
    mode, u_spans, _ = parts_of("project", kind)
    return g if U is None else _projected(g, U, None, _one_side(mode, u_spans, "high"))


def _one_side(mode: str, u_spans: str, v_spans: str) -> str:
    """core keeps g H' where complement keeps g (I − H')."""
    if mode == "core":
        u_spans, v_spans = _FLIPPED[u_spans], _FLIPPED[v_spans]
    return kind_of("project", "complement", u_spans, v_spans)


def _basis_gradient(grad: Tensor, h: Tensor, U: Tensor, spans: str) -> Tensor:
    value = product(grad, product(h.mT, U)) + product(h, product(grad.mT, U))
    value = value if spans == "low" else -value
    return value.sum_to_size(U.shape).to(U.dtype)


def _basis_tangent(dU: Tensor, h: Tensor, U: Tensor, spans: str) -> Tensor:
    value = product_of_shared(dU, product_of_shared(U.mT, h))
    value = value + product_of_shared(U, product_of_shared(dU.mT, h))
    return value if spans == "low" else -value


torch.library.register_autograd("osf_kernels::project", _backward, setup_context=_setup_context)


class _Project(torch.autograd.Function):
    """The operator with a derivative for ``transformed`` calls."""

    backward = staticmethod(_backward)
    jvp = staticmethod(_tangent)
    vmap = staticmethod(_project_vmap)

    @staticmethod
    def forward(g: Tensor, U: Tensor | None, V: Tensor | None, kind: str) -> Tensor:
        result: Tensor = _project(g, U, V, kind)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])


def _projected(g: Tensor, U: Tensor | None, V: Tensor | None, kind: str) -> Tensor:
    function = _Project.apply if transformed() else _project
    result: Tensor = function(g, U, V, kind)
    return result
