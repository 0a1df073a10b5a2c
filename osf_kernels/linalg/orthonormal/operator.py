"""What orthonormalize and polar have in common: refusals, a fast and a safe path, the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from osf_kernels import _padding
from osf_kernels.errors import Index, TypeRefusal, ValueRefusal
from osf_kernels.linalg.primitives import working_dtype
from osf_kernels.ops._library import register
from osf_kernels.ops._validation import DTYPES, require_constant, require_dense, require_tensor

Fast = Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor, Tensor]]
Safe = Callable[[Tensor], tuple[Tensor, ...]]


def admit(op: str, Y: Tensor) -> None:
    """Refuses what no operator may be called with."""
    require_tensor(op, "Y", Y)
    require_dense(op, "Y", Y)
    require_constant(op, "Y", Y)


def require_columns(op: str, Y: Tensor) -> None:
    """Refuses dtypes and shapes other than (..., m, r) with m ≥ r."""
    require_dtype(op, "Y", Y)
    if Y.dim() < 2:
        raise ValueRefusal.of(op, "Y", "(..., m, r)", tuple(Y.shape), "pass columns")
    m, r = Y.shape[-2:]
    if m < r:
        got = f"m={m}, r={r}"
        remedy = "pass Y.mT if it holds rows"
        raise ValueRefusal.of(op, "Y", "(..., m, r) with m ≥ r", got, remedy)


def require_dtype(op: str, name: str, t: Tensor, index: Index = None) -> None:
    """Refuses the dtypes that no factorization takes."""
    if t.dtype not in DTYPES:
        expected = "float32, bfloat16, float16 or float64"
        raise TypeRefusal.of(op, name, expected, t.dtype, "convert it first", index=index)


def operator(schema: str, fast: Fast, safe: Safe) -> Callable[..., Any]:
    """The torch.library operator of (..., m, r) made of two paths for (b, m, r).

    Args:
        schema: with the orthonormal columns as output, alone or with a rank.
        fast: (outputs, finite, ok): finite (b,) says whether Y is, ok (b,) whether outputs hold.
        safe: the outputs for matrices where those of ``fast`` don't hold.
    """
    name, single = schema.partition("(")[0], schema.endswith("-> Tensor")

    def fake(Y: Tensor) -> Any:
        require_columns(name, Y)
        Q = _padding.empty_like(Y, working_dtype(Y.dtype))
        return Q if single else (Q, Y.new_zeros(Y.shape[:-2], dtype=torch.int64))

    def run(Y: Tensor) -> Any:
        if not Y.numel():
            return fake(Y)
        require_columns(name, Y)
        batch = Y.reshape(-1, *Y.shape[-2:])
        found, finite, ok = fast(batch)
        rest = _unsound(name, batch, finite, ok)
        if rest is not None:
            for x, mended in zip(found, safe(batch[rest]), strict=True):
                x[rest] = mended
        Q, *ranks = (x.reshape((*Y.shape[:-2], *x.shape[1:])) for x in found)
        Q = _padding.padded_rows(Q)
        return Q if single else (Q, *ranks)

    def vmap(info: Any, in_dims: Any, Y: Tensor) -> tuple[Any, Any]:
        return call(Y.movedim(in_dims[0], 0)), 0 if single else (0, 0)

    call = register(schema, run, fake, vmap)
    return call


def _unsound(op: str, Y: Tensor, finite: Tensor, ok: Tensor) -> Tensor | None:
    """The matrices of (b, m, r) that aren't ok, None where all are; synchronizes once.

    Raises:
        ValueRefusal: one that isn't finite.
    """
    finite_here, ok_here = torch.stack([finite, ok]).tolist()
    if not all(finite_here):
        first = finite_here.index(False)
        count = int((~Y[first].isfinite()).sum())
        where = f" of matrix {first} of the batch" if len(finite_here) > 1 else ""
        got = f"{count} of {Y[first].numel()} entries{where} NaN or Inf"
        raise ValueRefusal.of(op, "Y", "finite", got)
    rest = [i for i, good in enumerate(ok_here) if not good]
    return torch.tensor(rest, device=Y.device) if rest else None
