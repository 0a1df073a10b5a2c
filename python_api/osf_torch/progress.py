"""One progress bar on stderr: rich's where rich is installed, a line of text otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

Show = bool | Literal["always"]
WIDTH = 24  # of the plain bar, in characters


class Bar(Protocol):
    """Counts items, and measures how far it is by their cost."""

    def begin(self, text: str) -> None:
        """Say what is being worked on."""

    def advance(self, count: int, cost: float) -> None:
        """``count`` items are done, ``cost`` of the total."""


class Silent:
    def begin(self, text: str) -> None: ...

    def advance(self, count: int, cost: float) -> None: ...


class Plain:
    """A line rewritten in place on a terminal; elsewhere a line each time something is done."""

    def __init__(self, title: str, count: int, cost: float, *, rewrite: bool) -> None:
        self._title, self._count, self._cost = title, count, cost
        self._rewrite = rewrite
        self._done, self._spent, self._text = 0, 0.0, ""
        self._started = time.monotonic()

    def begin(self, text: str) -> None:
        self._text = text
        if self._rewrite:
            self._print()

    def advance(self, count: int, cost: float) -> None:
        self._done += count
        self._spent += cost
        self._print()

    def close(self) -> None:
        if self._rewrite:
            print(file=sys.stderr)

    def _print(self) -> None:
        share = self._spent / self._cost if self._cost else 1.0
        filled = round(WIDTH * share)
        elapsed = time.monotonic() - self._started
        left = (
            f"{_clock(elapsed / share * (1.0 - share))} left" if share > 0 else "time left unknown"
        )
        line = (
            f"{self._title} {self._done}/{self._count} [{'#' * filled:.<{WIDTH}}] "
            f"{_clock(elapsed)}, {left}  {self._text}"
        )
        if self._rewrite:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


class Rich:
    """rich's bar, whose time left follows the cost and not the count."""

    def __init__(self, progress: Any, title: str, count: int, cost: float) -> None:
        self._progress, self._title, self._count, self._done = progress, title, count, 0
        self._task = progress.add_task(self._described(""), total=cost)

    def begin(self, text: str) -> None:
        self._progress.update(self._task, description=self._described(text))

    def advance(self, count: int, cost: float) -> None:
        self._done += count
        self._progress.update(self._task, advance=cost, description=self._described(""))

    def _described(self, text: str) -> str:
        return f"{self._title} {self._done}/{self._count} {text}".rstrip()


@contextmanager
def progress_bar(show: Show, title: str, count: int, cost: float) -> Iterator[Bar]:
    """A bar over ``count`` items of ``cost`` in all.

    Args:
        show: True draws on a terminal only, "always" elsewhere too, one line a step.
    """
    terminal = sys.stderr.isatty()
    if not show or (show != "always" and not terminal):
        yield Silent()
        return
    if terminal:
        try:
            from rich import console as rich_console
            from rich import progress as rich_progress
        except ImportError:
            pass
        else:
            columns = (
                rich_progress.TextColumn("{task.description}", markup=False),
                rich_progress.BarColumn(),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TimeRemainingColumn(),
            )
            console = rich_console.Console(stderr=True)
            with rich_progress.Progress(*columns, console=console) as progress:
                yield Rich(progress, title, count, cost)
            return
    plain = Plain(title, count, cost, rewrite=terminal)
    try:
        yield plain
    finally:
        plain.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
