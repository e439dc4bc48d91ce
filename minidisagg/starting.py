"""What a person at a terminal sees while workers load their weights and capture their graphs."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from minidisagg.core.messages import Starting


class StartBars(Progress):
    """A line for each worker that is being started, on stderr if that is a terminal, gone when all are up.

    A context, and what `Frontend.start` tells (`on_starting`).
    """

    def __init__(self) -> None:
        columns = TextColumn("{task.description}", style="dim"), BarColumn(24)
        super().__init__(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._lines: dict[str, TaskID] = {}

    def tell(self, worker: str, starting: Starting | None) -> None:
        """What it is at; None: it is up."""
        if starting is None:
            if (line := self._lines.pop(worker, None)) is not None:
                self.remove_task(line)
            return
        if worker not in self._lines:
            self._lines[worker] = self.add_task("")
        text, total = f"{worker}: {starting.what}", starting.total or None  # None: the bar moves to and fro
        self.update(self._lines[worker], description=text, completed=starting.done, total=total)
