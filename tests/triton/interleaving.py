"""Runs the programs of an interpreted launch side by side, in a random order.

Triton's interpreter runs one program after another, so that none ever waits for another. Here each
has a thread, one of which runs at a time; the next is drawn at every atomic and at every store.
As on a GPU, only so many are resident: another starts when one has ended, in no promised order.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter

__all__ = ["Stuck", "interleave"]

_MOST_SWITCHES = 3000
_NEW_WEIGHT = 0.1  # how likely a program begins or ceases to lag behind where it switches


class Stuck(RuntimeError):
    """Programs wait for what never comes."""


class _Programs:
    """The programs of one launch, and whose turn it is."""

    def __init__(self, count: int, resident: int, generator: random.Random) -> None:
        self.generator = generator
        self.turns = [threading.Semaphore(0) for _ in range(count)]
        self.alive = generator.sample(range(count), count)
        self.resident = resident
        self.running = 0
        self.switches = 0
        self.errors: list[BaseException] = []
        self.finished = threading.Semaphore(0)
        # Some lag behind for a while: drawn less often than the others. So do those that wait, to
        # save time.
        self.weights = [self.weight() for _ in range(count)]

    def weight(self) -> int:
        return self.generator.choice((1, 300))

    def pass_on(self) -> None:
        resident = self.alive[: self.resident]
        weights = [self.weights[i] for i in resident]
        self.running = self.generator.choices(resident, weights)[0]
        self.turns[self.running].release()

    def switch(self) -> None:
        """A point where another program may run."""
        self.switches += 1
        if self.errors or self.switches > _MOST_SWITCHES:
            raise Stuck(f"no end after {_MOST_SWITCHES} switches")
        me = self.running
        if self.generator.random() < _NEW_WEIGHT:
            self.weights[me] = self.weight()
        self.pass_on()
        self.turns[me].acquire()
        interpreter.interpreter_builder.set_grid_idx(me, 0, 0)

    def run(self, index: int, body: Callable[[], None]) -> None:
        self.turns[index].acquire()
        interpreter.interpreter_builder.set_grid_idx(index, 0, 0)
        try:
            if not self.errors:
                body()
        except BaseException as error:
            self.errors.append(error)
        self.alive.remove(index)
        if self.alive:
            self.pass_on()
        else:
            self.finished.release()

    def run_all(self, body: Callable[[], None]) -> None:
        threads = [
            threading.Thread(target=self.run, args=(i, body)) for i in range(len(self.turns))
        ]
        for thread in threads:
            thread.start()
        self.pass_on()
        self.finished.acquire()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def interleave(monkeypatch: pytest.MonkeyPatch, seed: int, resident: int = 6) -> list[int]:
    """From now on launches run so; returns the list that gets the number of programs of each."""
    generator = random.Random(seed)
    launched: list[int] = []
    current: list[_Programs] = []
    execute, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def together(executor: Any, *args: object, **options: object) -> None:
        body = executor.fn
        grid = executor.grid

        @functools.wraps(body)
        def at_the_last(**arguments: object) -> None:
            index = interpreter.interpreter_builder.grid_idx[0]
            if index < grid[0] - 1:
                return
            launched.append(grid[0])
            current.append(_Programs(grid[0], resident, generator))
            current[-1].run_all(lambda: body(**arguments))
            current.pop()

        at_the_last.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
        executor.fn = at_the_last
        execute(executor, *args, **options)

    def switching(operation: Callable[..., object]) -> Callable[..., object]:
        def operate(*args: Any) -> object:
            if current:
                if operation is atomic and not args[3].data.any():
                    current[-1].weights[current[-1].running] = 1
                current[-1].switch()
            return operation(*args)

        return operate

    builder = interpreter.InterpreterBuilder
    atomic = builder.create_atomic_rmw
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", together)
    # It patches triton.language in the globals of the function it is given.
    monkeypatch.setattr(
        interpreter, "_patch_lang", lambda fn: patch_lang(getattr(fn, "__wrapped__", fn))
    )
    for name in ("create_atomic_rmw", "create_masked_store", "create_store"):
        monkeypatch.setattr(builder, name, switching(getattr(builder, name)))
    return launched
