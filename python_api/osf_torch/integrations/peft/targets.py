"""Matrices and the bases they are projected with: many in one call, sharded ones by one sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osf_kernels import Basis
from osf_torch.bases import Held, mapped, moved
from osf_torch.lists import Entry, Lists, MatrixList, Side
from osf_torch.sharding import Cut, is_dtensor, local, sharding_of

ROWS, COLUMNS = -2, -1
SIDES = {"U_low": ROWS, "V_low": COLUMNS}


@dataclass(frozen=True)
class Target:
    """A matrix, or the DTensor of one, and the basis that its ``dim`` is projected with.

    Attributes:
        basis: (whole matrix.shape[dim], r) columns, whole on every rank.
        dim: -2 for (I − B Bᵀ) X, -1 for X (I − B Bᵀ).
        inverse: (BᵀB)⁻¹ (r, r), where a low basis isn't to be taken as orthonormal.
        whose: by whom the matrix is known from step to step.
        held: the tensor whose columns, or rows, the basis is.
    """

    matrix: Tensor
    basis: Tensor | Basis
    dim: int
    inverse: Tensor | None = None
    whose: int = 0
    held: Tensor | None = None

    @property
    def side(self) -> Side:
        cut = self._cut
        return Side(self.dim, () if cut is None else cut.groups, self.inverse)

    @property
    def _cut(self) -> Cut | None:
        """How ``dim`` of the matrix is cut."""
        sharding = sharding_of(self.matrix)
        return None if sharding is None else sharding.of(self.dim)

    def fitted(self) -> Held:
        """The rows of the basis for what this rank holds of ``dim``, where the matrix is: FSDP2
        offloads parameters to the CPU, and no buffers."""
        device, cut = local(self.matrix).device, self._cut
        basis = moved(self.basis, device)
        if cut is None:
            return basis
        start, size = cut.start, cut.size
        return mapped(basis, lambda columns: columns.narrow(-2, start, size))


@torch.no_grad()
def project(targets: Sequence[Target], lists: Lists | None = None) -> None:
    """P of each in place; those sharded along ``dim`` share one collective a group and dtype.

    Args:
        lists: where the list is kept ready for the next time; every target then has ``held``.
    """
    sides = [target.side for target in targets]
    xs = [side.view(local(target.matrix)) for side, target in zip(sides, targets, strict=True)]

    def entries() -> list[Entry]:
        return [side.entry(target.fitted()) for side, target in zip(sides, targets, strict=True)]

    if lists is None:
        MatrixList(xs, entries()).run_(xs)
        return
    keys, named = [], []
    for side, target in zip(sides, targets, strict=True):
        held, inverse = target.held, target.inverse
        assert held is not None
        keys.append((target.whose, (id(held), held.data_ptr()), side.groups, id(inverse)))
        named.append((held, inverse))
    lists.run_(keys, xs, entries, named)


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
