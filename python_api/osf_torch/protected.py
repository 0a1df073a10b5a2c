"""A protected weight, and what is done to lists of them: project and restore.

A list takes one call for the weights that are whole on this rank, and one collective a group for
those that are sharded, gradients to project and weights to restore together. A weight sharded by
columns is seen transposed, so that the sharded dimension is always the rows: there B = g V is local
and A = Uᵀ g is summed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import (
    Basis,
    Mode,
    apply_,
    coefficients,
    padded,
    project_,
    project_many_,
    restore_many_,
)
from osf_torch.sharding import Group, Sharding, is_dtensor, local, sharding_of, sum_over
from osf_torch.sharing import whole
from osf_torch.subspaces import Held, Subspace

# An entry of UᵀU − I: 16-bit bases are off by up to 4e-3, and float32 bases of LAPACK by 2e-5.
ORTHONORMAL_LIMIT = {2: 1e-2, 4: 1e-4, 8: 1e-4}  # by bytes of an element

_epochs = itertools.count(1)


@dataclass(frozen=True)
class Pinned(Subspace):
    """The bases that belong to ``Protected.view``, and what the weight's protected part is.

    Attributes:
        rest_A, rest_B: with S, UᵀW = S Vᵀ + rest_A and W V = U S + rest_B; in mode "core"
            UᵀW V = diag(S) + rest_B. None where it is below the weight's rounding.
        sketch: (m, c) float64, the protected part times random columns, where nothing is pinned.
    """

    rest_A: Tensor | None = None
    rest_B: Tensor | None = None
    sketch: Tensor | None = None

    def to(self, device: torch.device) -> Pinned:
        """All of it on another device."""
        return replace(
            self,
            **{
                field.name: moved(getattr(self, field.name), device)
                for field in fields(self)
                if getattr(self, field.name) is not None
            },
        )

    def residual(self, mode: Mode) -> tuple[Tensor, Tensor] | Tensor | None:
        """The argument of ``restore_many_``."""
        if self.rest_A is None or self.rest_B is None or mode == "core":
            return self.rest_B
        return self.rest_A, self.rest_B


class Protected:
    """A weight with what this rank needs of its subspace.

    Attributes:
        name: as in the model, without the names that wrappers add.
        weight: the parameter.
        sharding: how it lies, None where it is whole.
        held: what is protected of ``view``: this rank's slice of the sharded side, the other side
            whole.
        raw, kept: ``measures.imprint`` of the gradient that was projected last, before and after,
            where nothing is pinned.
    """

    def __init__(self, name: str, weight: nn.Parameter, subspace: Subspace) -> None:
        self.name, self.weight = name, weight
        self.sharding: Sharding | None = sharding_of(weight)
        self.take(self._held(subspace))
        self.raw: Tensor | None = None
        self.kept: Tensor | None = None

    @property
    def group(self) -> Group | None:
        """Over which coefficients are summed; None where no sum is wanted."""
        return self.sharding.group if self.sharding and self.sharding.dim >= -2 else None

    @property
    def is_readable(self) -> bool:
        """Whether the host reads figures of the weight without waiting for a device or a rank."""
        return self.sharding is None and self.weight.device.type == "cpu"

    def view(self, t: Tensor) -> Tensor:
        """What this rank holds of the weight or its gradient, with the sharded dimension first."""
        t = local(t.detach())
        return t.mT if self.is_transposed else t

    def take(self, held: Pinned) -> None:
        """Holds something else from now on; what was projected with it before, isn't."""
        self.held, self._epoch = held, next(_epochs)
        self.raw = self.kept = None
        self._versions = self._held_versions()

    def is_held_as_taken(self) -> bool:
        """Whether nothing is known to have written to what is held: the caller has the tensors."""
        return self._versions == self._held_versions()

    def _held_versions(self) -> list[int]:
        parts = [getattr(self.held, field.name) for field in fields(self.held)]
        tensors = [part.columns if isinstance(part, Basis) else part for part in parts]
        return [t._version for t in tensors if t is not None and not t.is_inference()]

    def follow(self) -> None:
        """Brings what is held to the device that the weight was moved to since, and bases to double
        precision where it was converted to that, or back."""
        weight = local(self.weight)
        columns = columns_of(self.held.V if self.held.U is None else self.held.U)
        if columns.device != weight.device:
            self.held = self.held.to(weight.device)
            self._versions = self._held_versions()
        if (columns.dtype == torch.float64) != (weight.dtype == torch.float64):
            U, V = (_in_dtype(basis, weight.dtype) for basis in (self.held.U, self.held.V))
            self.held = replace(self.held, U=U, V=V)
            self._versions = self._held_versions()

    @property
    def is_transposed(self) -> bool:
        """Whether ``view`` is the transposed weight's."""
        return self.sharding is not None and self.sharding.dim == -1

    def _held(self, s: Subspace) -> Pinned:
        device = local(self.weight).device
        U, V = (moved(_constant(basis), device) for basis in (s.U, s.V))
        for side, basis in (("U", U), ("V", V)):
            _require_orthonormal(side, basis)
        S = None if s.S is None else s.S.to(device)
        protected = None if s.protected is None else s.protected.to(device)
        cut = self.sharding
        if cut is None:
            return Pinned(U, V, S, protected)
        if cut.dim < -2:
            U, V = (_cut(cut, basis, cut.dim) for basis in (U, V))
            S = cut.slice(S, cut.dim + 1) if S is not None and S.dim() >= -cut.dim - 1 else S
        elif cut.dim == -1:
            U, V = _cut(cut, V, -2), U
        else:
            U = _cut(cut, U, -2)
        if protected is not None:
            protected = _part(cut, protected, cut.dim)
            protected = protected.mT if self.is_transposed else protected
        return Pinned(U, V, S, protected)

    # --- which gradient was projected ---
    # A mark on the gradient itself: a weak reference from here would keep torch from exchanging the
    # bodies of parameters and gradients, as ``Module.to`` does with DTensors.

    def mark_projected(self) -> None:
        g = self.weight.grad
        assert g is not None
        g.__dict__[_MARK] = self._epoch, g._version

    def has_met(self) -> bool:
        """Whether the gradient is the tensor that was projected last, written to since or not."""
        return self._mark() is not None

    def is_projected(self) -> bool:
        """Whether the gradient is the one that was projected, and nothing is known to have written
        to it since.

        Never of a DTensor: in-place operators count on it but not on its local tensor, writing to
        that the other way round, and ``torch._foreach_*_`` on neither (torch 2.13; the clipping
        functions use it). Projecting it again is exact: P² = P.
        """
        g = self.weight.grad
        return g is not None and not is_dtensor(g) and self._mark() == g._version

    def _mark(self) -> int | None:
        """The version of the gradient when it was projected for this item."""
        g = self.weight.grad
        epoch, version = (None, None) if g is None else g.__dict__.get(_MARK, (None, None))
        return version if epoch == self._epoch else None


_MARK = "_osf_projected"


def _require_orthonormal(side: str, basis: Held) -> None:
    """Refuses columns that UᵀU = I doesn't hold for; with them P is no projection and grows."""
    if basis is None or not columns_of(basis).numel():
        return
    columns = columns_of(basis)
    itemsize = columns.element_size()
    columns = columns.double()  # which autocast leaves alone
    gram = whole(columns.mT @ columns)
    off = float(
        (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max()
    )
    if not off <= ORTHONORMAL_LIMIT[itemsize]:
        raise ValueError(
            f"expected {side} to have orthonormal columns, got {side}'{side} off from I by "
            f"{off:.1e}; pass them through osf_kernels.orthonormalize first"
        )


def _in_dtype(basis: Held, dtype: torch.dtype) -> Held:
    """A basis in float64 for a float64 weight, else in float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(basis, Basis):
        return Basis(padded(basis.columns, dtype=wide), basis.spans)
    return None if basis is None else padded(basis, dtype=wide)


def _constant(basis: Held) -> Held:
    """A basis that autograd doesn't follow: the tensor itself where it doesn't anyway."""
    if basis is None or not columns_of(basis).requires_grad:
        return basis
    columns = columns_of(basis).detach()
    return Basis(columns, basis.spans) if isinstance(basis, Basis) else columns


def zero3_shape(weight: Tensor) -> tuple[int, ...] | None:
    """The whole shape of a weight that DeepSpeed's ZeRO-3 has partitioned, else None."""
    return tuple(getattr(weight, "ds_shape", ())) or None


def shapes_of(weight: Tensor, s: Subspace) -> tuple[Tensor, Held, Held]:
    """The whole weight and its bases as meta tensors, for ``plan`` to judge."""
    W = torch.empty(zero3_shape(weight) or weight.shape, dtype=weight.dtype, device="meta")
    return W, moved(s.U, W.device), moved(s.V, W.device)


def moved(basis: Any, device: torch.device) -> Any:
    """A tensor, a Basis or None on a device; itself where it is there."""
    if isinstance(basis, Basis):
        return Basis(moved(basis.columns, device), basis.spans)
    if basis is None or basis.device == device:
        return basis
    return basis.to(device) if is_dtensor(basis) else padded(basis, device)


def double(basis: Held) -> Held:
    """A basis in float64."""
    if isinstance(basis, Basis):
        columns = basis.columns.double()
        return columns if basis.spans == "high" else Basis(columns, basis.spans)
    return None if basis is None else basis.double()


def _cut(cut: Sharding, basis: Held, dim: int) -> Held:
    columns = basis.columns if isinstance(basis, Basis) else basis
    if columns is None or columns.dim() < -dim:  # one basis for every matrix of a batch
        return basis
    part = _part(cut, columns, dim)
    return Basis(part, basis.spans) if isinstance(basis, Basis) else part


def _part(cut: Sharding, t: Tensor, dim: int) -> Tensor:
    """This rank's slice of a whole tensor, or what it holds of one that is sharded already."""
    return local(t) if is_dtensor(t) else cut.slice(t, dim)


def is_high(basis: Held) -> bool:
    return basis is not None and (not isinstance(basis, Basis) or basis.spans == "high")


def columns_of(basis: Held) -> Tensor:
    assert basis is not None
    return basis.columns if isinstance(basis, Basis) else basis


# --- lists ---


def summed_coefficients(
    items: Sequence[Protected], xs: Sequence[Tensor], bases: Sequence[tuple[Held, Held]]
) -> list[tuple[Tensor, Tensor]]:
    """A = Uᵀ x of the whole matrices and B = x V of what is held here, one sum a group."""
    pairs = [list(coefficients(x, U, V)) for x, (U, V) in zip(xs, bases, strict=True)]
    together: dict[tuple[Group, torch.dtype, torch.device], list[int]] = {}
    for i, (item, (A, _)) in enumerate(zip(items, pairs, strict=True)):
        if item.group is not None:
            together.setdefault((item.group, A.dtype, A.device), []).append(i)
    for (group, _, _), members in together.items():
        for i, A in zip(members, sum_over(group, [pairs[i][0] for i in members]), strict=True):
            pairs[i][0] = A
    return [(A, B) for A, B in pairs]


def project_and_restore_all_(
    projected: Sequence[Protected], restored: Sequence[Protected], mode: Mode
) -> None:
    """g ← P(g) for the gradients of some items, W ← P(W) + what is pinned for the weights of some.

    Sharded ones of both take one sum.
    """
    whole_grads, sharded_grads = _parted(projected)
    whole_weights, sharded_weights = _parted(restored)
    _project_whole_(whole_grads, mode)
    _restore_whole_(whole_weights, mode)
    sharded = [*sharded_grads, *sharded_weights]
    if sharded:
        Ws = [item.view(item.weight) for item in sharded_weights]
        xs = [_summand(item, W) for item, W in zip(sharded_weights, Ws, strict=True)]
        gs = [_grad(item) for item in sharded_grads]
        pairs = summed_coefficients(sharded, [*gs, *xs], _bases(sharded))
        for item, g, (A, B) in zip(sharded_grads, gs, pairs, strict=False):
            apply_(g, item.held.U, item.held.V, A, B, mode=mode)
        for item, W, x, (A, B) in zip(sharded_weights, Ws, xs, pairs[len(gs) :], strict=True):
            _restore_part_(item, W, x, A, B, mode)
    for item in projected:
        item.mark_projected()


def restore_all_(items: Sequence[Protected], mode: Mode) -> None:
    """W ← P(W) + what is pinned, for the weights of all items."""
    project_and_restore_all_([], items, mode)


def _project_whole_(whole: Sequence[Protected], mode: Mode) -> None:
    if len(whole) == 1:
        project_(_grad(whole[0]), whole[0].held.U, whole[0].held.V, mode=mode)
    elif whole:
        bases = _bases(whole)
        project_many_(
            [_grad(item) for item in whole], [U for U, _ in bases], [V for _, V in bases], mode=mode
        )


def _restore_whole_(whole: Sequence[Protected], mode: Mode) -> None:
    restore_many_(
        [item.view(item.weight) for item in whole],
        [item.held.U for item in whole],
        [item.held.V for item in whole],
        S=[item.held.S for item in whole],
        residual=[item.held.residual(mode) for item in whole],
        protected=[item.held.protected for item in whole],
        mode=mode,
    )


def _summand(item: Protected, W: Tensor) -> Tensor:
    """W, in float32 where a dense part is added to it: rounded to 16 bits once, at the end."""
    return W.float() if W.element_size() == 2 and item.held.protected is not None else W


def _restore_part_(item: Protected, W: Tensor, x: Tensor, A: Tensor, B: Tensor, mode: Mode) -> None:
    """Restores this rank's slice W from its ``_summand`` x and the coefficients of the whole."""
    U, V, S = item.held.U, item.held.V, item.held.S
    if S is not None:
        # D = U A + (B − U (A V)) Vᵀ with A = Uᵀ W − S Vᵀ and B = W V − U S
        # and less what the weight has beside its triplets; in mode "core" that is of A V alone,
        # which U and V carry to both.
        A.sub_(S.to(A.dtype).unsqueeze(-1) * columns_of(V).to(A.dtype).mT)
        B.sub_(columns_of(U).to(B.dtype) * S.to(B.dtype).unsqueeze(-2))
        rest_A, rest_B = item.held.rest_A, item.held.rest_B
        if rest_B is not None and mode == "core":
            rest = rest_B.to(A.dtype)
            A.sub_(rest @ columns_of(V).to(A.dtype).mT)
            B.sub_(columns_of(U).to(B.dtype) @ rest)
        elif rest_A is not None and rest_B is not None:
            A.sub_(rest_A)
            B.sub_(rest_B)
    apply_(x, U, V, A, B, mode=mode)
    if item.held.protected is not None:
        x.add_(item.held.protected)
    if x is not W:
        W.copy_(x)


def _parted(items: Sequence[Protected]) -> tuple[list[Protected], list[Protected]]:
    whole = [item for item in items if item.group is None]
    return whole, [item for item in items if item.group is not None]


def _bases(items: Sequence[Protected]) -> list[tuple[Held, Held]]:
    return [(item.held.U, item.held.V) for item in items]


def _grad(item: Protected) -> Tensor:
    g = item.weight.grad
    assert g is not None
    return item.view(g)
