"""Bringing weights up to date: W += U_l (C − merged) V_lᵀ, or W = round(W₀ + U_l C V_lᵀ)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import FreeBasis, add_free_many_, free_matrix
from osf_torch.free.spec import Place, Spec
from osf_torch.sharding import Sharding, gathered, is_dtensor, local, sharding_of

SEEN = "_osf_version"  # of ``merged``: the version of C that it was copied from


def is_stale(C: Tensor, merged: Tensor) -> bool:
    """Whether C is, or may be, another than the one that W has in it.

    On a CPU their values are compared, whoever wrote them. Elsewhere that would wait for the device:
    there the count of writes that torch keeps decides, which a write through ``.data`` escapes.
    """
    if C.device.type == "cpu":
        return not torch.equal(C, merged)
    return merged.__dict__.get(SEEN) != C._version


@torch.no_grad()
def merge(places: Iterable[Place], *, force: bool = False) -> int:
    """Brings the weights of those up to date that aren't; how many they were.

    Args:
        force: also those of which it isn't known, such as sharded ones: a collective, which every
            rank joins with the same places.
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
        elif force or is_stale(C, merged):
            stale.append(place)
    whole = [place for place in stale if not place.spec.is_sharded]
    _merge_whole([place for place in whole if not place.spec.is_rounded])
    for place in whole:
        if place.spec.is_rounded:
            tensors = [place.get(name) for name in (place.spec.base, place.spec.free)]
            _round(place.spec, place.weight, *tensors)
    _merge_sharded([place for place in stale if place.spec.is_sharded])
    for place in stale:
        _note(place.get(place.spec.free), place.get(place.spec.merged))
    return len(stale)


def merge_one(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
    """The same for one weight, given by its tensors, where that is stale; of whole ones alone."""
    if not is_stale(C, merged):
        return
    spec.follow(W.device)
    if base is not None:
        _round(spec, W, base, C)
    else:
        _add([spec], [W], [C - merged])
    _note(C, merged)


def _note(C: Tensor, merged: Tensor) -> None:
    """``merged`` is C from now on."""
    local(merged).copy_(local(C))
    merged.__dict__[SEEN] = C._version


def _merge_whole(places: Sequence[Place]) -> None:
    for place in places:
        place.spec.follow(place.weight.device)
    # One list for the whole model. The differences take the place of what was merged before.
    news = [place.get(place.spec.free) for place in places]
    differences = [place.get(place.spec.merged) for place in places]
    if places:
        torch._foreach_neg_(differences)
        torch._foreach_add_(differences, news)
        _add([place.spec for place in places], [place.weight for place in places], differences)


def _add(specs: Sequence[Spec], weights: Sequence[Tensor], blocks: Sequence[Tensor]) -> None:
    """W += U_l C V_lᵀ of a list; a flat weight through a matrix of its own where it has to be."""
    matrices, copies = [], []
    for spec, W in zip(specs, weights, strict=True):
        matrix = W.detach().reshape(spec.matrix_shape)
        if matrix.data_ptr() != W.data_ptr():  # such as of a convolution with its channels last
            copies.append((W, matrix))
        matrices.append(matrix)
    lefts, rights = [spec.left for spec in specs], [spec.right for spec in specs]
    add_free_many_(matrices, blocks, lefts, rights)
    for W, matrix in copies:
        W.copy_(matrix.view(W.shape))


def _round(spec: Spec, W: Tensor, base: Tensor, C: Tensor) -> None:
    """W = round(W₀ + U_l C V_lᵀ), the sum in C's precision and rounded once."""
    spec.follow(W.device)
    W.copy_(base.to(C.dtype) + free_matrix(C, spec.left, spec.right).view(W.shape))


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


def _whole_blocks(places: Sequence[Place], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each block as this rank needs it: whole, or of a weight sharded by its batch as that is."""
    kept: dict[int, Tensor] = {}
    gather: list[tuple[int, Tensor]] = []
    for i, (place, block) in enumerate(zip(places, blocks, strict=True)):
        cut, of_weight = sharding_of(block), sharding_of(place.weight)
        if cut is None:
            kept[i] = local(block)
        elif of_weight is not None and cut.dim < -2 and of_weight.dim == cut.dim:
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
