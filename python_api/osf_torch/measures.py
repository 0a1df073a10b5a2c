"""What is measured of a protected weight: its protected part, and how far that has moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osf_kernels import Mode, apply_, project
from osf_torch.protected import Protected, columns_of, double, is_high, summed_coefficients
from osf_torch.sharding import sum_over
from osf_torch.subspaces import Subspace

# How far U, S, V may be from triplets of the weight, relative to S: float32 decompositions of
# trained weights are off by 1e-6 to 1e-5, bfloat16 bases by 3e-3.
TRIPLETS_LIMIT = 2e-2
DRIFT_LIMIT = 1e-4  # of the protected part, where bases are float32: decompositions reach 1e-5
TINY = 1e-300  # in a denominator that may be zero


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
    if not has_triplets(s):
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


def pinned(item: Protected, mode: Mode) -> Subspace:
    """What restoring needs beside the bases: S of triplets, else the dense protected part.

    Raises:
        ValueError: U, S, V aren't triplets of the weight; restoring sets UᵀW to S Vᵀ, so the
            first step would replace the weight by what they belong to.
    """
    s, W = item.held, item.view(item.weight)
    if s.protected is not None:
        return Subspace(s.U, s.V, None, s.protected)
    if not has_triplets(s):
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


def has_triplets(s: Subspace) -> bool:
    return s.S is not None and is_high(s.U) and is_high(s.V)
