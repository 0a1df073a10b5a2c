"""What ``bench/traffic_tasks.py`` says that tasks touch, against the kernel under the interpreter.

The tests compare task by task which cache lines are read and written. Of the matrices the tests
also compare the order in which lines are first touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

import osf_kernels
from bench.l2 import LINE_BYTES
from bench.traffic_tasks import Step, Tasks
from osf_kernels.backends import grouped
from osf_kernels.backends.triton import configs, dispatch
from tests.helpers import generator_for, randn
from tests.triton.watching import watch

SMALL = configs.Projection(32, 16, 16, 32, 16, 32, 4, 1, 1)
CHUNKED = SMALL._replace(block_r=16, block_q=16)


class Touched:
    """Lines that each task of a launch has read and written, in the order of their first use."""

    def __init__(self) -> None:
        self.tasks: list[tuple[list[int], list[int]]] = []
        self.reads: dict[int, None] = {}
        self.writes: dict[int, None] = {}

    def add(self, lines: dict[int, None], pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        starts = pointers.data[mask.data.astype(bool)]
        for start in starts.ravel().tolist():
            lines.setdefault(start // LINE_BYTES)
            lines.setdefault((start + width - 1) // LINE_BYTES)

    def end(self) -> None:
        self.tasks.append((list(self.reads), list(self.writes)))
        self.reads, self.writes = {}, {}


@contextmanager
def touching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Touched]:
    """Collects what the interpreter loads and stores between two signals, scalars aside."""
    touched = Touched()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if pointers.data.size > 1:
            touched.add(touched.reads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if pointers.data.size > 1:
            touched.add(touched.writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting(
        self: Any, operation: Any, pointers: Any, value: Any, mask: Any, sem: Any, *rest: Any
    ) -> Any:
        if "RELEASE" in str(sem) and "ACQUIRE" not in str(sem):
            touched.end()
        return atomic(self, operation, pointers, value, mask, sem, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", loading)
        patch.setattr(builder, "create_masked_store", storing)
        patch.setattr(builder, "create_atomic_rmw", counting)
        yield touched


@pytest.mark.parametrize("ranks", [(16, 8), (40, 24), (None, 16), (16, None)], ids=str)
@pytest.mark.parametrize("split", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tasks_touch_what_the_model_says(
    ranks: tuple[int | None, int | None], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CHUNKED if ranks == (40, 24) else SMALL
    monkeypatch.setattr(configs, "projection_config", lambda *_: config)
    monkeypatch.setattr(configs, "SHORTEST_SPLIT", 32)
    monkeypatch.setitem(configs.FILL, "sm_80", 256 if split else 1)
    monkeypatch.setattr(dispatch.launch, "_INTERPRETED_PROGRAMS", 1)
    grouped.single.cache_clear()
    watching = watch(monkeypatch)
    g = generator_for("traffic", ranks, split)
    m, n = 96, 128
    xs = [randn(m, n, dtype=torch.bfloat16, generator=g) for _ in range(2)]
    Us, Vs = (
        [None if rank is None else randn(size, rank, dtype=torch.bfloat16, generator=g)] * 2
        for size, rank in zip((m, n), ranks, strict=True)
    )
    with osf_kernels.use_backend("triton"), touching(monkeypatch) as touched:
        osf_kernels.project_many_(xs, Us, Vs)
    (made,), (records,) = watching.planned, watching.records
    tasks = Tasks(made, records.tolist())
    assert bool(made.constants["HAS_PARTS"]) == split
    of_x = {line for x in xs for line in lines_of(x)}
    said = [
        (place, list(steps))
        for place, local in tasks.order
        for steps in until_signals(tasks.steps(place, local))
    ]
    tiles_of_C = 0 if None in ranks else 2 * -(-ranks[0] // 16) * -(-ranks[1] // 16)
    assert len(touched.tasks) == len(said) == made.tasks + tiles_of_C
    for (place, steps), (reads, writes) in zip(said, touched.tasks, strict=True):
        said_reads, said_writes = (
            list(dict.fromkeys(line for step in steps for r in regions(step) for line in r.lines()))
            for regions in (lambda step: step.reads, lambda step: step.writes)
        )
        assert set(reads) == set(said_reads)
        assert set(writes) == set(said_writes)
        if tasks.is_update(place):  # a tile at a time, row by row
            assert [line for line in reads if line in of_x] == [
                line for line in said_reads if line in of_x
            ]


def until_signals(steps: Iterator[Step]) -> Iterator[list[Step]]:
    """The steps of a task; those up to a signal that it gives under way apart."""
    found = []
    for step in steps:
        found.append(step)
        if step.signal is not None:
            yield found
            found = []
    yield found


def lines_of(t: Tensor) -> range:
    first = t.data_ptr()
    return range(first // LINE_BYTES, (first + t.numel() * t.element_size() - 1) // LINE_BYTES + 1)
