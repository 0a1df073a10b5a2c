"""A guard's state: what is protected of every weight, as nested dicts of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from osf_kernels import Basis, padded
from osf_torch.bases import Held, columns_of, spans_of
from osf_torch.protected import Pinned, Protected
from osf_torch.selection import listed
from osf_torch.sharding import as_dtensor, is_dtensor, lies_as, local
from osf_torch.subspaces import (
    Decomposition,
    Subspace,
    Subspaces,
    assemble,
    facts_of,
)

FORMAT = 2
FORMATS = (1, 2)  # 1 knew triplets alone
KEYS = ("when", "restore", "mode", "projections", "weights")
PARTS = ("rest_A", "rest_B", "sketch")  # what Pinned has beside a Subspace
# A weight sharded by columns is held as its transpose; U and V of the state are the weight's own.
TRANSPOSED = {"U": "V", "V": "U", "U_spans": "V_spans", "V_spans": "U_spans"}


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
        "weights": {item.name: _pinned_state(item) for item in items},
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
    held = {item.name: _read_pinned(item, saved[item.name], copies) for item in items}
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


def _pinned_state(item: Protected) -> dict[str, Any]:
    state = _subspace_state(item.held) | {name: getattr(item.held, name) for name in PARTS}
    for key, dim in _sharded_dims(item, state).items():
        state[key] = as_dtensor(state[key], item.weight, dim)
    if item.is_transposed:  # held is that of the transposed weight
        state |= {key: state[other] for key, other in TRANSPOSED.items()}
    return state | {"shape": tuple(item.weight.shape)}


def _sharded_dims(item: Protected, state: Mapping[str, Any]) -> dict[str, int]:
    """Of the tensors of a sharded weight's state that this rank holds a slice of, in ``view``'s
    terms: the dimension, from the end."""
    cut = item.sharding
    if cut is None:
        return {}
    if cut.dim >= -2:
        dims = {"U": -2, "rest_B": -2, "protected": -2, "sketch": -2}
        if state["rest_A"] is None:
            del dims["rest_B"]  # of mode "core": no side of the weight's
    else:
        dims = dict.fromkeys(("U", "V", "protected", "rest_A", "rest_B", "sketch"), cut.dim)
        dims["S"] = cut.dim + 1
    return {
        key: dim for key, dim in dims.items() if state[key] is not None and state[key].dim() >= -dim
    }


def _read_pinned(item: Protected, saved: Mapping[str, Any], copies: _Copies) -> Pinned:
    if tuple(saved["shape"]) != tuple(item.weight.shape):
        _refuse(
            f"a state of {item.name!r} with shape {tuple(item.weight.shape)}",
            f"{tuple(saved['shape'])}; it is another model's",
        )
    saved = dict.fromkeys(PARTS) | dict(saved)
    if item.is_transposed:
        saved |= {key: saved[other] for key, other in TRANSPOSED.items()}
    dims = _sharded_dims(item, saved)
    for key, t in saved.items():
        if not isinstance(t, Tensor):
            continue
        if key in dims and not is_dtensor(t):
            _refuse(
                f"{key} of {item.name!r} as a DTensor, as the weight is",
                "a tensor; it was saved of weights that weren't sharded: load it there, or refresh",
            )
        if is_dtensor(t):
            whole = t.shape[dims[key]] if key in dims else None
            if key not in dims or not lies_as(t, item.weight, dims[key]):
                _refuse(
                    f"{key} of {item.name!r} sharded as the weight is",
                    f"one of {t.device_mesh.size()} ranks, {whole} along its dimension; resume on "  # type: ignore[attr-defined]
                    "as many ranks, or load the state by torch.distributed.checkpoint into that of "
                    "a guard on these ranks",
                )
            saved[key] = local(t)
    device = local(item.weight).device
    found = _read_subspace(saved, copies, device)
    rests = {name: copies.of(t, device) for name in PARTS if (t := saved[name]) is not None}
    return Pinned(found.U, found.V, found.S, found.protected, **rests)


def _subspace_state(s: Subspace) -> dict[str, Any]:
    state: dict[str, Any] = {"S": s.S, "protected": s.protected}
    for side, basis in (("U", s.U), ("V", s.V)):
        state[side] = None if basis is None else columns_of(basis)
        state[f"{side}_spans"] = spans_of(basis)
    return state


def _entry_state(s: Subspace) -> dict[str, Any]:
    if isinstance(s, Decomposition):
        return {"factors": s.factors(), "facts": facts_of(s)}
    return _subspace_state(s)


class _Copies:
    """Copies of tensors, one of each on a device, in the order of strides that it had.

    Products of a transposed basis may round otherwise.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, t: Tensor, device: torch.device) -> Tensor:
        key = id(t), device
        if key not in self._made:
            made = t.to(device, copy=True, memory_format=torch.preserve_format)
            self._made[key] = padded(made)
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
