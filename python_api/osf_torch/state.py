"""A guard's state: what is protected of every weight, as nested dicts of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from osf_kernels import Basis, padded
from osf_torch.bases import Held, columns_of, mapped, spans_of
from osf_torch.grown import InputSubspace
from osf_torch.protected import Pinned, Protected
from osf_torch.selection import listed
from osf_torch.sharding import as_dtensor, local
from osf_torch.subspaces import (
    Decomposition,
    Subspace,
    Subspaces,
    assemble,
    facts_of,
)

FORMAT = 3
# 1 knew triplets alone; 1 and 2 had what is beside the bases of a weight that is sharded by columns
# as of its transpose.
FORMATS = (1, 2, 3)
KEYS = ("when", "restore", "mode", "projections", "weights")
PARTS = ("rest_A", "rest_B", "sketch")  # what Pinned has beside a Subspace


def state_of(
    items: Sequence[Protected],
    moved: Sequence[Protected],
    subspaces: Mapping[str, Subspace],
    when: str,
    restore: bool | str,
    mode: str,
    projections: int,
) -> dict[str, Any]:
    """Of :meth:`Guard.state_dict`."""
    return {
        "format": FORMAT,
        "when": when,
        "restore": restore,
        "mode": mode,
        "projections": projections,
        "moved": [item.name for item in moved],
        "weights": {item.name: _pinned_state(item, mode) for item in items},
        "subspaces": {
            "seed": subspaces.seed if isinstance(subspaces, Subspaces) else None,
            "weights": {name: _entry_state(s) for name, s in subspaces.items()},
        },
    }


def read_state(
    state: Mapping[str, Any], items: Sequence[Protected], when: str, restore: bool | str, mode: str
) -> tuple[dict[str, Pinned], Mapping[str, Subspace]]:
    """What every item is to hold, and the guard's subspaces.

    A tensor that occurs in several places is copied once. Older states have no subspaces; what
    the items hold stands in for them.

    Raises:
        ValueError: as :meth:`Guard.load_state_dict`.
    """
    require_state(state, "Guard.load_state_dict")
    settings = {"when": when, "restore": restore, "mode": mode}
    for key, wanted in settings.items():
        if state[key] != wanted:
            _refuse(
                f"a state with {key}={wanted!r}",
                f"{state[key]!r}; protect the model as it was, then load",
            )
    saved: Mapping[str, Mapping[str, Any]] = state["weights"]
    names = {item.name for item in items}
    if names != saved.keys():
        missing, foreign = sorted(names - saved.keys()), sorted(saved.keys() - names)
        got = [f"none for {listed(missing)}"] if missing else []
        got += [f"{listed(foreign)} too"] if foreign else []
        _refuse("a state of the protected parameters", f"{' and '.join(got)}; it is another run's")
    copies = _Copies()
    found = int(state["format"])
    held = {item.name: _read_pinned(item, saved[item.name], copies, mode, found) for item in items}
    return held, _read_subspaces(state["subspaces"], copies) if "subspaces" in state else held


def is_state(value: Mapping[str, Any]) -> bool:
    """Whether it is what ``Guard.state_dict`` returned, not subspaces by parameter name."""
    return {"format", "weights", "projections"} <= value.keys()


def require_state(state: Mapping[str, Any], operator: str) -> None:
    """Refuses what ``Guard.state_dict`` didn't return."""
    found = state.get("format") if isinstance(state, Mapping) else None
    if found not in FORMATS:
        raise ValueError(
            f"osf_torch.{operator}: expected a state with format={FORMAT}, got {found!r}; pass "
            "what Guard.state_dict() returned"
        )
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(
            f"osf_torch.{operator}: expected a state with {listed(list(KEYS))}, got one without "
            f"{listed(missing)}; pass what Guard.state_dict() returned, whole"
        )


def subspaces_of(state: Mapping[str, Any]) -> dict[str, Subspace]:
    """What a state protects of each weight: its bases, whole or as DTensors."""
    copies = _Copies()
    return {
        name: _read_subspace({**saved, "S": None, "protected": None}, copies)
        for name, saved in state["weights"].items()
    }


def _refuse(expected: str, got: str) -> None:
    raise ValueError(f"osf_torch.Guard.load_state_dict: expected {expected}, got {got}")


def _pinned_state(item: Protected, mode: str) -> dict[str, Any]:
    """What is held of the weight itself, the ranks' parts as DTensors."""
    held = item.turned(item.held)
    state = _subspace_state(held) | {name: getattr(held, name) for name in PARTS}
    for key, t in state.items():
        if isinstance(t, Tensor) and item.sharding is not None:
            follows = item.follows(key, t.dim(), core=mode == "core")
            state[key] = as_dtensor(t, item.weight, follows)
    return state | {"shape": tuple(item.weight.shape)}


def _read_pinned(
    item: Protected, saved: Mapping[str, Any], copies: _Copies, mode: str, found: int
) -> Pinned:
    """Args:
    found: the format of the state.
    """
    shape, whole = tuple(item.weight.shape), item.matrix_shape
    if tuple(saved["shape"]) != shape:
        _refuse(
            f"a state of {item.name!r} with shape {shape}",
            f"{tuple(saved['shape'])}; it is another model's",
        )
    saved = dict.fromkeys(PARTS) | dict(saved)
    beside = [key for key in ("protected", *PARTS) if saved[key] is not None]
    if found < 3 and item.is_transposed and beside:
        _refuse(
            f"a state of format 3 of {item.name!r}, which is sharded by columns",
            f"format {found}, of which {listed(beside)} may be transposed; resume it where it was "
            "saved and save it anew, or protect the model again",
        )
    parts: dict[str, Any] = {}
    for key in ("U", "V", "S", "protected", *PARTS):
        t = saved[key]
        if t is None:
            continue
        for mine, theirs in item.sides(key, t.dim(), core=mode == "core").items():
            if t.shape[mine] != whole[theirs]:
                _refuse(
                    f"all of {key} of {item.name!r}, {whole[theirs]} along dimension {mine}",
                    f"{t.shape[mine]}: a part that one rank has saved; save Guard.state_dict() as "
                    "it is, by torch.distributed.checkpoint, or full_tensor() of what is in it",
                )
        spans = saved.get(f"{key}_spans")
        parts[key] = t if spans is None else Basis(t, spans)
    held = item.hold(parts, core=mode == "core")
    device = local(item.weight).device
    copied: dict[str, Any] = {
        name: mapped(getattr(held, name), lambda t: copies.of(t, device))
        for name in ("U", "V", "S", "protected", *PARTS)
    }
    return replace(held, **copied)


def _subspace_state(s: Subspace) -> dict[str, Any]:
    state: dict[str, Any] = {"S": s.S, "protected": s.protected}
    for side, basis in (("U", s.U), ("V", s.V)):
        state[side] = None if basis is None else columns_of(basis)
        state[f"{side}_spans"] = spans_of(basis)
    return state


def _entry_state(s: Subspace) -> dict[str, Any]:
    if isinstance(s, Decomposition):
        return {"factors": s.factors(), "facts": facts_of(s)}
    if isinstance(s, InputSubspace):
        return {"factors": s.factors()}
    return _subspace_state(s)


class _Copies:
    """Copies of tensors, one of each on a device, in the order of strides that it had.

    Products of a transposed basis may round otherwise.
    """

    def __init__(self) -> None:
        # With what it is a copy of, so that nothing else has that id.
        self._made: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def of(self, t: Tensor, device: torch.device) -> Tensor:
        key = id(t), device
        if key not in self._made:
            made = t.to(device, copy=True, memory_format=torch.preserve_format)
            self._made[key] = t, padded(made)
        return self._made[key][1]


def _read_subspace(
    saved: Mapping[str, Any], copies: _Copies, device: torch.device | None = None
) -> Subspace:
    """On ``device``, or each tensor where it is."""

    def copied(key: str) -> Tensor | None:
        t: Tensor | None = saved[key]
        return None if t is None else copies.of(t, device or t.device)

    def basis(side: str) -> Held:
        columns = copied(side)
        return None if columns is None else Basis(columns, saved[f"{side}_spans"])

    return Subspace(basis("U"), basis("V"), copied("S"), copied("protected"))


def _read_entry(saved: Mapping[str, Any], copies: _Copies) -> Subspace:
    """The other way round of ``_entry_state``."""
    if "factors" not in saved:
        return _read_subspace(saved, copies)
    factors = {key: copies.of(t, t.device) for key, t in saved["factors"].items()}
    return assemble(factors, **saved["facts"]) if "facts" in saved else InputSubspace.of(factors)


def _read_subspaces(saved: Mapping[str, Any], copies: _Copies) -> Mapping[str, Subspace]:
    entries = {name: _read_entry(entry, copies) for name, entry in saved["weights"].items()}
    whole = {name: s for name, s in entries.items() if isinstance(s, Decomposition)}
    if saved["seed"] is None or len(whole) < len(entries):
        return entries
    return Subspaces(whole, seed=saved["seed"])
