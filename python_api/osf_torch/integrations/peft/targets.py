"""Matrices and the bases they are projected with: many in one call, sharded ones by one sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osf_kernels import Basis, apply_, coefficients, project_, project_many_
from osf_torch.sharding import is_dtensor, local, sharding_of, sum_over

ROWS, COLUMNS = -2, -1
SIDES = {"U_low": ROWS, "V_low": COLUMNS}


@dataclass(frozen=True)
class Target:
    """A matrix, or the DTensor of one, and the basis that its ``dim`` is projected with.

    Attributes:
        basis: (whole matrix.shape[dim], r) columns, whole on every rank.
        dim: -2 for (I − B Bᵀ) X, -1 for X (I − B Bᵀ).
        inverse: (BᵀB)⁻¹ (r, r), where a low basis isn't to be taken as orthonormal.
    """

    matrix: Tensor
    basis: Tensor | Basis
    dim: int
    inverse: Tensor | None = None


@torch.no_grad()
def project(targets: Sequence[Target]) -> None:
    """P of each in place; those sharded along ``dim`` share one collective a group and dtype."""
    whole: list[tuple[Tensor, Tensor | Basis, int]] = []
    halves: dict[Any, list[tuple[Tensor, Tensor | Basis, Tensor | None]]] = {}
    for target in targets:
        X = local(target.matrix)
        basis = _mapped(target.basis, X.device)
        sharding = sharding_of(target.matrix)
        shared = sharding is not None and sharding.dim == target.dim
        if not shared and target.inverse is None:
            whole.append((X, basis, target.dim))
            continue
        group = None
        if shared:
            assert sharding is not None
            group = sharding.group
            basis = _narrowed(basis, sharding.start, sharding.size)
        kind = (group, X.dtype == torch.float64, X.device)
        rows = X if target.dim == ROWS else X.mT
        halves.setdefault(kind, []).append((rows, basis, target.inverse))
    if len(whole) == 1:
        X, basis, dim = whole[0]
        project_(X, *((basis, None) if dim == ROWS else (None, basis)))
    elif whole:
        project_many_(
            [X for X, _, _ in whole],
            [basis if dim == ROWS else None for _, basis, dim in whole],
            [basis if dim == COLUMNS else None for _, basis, dim in whole],
        )
    for (group, *_), parts in halves.items():
        ready = [coefficients(X, basis, None) for X, basis, _ in parts]
        sums = [A for A, _ in ready]
        if group is not None:
            sums = sum_over(group, sums)
        for (X, basis, inverse), A, (_, B) in zip(parts, sums, ready, strict=True):
            apply_(X, basis, None, A if inverse is None else inverse.to(A) @ A, B)


def _mapped(basis: Tensor | Basis, device: torch.device) -> Tensor | Basis:
    """Where the matrix is: FSDP2 offloads parameters to the CPU, and no buffers."""
    if isinstance(basis, Basis):
        return Basis(basis.columns.to(device), basis.spans)
    return basis.to(device)


def _narrowed(basis: Tensor | Basis, start: int, size: int) -> Tensor | Basis:
    if isinstance(basis, Basis):
        return Basis(basis.columns.narrow(-2, start, size), basis.spans)
    return basis.narrow(-2, start, size)


def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """dU ← (I − U_high U_highᵀ) dU and dV ← dV (I − V_highᵀ V_high), of U_low's and V_low's grad.

    In place. A DTensor that is sharded along the projected dimension takes one all-reduce of
    coefficients, on its own mesh's group; whatever is whole takes none.

    Args:
        svd_dict: as decompose_weight_matrix makes it; its tensors may be DTensors.
    """
    targets = []
    for side, high in (("U_low", "U_high"), ("V_low", "V_high")):
        grad = svd_dict[side].grad
        if grad is not None:
            basis = svd_dict[high].detach()
            basis = basis.full_tensor() if is_dtensor(basis) else basis
            targets.append(Target(grad, basis if side == "U_low" else basis.mT, SIDES[side]))
    project(targets)
