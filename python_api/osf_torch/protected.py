"""A protected weight, and what is done to lists of them: project, restore, measure.

A list takes one call for the weights that are whole on this rank, and one collective a group for
those that are sharded, gradients to project and weights to restore together. A weight sharded by
columns is seen transposed, so that the sharded dimension is always the rows: there B = g V is local
and A = Uᵀ g is summed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from osf_kernels import (
    Basis,
    Mode,
    apply_,
    coefficients,
    plan,
    project,
    project_,
    project_many_,
    restore_many_,
)
from osf_torch.sharding import Group, Sharding, is_dtensor, local, sharding_of, sum_over
from osf_torch.sharing import whole
from osf_torch.subspaces import Held, Subspace

# How far U, S, V may be from triplets of the weight, relative to S: float32 decompositions of
# trained weights are off by 1e-6 to 1e-5, bfloat16 bases by 3e-3.
TRIPLETS_LIMIT = 2e-2
ORTHONORMAL_LIMIT = 2e-2  # an entry of UᵀU − I: 16-bit bases are off by 1e-3
DRIFT_LIMIT = 1e-4  # of the protected part, where bases are float32: decompositions reach 1e-5
TINY = 1e-300  # in a denominator that may be zero


class Protected:
    """A weight with what this rank needs of its subspace.

    Attributes:
        name: as in the model, without the names that wrappers add.
        weight: the parameter.
        sharding: how it lies, None where it is whole.
        held: the bases, S and dense part that belong to ``view``: this rank's slice of the
            sharded side, the other side whole.
    """

    def __init__(self, name: str, weight: nn.Parameter, subspace: Subspace) -> None:
        self.name, self.weight = name, weight
        self.sharding: Sharding | None = sharding_of(weight)
        self.held = self._held(subspace)
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self.mark_left()

    @property
    def group(self) -> Group | None:
        """Over which coefficients are summed; None where no sum is wanted."""
        return self.sharding.group if self.sharding and self.sharding.dim >= -2 else None

    def view(self, t: Tensor) -> Tensor:
        """What this rank holds of the weight or its gradient, with the sharded dimension first."""
        t = local(t.detach())
        return t.mT if self._transposed else t

    @property
    def _transposed(self) -> bool:
        return self.sharding is not None and self.sharding.dim == -1

    def _held(self, s: Subspace) -> Subspace:
        device = local(self.weight).device
        U, V = moved(s.U, device), moved(s.V, device)
        for side, basis in (("U", U), ("V", V)):
            _require_orthonormal(side, basis)
        S = None if s.S is None else s.S.to(device)
        protected = None if s.protected is None else s.protected.to(device)
        cut = self.sharding
        if cut is None:
            return Subspace(U, V, S, protected)
        if cut.dim < -2:
            U, V = (_cut(cut, basis, cut.dim) for basis in (U, V))
            S = cut.slice(S, cut.dim + 1) if S is not None and S.dim() >= -cut.dim - 1 else S
        elif cut.dim == -1:
            U, V = _cut(cut, V, -2), U
        else:
            U = _cut(cut, U, -2)
        if protected is not None:
            protected = _part(cut, protected, cut.dim)
            protected = protected.mT if self._transposed else protected
        return Subspace(U, V, S, protected)

    # --- which gradient was projected last ---

    def mark_projected(self) -> None:
        g = self.weight.grad
        assert g is not None
        self._seen = weakref.ref(g), g._version

    def has_met(self) -> bool:
        """Whether the gradient is the tensor that was projected last, written to since or not."""
        return self._seen is not None and self._seen[0]() is self.weight.grad

    def is_projected(self) -> bool:
        """Whether the gradient is the one that was projected, unwritten since.

        Never of a DTensor: in-place operators count on it but not on its local tensor, writing to
        that the other way round, and ``torch._foreach_*_`` on neither (torch 2.13; the clipping
        functions use it). Projecting it again is exact: P² = P.
        """
        g = self.weight.grad
        return (
            self.has_met()
            and g is not None
            and not is_dtensor(g)
            and self._seen is not None
            and self._seen[1] == g._version
        )

    # --- who wrote to the weight last ---

    def mark_left(self) -> None:
        """The weight is as the guard knows it: after a step, or pinned."""
        self._left = self.weight._version

    def is_as_left(self) -> bool:
        """Whether nothing is known to have written to the weight since.

        Of a DTensor ``copy_`` and other plain operators count, and they count on every rank alike;
        what writes to its local tensor, or to ``weight.data``, isn't seen.
        """
        return self._left == self.weight._version


def _require_orthonormal(side: str, basis: Held) -> None:
    """Refuses columns that UᵀU = I doesn't hold for; with them P is no projection and grows."""
    if basis is None or not columns_of(basis).numel():
        return
    columns = columns_of(basis)
    columns = columns.float() if columns.element_size() == 2 else columns
    gram = whole(columns.mT @ columns)
    off = float(
        (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max()
    )
    if not off <= ORTHONORMAL_LIMIT:
        raise ValueError(
            f"expected {side} to have orthonormal columns, got {side}'{side} off from I by "
            f"{off:.1e}; pass them through osf_kernels.orthonormalize first"
        )


def zero3_shape(weight: Tensor) -> tuple[int, ...] | None:
    """The whole shape of a weight that DeepSpeed's ZeRO-3 has partitioned, else None."""
    return tuple(getattr(weight, "ds_shape", ())) or None


def shapes_of(weight: Tensor, s: Subspace) -> tuple[Tensor, Held, Held]:
    """The whole weight and its bases as meta tensors, for ``plan`` to judge."""
    W = torch.empty(zero3_shape(weight) or weight.shape, dtype=weight.dtype, device="meta")
    return W, moved(s.U, W.device), moved(s.V, W.device)


def moved(basis: Held, device: torch.device) -> Held:
    if isinstance(basis, Basis):
        return Basis(basis.columns.to(device), basis.spans)
    return None if basis is None else basis.to(device)


def double(basis: Held) -> Held:
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
    for item in restored:
        item.mark_left()


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
        A.sub_(S.to(A.dtype).unsqueeze(-1) * columns_of(V).to(A.dtype).mT)
        B.sub_(columns_of(U).to(B.dtype) * S.to(B.dtype).unsqueeze(-2))
    apply_(x, U, V, A, B, mode=mode)
    if item.held.protected is not None:
        x.add_(item.held.protected)
    if x is not W:
        W.copy_(x)


def remainder(item: Protected, x: Tensor, mode: Mode) -> Tensor:
    """x − P(x) in float64, of what this rank holds; ``x`` is the view of a weight or gradient."""
    x = x.double()
    bases = double(item.held.U), double(item.held.V)
    if item.group is None:
        return x - project(x, *bases, mode=mode)
    ((A, B),) = summed_coefficients([item], [x], [bases])
    return x - apply_(x.clone(), *bases, A, B, mode=mode)


def norm(item: Protected, x: Tensor) -> float:
    """The Frobenius norm of the whole matrix from what each rank holds; synchronises."""
    square = x.double().square().sum()
    if item.sharding is not None:
        (square,) = sum_over(item.sharding.group, [square])
    return float(square.sqrt())


def share(item: Protected, x: Tensor, mode: Mode) -> float:
    """‖x − P(x)‖ / ‖x‖, 0 of x = 0."""
    return norm(item, remainder(item, x, mode)) / max(norm(item, x), TINY)


def reference(item: Protected) -> Tensor | None:
    """The protected part as it was, in float64, of what this rank holds; None where unknown."""
    s = item.held
    if s.protected is not None:
        return s.protected.double()
    if not _has_triplets(s):
        return None
    assert s.S is not None
    U, V = columns_of(s.U).double(), columns_of(s.V).double()
    return (U * s.S.double().unsqueeze(-2)) @ V.mT


@torch.no_grad()
def drift(item: Protected, mode: Mode) -> float:
    """‖H(W) − H_ref‖ / ‖H_ref‖ in float64, of the whole matrix.

    Raises:
        RuntimeError: no reference is known.
    """
    H = reference(item)
    if H is None:
        raise RuntimeError(
            f"osf_torch.Guard.drift: expected a reference for {item.name!r}, got a subspace "
            "without S and protected and restore=False; give one of them"
        )
    off = remainder(item, item.view(item.weight), mode) - H
    return norm(item, off) / max(norm(item, H), TINY)


@torch.no_grad()
def released(before: Protected, after: Protected, mode: Mode) -> float:
    """‖P(H)‖ / ‖H‖ of the part H that ``before`` protects, P that of ``after``; in float64."""
    H = remainder(before, before.view(before.weight), mode)
    return norm(before, H - remainder(after, H, mode)) / max(norm(before, H), TINY)


def refused(error: Exception, items: Sequence[Protected], mode: Mode) -> Exception:
    """An operator's refusal of a list, with the name of the parameter that is at fault."""
    for item in items:
        for x in (item.weight, item.weight.grad):
            try:
                if x is not None:
                    plan(item.view(x), item.held.U, item.held.V, mode=mode)
            except (TypeError, ValueError) as found:
                return type(found)(
                    f"osf_torch.Guard: parameter {item.name!r}: {found}; after converting the "
                    "model protect it again"
                )
    return error


def pinned(item: Protected, mode: Mode) -> Subspace:
    """What restoring needs beside the bases: S of triplets, else the dense protected part.

    Raises:
        ValueError: U, S, V aren't triplets of the weight; restoring sets UᵀW to S Vᵀ, so the
            first step would replace the weight by what they belong to.
    """
    s, W = item.held, item.view(item.weight)
    if s.protected is not None:
        return Subspace(s.U, s.V, None, s.protected)
    if not _has_triplets(s):
        H = remainder(item, W, mode)
        return Subspace(s.U, s.V, None, H if W.dtype == H.dtype else H.float())
    assert s.S is not None
    bases, S = (double(s.U), double(s.V)), s.S.double()
    ((A, _),) = summed_coefficients([item], [W.double()], [bases])
    off = float((A - S.unsqueeze(-1) * columns_of(bases[1]).mT).norm() / S.norm().clamp_min(TINY))
    if off > TRIPLETS_LIMIT:
        raise ValueError(
            f"expected U, S, V of parameter {item.name!r} to be singular triplets of it, got "
            f"|U'W - S V'| = {off:.1e} |S|; take them from the weight as it stands, or leave S out"
        )
    return s


@torch.no_grad()
def pin(items: Sequence[Protected], mode: Mode) -> None:
    """Gives every item what restoring needs; see ``pinned``."""
    for item in items:
        try:
            item.held = pinned(item, mode)
        except ValueError as error:
            raise ValueError(f"osf_torch.protect: {error}") from None


def drift_limit(item: Protected) -> float:
    """What rounding explains of a drift: of the weight at every step, and of the bases."""
    held = [columns_of(basis) for basis in (item.held.U, item.held.V) if basis is not None]
    rounded = any(columns.element_size() == 2 for columns in held)
    H = reference(item)
    assert H is not None
    W = item.view(item.weight)
    ratio = norm(item, W) / max(norm(item, H), TINY)
    return (TRIPLETS_LIMIT if rounded else DRIFT_LIMIT) + 8 * torch.finfo(W.dtype).eps * ratio


def rank_of(s: Subspace, shape: Sequence[int]) -> int:
    """How many directions are protected, on the side that protects fewer."""
    return min(
        columns_of(basis).shape[-1] if is_high(basis) else size - columns_of(basis).shape[-1]
        for basis, size in zip((s.U, s.V), shape[-2:], strict=True)
        if basis is not None
    )


def _has_triplets(s: Subspace) -> bool:
    return s.S is not None and is_high(s.U) and is_high(s.V)


def _parted(items: Sequence[Protected]) -> tuple[list[Protected], list[Protected]]:
    whole = [item for item in items if item.group is None]
    return whole, [item for item in items if item.group is not None]


def _bases(items: Sequence[Protected]) -> list[tuple[Held, Held]]:
    return [(item.held.U, item.held.V) for item in items]


def _grad(item: Protected) -> Tensor:
    g = item.weight.grad
    assert g is not None
    return item.view(g)
