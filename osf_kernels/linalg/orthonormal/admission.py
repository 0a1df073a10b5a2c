"""What orthonormalize and polar refuse, and which matrices of a batch take their safe path."""

from __future__ import annotations

import torch
from torch import Tensor

from osf_kernels.errors import Index, TypeRefusal, ValueRefusal
from osf_kernels.ops._validation import DTYPES, require_constant, require_dense, require_tensor


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


def unsound(op: str, Y: Tensor, finite: Tensor, ok: Tensor) -> Tensor | None:
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
