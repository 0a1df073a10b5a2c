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
from osf_torch.subspaces import Held, Subspace

FORMAT = 1


def state_of(
    items: Sequence[Protected],
    moved: Sequence[Protected],
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
        "weights": {item.name: _weight_state(item) for item in items},
    }


def read_state(
    state: Mapping[str, Any], items: Sequence[Protected], when: str, restore: bool | str, mode: str
) -> dict[str, Subspace]:
    """What every item is to hold.

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
    return {item.name: _read_weight(saved[item.name], local(item.weight)) for item in items}


def _refuse(expected: str, got: str) -> None:
    raise ValueError(f"osf_torch.Guard.load_state_dict: expected {expected}, got {got}")


def _layout(item: Protected) -> dict[str, Any]:
    cut = item.sharding
    return {
        "shape": tuple(item.weight.shape),
        "ranks": 1 if cut is None else cut.ranks,
        "slice": None if cut is None else (cut.dim, cut.start, cut.size),
    }


def _weight_state(item: Protected) -> dict[str, Any]:
    s = item.held
    state: dict[str, Any] = {"S": s.S, "protected": s.protected}
    for side, basis in (("U", s.U), ("V", s.V)):
        low = isinstance(basis, Basis) and basis.spans == "low"
        state[side] = basis.columns if isinstance(basis, Basis) else basis
        state[f"{side}_spans"] = "low" if low else "high"
    return state | _layout(item)


def _read_weight(saved: Mapping[str, Any], like: Tensor) -> Subspace:
    def basis(side: str) -> Held:
        columns = _copied(saved[side], like.device)
        return None if columns is None else Basis(columns, saved[f"{side}_spans"])

    return Subspace(
        basis("U"),
        basis("V"),
        _copied(saved["S"], like.device),
        _copied(saved["protected"], like.device),
    )


def _copied(t: Tensor | None, device: torch.device) -> Tensor | None:
    # In the strides it had: products of a transposed basis may round otherwise.
    return None if t is None else t.to(device, copy=True, memory_format=torch.preserve_format)
