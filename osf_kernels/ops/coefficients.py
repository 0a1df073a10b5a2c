"""coefficients and apply_: the projection in two halves, for a caller with shards between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from osf_kernels.backends.jobs import Problem, coefficient_dtype
from osf_kernels.errors import TypeRefusal, ValueRefusal
from osf_kernels.ops._coefficient_list import (
    CoefficientList,
    coefficient_shapes,
    empty_coefficients,
)
from osf_kernels.ops._library import (
    aligned,
    register,
    require_vmapped,
    transformed,
)
from osf_kernels.ops._memory import require_no_leaf, require_target, require_writable
from osf_kernels.ops._route import CoefficientRoute, Route, decide
from osf_kernels.ops._validation import (
    BasisLike,
    columns,
    kind_of,
    require_constant,
    require_tensor,
    shape_check,
)
from osf_kernels.plan import Mode


def coefficients(g: Tensor, U: BasisLike, V: BasisLike) -> tuple[Tensor, Tensor]:
    """A = Uᵀ g and B = g V, from one read of g where the backend can: what a shard all-reduces.

    With rows sharded (U and g hold the same rows, V whole) B is local and the sum of A over
    the shards is Uᵀ g of the whole matrix; then ``apply_`` finishes locally. With columns
    sharded it is the mirror image: pass ``g.mT`` with U and V exchanged.

    Args:
        g: (..., m, n).
        U: (..., m, r) columns, a Basis (its columns as held, high or low), or None.
        V: (..., n, k) likewise.

    Returns:
        (A, B): (..., r, n) and (..., m, k), float32 (float64 for float64 g); a missing side is
        empty, with r = 0 or k = 0. A is contiguous; on a GPU the rows of B begin on 16-byte
        boundaries, whatever k is.

    Raises:
        TypeError, ValueError: as project.

    Mutates nothing; doesn't synchronise; draws no random numbers. Differentiable as project.
    """
    require_tensor("coefficients", "g", g)
    U, _ = columns("coefficients", "U", U)
    V, _ = columns("coefficients", "V", V)
    A, B = _both(g, U, V)
    return A, B


def apply_(
    g: Tensor,
    U: BasisLike,
    V: BasisLike,
    A: Tensor,
    B: Tensor,
    *,
    mode: Mode = "complement",
) -> Tensor:
    """g ← P(g) in place from ready coefficients: the other half of :func:`coefficients`.

    Uᵀ g V is taken as A V, so A is the whole matrix's (all-reduced where rows are sharded) and
    V is whole.

    Args:
        g: (..., m, n), what is held here of the matrix.
        U, V: as in coefficients, with what their columns span.
        A: (..., r, n), B: (..., m, k): of :func:`coefficients`, A summed over the shards.
        mode: "complement" or "core".

    Returns:
        g itself.

    Raises:
        TypeError, ValueError: as project_; coefficients of another shape; an argument that autograd
            differentiates.

    Mutates g, not A and B; doesn't synchronise; draws no random numbers; not differentiable.
    """
    op = "apply_"
    require_target(op, "g", g)
    require_tensor(op, "A", A)
    require_tensor(op, "B", B)
    U, u_spans = columns(op, "U", U)
    V, v_spans = columns(op, "V", V)
    require_no_leaf(op, "g", g)
    require_constant(op, "gUVAB", g, U, V, A, B)
    _apply_(g, U, V, A, B, kind_of(op, mode, u_spans, v_spans))
    return g


# --- torch.library -------------------------------------------------------------------------

_KIND = kind_of("coefficients", "complement", "high", "high")  # coefficients are of columns as held


def _coefficients_impl(g: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    decided = decide("coefficients", "gUV", g, U, V, _KIND, "shard")
    A, B = empty_coefficients(g, U, V)
    found = CoefficientList([A], [B], ())
    CoefficientRoute([g], [U], [V], found, [decided.backend]).run([g], found)
    return A, B


def _coefficients_fake(g: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    shape_check("coefficients", g, U, V, _KIND, shard=True)
    return empty_coefficients(g, U, V)


def _coefficients_vmap(info: Any, in_dims: Any, g: Any, U: Any, V: Any) -> tuple[Any, Any]:
    g, U, V = aligned(info, in_dims, (g, U, V))
    return _both(g, U, V), (0, 0)


def _check_coefficients(
    g: Tensor, U: Tensor | None, V: Tensor | None, A: Tensor, B: Tensor
) -> None:
    op = "apply_"
    wanted = zip("AB", (A, B), coefficient_shapes(g.shape, U, V), strict=True)
    for name, t, shape in wanted:
        if t.shape != shape:
            remedy = "take both from coefficients(g, U, V)"
            raise ValueRefusal.of(op, name, str(tuple(shape)), tuple(t.shape), remedy)
        if t.device != g.device:
            raise ValueRefusal.of(op, name, f"on {g.device} like g", f"on {t.device}")
        if t.dtype != coefficient_dtype(g):
            raise TypeRefusal.of(op, name, f"{coefficient_dtype(g)}", t.dtype)


def _apply__impl(
    g: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    A: Tensor,
    B: Tensor,
    kind: str,
) -> None:
    op = "apply_"
    decided = decide(op, "gUV", g, U, V, kind, "shard")
    _check_coefficients(g, U, V, A, B)
    require_writable(op, "gUVAB", g, U, V, A, B)
    A_, B_ = None if U is None else A, None if V is None else B
    Route([Problem(g, g, U, V, decided.step, A=A_, B=B_)], [decided.backend]).run([g], [(A_, B_)])


def _apply__fake(g: Any, U: Any, V: Any, A: Any, B: Any, kind: str) -> None:
    shape_check("apply_", g, U, V, kind, shard=True)
    _check_coefficients(g, U, V, A, B)


def _apply__vmap(
    info: Any, in_dims: Any, g: Any, U: Any, V: Any, A: Any, B: Any, kind: str
) -> tuple[None, None]:
    require_vmapped("apply_", "g", in_dims[0])
    g, U, V, A, B = aligned(info, in_dims, (g, U, V, A, B))
    batch = g.shape[:-2]
    _apply_(g, U, V, A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-2:]), kind)
    return None, None


_coefficients = register(
    "coefficients(Tensor g, Tensor? U, Tensor? V) -> (Tensor, Tensor)",
    _coefficients_impl,
    _coefficients_fake,
    _coefficients_vmap,
)
_apply_ = register(
    "apply_(Tensor(a!) g, Tensor? U, Tensor? V, Tensor A, Tensor B, str kind) -> ()",
    _apply__impl,
    _apply__fake,
    _apply__vmap,
)


# --- derivatives ---------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, for_A: Tensor, for_B: Tensor) -> tuple[Any, ...]:
    """A = Uᵀ g and B = g V are bilinear."""
    g, U, V = ctx.saved_tensors
    for_g, for_U, for_V = torch.zeros_like(g, dtype=for_A.dtype), None, None
    if U is not None:
        for_g = for_g + product_of_shared(U, for_A)
        for_U = product(g, for_A.mT).sum_to_size(U.shape).to(U.dtype)
    if V is not None:
        for_g = for_g + product(for_B, V.mT)
        for_V = product(g.mT, for_B).sum_to_size(V.shape).to(V.dtype)
    return for_g.to(g.dtype), for_U, for_V


torch.library.register_autograd(
    "osf_kernels::coefficients", _backward, setup_context=_setup_context
)


class _Coefficients(torch.autograd.Function):
    """The operator with a derivative for ``transformed`` calls."""

    backward = staticmethod(_backward)
    vmap = staticmethod(_coefficients_vmap)

    @staticmethod
    def forward(g: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
        A, B = _coefficients(g, U, V)
        return A, B

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dg: Any, dU: Any, dV: Any) -> tuple[Tensor, Tensor]:
        g, U, V = ctx.saved_tensors
        dA, dB = empty_coefficients(g, U, V)
        dA, dB = dA.zero_(), dB.zero_()
        if dg is not None:
            dA, dB = _both(dg, U, V)
        if dU is not None:
            dA = dA + _both(g, dU, None)[0]
        if dV is not None:
            dB = dB + _both(g, None, dV)[1]
        return dA, dB


def _both(g: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    function = _Coefficients.apply if transformed() else _coefficients
    A, B = function(g, U, V)
    return A, B


# Derivatives multiply by the operator itself: in full precision, compiled and to any order too.


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 (float64 of float64); b's batch dimensions broadcast to those of a."""
    return _both(a, None, b)[1]


def product_of_shared(a: Tensor, b: Tensor) -> Tensor:
    """a b likewise; a's batch dimensions broadcast to those of b."""
    return _both(b, a.mT, None)[0]
