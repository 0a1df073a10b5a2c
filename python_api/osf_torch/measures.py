"""What is measured of a protected weight: its protected part, and how far that has moved.

Everything here is measured against the weight as it was at ``protect``, never against its triplets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from osf_kernels import Mode, coefficients, project, use_backend
from osf_torch.bases import Held, columns_of, double, is_high
from osf_torch.protected import (
    Pinned,
    Protected,
    matrices_of,
    readable,
    zero3_shape,
)
from osf_torch.sharding import Group, sum_over
from osf_torch.subspaces import Subspace
from osf_torch.writes import norms

# How far S Vᵀ may be from UᵀW, or U S from W V, relative to S, on the side where they are closer:
# there an iteration that stopped early is exact by its construction, 16-bit bases are off by 3e-3,
# and another weight's triplets by 1 or more. What triplets miss is pinned beside them.
TRIPLETS_LIMIT = 0.1
# Beyond this drift a weight isn't the one that was protected: another one's is 1 or more.
FOREIGN_LIMIT = 0.5
# Of a drift that is explained beside the weight's own rounding: bases of float32, orthonormal to
# 1e-4 at worst, leave that share of what a step moves, and 16-bit ones 4e-3 of it.
DRIFT_LIMIT = 1e-5
ROUNDED_DRIFT_LIMIT = 5e-3
# A drift above this is told even where rounding explains it: the weight has outgrown what its dtype
# can hold of the protected part. In 16 bits .5 eps of a weight that hasn't are 4e-3.
TOLD_DRIFT = 1e-2
# What a weight has beside its triplets is held to this share of its rounding.
SHARE_OF_ROUNDING = 1 / 8
ROUNDING_OF_BFLOAT16 = 2.0**-9
PROBES = 8  # columns of a sketch: it finds a norm to a quarter, for any direction that moved
TINY = 1e-300  # in a denominator that may be zero


# --- the protected part of a matrix ---


def remainder(item: Protected, x: Tensor, mode: Mode) -> Tensor:
    """x − P(x) in float64, of what this rank holds; ``x`` is the view of a weight or gradient."""
    x = x.double()
    U, V = item.held.U, item.held.V
    if not item.groups:
        with use_backend("torch"):  # float64 is computed by no other, whatever is asked for
            return x - project(x, double(U), double(V), mode=mode)
    core = mode == "core"
    rows = _within(U, x, everything=core, groups=item.groups)
    columns = (rows if core else x - rows).mT
    columns = _within(V, columns, everything=core, groups=item.across).mT
    return columns if core else rows + columns


def _coefficients(item: Protected, x: Tensor, bases: tuple[Held, Held]) -> tuple[Tensor, Tensor]:
    """A = Uᵀ x and B = x V of the whole matrix, of each what belongs to this rank's part."""
    with use_backend("torch"):
        A, B = coefficients(x, *bases)
    (A,), (B,) = sum_over(item.groups, [A]), sum_over(item.across, [B])
    return A, B


def sketched(item: Protected, W: Tensor, mode: Mode) -> Tensor:
    """(W − P(W)) Ω in float64 of the rows that this rank holds of the weight itself, with the same
    random Ω (n, c) every time.

    ‖(W − P(W)) Ω‖_F is √c·‖W − P(W)‖_F up to chance. It takes one product of W with 2c columns.
    """
    x, held, sides = W.double(), item.held, (item.groups, item.across)
    if item.is_transposed:
        x, held, sides = x.mT, item.turned(held), sides[::-1]
    rows, across = sides
    Omega = _probes(item.matrix_shape[-1], x.device)
    cut = None if item.sharding is None else item.sharding.of(-1)
    Omega = Omega if cut is None else cut.slice(Omega, -2)
    core = mode == "core"
    inside = _within(held.V, Omega, everything=core, groups=across)
    columns = inside if core else torch.cat([inside, Omega - inside], -1)
    (both,) = sum_over(across, [x @ columns])
    if core:
        return _within(held.U, both, everything=True, groups=rows)
    return both[..., :PROBES] + _within(held.U, both[..., PROBES:], everything=False, groups=rows)


def leaking(item: Protected, mode: Mode) -> Tensor | None:
    """How much of the gradient, ‖g − P(g)‖ / ‖g‖, is there beyond what rounding explains, in
    float64 and up to chance: at most 0 of one that is projected. On its device; synchronises with
    nobody.

    None where ranks would have to add up for it: of a sharded gradient the sharded side isn't
    looked at.
    """
    g = item.weight.grad
    assert g is not None
    # Seen: 1 eps of 16 bits, which are rounded once at the end, and 9 of float32 in mode "core".
    rounding = torch.finfo(g.dtype).eps * (2 if g.element_size() == 2 else 32)
    x = item.view(g).double()
    if item.across or (item.groups and (mode == "core" or item.held.V is None)):
        return None
    Omega = _probes(x.shape[-1], x.device)
    inside = _within(item.held.V, Omega, everything=mode == "core")
    if item.groups:
        found = x @ inside
    elif mode == "core":
        found = _within(item.held.U, x @ inside, everything=True)
    else:
        both = x @ torch.cat([inside, Omega - inside], -1)
        across = _within(item.held.U, both[..., PROBES:], everything=False)
        found = both[..., :PROBES] + across
    leak: Tensor = found.norm() / (x.norm() * PROBES**0.5).clamp_min(torch.finfo(x.dtype).tiny)
    allowed: Tensor | float = ROUNDED_DRIFT_LIMIT if _is_rounded(item) else DRIFT_LIMIT
    if item.raw is not None and item.kept is not None:
        # Of a gradient that lay in the protected span what is left is rounding.
        before, after = item.raw.double().norm(), item.kept.double().norm()
        allowed = allowed + rounding * (before / after).clamp_max(1 / rounding)
    excess: Tensor = leak - allowed - rounding
    return excess


def _probes(n: int, device: torch.device) -> Tensor:
    """Random columns (n, c) in float64 for an x of n columns, the same every time."""
    generator = torch.Generator("cpu").manual_seed(n)
    size = (n, PROBES)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(device)


def _within(basis: Held, y: Tensor, *, everything: bool, groups: Sequence[Group] = ()) -> Tensor:
    """The part of y (n, c) in the span that a basis protects; a missing one protects all of it in
    mode "core" and nothing in mode "complement".

    Args:
        groups: of the ranks that hold the other rows of the basis and of y.
    """
    if basis is None:
        return y if everything else torch.zeros_like(y)
    columns = columns_of(basis).to(y.dtype)
    (inner,) = sum_over(groups, [columns.mT @ y])
    part = columns @ inner
    return part if is_high(basis) else y - part


def norm(item: Protected, x: Tensor, alike: Sequence[Group] = ()) -> float:
    """The Frobenius norm of the whole matrix from what each rank holds; synchronises.

    Args:
        alike: groups whose ranks all hold the same of x.
    """
    square = x.double().square().sum()
    groups = () if item.sharding is None else item.sharding.groups
    (square,) = sum_over([group for group in groups if group not in alike], [square])
    return float(square.sqrt())


def _alike_of_sketch(item: Protected) -> Sequence[Group]:
    """The groups whose ranks hold the same of a sketch."""
    cut = None if item.sharding is None else item.sharding.of(-1)
    return () if cut is None else cut.groups


def share(item: Protected, x: Tensor, mode: Mode) -> float:
    """‖x − P(x)‖ / ‖x‖, 0 of x = 0."""
    return norm(item, remainder(item, x, mode)) / max(norm(item, x), TINY)


def imprints(items: Sequence[Protected]) -> list[Tensor]:
    """Of what this rank holds of each gradient, figures that are others of one that was written to.

    What the host can read at once is compared: there it is g ω, with the same random ω every time,
    √n of the gradient's length up to chance. Elsewhere it is the norm, for ``leaking`` to judge by.
    """
    found: list[Tensor] = []
    unread: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for item, g in zip(items, matrices_of(items), strict=True):
        if item.sharding is None and g.device.type == "cpu":
            found.append(g @ _random(g.shape[-1], g.dtype, g.device))
        else:
            unread.setdefault((g.device, g.dtype), []).append(len(found))
            found.append(g)
    for at in unread.values():
        for i, length in zip(at, norms([found[i] for i in at]), strict=True):
            found[i] = length
    return found


@lru_cache(maxsize=256)
def _random(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(n)
    return torch.randn(n, generator=generator, device="cpu").to(device, dtype)


def rewritten(items: Sequence[Protected]) -> list[Protected]:
    """Those whose gradients aren't known to be as they were projected: whose imprints differ, and
    all that the host can't read without waiting."""
    known = [item for item in readable(items) if item.kept is not None]
    pairs = zip(known, imprints(known), strict=True)
    same = {id(item) for item, now in pairs if torch.equal(now, item.kept)}  # type: ignore[arg-type]
    return [item for item in items if id(item) not in same]


# --- what it was at protect ---


def reference(item: Protected, mode: Mode) -> Tensor | None:
    """The protected part as it was, in float64, of what this rank holds; None where it isn't held
    as such."""
    s = item.held
    if s.protected is not None:
        return s.protected.double()
    if not has_triplets(s):
        return None
    assert s.S is not None
    U, V, S = columns_of(s.U).double(), columns_of(s.V).double(), s.S.double()
    if mode == "core":
        C = torch.diag_embed(S)
        return U @ (C if s.rest_B is None else C + s.rest_B) @ V.mT
    A, B = S.unsqueeze(-1) * V.mT, U * S.unsqueeze(-2)
    if s.rest_A is not None and s.rest_B is not None:
        A, B = A + s.rest_A, B + s.rest_B
    (inner,) = sum_over(item.across, [A @ V])
    return U @ A + (B - U @ inner) @ V.mT


@torch.no_grad()
def drift(item: Protected, mode: Mode) -> float:
    """‖H(W) − H_ref‖ / ‖H_ref‖ of the whole matrix in float64, from a sketch of H_ref where that
    is all that is held.

    Raises:
        RuntimeError: nothing is, since the weight was partitioned by DeepSpeed's ZeRO-3.
    """
    item.follow()
    W = item.view(item.weight)
    sketch = item.held.sketch
    if sketch is not None and not zero3_shape(item.weight):
        now = sketched(item, W, mode)
        return _relative(item, now - sketch, sketch, _alike_of_sketch(item))
    H = None if zero3_shape(item.weight) else reference(item, mode)
    if H is None:
        raise RuntimeError(
            f"osf_torch.Guard.drift: expected {item.name!r} to be whole on this rank, got a weight "
            "that DeepSpeed's ZeRO-3 has partitioned; gather it to measure it"
        )
    return _relative(item, remainder(item, W, mode) - H, H)


def _relative(item: Protected, off: Tensor, H: Tensor, alike: Sequence[Group] = ()) -> float:
    return norm(item, off, alike) / max(norm(item, H, alike), TINY)


@torch.no_grad()
def released(before: Protected, after: Protected, mode: Mode) -> float:
    """‖P(H)‖ / ‖H‖ of the part H that ``before`` protects, P that of ``after``; in float64."""
    H = remainder(before, before.view(before.weight), mode)
    return norm(before, H - remainder(after, H, mode)) / max(norm(before, H), TINY)


def drift_limit(item: Protected, mode: Mode) -> float:
    """What rounding explains of a drift: of the weight at every step, and of the bases."""
    sketch = item.held.sketch
    if sketch is not None:
        return _limit(item, norm(item, sketch, _alike_of_sketch(item)) / PROBES**0.5)
    H = reference(item, mode)
    assert H is not None
    return _limit(item, norm(item, H))


def _limit(item: Protected, size: float) -> float:
    """Args:
    size: of the protected part.
    """
    W = item.view(item.weight)
    ratio = norm(item, W) / max(size, TINY)
    limit = ROUNDED_DRIFT_LIMIT if _is_rounded(item) else DRIFT_LIMIT
    # In 16 bits what is restored is rounded once, each entry by half an eps at most. Wider weights
    # are restored by products in their own dtype, which leave up to .9 eps (96 × 160, 200 to 2,000
    # times as large as when they were protected).
    return limit + torch.finfo(W.dtype).eps * (0.5 if W.element_size() == 2 else 2.0) * ratio


def _is_rounded(item: Protected) -> bool:
    """Whether a basis is of 16 bits, and its columns not quite orthonormal."""
    held = (columns_of(basis) for basis in (item.held.U, item.held.V) if basis is not None)
    return any(columns.element_size() == 2 for columns in held)


# --- pinning it ---


def pinned(item: Protected, mode: Mode) -> Pinned:
    """What restoring needs beside the bases, so that it moves the weight as it is by its rounding
    alone: S with what the weight has beside its triplets, or the dense protected part where that
    is smaller.

    Raises:
        ValueError: S or ``protected`` belong to another weight.
    """
    s, W = item.held, item.view(item.weight)
    if s.protected is not None or not has_triplets(s):
        return _dense(item, W, mode)
    assert s.S is not None
    bases, S = (double(s.U), double(s.V)), s.S.double()
    A, B = _coefficients(item, W.double(), bases)
    U, V = map(columns_of, bases)
    rests = {"rest_A": A - S.unsqueeze(-1) * V.mT, "rest_B": B - U * S.unsqueeze(-2)}
    alike = {"rest_A": item.groups, "rest_B": item.across}
    sizes = {name: norm(item, rest, alike[name]) for name, rest in rests.items()}
    everywhere = (*item.groups, *item.across)
    off = min(sizes.values()) / max(norm(item, S, everywhere), TINY)
    if not off <= TRIPLETS_LIMIT:
        raise ValueError(
            f"expected U, S, V of parameter {item.name!r} to be singular triplets of it, got "
            f"|U'W - S V'| and |W V - U S| of {off:.1e} |S| and more; take them from the weight as "
            "it stands, or leave S out"
        )
    if item.across:  # each sum goes with those of its group, so that one side follows the other
        return _dense(item, W, mode)
    if mode == "core":
        rests = {"rest_B": A @ V - torch.diag_embed(S)}
        sizes = {"rest_B": norm(item, rests["rest_B"], everywhere)}
    allowed = SHARE_OF_ROUNDING * torch.finfo(W.dtype).eps * norm(item, W)
    if max(sizes.values()) <= allowed:
        return Pinned(s.U, s.V, s.S)
    for name, rest in rests.items():
        narrow = sizes[name] * ROUNDING_OF_BFLOAT16 <= allowed
        rests[name] = rest.to(torch.bfloat16 if narrow else _wide(W))
    # Of the whole, so that every rank decides alike.
    elements, r = item.weight.numel(), S.shape[-1]
    m, n = item.view_shape[-2:]
    of_rests = {"rest_A": elements // max(m, 1) * r, "rest_B": elements // max(n, 1) * r}
    beside = sum(of_rests[name] * rest.element_size() for name, rest in rests.items())
    if mode != "core" and elements * _wide(W).itemsize < beside:
        return _dense(item, W, mode)
    return Pinned(s.U, s.V, s.S, **rests)


def _dense(item: Protected, W: Tensor, mode: Mode) -> Pinned:
    s, H = item.held, remainder(item, W, mode)
    if s.protected is not None:
        off = _relative(item, H - s.protected.double(), H)
        if not off <= _limit(item, norm(item, H)):
            raise ValueError(
                f"expected protected of parameter {item.name!r} to be W - P(W) of the weight as it "
                f"stands, got one off by {off:.1e} of it; leave it out, and protect computes it"
            )
    return Pinned(s.U, s.V, None, H.to(_wide(W)))


def settle(item: Protected, mode: Mode) -> None:
    """Has an item hold densely what a state has as triplets, where its weight is cut on both sides:
    see ``lists.Entry.across``."""
    s = item.held
    if item.across and s.sketch is None and s.protected is None:
        H = reference(item, mode)
        assert H is not None
        item.take(Pinned(s.U, s.V, None, H.to(_wide(item.weight))))


def _wide(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


@torch.no_grad()
def pin(items: Sequence[Protected], mode: Mode, restore: bool) -> None:
    """Gives each item what restoring needs, or without a sketch to measure by.

    Raises:
        ValueError: as ``pinned``.
    """
    for item in items:
        s = item.held
        try:
            if restore:
                item.take(pinned(item, mode))
            elif zero3_shape(item.weight):
                item.take(Pinned(s.U, s.V))
            else:
                item.take(Pinned(s.U, s.V, sketch=sketched(item, item.view(item.weight), mode)))
        except ValueError as error:
            raise ValueError(f"osf_torch.protect: {error}") from None


def rank_of(s: Subspace, shape: Sequence[int]) -> int:
    """How many directions are protected, on the side that protects fewer."""
    return min(
        columns_of(basis).shape[-1] if is_high(basis) else size - columns_of(basis).shape[-1]
        for basis, size in zip((s.U, s.V), shape[-2:], strict=True)
        if basis is not None
    )


def has_triplets(s: Subspace) -> bool:
    return s.S is not None and is_high(s.U) and is_high(s.V)
