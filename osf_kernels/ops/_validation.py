"""What every operator refuses, and what it makes of what it accepts.

Everything that shapes, dtypes and devices decide is decided once per combination and cached:
a call that was seen before pays for building the key alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import osf_kernels.backends.torch as torch_backend
from osf_kernels.backends.choosing import choose_for, choose_named, module
from osf_kernels.basis import Basis
from osf_kernels.errors import TypeRefusal, ValueRefusal
from osf_kernels.ops._library import has_tangent
from osf_kernels.ops._names import Names
from osf_kernels.plan import MODES, Matrix, Mode, Step, choose, choose_pinned, on_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_NAMES[torch.float64] = "float64"

# Mode and spans travel to the operators as one word: each string of its own costs the dispatcher
# 0.7 µs a call.
_KINDS: dict[tuple[str, str, str], str] = {
    (mode, u, v): f"{mode}:{u}:{v}"
    for mode in MODES
    for u in ("high", "low")
    for v in ("high", "low")
}
_PARTS: dict[str, tuple[Any, str, str]] = {kind: parts for parts, kind in _KINDS.items()}

BasisLike = Tensor | Basis | None
Meta = tuple[Any, ...]  # (shape, dtype, device) of a tensor
# Which forms the planner may take: any, those that round once, those of ready coefficients of a
# shard (whose bases may be wider than what is held of their side), those that pin to S, and of a
# shard.
Choice = Literal["any", "once", "shard", "pinned", "pinned shard"]


def meta(t: Tensor) -> Meta:
    return t.shape, t.dtype, t.device


def columns(op: str, name: str, basis: BasisLike) -> tuple[Tensor | None, str]:
    """The columns of a basis argument and what they span."""
    held, spans = (basis.columns, basis.spans) if isinstance(basis, Basis) else (basis, "high")
    if held is None:
        return held, spans
    if isinstance(held, Tensor):
        require_dense(op, name, held)
        return held, spans
    raise TypeRefusal.of(
        op, name, "a tensor, a Basis or None", type(basis).__name__, "wrap it in a tensor"
    )


def require_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeRefusal.of(op, name, "a tensor", type(value).__name__)
    require_dense(op, name, value)


def require_dense(op: str, name: str, t: Tensor) -> None:
    # Dynamo has no layouts in a backward pass that it traces.
    if not torch.compiler.is_compiling() and t.layout != torch.strided:
        raise TypeRefusal.of(op, name, "a dense tensor", t.layout, f"pass {name}.to_dense()")


def kind_of(op: str, mode: str, u_spans: str, v_spans: str) -> str:
    """Mode and spans as one word, "complement:high:low"."""
    kind = _KINDS.get((mode, u_spans, v_spans))
    if kind is None:
        raise ValueRefusal.of(op, "mode", '"complement" or "core"', repr(mode))
    return kind


def held(
    names: Names, Us: Sequence[BasisLike], Vs: Sequence[BasisLike], mode: str
) -> tuple[list[Tensor | None], list[Tensor | None], list[str]]:
    """The columns of a list's bases, and a word of mode and spans a matrix."""
    lefts: list[Tensor | None] = []
    rights: list[Tensor | None] = []
    kinds = []
    for i, (left, right) in enumerate(zip(Us, Vs, strict=True)):
        spans = []
        for side, basis, columns_of_side in ((1, left, lefts), (2, right, rights)):
            if basis is None or (type(basis) is Tensor and basis.layout is torch.strided):
                columns_of_side.append(basis)
                spans.append("high")
            else:
                found, span = columns(names.op, names.entry(i)[side], basis)
                columns_of_side.append(found)
                spans.append(span)
        kinds.append(kind_of(names.op, mode, *spans))
    return lefts, rights, kinds


def parts_of(op: str, kind: str) -> tuple[Mode, str, str]:
    """The mode and the spans of U and V that a word stands for."""
    parts = _PARTS.get(kind)
    if parts is None:
        expected = f"one of {', '.join(_PARTS)}"
        raise ValueRefusal.of(op, "kind", expected, repr(kind))
    return parts


def require_lengths(op: str, **lists: Sequence[object]) -> None:
    """All lists of a list operator have one length."""
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            raise TypeRefusal.of(op, name, "a list or a tuple", type(value).__name__)
    (first, reference), *others = lists.items()
    for name, value in others:
        if len(value) != len(reference):
            raise ValueRefusal.of(
                op,
                name,
                f"as long as {first} ({len(reference)})",
                f"{len(value)} entries",
                "pass None where a matrix has no such argument",
            )


def check_matrix(op: str, name: str, g: Meta) -> None:
    shape, dtype, _ = g
    if dtype not in DTYPES:
        raise TypeRefusal.of(
            op, name, "float32, bfloat16, float16 or float64", dtype, "convert it first"
        )
    if len(shape) < 2:
        raise ValueRefusal.of(
            op, name, "(..., m, n)", tuple(shape), "a vector has no two-sided projection"
        )


def check_basis(
    op: str, name: str, basis: Meta, g: Meta, *, left: bool, shard: bool = False
) -> None:
    shape, dtype, device = basis
    size = g[0][-2] if left else g[0][-1]
    letters = ("(..., m, r)", "m") if left else ("(..., n, k)", "n")
    expected = f"{letters[0]} with {letters[1]}={size}"
    if dtype not in DTYPES:
        raise TypeRefusal.of(
            op, name, "float32, bfloat16, float16 or float64", dtype, "convert it first"
        )
    if len(shape) < 2:
        raise ValueRefusal.of(op, name, expected, tuple(shape))
    if shape[-2] != size:
        rows = shape[-1] == size
        remedy = f"pass {name}.mT if it holds rows" if rows else ""
        raise ValueRefusal.of(op, name, expected, tuple(shape), remedy)
    if shape[-1] > size and not shard:
        raise ValueRefusal.of(
            op,
            name,
            f"no wider than its side, {expected}",
            tuple(shape),
            "orthonormal columns can't outnumber their rows",
        )
    lead, batch = shape[:-2], g[0][:-2]
    if len(lead) > len(batch) or any(
        a != b and a != 1 for a, b in zip(reversed(lead), reversed(batch), strict=False)
    ):
        raise ValueRefusal.of(
            op, name, f"broadcastable to batch dimensions {tuple(batch)}", tuple(shape)
        )
    if device != g[2]:
        raise ValueRefusal.of(op, name, f"on {g[2]} like the matrix", f"on {device}")
    if (dtype == torch.float64) != (g[1] == torch.float64):
        raise TypeRefusal.of(
            op,
            name,
            "float64 together with its matrix or not at all",
            f"{dtype} beside {g[1]}",
            "convert one of them",
        )


def check(
    op: str,
    names: Sequence[str],
    g: Meta,
    U: Meta | None,
    V: Meta | None,
    shard: bool = False,
) -> None:
    check_matrix(op, names[0], g)
    if U is not None:
        check_basis(op, names[1], U, g, left=True, shard=shard)
    if V is not None:
        check_basis(op, names[2], V, g, left=False, shard=shard)


def shape_check(
    op: str,
    g: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    kind: str,
    *,
    names: Sequence[str] = "gUV",
    shard: bool = False,
) -> None:
    """The same refusals where shapes may be symbolic: in a fake kernel."""
    parts_of(op, kind)
    u_meta, v_meta = None if U is None else meta(U), None if V is None else meta(V)
    check(op, names, meta(g), u_meta, v_meta, shard)


class Decision(NamedTuple):
    """What one matrix runs."""

    matrix: Matrix
    step: Step
    backend: str
    why: str
    direct: bool  # on torch, one matrix, every operand in the working dtype


def of_shard(choice: Choice) -> bool:
    """Whether a basis may be wider than its side, of which these are some rows."""
    return choice in ("shard", "pinned shard")


@lru_cache(maxsize=8192)
def admit(
    op: str,
    g: Meta,
    U: Meta | None,
    V: Meta | None,
    kind: str,
    request: str,
    choice: Choice,
    architecture: str | None = None,
) -> Decision:
    """What one matrix runs, or the refusal; on a named architecture instead of the device, "cpu" or
    one of ``gpu.ARCHITECTURES``, where it is said."""
    mode, u_spans, v_spans = parts_of(op, kind)
    check(op, ("g", "U", "V"), g, U, V, of_shard(choice))
    shape, dtype, device = g
    held = [t[1] for t in (U, V) if t is not None]
    x = Matrix(
        m=shape[-2],
        n=shape[-1],
        r=None if U is None else U[0][-1],
        k=None if V is None else V[0][-1],
        u_spans=u_spans,
        v_spans=v_spans,
        dtype=_NAMES[dtype],
        basis_dtype=_NAMES[max(held, key=lambda d: d.itemsize) if held else dtype],
        batch=shape[:-2].numel(),
    )
    # Kernels for a GPU are planned for one, wherever they are interpreted.
    planned_for = "cuda" if request in ("triton", "cuda") else device.type
    if architecture is not None:
        planned_for = "cpu" if architecture == "cpu" else "cuda"
    if choice in ("pinned", "pinned shard"):
        step = choose_pinned(x, mode, planned_for, choice == "pinned shard")
    else:
        step = choose(x, mode, planned_for, once=choice != "any", shard=choice == "shard")
    if architecture is None:
        backend, why = choose_for(request, device, x, step)
        runs = module(backend)
        kept = runs.keeps(x, device)
    else:
        backend, why = choose_named(architecture, x, step)
        runs = module(backend)
        kept = backend == "triton" and runs.keeps_on(architecture, x)
    step = on_backend(x, step, runs.coefficient_reads(x), backend == "torch", kept)
    dtypes = (dtype, None if U is None else U[1], None if V is None else V[1])
    direct = backend == "torch" and len(shape) == 2 and torch_backend.needs_no_conversion(*dtypes)
    return Decision(x, step, backend, why, direct)


def require_constant(op: str, names: Sequence[str], *tensors: Tensor | None) -> None:
    """An operator without derivative takes nothing that is differentiated in either mode."""
    recording = torch.is_grad_enabled()
    for name, t in zip(names, tensors, strict=True):
        got = ""
        if t is not None and recording and t.requires_grad:
            got = "one that requires grad"
        elif has_tangent(t):
            got = "one with a tangent of forward mode"
        if got:
            remedy = f"pass {name}.detach()"
            raise ValueRefusal.of(op, name, "a tensor without gradient", got, remedy)
