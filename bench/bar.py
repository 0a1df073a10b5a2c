"""The progress bar of the benches that draw with rich."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from bench import report


class Bar(Progress):
    """rich draws nothing before the end where its console is no terminal: there each description
    is handed to ``report.progress``."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._say = (lambda _: None) if self.console.is_terminal else report.progress()

    def update(self, task_id: TaskID, *, description: str | None = None, **changes: Any) -> None:
        super().update(task_id, description=description, **changes)
        self._say(description or "")

    def stop(self) -> None:
        self._say("")
        super().stop()


def bar_on(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
    )
