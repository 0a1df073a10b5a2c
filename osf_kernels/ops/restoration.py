"""restore_ and restore_many_: pin the protected part of a weight after an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels.backends.forms import Problem
from osf_kernels.errors import describe
from osf_kernels.ops._execute import decide, execute
from osf_kernels.ops._library import register
from osf_kernels.ops._memory import (
    require_distinct,
    require_no_leaf,
    require_no_meta_among,
    require_target,
    require_writable,
)
from osf_kernels.ops._validation import (
    DTYPES,
    BasisLike,
    columns,
    kind_of,
    parts_of,
    require_constant,
    require_lengths,
    require_tensor,
    shape_check,
)
from osf_kernels.plan import Mode

# What W_ref has beside its triplets: (UᵀW_ref − S Vᵀ, W_ref V − U S), in mode "core" the single
# tensor UᵀW_ref V − diag(S).
Residual = tuple[Tensor, Tensor] | Tensor


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
    _restore("restore_", [W], [U], [V], [S], [residual], [protected], mode, single=True)
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
    lists: dict[str, Sequence[object]] = {"Ws": Ws, "Us": Us, "Vs": Vs}
    given = {"S": S, "residual": residual, "protected": protected}
    lists |= {name: value for name, value in given.items() if value is not None}
    op = "restore_many_"
    require_lengths(op, **lists)
    none = [None] * len(Ws)
    pins = S or none, residual or none, protected or none
    _restore(op, Ws, Us, Vs, pins[0], pins[1], pins[2], mode, single=False)


_ARGUMENTS = ("W", "U", "V", "S", "protected", "residual")


def _names(i: int, single: bool) -> tuple[str, ...]:
    """Of W, U, V, S, protected and residual, as the caller knows them."""
    if single:
        return _ARGUMENTS
    return tuple(f"{name}s[{i}]" if name in "WUV" else f"{name}[{i}]" for name in _ARGUMENTS)


def _restore(
    op: str,
    Ws: Sequence[Tensor],
    Us: Sequence[BasisLike],
    Vs: Sequence[BasisLike],
    Ss: Sequence[Tensor | None],
    residuals: Sequence[Residual | None],
    addends: Sequence[Tensor | None],
    mode: Mode,
    *,
    single: bool,
) -> None:
    lefts, rights, rests = [], [], []
    arguments = zip(Ws, Us, Vs, Ss, residuals, addends, strict=True)
    for i, (W, U, V, S, residual, addend) in enumerate(arguments):
        name_W, name_U, name_V, name_S, name_H, name_R = _names(i, single)
        require_target(op, name_W, W)
        lefts.append(columns(op, name_U, U))
        rights.append(columns(op, name_V, V))
        for name, t in ((name_S, S), (name_H, addend)):
            if t is not None:
                require_tensor(op, name, t)
        if (S is None) == (addend is None):
            got = "neither" if S is None else "both"
            remedy = "S for singular triplets, protected = W_ref − P(W_ref) for any basis"
            raise ValueError(
                describe(op, f"exactly one of {name_S} and {name_H}", "given", got, remedy)
            )
        rest_A, rest_B = _rests(op, name_R, residual, mode)
        if residual is not None and S is None:
            remedy = f"pass {name_S}, or leave {name_R} out"
            raise ValueError(describe(op, name_R, f"beside {name_S}", "one alone", remedy))
        rests.append((rest_A, rest_B))
        require_no_leaf(op, name_W, W)
        names = (*_names(i, single), name_R)
        held = (lefts[-1][0], rights[-1][0])
        require_constant(op, names, W, *held, S, addend, rest_A, rest_B)
    require_no_meta_among(op, "Ws", Ws)
    _restore_many_(
        list(Ws),
        [U for U, _ in lefts],
        [V for V, _ in rights],
        list(Ss),
        list(addends),
        [rest for rest, _ in rests],
        [rest for _, rest in rests],
        [kind_of(op, mode, u, v) for (_, u), (_, v) in zip(lefts, rights, strict=True)],
        single,
    )


def _rests(op: str, name: str, residual: object, mode: str) -> tuple[Tensor | None, Tensor | None]:
    """The residual's two tensors; in mode "core" its one tensor comes second."""
    if residual is None:
        return None, None
    if mode == "core":
        if isinstance(residual, Tensor):
            return None, residual
        expected = 'a tensor (..., r, r) in mode "core"'
    else:
        if (
            isinstance(residual, (tuple, list))
            and len(residual) == 2
            and all(isinstance(t, Tensor) for t in residual)
        ):
            return residual[0], residual[1]
        expected = "a pair of tensors (..., r, n) and (..., m, r)"
    raise TypeError(describe(op, name, expected, type(residual).__name__))


def _check_pinned(
    op: str,
    names: Sequence[str],
    W: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    S: Tensor | None,
    addend: Tensor | None,
    rests: tuple[Tensor | None, Tensor | None],
    kind: str,
) -> None:
    name_U, name_V, name_S, name_H, name_R = names[1:]
    mode, *spans = parts_of(op, kind)
    for name, t in ((name_S, S), (name_H, addend), (name_R, rests[0]), (name_R, rests[1])):
        if t is not None and t.dtype not in DTYPES:
            raise TypeError(describe(op, name, "a floating dtype", t.dtype, "convert it first"))
        if t is not None and t.device != W.device:
            raise ValueError(describe(op, name, f"on {W.device} like the weight", f"on {t.device}"))
    if addend is not None and addend.shape != W.shape:
        raise ValueError(
            describe(op, name_H, f"{tuple(W.shape)} like the weight", tuple(addend.shape))
        )
    if S is None:
        return
    remedy = "pass protected = W_ref − P(W_ref) instead of S"
    for name, t, held in ((name_U, U, spans[0]), (name_V, V, spans[1])):
        if t is None or held != "high":
            got = "no basis" if t is None else "a low basis"
            raise ValueError(describe(op, name, f"a high basis beside {name_S}", got, remedy))
    assert U is not None
    assert V is not None
    r, k = U.shape[-1], V.shape[-1]
    if r != k:
        raise ValueError(describe(op, name_V, f"as wide as {name_U} (r={r}) beside S", f"k={k}"))
    if S.dim() < 1 or S.shape[-1] != r or S.dim() > W.dim() - 1:
        raise ValueError(describe(op, name_S, f"(..., r) with r={r}", tuple(S.shape)))
    *batch, m, n = W.shape
    shapes = [(r, n), (r, r) if mode == "core" else (m, r)]
    for rest, (rows, width) in zip(rests, shapes, strict=True):
        if rest is not None and rest.shape != (*batch, rows, width):
            expected = f"of shape {(*batch, rows, width)}"
            raise ValueError(describe(op, name_R, expected, tuple(rest.shape)))


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
    op = "restore_" if single else "restore_many_"
    problems, backend_names = [], []
    arguments = zip(Ws, Us, Vs, Ss, addends, rests_A, rests_B, kinds, strict=True)
    for i, (W, U, V, S, addend, rest_A, rest_B, kind) in enumerate(arguments):
        names = _names(i, single)
        # Two updates would round a 16-bit weight twice.
        choice = "pinned" if S is not None else "once" if W.element_size() == 2 else "any"
        decided = decide(op, names, W, U, V, kind, choice)  # type: ignore[arg-type]
        _check_pinned(op, names, W, U, V, S, addend, (rest_A, rest_B), kind)
        require_writable(op, (*names, names[-1]), W, U, V, S, addend, rest_A, rest_B)
        if W.dtype != torch.float64:
            S = None if S is None else S.float()
            addend = (
                addend.float() if addend is not None and addend.dtype == torch.float64 else addend
            )
        rests = {"rest_A": rest_A, "rest_B": rest_B}
        problems.append(Problem(W, W, U, V, decided.step, S, addend, **rests))
        backend_names.append(decided.backend)
    if not single:
        read = {"Us": Us, "Vs": Vs, "S": Ss, "protected": addends}
        read |= {"residual": rests_A, "second of residual": rests_B}
        require_distinct(op, "Ws", Ws, read)
    execute(problems, backend_names)


def _fake(
    Ws: Any, Us: Any, Vs: Any, Ss: Any, Hs: Any, As: Any, Bs: Any, kinds: list[str], single: bool
) -> None:
    op = "restore_" if single else "restore_many_"
    arguments = zip(Ws, Us, Vs, Ss, Hs, As, Bs, kinds, strict=True)
    for i, (W, U, V, S, H, A, B, kind) in enumerate(arguments):
        names = _names(i, single)
        shape_check(op, W, U, V, kind, names=names)
        _check_pinned(op, names, W, U, V, S, H, (A, B), kind)


_restore_many_ = register(
    "restore_many_(Tensor(a!)[] Ws, Tensor?[] Us, Tensor?[] Vs, Tensor?[] S, Tensor?[] protected, "
    "Tensor?[] rests_A, Tensor?[] rests_B, str[] kinds, bool single) -> ()",
    _impl,
    _fake,
)
