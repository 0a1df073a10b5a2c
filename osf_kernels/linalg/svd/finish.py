"""From a method's factors to results: signs, low bases, figures, and memory of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from osf_kernels import _padding, cpu
from osf_kernels.errors import ValueRefusal
from osf_kernels.linalg.orthonormal.complement import complement
from osf_kernels.linalg.svd.arguments import OP, Entry, Options, times_power
from osf_kernels.linalg.svd.factors import Factors
from osf_kernels.linalg.svd.residual import limit
from osf_kernels.linalg.svd.result import TENSORS, TruncatedSVD, unbound

# Elements of one column whose magnitudes differ by less, in eps of the largest, differ by rounding
# alone, or not at all.
_TIE = 512.0


def results_of(
    method: str, entries: Sequence[Entry], factors: Factors, options: Options
) -> list[TruncatedSVD]:
    """One result for each matrix of a group."""
    residual, tol = factors.residual, options.tol
    norms = torch.tensor([entry.norm for entry in entries], dtype=torch.float64, device="cpu")
    norms = norms.to(residual.device, non_blocking=True)
    signs = _signs(factors.V)
    U, V = _times(factors.U, signs), _times(factors.V, signs)
    # Equal ones come from norms in any order, to rounding.
    S = factors.S.cummin(-1).values
    U_low, V_low = factors.U_low, factors.V_low
    if options.complement:
        U_low = complement(U) if U_low is None else U_low
        V_low = complement(V) if V_low is None else V_low
    held = S.double().square().sum(-1) / norms.square()
    captured = torch.where(norms == 0, 1, held.clamp_max(1)).to(S.dtype)  # of 0 all is held
    converged = residual <= limit(tol, S.dtype, min(entries[0].A.shape))
    if method in ("exact", "gram") and tol is None:
        # "gram" has gone to float64, or to LAPACK's SVD, where its residual was above the limit.
        converged = residual.isfinite()
    if factors.leading is not None:
        converged = converged & factors.leading
    tensors = dict(
        zip(TENSORS, (U, S, V, residual, captured, converged, U_low, V_low), strict=True)
    )
    results = [_owned(result) for result in unbound(tensors, factors.iterations, method)]
    return [_scaled_back(entry, result) for entry, result in zip(entries, results, strict=True)]


def _signs(V: Tensor) -> Tensor:
    """±1 for each column, (b, 1, r): the sign of the first element that is within ``_TIE`` eps of
    the largest magnitude, so the sign of the largest where no element of the other sign is near."""
    if not V.shape[-1]:
        return V.new_empty(len(V), 1, 0)
    tie = _TIE * torch.finfo(V.dtype).eps
    # aminmax takes five times as long as both on a CPU for many columns.
    least, most = V.amin(dim=-2, keepdim=True), V.amax(dim=-2, keepdim=True)
    signs = torch.where(-least > most, -1, 1).to(V.dtype)
    which, column = torch.nonzero(((most + least).abs() <= tie * most).squeeze(-2), as_tuple=True)
    if len(which):
        tied = V[which, :, column]  # (k, n)
        magnitudes = tied.abs()
        near = magnitudes >= (1 - tie) * magnitudes.amax(-1, keepdim=True)
        first = tied.gather(-1, near.int().argmax(-1, keepdim=True)).squeeze(-1)
        signs[which, 0, column] = torch.where(first < 0, -1, 1).to(V.dtype)
    return signs


def _times(X: Tensor, signs: Tensor) -> Tensor:
    """X·signs in rows, whatever X was: one pass instead of a product and a copy."""
    out = _padding.empty_like(X)
    transposed = X.device.type == "cpu" and X.stride(-1) != 1
    step = cpu.TRANSPOSED_AT_ONCE if transposed else max(1, X.shape[-1])
    parts = (x.split(step, -1) for x in (X, signs, out))
    for x, sign, y in zip(*parts, strict=True):
        torch.mul(x, sign, out=y)
    return out


def _scaled_back(entry: Entry, result: TruncatedSVD) -> TruncatedSVD:
    if not entry.exponent:
        return result
    S = times_power(result.S, entry.exponent)
    if entry.exponent > 0 and not bool(S.isfinite().all()):
        expected = f"small enough for its singular values to fit {S.dtype}"
        raise ValueRefusal.of(OP, "A", expected, "larger", "scale it down", index=entry.index)
    return replace(result, S=S)


def _owned(result: TruncatedSVD) -> TruncatedSVD:
    """The result in memory of its own size, since a view would keep its whole group alive."""
    given = {name: getattr(result, name) for name in TENSORS}
    owned: dict[str, Any] = {k: None if x is None else _own(x) for k, x in given.items()}
    return replace(result, **owned)


def _own(x: Tensor) -> Tensor:
    """x in memory of its own size, a matrix in padded rows."""
    if x.dim() == 2:
        rows, columns = x.shape
        width = _padding.leading_dimension(columns, x.device, x.dtype)
        in_rows = x.is_contiguous() if width == columns else x.stride() == (width, 1)
        owns = in_rows and x.untyped_storage().nbytes() == rows * width * x.element_size()
        return x if owns else _padding.empty_like(x).copy_(x)
    owns = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if owns else x.clone(memory_format=torch.contiguous_format)


def stacked_result(results: Sequence[TruncatedSVD], batch: Sequence[int]) -> TruncatedSVD:
    """One result of a batch, from those of its matrices."""

    def field(name: str) -> Tensor | None:
        parts = [getattr(result, name) for result in results]
        if parts[0] is None:
            return None
        whole = torch.stack(parts)[: math.prod(batch)].reshape(*batch, *parts[0].shape)
        return _padding.padded(whole) if parts[0].dim() == 2 else whole

    tensors = {name: field(name) for name in TENSORS}
    return TruncatedSVD(
        **tensors,  # type: ignore[arg-type]
        iterations=max(result.iterations for result in results),
        method=" + ".join(dict.fromkeys(result.method for result in results)),
    )
