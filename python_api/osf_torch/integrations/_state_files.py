"""The state of subspaces beside a checkpoint, as one file; and what ranks of a run agree upon."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osf_torch.selection import named_weights
from osf_torch.sharding import is_dtensor
from osf_torch.sharing import Ranks, whole

FILE = "osf_subspaces.pt"  # beside a checkpoint's other files


def write_state(folder: str | os.PathLike[str], state: Mapping[str, Any], *, writes: bool) -> None:
    """Writes a state to :data:`FILE` in a checkpoint's folder, whole or not at all.

    Sharded tensors are gathered, one after the other; only who writes keeps them, in host memory.
    Every rank calls it, and waits until it is written.

    Args:
        writes: whether this rank writes.

    Raises:
        RuntimeError: another rank couldn't write.
    """
    held = gathered(state, keep=writes)
    error = None
    try:
        if writes:
            path = Path(folder) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{FILE}.{secrets.token_hex(4)}.partial")
            try:
                torch.save(held, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    except Exception as caught:
        error = caught
    ranks = Ranks(world())
    ranks.agree(error, device_of_world(), "integrations: writing the state of subspaces")


def read_state(folder: str | os.PathLike[str], *, operator: str) -> dict[str, Any]:
    """What :func:`write_state` wrote: nothing but tensors, numbers and strings is read.

    Tensors that were sharded are whole: loading the state cuts each as its weight is cut now.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"osf_torch.{operator}: expected {FILE} beside the checkpoint in {folder}, got none; "
            "what a run protects can't be found again in weights that it has trained: resume from "
            "a checkpoint that was saved with it"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def gathered(value: Any, keep: bool, done: dict[int, Any] | None = None) -> Any:
    """A state with whole tensors on the host; those that several places have stay one tensor."""
    done = {} if done is None else done
    if isinstance(value, Mapping):
        return {key: gathered(entry, keep, done) for key, entry in value.items()}
    if not isinstance(value, Tensor):
        return value
    if id(value) not in done:
        t: Any = value.detach()
        if is_dtensor(t):
            t = whole(t)
        found = t.cpu() if keep else None
        done[id(value)] = found, value  # held, so that its id stays its own
    return done[id(value)][0]


# --- ranks ---


def world() -> Any:
    """The group of all ranks; None of one process."""
    import torch.distributed as dist

    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if there else None


def device_of_world() -> torch.device:
    """Where collectives of the group of all ranks take tensors."""
    group = world()
    if group is None:
        return torch.device("cpu")
    import torch.distributed as dist

    if "cpu:" in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None else accelerator


def require_same_weights(model: nn.Module, ranks: Ranks, operator: str) -> None:
    """Before ranks share out decompositions: each decomposes weights of its own."""
    if ranks.group is None:
        return
    plain = [p for p in named_weights(model).values() if not is_dtensor(p)]
    require_alike(
        sums_of(plain),
        operator,
        "weights: one rank loads them and sends them later, or they are drawn without a seed",
        "load them on every rank (FSDP's cpu_ram_efficient_loading=False)",
    )


def require_alike(sums: Tensor, operator: str, what: str, remedy: str) -> None:
    ranks = Ranks(world())
    if ranks.group is None:
        return
    import torch.distributed as dist

    mine = sums.to(device_of_world())
    first = mine.clone()
    dist.broadcast(first, group_src=0, group=ranks.group)
    off = not torch.allclose(mine, first, rtol=1e-9, atol=1e-12, equal_nan=True)
    flag = torch.tensor(float(off), device=mine.device)
    dist.all_reduce(flag, group=ranks.group)
    if flag:
        raise ValueError(
            f"osf_torch.{operator}: expected the same on every rank, got other {what}; {remedy}"
        )


@torch.no_grad()
def sums_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of each its sum and the sum of its magnitudes, in float64 on the host; NaN of meta ones."""
    found = torch.full((len(tensors), 2), math.nan, dtype=torch.float64)
    for sums, t in zip(found, tensors, strict=True):
        if not t.is_meta:
            sums[0], sums[1] = t.sum(dtype=torch.float64), t.abs().sum(dtype=torch.float64)
    return found
