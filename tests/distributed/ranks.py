"""Runs a function in real gloo processes, one a rank, and brings back what each returned."""

from __future__ import annotations

import datetime as dt
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120  # of one collective: a rank that waits in vain fails before the test does
COUNTED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "broadcast",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)
# What torch 2.13 calls others.
NAMES = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` of every rank; it must stand at a module's top level.

    Raises:
        RuntimeError: with the first failing rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (count, folder, function, arguments), nprocs=count)
        found = [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)
        ]
    failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(found) if not good]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in found]


def _rank(rank: int, count: int, folder: str, function: Any, arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=dt.timedelta(seconds=TIMEOUT_S),
    )
    try:
        value = (True, function(rank, *arguments))
    except Exception:
        value = (False, traceback.format_exc())
    torch.save(value, Path(folder) / f"{rank}.pt")
    if value[0]:
        dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo's that lets go of a tensor while the interpreter ends aborts the process
    # (pytorch/pytorch#179291), so the process ends without that.
    os._exit(0)


class Collectives:
    """Counts what a block sends through torch.distributed, and its elements."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, Any]] = []

    def __enter__(self) -> Collectives:
        self._kept = {}
        for name in COUNTED:
            if not hasattr(dist, name):  # of another release
                continue
            self._kept[name] = getattr(dist, name)
            setattr(dist, name, self._counting(name))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _counting(self, name: str) -> Any:
        function = self._kept[name]

        def run(*args: Any, **options: Any) -> Any:
            given = (*args, *options.values())
            elements = max(t.numel() for t in given if isinstance(t, torch.Tensor))
            self.calls.append((NAMES.get(name, name), elements, options.get("group")))
            return function(*args, **options)

        return run
