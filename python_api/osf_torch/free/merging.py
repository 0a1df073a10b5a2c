"""Bringing weights up to date: W += U_l (C − merged) V_lᵀ, or W = round(W₀ + U_l C V_lᵀ)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import FreeBasis, add_free_many_, free_matrix
from osf_torch.free.spec import Place, Spec, places_of
from osf_torch.sharding import Sharding, gathered, is_dtensor, local, sharding_of

SEEN = "_osf_seen"  # of ``merged``: the memory and the version of C that it was copied from


def is_stale(C: Tensor, merged: Tensor) -> bool:
    """Whether C is, or may be, another than the one that W has in it.

    On a CPU their values are compared, whoever wrote them. Elsewhere that would wait for the
    device: there where C lies and the count of writes that torch keeps decide, which a write
    through ``.data`` escapes.
    """
    if is_compared(C):
        return not torch.equal(C, merged)
    return merged.__dict__.get(SEEN) != _seen(C)


def is_compared(C: Tensor) -> bool:
    """Whether values tell if C is merged; else what torch counts does."""
    return C.device.type == "cpu"


def _seen(C: Tensor) -> tuple[int, int]:
    return local(C).data_ptr(), C._version


@torch.no_grad()
def merge(places: Iterable[Place], *, force: bool = False, looks: bool = False) -> int:
    """Brings the weights of those up to date that aren't; how many they were.

    Args:
        force: also those that seem to be up to date: of sharded ones a collective, which every
            rank joins with the same places.
        looks: whether values are compared also where that waits for the device.
    """
    stale = []
    for place in places:
        if place.spec.update != "merge":
            continue
        C, merged = place.get(place.spec.free), place.get(place.spec.merged)
        if is_dtensor(place.weight) or is_dtensor(C):
            place.spec.is_sharded = True
            if force or is_stale(local(C), local(merged)):
                stale.append(place)
        elif force or (not torch.equal(C, merged) if looks else is_stale(C, merged)):
            stale.append(place)
    for place in stale:
        if not place.spec.is_sharded:
            base = place.get(place.spec.base) if place.spec.is_rounded else None
            _merge_whole(
                place.spec,
                place.weight,
                place.get(place.spec.free),
                place.get(place.spec.merged),
                base,
            )
    _merge_sharded([place for place in stale if place.spec.is_sharded])
    return len(stale)


def require_current(model: nn.Module, weights: Iterable[Tensor], operator: str) -> None:
    """Brings confined weights up to date that are about to be read; whole ones.

    Raises:
        ValueError: some that what is learned stands beside.
    """
    wanted = {id(weight) for weight in weights}
    places = [place for place in places_of(model) if id(place.weight) in wanted]
    beside = [place.name for place in places if place.spec.update == "beside"]
    if beside:
        raise ValueError(
            f"osf_torch.{operator}: expected weights that hold what was learned, got "
            f'{", ".join(beside)} confined with update="beside", which hold what they were before; '
            "Confined.release() first"
        )
    merge(place for place in places if not place.spec.is_sharded)


def merge_one(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
    """The same for one weight, given by its tensors, where that is stale; of whole ones alone."""
    if is_stale(C, merged):
        _merge_whole(spec, W, C, merged, base)


def _merge_whole(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
    """One weight after the other, whose free block stays in a core's cache meanwhile: on two cores,
    of MiniLM at ρ = .5, in 36 ms where all differences at once took 47."""
    spec.follow(W.device)
    if base is not None:
        W.copy_(base.to(C.dtype) + free_matrix(C, spec.left, spec.right).view(W.shape))
    elif W.element_size() < 4:
        raise RuntimeError(
            f"osf_torch.confine: expected {spec.name!r} to stay of the dtype that it was confined "
            f"with, got {W.dtype}, which a step is below the rounding of; convert the model first, "
            "then confine it"
        )
    else:
        if C.dtype == W.dtype:  # in the memory of what was merged before
            difference = torch.sub(C, merged, out=merged)
        else:  # of two that were rounded, which W is finer than
            difference = C.to(W.dtype) - merged
        matrix = W.detach().reshape(spec.matrix_shape)
        add_free_many_([matrix], [difference], [spec.left], [spec.right])
        if matrix.data_ptr() != W.data_ptr():  # of a convolution with its channels last
            W.copy_(matrix.view(W.shape))
    _note(C, merged)


def _note(C: Tensor, merged: Tensor) -> None:
    """``merged`` is C from now on."""
    local(merged).copy_(local(C))
    merged.__dict__[SEEN] = _seen(C)


# --- sharded weights ---


def _merge_sharded(places: Sequence[Place]) -> None:
    """What this rank holds of each weight, from all of the difference: one gather a mesh group."""
    differences = []
    for place in places:
        C, merged = place.get(place.spec.free), place.get(place.spec.merged)
        # Of a weight that is rounded from its base all of C is added each time.
        differences.append(C.detach() if place.spec.is_rounded else C.detach() - merged.detach())
    for place, difference in zip(places, _whole_blocks(places, differences), strict=True):
        spec, W = place.spec, local(place.weight.detach())
        spec.follow(W.device)
        if not W.numel():
            continue
        left, right, rows, columns = part_of(spec, sharding_of(place.weight))
        update = free_matrix(difference, left, right, rows, columns).view(W.shape)
        if spec.is_rounded:
            W.copy_(local(place.get(spec.base)).to(update.dtype) + update)
        else:
            W += update.to(W.dtype)
    for place in places:
        _note(place.get(place.spec.free), place.get(place.spec.merged))


def _whole_blocks(places: Sequence[Place], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each block as this rank needs it: whole, or of a weight sharded by its batch as that is."""
    kept: dict[int, Tensor] = {}
    gather: list[tuple[int, Tensor]] = []
    for i, (place, block) in enumerate(zip(places, blocks, strict=True)):
        cut, of_weight = sharding_of(block), sharding_of(place.weight)
        if cut is None or (of_weight is not None and cut.dim < -2 and of_weight.dim == cut.dim):
            kept[i] = local(block)
        else:
            gather.append((i, block))
    kept.update(zip((i for i, _ in gather), gathered([block for _, block in gather]), strict=True))
    found = [kept[i] for i in range(len(blocks))]
    for i, place in enumerate(places):
        cut = sharding_of(place.weight)
        if cut is not None and cut.dim < -2 and not place.spec.is_flat:
            whole = found[i].shape[cut.dim] == place.weight.shape[cut.dim] != cut.size
            found[i] = cut.slice(found[i], cut.dim) if whole else found[i]
    return found


def part_of(spec: Spec, cut: Sharding | None) -> tuple[FreeBasis, FreeBasis, Any, Any]:
    """The bases of what this rank holds, and which rows and columns of the matrix it is."""
    if cut is None:
        return spec.left, spec.right, None, None
    part = slice(cut.start, cut.start + cut.size)
    if spec.is_flat:
        if cut.dim != -len(spec.shape):
            raise ValueError(
                f"osf_torch.confine: expected {spec.name!r} to be sharded by its first dimension, "
                f"got dimension {cut.dim} of {spec.shape}"
            )
        return spec.left, spec.right, part, None
    if cut.dim == -2:
        return spec.left, spec.right, part, None
    if cut.dim == -1:
        return spec.left, spec.right, None, part
    return spec.left.of_batch(cut.dim, part), spec.right.of_batch(cut.dim, part), None, None
