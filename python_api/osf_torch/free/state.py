"""What is saved of confined weights beside the model: C, the bases, what W was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import FreeBasis
from osf_torch.free import drifting
from osf_torch.free.admission import Settings, Sides
from osf_torch.free.current import current, update_of
from osf_torch.free.drifting import Reference
from osf_torch.free.merging import merge
from osf_torch.free.spec import Place
from osf_torch.grown import Spectrum
from osf_torch.selection import listed
from osf_torch.sharding import is_dtensor, local

FORMAT = 1
KEYS = ("update", "rank", "decay_to", "confined")
# A weight is the one that was saved when it is so up to this part of its norm: what is loaded from
# a file is so to the bit, what was summed over ranks in another order to 1e-15.
SAME = 1e-6


def state_of(places: Sequence[Place], settings: Settings) -> dict[str, Any]:
    """Of ``Confined.state_dict``."""
    return {
        "format": FORMAT,
        "update": settings.update,
        "rank": settings.rank,
        "decay_to": settings.decay_to,
        "confined": {place.name: _saved(place) for place in places},
    }


def _saved(place: Place) -> dict[str, Any]:
    spec = place.spec
    found: dict[str, Any] = {
        "shape": tuple(spec.shape),
        "left": _saved_basis(spec.left),
        "right": _saved_basis(spec.right),
        "trained": {name: _copied(place.get(name)) for name in spec.trainable},
        "spectra": {
            side: {part: _copied(t) for part, t in spectrum._asdict().items()}
            for side, spectrum in spec.spectra.items()
        },
    }
    if spec.is_rounded:
        found["base"] = _copied(place.get(spec.base))
    elif spec.update == "beside" and not spec.is_opaque and place.weight.element_size() < 4:
        found["base"] = _copied(place.weight)
    start = spec.reference
    if start is not None:
        # A quantized weight is what it was, or is refused when it is read.
        now = start.whole.clone() if spec.is_opaque else drifting.reference(place).whole
        protected, whole = start.protected.clone(), start.whole.clone()
        found |= {"protected": protected, "start": whole, "now": now}
    return found


def _copied(t: Tensor) -> Tensor:
    """A copy: what loads a checkpoint into the tensors of a state (torch.distributed.checkpoint)
    would write to C and to the weight one after the other, and nothing would know of it between."""
    return t.detach().clone()


def _saved_basis(basis: FreeBasis) -> dict[str, Any]:
    parts = {str(i): _copied(part) for i, part in enumerate(basis.tensors)}
    return {"size": basis.size, "width": basis.width, "held": basis.held, "parts": parts}


def _read_basis(saved: Mapping[str, Any]) -> FreeBasis:
    parts = tuple(saved["parts"][str(i)].clone() for i in range(len(saved["parts"])))
    return FreeBasis(saved["size"], saved["width"], saved["held"], parts)


def is_state(value: Mapping[str, Any]) -> bool:
    """Whether it is what ``Confined.state_dict`` returned, not subspaces by parameter name."""
    return {"format", "confined"} <= value.keys()


def require_state(state: Mapping[str, Any]) -> None:
    """Refuses what ``Confined.state_dict`` didn't return."""
    found = state.get("format") if isinstance(state, Mapping) else None
    missing = [key for key in KEYS if found is None or key not in state]
    if found != FORMAT or missing:
        raise ValueError(
            f"osf_torch.confine: expected a state with format={FORMAT} and {listed(list(KEYS))}, "
            f"got format={found!r}{f' without {listed(missing)}' if missing else ''}; pass what "
            "Confined.state_dict() returned, whole"
        )


def sides_of(state: Mapping[str, Any]) -> dict[str, Sides]:
    """The free bases of each weight, as they were held."""
    return {
        name: Sides(
            _read_basis(saved["left"]),
            _read_basis(saved["right"]),
            next(iter(saved["trained"].values())).dtype,
        )
        for name, saved in state["confined"].items()
    }


def _read_reference(saved: Mapping[str, Any], device: torch.device) -> Reference | None:
    """What a weight was when it was confined first."""
    if "start" not in saved:
        return None
    return Reference(saved["protected"].to(device), saved["start"].to(device))


def require_of_weights(places: Sequence[Place], state: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each weight is the one that was saved (True), or the one that it started from.

    Raises:
        ValueError: neither; another set of weights; of the other precision, where that decides
            whether W₀ is kept.
    """
    saved = state["confined"]
    names = {place.name for place in places}
    if names != saved.keys():
        missing, foreign = sorted(names - saved.keys()), sorted(saved.keys() - names)
        got = [f"none for {listed(missing)}"] if missing else []
        got += [f"{listed(foreign)} too"] if foreign else []
        raise ValueError(
            "osf_torch.confine: expected a state of the confined weights, got "
            f"{' and '.join(got)}; it is another run's"
        )
    found = {}
    for place in places:
        entry = saved[place.name]
        if tuple(entry["shape"]) != tuple(place.spec.shape):
            raise ValueError(
                f"osf_torch.confine: expected a state of {place.name!r} with shape "
                f"{tuple(place.spec.shape)}, got {tuple(entry['shape'])}; it is another model's"
            )
        if place.spec.update == "merge" and place.spec.is_rounded != ("base" in entry):
            full, half = "float32 or float64", "half precision, with W₀ beside it"
            wanted, given = (half, full) if place.spec.is_rounded else (full, half)
            raise ValueError(
                f"osf_torch.confine: expected a state of {place.name!r} in {wanted}, as the model "
                f"has it ({place.weight.dtype}), got one in {given}; convert the model to what it "
                "was saved in before confine, or release() there, convert and confine anew"
            )
        if place.spec.is_opaque and not (place.is_read and "start" in entry):
            found[place.name] = False
            continue
        if place.spec.is_opaque:  # C stands beside it in the model's state too
            now = start = drifting.relative(drifting.alone(place), entry["start"])
            same = SAME
        else:
            whole = drifting.reference(place).whole
            now, start = (drifting.relative(whole, entry[key]) for key in ("now", "start"))
            # In half precision the weight is a sum that was rounded where it was saved.
            rounded = place.weight.element_size() < 4
            same = torch.finfo(place.weight.dtype).eps if rounded else SAME
        if not min(now, start) <= same:
            raise ValueError(
                f"osf_torch.confine: expected {place.name!r} to be the weight that was saved with "
                f"this state, or the one that it started from, got one off by {now:.1e} and "
                f"{start:.1e}; load the model's checkpoint before the state"
            )
        found[place.name] = not place.spec.is_opaque and now <= start
    return found


def require_trained(place: Place, held: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Refuses a state whose free block of a weight is another than ``held``, by its shapes."""
    saved = state["confined"].get(place.name, {}).get("trained")
    if saved is None:  # another set of weights, which is told of as a whole
        return
    wanted = {name: tuple(held[name].shape) for name in place.spec.trainable}
    found = {name: tuple(t.shape) for name, t in saved.items()}
    if found != wanted:
        raise ValueError(
            f"osf_torch.confine: expected a state of {place.name!r} with a free block like the "
            f"model's, {wanted}, got {found}; confine the model of the state: confine(model, state)"
        )


@torch.no_grad()
def load(places: Sequence[Place], state: Mapping[str, Any], settings: Settings) -> None:
    """Of ``Confined.load_state_dict``: C as it was saved, and weights that are the saved ones."""
    for key in ("update", "rank", "decay_to"):
        if state[key] != getattr(settings, key):
            raise ValueError(
                f"osf_torch.confine: expected a state with {key}={getattr(settings, key)!r}, got "
                f"{state[key]!r}; confine the model as it was, then load"
            )
    for place in places:
        require_trained(place, {name: place.get(name) for name in place.spec.trainable}, state)
    merged = require_of_weights(places, state)
    for place in places:
        _load(place, state["confined"][place.name], merged[place.name])
    merge(places, force=any(place.is_sharded for place in places))


def _load(place: Place, saved: Mapping[str, Any], has_block: bool) -> None:
    """Args:
    has_block: whether the weight has the saved block in it already.
    """
    spec = place.spec
    spec.left, spec.right = (_read_basis(saved[side]) for side in ("left", "right"))
    spec.spectra = {  # which older states have none of
        side: Spectrum(**{part: _copied(t).cpu() for part, t in held.items()})
        for side, held in saved.get("spectra", {}).items()
    }
    spec.reference = _read_reference(saved, place.device)
    spec.follow(place.device)
    whole = current(place).detach().clone() if spec.update == "beside" and has_block else None
    started = place.get(spec.merged).clone() if spec.update == "merge" else None
    for name, t in saved["trained"].items():
        put(place.get(name), t)
    if spec.is_rounded:
        put(place.get(spec.base), saved["base"])
        place.get(spec.merged).fill_(float("nan"))  # stale, whatever C is: W is rounded anew
    elif spec.update == "merge":
        # W has the saved block in it, or the one that it was confined with.
        put(place.get(spec.merged), saved["trained"][spec.free] if has_block else started)
    elif "base" in saved:
        put(place.weight, saved["base"])
    elif whole is not None:
        put(place.weight, whole - update_of(place).to(whole.dtype))


def put(into: Tensor, t: Any) -> None:
    """Copies values, of a whole tensor also into a sharded one."""
    if t is into:
        return
    target: Any = into
    if is_dtensor(t) and not (is_dtensor(into) and _lie_alike(t, target)):
        t = t.full_tensor()
    if is_dtensor(into) and not is_dtensor(t):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has all of it and takes its part.
        t = t.to(local(into).device)
        t = distribute_tensor(t, target.device_mesh, target.placements, src_data_rank=None)
    into.copy_(t)


def _lie_alike(t: Any, other: Any) -> bool:
    alike: bool = t.device_mesh == other.device_mesh and t.placements == other.placements
    return alike
