"""What restoring pins of a weight: from singular values, or from the dense protected part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from osf_kernels.errors import Refusal, TypeRefusal, ValueRefusal
from osf_kernels.ops._names import Names
from osf_kernels.ops._validation import (
    DTYPES,
    parts_of,
    require_constant,
    require_lengths,
    require_tensor,
)

# What W_ref has beside its triplets: (UᵀW_ref − S Vᵀ, W_ref V − U S), in mode "core" the single
# tensor UᵀW_ref V − diag(S).
Residual = tuple[Tensor, Tensor] | Tensor


class Pin(NamedTuple):
    """What one weight is pinned to."""

    S: Tensor | None = None
    addend: Tensor | None = None
    rest_A: Tensor | None = None
    rest_B: Tensor | None = None

    def operands(self, dtype: torch.dtype) -> Pin:
        """As a ``Problem`` takes it, for weights of a dtype."""
        S, addend = self.S, self.addend
        if dtype != torch.float64:
            S = None if S is None else S.float()
            if addend is not None and addend.dtype == torch.float64:
                addend = addend.float()
        return self._replace(S=S, addend=addend)


def identities(
    S: Sequence[Any] | None, residual: Sequence[Any] | None, protected: Sequence[Any] | None
) -> list[int]:
    """The identities of all tensors, and of what stands for none."""
    ids: list[int] = []
    for given in (S, residual, protected):
        if given is not None and not isinstance(given, (list, tuple)):
            ids.append(-2)  # which ``pins_of`` refuses
            continue
        for entry in given or ():
            if isinstance(entry, (tuple, list)):
                ids += map(id, entry)
            else:
                ids.append(id(entry))
        ids.append(-1)
    return ids


def pins_of(
    names: Names,
    count: int,
    S: Sequence[Tensor | None] | None,
    residual: Sequence[Residual | None] | None,
    protected: Sequence[Tensor | None] | None,
    mode: str,
) -> list[Pin]:
    """A pin a weight from the arguments of ``restore_many_``; their kinds alone are looked at."""
    op, none = names.op, [None] * count
    given = {"S": S, "residual": residual, "protected": protected}
    lists = {name: value for name, value in given.items() if value is not None}
    require_lengths(op, **{names.xs: none}, **lists)
    pins = []
    entries = zip(S or none, residual or none, protected or none, strict=True)
    for i, (s, rest, addend) in enumerate(entries):
        rests = (None, None) if rest is None else _rests(op, names, i, rest, mode)
        if (s is None) == (addend is None) or (rest is not None and s is None):
            _refuse_unpinned(names, i, s, rest)
        for name, t in (("S", s), ("protected", addend)):
            if t is not None:
                require_tensor(op, names.pin(name, i), t)
        pins.append(Pin(s, addend, *rests))
    return pins


def _refuse_unpinned(names: Names, i: int, S: object, residual: object) -> NoReturn:
    name_S, name_H, name_R = (names.pin(name, i) for name in ("S", "protected", "residual"))
    if S is None and residual is not None:
        remedy = f"pass {name_S}, or leave {name_R} out"
        raise ValueRefusal.of(names.op, name_R, f"beside {name_S}", "one alone", remedy)
    got = "neither" if S is None else "both"
    remedy = "S for singular triplets, protected = W_ref − P(W_ref) for any basis"
    argument = f"exactly one of {name_S} and {name_H}"
    raise ValueRefusal.of(names.op, argument, "given", got, remedy)


def _rests(
    op: str, names: Names, i: int, residual: object, mode: str
) -> tuple[Tensor | None, Tensor | None]:
    """The residual's two tensors; in mode "core" its one tensor comes second."""
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
    raise TypeRefusal.of(op, names.pin("residual", i), expected, type(residual).__name__)


def require_pins(
    names: Names,
    weights: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    kinds: Sequence[str],
    pins: Sequence[Pin],
) -> None:
    """Refuses pins that don't fit their weights, or share memory with one."""
    i = 0
    try:
        for i, (W, U, V, kind, pin) in enumerate(zip(weights, Us, Vs, kinds, pins, strict=True)):
            require_pin(names, i, W, U, V, kind, pin)
            require_constant(names.op, [*names.entry(i), *names.pins(i)], W, U, V, *pin)
    except Refusal as refusal:
        refusal.index = i
        raise


def require_pin(
    names: Names,
    i: int,
    W: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    kind: str,
    pin: Pin,
) -> None:
    """Refuses a pin whose shapes, dtypes or device don't fit its weight's."""
    op, S = names.op, pin.S
    mode, *spans = parts_of(op, kind)
    for name, t in zip(names.pins(i), pin, strict=True):
        if t is not None and t.dtype not in DTYPES:
            raise TypeRefusal.of(op, name, "a floating dtype", t.dtype, "convert it first")
        if t is not None and t.device != W.device:
            raise ValueRefusal.of(op, name, f"on {W.device} like the weight", f"on {t.device}")
    name_S, name_H, name_R, _ = names.pins(i)
    if pin.addend is not None and pin.addend.shape != W.shape:
        expected = f"{tuple(W.shape)} like the weight"
        raise ValueRefusal.of(op, name_H, expected, tuple(pin.addend.shape))
    if S is None:
        return
    _, name_U, name_V = names.entry(i)
    remedy = "pass protected = W_ref − P(W_ref) instead of S"
    for name, t, held in ((name_U, U, spans[0]), (name_V, V, spans[1])):
        if t is None or held != "high":
            got = "no basis" if t is None else "a low basis"
            raise ValueRefusal.of(op, name, f"a high basis beside {name_S}", got, remedy)
    assert U is not None
    assert V is not None
    r, k = U.shape[-1], V.shape[-1]
    if r != k:
        raise ValueRefusal.of(op, name_V, f"as wide as {name_U} (r={r}) beside S", f"k={k}")
    *batch, m, n = W.shape
    if S.dim() < 1 or S.shape[-1] != r or S.dim() > W.dim() - 1:
        raise ValueRefusal.of(op, name_S, f"(..., r) with r={r}", tuple(S.shape))
    beside = zip(reversed(S.shape[:-1]), reversed(batch), strict=False)
    if not all(a in (1, b) for a, b in beside):
        expected = f"broadcastable to batch dimensions {tuple(batch)}"
        raise ValueRefusal.of(op, name_S, expected, tuple(S.shape))
    shapes = [(r, n), (r, r) if mode == "core" else (m, r)]
    for rest, (rows, width) in zip((pin.rest_A, pin.rest_B), shapes, strict=True):
        if rest is not None and rest.shape != (*batch, rows, width):
            expected = f"of shape {(*batch, rows, width)}"
            raise ValueRefusal.of(op, name_R, expected, tuple(rest.shape))
