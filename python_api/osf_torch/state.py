"""A guard's state: what is protected of every weight, as nested dicts of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import Basis
from osf_torch.protected import Protected
from osf_torch.selection import listed
from osf_torch.sharding import local
from osf_torch.subspaces import (
    Decomposition,
    Held,
    Subspace,
    Subspaces,
    assemble,
    facts_of,
)

FORMAT = 1


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
        "weights": {item.name: _subspace_state(item.held) | _layout(item) for item in items},
        "subspaces": {
            "seed": subspaces.seed if isinstance(subspaces, Subspaces) else None,
            "weights": {name: _entry_state(s) for name, s in subspaces.items()},
        },
    }


def read_state(
    state: Mapping[str, Any], items: Sequence[Protected], when: str, restore: bool | str, mode: str
) -> tuple[dict[str, Subspace], Mapping[str, Subspace]]:
    """What every item is to hold, and the guard's subspaces.

    A tensor that occurs in several places is copied once. Older states have no subspaces; what
    the items hold stands in for them.

    Raises:
        ValueError: as :meth:`Guard.load_state_dict`.
    """
    settings = {"format": FORMAT, "when": when, "restore": restore, "mode": mode}
    for key, wanted in settings.items():
        if state.get(key) != wanted:
            remedy = "protect the model as it was, then load" if key != "format" else "save it anew"
            _refuse(f"a state with {key}={wanted!r}", f"{state.get(key)!r}; {remedy}")
    saved: Mapping[str, Mapping[str, Any]] = state["weights"]
    names = {item.name for item in items}
    if names != saved.keys():
        missing, foreign = sorted(names - saved.keys()), sorted(saved.keys() - names)
        got = [f"none for {listed(missing)}"] if missing else []
        got += [f"{listed(foreign)} too"] if foreign else []
        _refuse("a state of the protected parameters", f"{' and '.join(got)}; it is another run's")
    for item in items:
        own, other = _layout(item), {key: saved[item.name][key] for key in _layout(item)}
        if own["ranks"] != other["ranks"]:
            _refuse(
                f"a state of {own['ranks']} ranks for {item.name!r}",
                f"one of {other['ranks']}; resume on as many, or refresh and protect anew",
            )
        if own != other:
            _refuse(f"a state of {item.name!r} with {own}", f"{other}; it is another rank's")
    copies = _Copies()
    held = {
        item.name: _read_subspace(saved[item.name], copies, local(item.weight).device)
        for item in items
    }
    return held, _read_subspaces(state["subspaces"], copies) if "subspaces" in state else held


def _refuse(expected: str, got: str) -> None:
    raise ValueError(f"osf_torch.Guard.load_state_dict: expected {expected}, got {got}")


def _layout(item: Protected) -> dict[str, Any]:
    cut = item.sharding
    return {
        "shape": tuple(item.weight.shape),
        "ranks": 1 if cut is None else cut.ranks,
        "slice": None if cut is None else (cut.dim, cut.start, cut.size),
    }


def _subspace_state(s: Subspace) -> dict[str, Any]:
    state: dict[str, Any] = {"S": s.S, "protected": s.protected}
    for side, basis in (("U", s.U), ("V", s.V)):
        low = isinstance(basis, Basis) and basis.spans == "low"
        state[side] = basis.columns if isinstance(basis, Basis) else basis
        state[f"{side}_spans"] = "low" if low else "high"
    return state


def _entry_state(s: Subspace) -> dict[str, Any]:
    if isinstance(s, Decomposition):
        return {"factors": s.factors(), "facts": facts_of(s)}
    return _subspace_state(s)


class _Copies:
    """Copies of tensors, one of each on a device, in the strides that it had.

    Products of a transposed basis may round otherwise.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, t: Tensor, device: torch.device) -> Tensor:
        key = id(t), device
        if key not in self._made:
            self._made[key] = t.to(device, copy=True, memory_format=torch.preserve_format)
        return self._made[key]


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


def _read_subspaces(saved: Mapping[str, Any], copies: _Copies) -> Mapping[str, Subspace]:
    entries = {
        name: assemble(
            {key: copies.of(t, t.device) for key, t in entry["factors"].items()}, **entry["facts"]
        )
        if "factors" in entry
        else _read_subspace(entry, copies)
        for name, entry in saved["weights"].items()
    }
    whole = {name: s for name, s in entries.items() if isinstance(s, Decomposition)}
    if saved["seed"] is None or len(whole) < len(entries):
        return entries
    return Subspaces(whole, seed=saved["seed"])
