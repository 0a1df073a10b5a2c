"""Bringing weights up to date: W += U_l (C − merged) V_lᵀ, or W = round(W₀ + U_l C V_lᵀ)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from osf_kernels import FreeBasis, add_free_many_, free_matrix
from osf_torch.free.spec import AtRest, Place, Spec, places_of
from osf_torch.sharding import Cut, Sharding, gathered, is_dtensor, local, sharding_of

SEEN = "_osf_seen"  # of ``merged``: the memory and the version of C that it was copied from
WEIGHT = "_osf_weight"  # of what is trained: what the weight was, as the host sees it
SAMPLES = 64  # numbers of a weight that are looked at on a CPU
GATHERED = 2**26  # elements of C that are whole on a rank at a time: 256 MiB of float32


def is_stale(C: Tensor, merged: Tensor, *, looks: bool = False) -> bool:
    """Whether C is, or may be, another than the one that W has in it.

    On a CPU their values are compared, whoever wrote them. Elsewhere that would wait for the
    device: there where C lies and the count of writes that torch keeps decide, which a write
    through ``.data`` escapes; with ``looks`` the values do there too.
    """
    if looks or is_compared(C):
        return not _is_same(local(C.detach()), local(merged.detach()))
    return bool(merged.__dict__.get(SEEN) != _seen(C))


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike bit for bit. Eight bytes at a time take half as long as what
    torch.equal compares of float32 (1344 × 192: 80 µs for 179)."""
    if _is_of_words(a) and _is_of_words(b):
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _is_of_words(t: Tensor) -> bool:
    size = t.element_size()
    starts = int(t.storage_offset()) * size % 8 == 0
    return starts and t.dim() > 0 and t.is_contiguous() and t.shape[-1] * size % 8 == 0


def is_compared(C: Tensor) -> bool:
    """Whether values tell if C is merged; else what torch counts does."""
    return C.device.type == "cpu"


def _seen(C: Any) -> tuple[int, ...]:
    """Where C lies, and the counts of writes to it; of a DTensor also to what this rank holds."""
    held = local(C)
    return held.data_ptr(), C._version, *([C._local_tensor._version] if is_dtensor(C) else [])


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """In which products with free bases keep their dtype: rounded to half precision, an update
    would leave the free block by that rounding."""
    kind = t.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@torch.no_grad()
def merge(places: Iterable[Place], *, force: bool = False, looks: bool = False) -> int:
    """Brings the weights of those up to date that aren't; how many they were.

    Args:
        force: also those that seem to be up to date: of sharded ones a collective, which every
            rank joins with the same places.
        looks: whether values are compared also where that waits for the device.
    """
    count, sharded = 0, []
    for place in places:
        spec = place.spec
        if spec.update != "merge":
            continue
        require_writable(place)
        C, merged = place.get(spec.free), place.get(spec.merged)
        if place.is_sharded:
            if force or is_stale(C, merged):
                sharded.append(place)
            continue
        with spec.lock:
            if force or is_stale(C, merged, looks=looks):
                _merge_whole(spec, place.weight, C, merged, place.base)
                count += 1
    _merge_sharded(sharded)
    return count + len(sharded)


def require_writable(place: Place) -> None:
    """Refuses to merge into a weight that DeepSpeed's ZeRO-3 has partitioned: what is gathered for
    a forward pass is let go after it, so that a backward pass would see the weight as it was.

    Raises:
        RuntimeError: so it is.
    """
    if place.spec.update == "merge" and hasattr(place.weight, "ds_id"):
        raise RuntimeError(
            f"osf_torch.confine: expected {place.name!r} to stay on this rank to merge into it, "
            "got a weight that DeepSpeed's ZeRO-3 has partitioned; call, before "
            'deepspeed.initialize, confine(..., update="beside") or confine(..., rank=s), which '
            "leave W as it is"
        )


# --- who else writes to W ---


def note_weight(place: Place) -> None:
    """The weight, as it is now, is what the last merge has made it, or what was looked at."""
    if not is_dtensor(place.weight):
        _note_weight(place.get(place.spec.trainable[0]), place.weight, place.base)


def _note_weight(block: Tensor, *held: Tensor | None) -> None:
    block.__dict__[WEIGHT] = [_state_of(t) for t in held if t is not None]


def is_written(place: Place) -> bool:
    """Whether something else has written to a whole weight, or to the W₀ that it is rounded from,
    since it was noted, as far as the host sees without waiting: by torch's count of writes, and on
    a CPU by some of the values."""
    return _is_written(place.get(place.spec.trainable[0]), place.weight, place.base)


def _is_written(block: Tensor, *held: Tensor | None) -> bool:
    noted = block.__dict__.get(WEIGHT)
    now = [_state_of(t) for t in held if t is not None]
    if noted is None or len(noted) != len(now):
        return True
    return any(
        before[:2] != after[:2] or not torch.equal(before[2], after[2])
        for before, after in zip(noted, now, strict=True)
    )


def _state_of(W: Tensor) -> tuple[int, int, Tensor]:
    W = W.detach()
    flat = W.reshape(-1) if W.device.type == "cpu" and W.is_contiguous() else W.new_empty(0)
    return W.data_ptr(), W._version, flat[:: max(1, flat.numel() // SAMPLES)].clone()


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
    merge(place for place in places if not place.is_sharded)


def merge_one(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
    """The same for one weight, given by its tensors, where that is stale; of whole ones alone."""
    if is_stale(C, merged):
        with spec.lock:
            if is_stale(C, merged):  # no other thread has come first
                _merge_whole(spec, W, C, merged, base)


def _merge_whole(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
    """One weight after the other, whose free block stays in a core's cache meanwhile: on two cores,
    of MiniLM at ρ = .5, in 36 ms where all differences at once took 47.

    C is read once, since another thread's optimizer may be writing to it: what W gets of it is what
    ``merged`` says. That is written last, since another thread that finds it like C reads W.

    A weight that something else has written to isn't noted, so that the next step looks at what is
    protected of it.
    """
    spec.follow(W.device)
    written = _is_written(C, W, base)
    seen, taken = _seen(C), C.detach().clone()
    with without_autocast(W):
        _write_sum(spec, W, taken, merged, base)
    _note(merged, taken, seen)
    if not written:
        _note_weight(C, W, base)


def _write_sum(spec: Spec, W: Tensor, C: Tensor, merged: Tensor, base: Tensor | None) -> None:
    if base is not None:
        W.copy_(base.to(C.dtype) + free_matrix(C, spec.left, spec.right).view(W.shape))
    else:
        _require_precise(spec, W)
        difference = C.to(W.dtype) - merged  # of two that may be rounded, which W is finer than
        matrix = W.detach().reshape(spec.matrix_shape)
        add_free_many_([matrix], [difference], [spec.left], [spec.right])
        if matrix.data_ptr() != W.data_ptr():  # of a convolution with its channels last
            W.copy_(matrix.view(W.shape))


def _require_precise(spec: Spec, W: Tensor) -> None:
    """Raises RuntimeError where what a step adds would be rounded away."""
    if W.element_size() < 4:
        raise RuntimeError(
            f"osf_torch.confine: expected {spec.name!r} to stay of the dtype that it was confined "
            f"with, got {W.dtype}, which a step is below the rounding of; convert the model first, "
            "then confine it"
        )


def _note(merged: Tensor, taken: Tensor, seen: tuple[int, ...]) -> None:
    """``merged`` is what was taken of C, when it was as ``seen``."""
    local(merged).copy_(taken)
    merged.__dict__[SEEN] = seen


# --- sharded weights ---


def require_together(place: Place) -> None:
    """Refuses a weight that is sharded without its free block, or the other way around.

    Raises:
        RuntimeError: so it is.
    """
    weight, block = place.weight, place.get(place.spec.trainable[0])
    if is_dtensor(weight) != is_dtensor(block):
        kinds = ["a DTensor" if is_dtensor(t) else "a plain tensor" for t in (weight, block)]
        raise RuntimeError(
            f"osf_torch.confine: expected {place.name!r} and {place.spec.trainable[0]!r} to be "
            f"sharded together, got {kinds[0]} and {kinds[1]}; call parallelize_module before "
            "confine, and leave nothing of it out of fully_shard"
        )


def require_fresh(place: Place) -> None:
    """Refuses a sharded weight that something has written C of since it was merged: within a
    forward pass there is nothing to merge into, and ranks can't know of each other.

    On a CPU the values tell, elsewhere the counts of writes, and values where these don't.

    Raises:
        RuntimeError: so it is.
    """
    if torch.compiler.is_compiling():
        return
    C, merged = place.get(place.spec.free), place.get(place.spec.merged)
    if not is_compared(C):  # where gathered tensors have no counts
        rest = AtRest(place.module, place.spec)
        C, merged = rest.get(rest.spec.free), rest.get(rest.spec.merged)
    if not is_stale(C, merged):
        return
    if torch.equal(local(C), local(merged)):
        merged.__dict__[SEEN] = _seen(C)
        return
    raise RuntimeError(
        f"osf_torch.confine: expected the free block of {place.name!r}, which is sharded, to be "
        "merged before the forward pass, got one that something else than a step of a torch "
        "optimizer has written to; call Confined.merge() on every rank after such writes"
    )


def cut_of(name: str, weight: Tensor) -> Sharding | None:
    """``sharding_of``, whose refusals name the weight."""
    try:
        return sharding_of(weight)
    except ValueError as error:
        raise ValueError(f"osf_torch.confine: parameter {name!r}: {error}") from None


def _merge_sharded(places: Sequence[Place]) -> None:
    """What this rank holds of each weight, from all of the difference: one gather a mesh group, of
    large models one for every ``GATHERED`` elements."""
    for some in _portions(places):
        differences = []
        for place in some:
            C, merged = place.get(place.spec.free), place.get(place.spec.merged)
            # Of a weight that is rounded from its base all of C is added each time.
            C = C.detach()
            differences.append(C if place.spec.is_rounded else C - merged.detach())
        for place, difference in zip(some, whole_blocks(some, differences), strict=True):
            spec, W = place.spec, local(place.weight.detach())
            if not W.numel():
                continue
            update = part_of_update(spec, difference, place.weight)
            if spec.is_rounded:
                W.copy_(local(place.get(spec.base).detach()).to(update.dtype) + update)
            else:
                W += update.to(W.dtype)
        for place in some:
            C = place.get(place.spec.free)
            _note(place.get(place.spec.merged), local(C), _seen(C))


def _portions(places: Sequence[Place]) -> Iterator[list[Place]]:
    """The places in order, some at a time: of at most ``GATHERED`` elements of C, or one."""
    portion: list[Place] = []
    elements = 0
    for place in places:
        require_together(place)
        if not place.spec.is_rounded:
            _require_precise(place.spec, place.weight)
        count = place.get(place.spec.free).numel()
        if portion and elements + count > GATHERED:
            yield portion
            portion, elements = [], 0
        portion.append(place)
        elements += count
    if portion:
        yield portion


def part_of_update(spec: Spec, block: Tensor, weight: Tensor) -> Tensor:
    """What this rank holds of U_l C V_lᵀ, in the shape of its part of the weight.

    Args:
        block: C as ``whole_blocks`` has it.
    """
    spec.follow(block.device)
    left, right, rows, columns = part_of(spec, cut_of(spec.name, weight))
    return free_matrix(block, left, right, rows, columns).view(local(weight).shape)


def whole_blocks(places: Sequence[Place], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Each block as this rank needs it: whole, or of a weight sharded by its batch as that is."""
    cuts = [
        [] if place.spec.is_flat else _batch_cuts(cut_of(place.name, place.weight))
        for place in places
    ]
    found: dict[int, Tensor] = {}
    gather: list[int] = []
    for i, (block, batch) in enumerate(zip(blocks, cuts, strict=True)):
        if batch and _batch_cuts(sharding_of(block)) == batch:
            found[i] = local(block)
        else:
            gather.append(i)
    for i, whole in zip(gather, gathered([blocks[i] for i in gather]), strict=True):
        for cut in cuts[i]:
            whole = cut.slice(whole, cut.dim)
        found[i] = whole
    return [found[i] for i in range(len(blocks))]


def _batch_cuts(sharding: Sharding | None) -> list[Cut]:
    """Those of the dimensions of a batch; a free block has them where its weight has."""
    return [] if sharding is None else [cut for cut in sharding.cuts if cut.dim < -2]


def part_of(spec: Spec, sharding: Sharding | None) -> tuple[FreeBasis, FreeBasis, Any, Any]:
    """The bases of what this rank holds, and which rows and columns of the matrix it is."""
    left, right = spec.left, spec.right
    parts: dict[int, slice] = {}
    for cut in () if sharding is None else sharding.cuts:
        part = slice(cut.start, cut.start + cut.size)
        if spec.is_flat and cut.dim != -len(spec.shape):
            raise ValueError(
                f"osf_torch.confine: expected {spec.name!r} to be sharded by its first dimension, "
                f"got dimension {cut.dim} of {spec.shape}"
            )
        if spec.is_flat:
            parts[-2] = part
        elif cut.dim >= -2:
            parts[cut.dim] = part
        else:
            left, right = (side.of_batch(cut.dim, part) for side in (left, right))
    return left, right, parts.get(-2), parts.get(-1)
