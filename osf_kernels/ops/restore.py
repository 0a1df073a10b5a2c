"""restore_ and restore_many_: pin the protected part of a weight after an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from osf_kernels.ops._library import observed, register
from osf_kernels.ops._memory import require_no_leaf, require_no_meta_among, require_target
from osf_kernels.ops._names import Names
from osf_kernels.ops._pins import Pin, Residual, pins_of, require_pin
from osf_kernels.ops._validation import (
    BasisLike,
    held,
    parts_of,
    require_constant,
    require_lengths,
    shape_check,
)
from osf_kernels.ops.prepared import Prepared
from osf_kernels.plan import Mode

_ONE = Names("restore_", "W", "U", "V", single=True)
_MANY = Names("restore_many_", "Ws")


def restore_(
    W: Tensor,
    U: BasisLike,
    V: BasisLike,
    *,
    S: Tensor | None = None,
    residual: Residual | None = None,
    protected: Tensor | None = None,
    mode: Mode = "complement",
) -> Tensor:
    """W ← P(W) + protected, in place: the protected part of W is again what it was.

    Projecting gradients isn't enough: an elementwise optimizer turns the step back into the
    protected span and weight decay shrinks it. Two ways to say what to pin:

    * ``S``, with U, S, V singular triplets of the weight at refresh: the protected part is known
      without a copy, W ← W − D with A = Uᵀ W − S Vᵀ, B = W V − U S, D = U A + (B − U (A V)) Vᵀ;
      afterwards Uᵀ W = S Vᵀ and W V = U S to rounding. In mode "core" Uᵀ W V = S alone is pinned.
      Triplets are never exact, so that this moves W_ref by what they miss of it. ``residual``
      says what that is, and is subtracted from A and B as well: Uᵀ W = Uᵀ W_ref afterwards.
    * ``protected`` = W_ref − P(W_ref), dense, with any bases.

    Args:
        W: (..., m, n), any supported dtype; for 16-bit weights the sum is rounded once.
        U, V: (..., m, r) and (..., n, k) orthonormal columns, a Basis, or None as in project;
            with S both are high and r = k.
        S: (..., r) singular values, or None.
        residual: with S, the pair (Uᵀ W_ref − S Vᵀ, W_ref V − U S) of (..., r, n) and (..., m, r),
            in mode "core" the tensor Uᵀ W_ref V − diag(S) of (..., r, r); of any floating dtype,
            since it is small beside S. None where U, S, V are triplets to rounding.
        protected: (..., m, n) of any floating dtype, or None. Exactly one of the two is given.
        mode: "complement" or "core", as the gradients were projected.

    Returns:
        W itself.

    Raises:
        TypeError, ValueError: as project_; both or neither of S and protected; S with a low or a
            missing basis; residual without S or of another shape; an argument that autograd
            differentiates. Before anything is written.

    Mutates W; doesn't synchronise; draws no random numbers; not differentiable, so call it under
    torch.no_grad() on a parameter.

    Source: W = H + P(W) with H = W_ref − P(W_ref), as P is linear and idempotent.
    """
    names = _ONE
    _restore(names, [W], [U], [V], [S], [residual], [protected], mode=mode)
    return W


def restore_many_(
    Ws: Sequence[Tensor],
    Us: Sequence[BasisLike],
    Vs: Sequence[BasisLike],
    *,
    S: Sequence[Tensor | None] | None = None,
    residual: Sequence[Residual | None] | None = None,
    protected: Sequence[Tensor | None] | None = None,
    mode: Mode = "complement",
) -> None:
    """:func:`restore_` for every matrix of a list, in the launches of one; all or nothing.

    Args:
        Ws, Us, Vs: lists of one length.
        S, protected: lists of that length; each matrix has an entry in exactly one of them.
        residual: a list of that length, with entries beside those of S.

    Raises:
        TypeError, ValueError: as restore_, naming the entry; lists of unequal length.

    Mutates every matrix of Ws; doesn't synchronise; draws no random numbers.
    """
    names = _MANY
    require_lengths(names.op, Ws=Ws, Us=Us, Vs=Vs)
    _restore(names, Ws, Us, Vs, S, residual, protected, mode=mode)


def _restore(
    names: Names,
    Ws: Sequence[Tensor],
    Us: Sequence[BasisLike],
    Vs: Sequence[BasisLike],
    S: Sequence[Tensor | None] | None,
    residual: Sequence[Residual | None] | None,
    protected: Sequence[Tensor | None] | None,
    *,
    mode: Mode,
) -> None:
    for i, W in enumerate(Ws):
        require_target(names.op, names.entry(i)[0], W)
    held_U, held_V, kinds = held(names, Us, Vs, mode)
    if observed():
        pins = pins_of(names, len(Ws), S, residual, protected, mode)
        for i, (W, U, V, pin) in enumerate(zip(Ws, held_U, held_V, pins, strict=True)):
            require_no_leaf(names.op, names.entry(i)[0], W)
            require_constant(names.op, [*names.entry(i), *names.pins(i)], W, U, V, *pin)
        require_no_meta_among(names.op, names.xs, Ws)
        columns = [[pin[j] for pin in pins] for j in range(4)]
        _restore_many_(list(Ws), held_U, held_V, *columns, kinds, names.single)
        return
    prepared = Prepared(names, Ws, held_U, held_V, kinds, mode=mode)
    prepared.run_restore_(names, Ws, S, residual, protected)


# --- torch.library -------------------------------------------------------------------------


def _impl(
    Ws: list[Tensor],
    Us: list[Tensor | None],
    Vs: list[Tensor | None],
    Ss: list[Tensor | None],
    addends: list[Tensor | None],
    rests_A: list[Tensor | None],
    rests_B: list[Tensor | None],
    kinds: list[str],
    single: bool,
) -> None:
    if not Ws:
        return
    names = (
        Names("restore_", "W", "U", "V", single=True) if single else Names("restore_many_", "Ws")
    )
    mode, _, _ = parts_of(names.op, kinds[0])
    residuals: list[Residual | None] = [
        B if A is None or B is None else (A, B) for A, B in zip(rests_A, rests_B, strict=True)
    ]
    prepared = Prepared(names, Ws, Us, Vs, kinds, mode=mode)
    prepared.run_restore_(names, Ws, Ss, residuals, addends)


def _fake(
    Ws: Any, Us: Any, Vs: Any, Ss: Any, Hs: Any, As: Any, Bs: Any, kinds: list[str], single: bool
) -> None:
    names = (
        Names("restore_", "W", "U", "V", single=True) if single else Names("restore_many_", "Ws")
    )
    arguments = zip(Ws, Us, Vs, Ss, Hs, As, Bs, kinds, strict=True)
    for i, (W, U, V, S, H, A, B, kind) in enumerate(arguments):
        shape_check(names.op, W, U, V, kind, names=names.entry(i))
        require_pin(names, i, W, U, V, kind, Pin(S, H, A, B))


_restore_many_ = register(
    "restore_many_(Tensor(a!)[] Ws, Tensor?[] Us, Tensor?[] Vs, Tensor?[] S, Tensor?[] protected, "
    "Tensor?[] rests_A, Tensor?[] rests_B, str[] kinds, bool single) -> ()",
    _impl,
    _fake,
)
