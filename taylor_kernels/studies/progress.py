"""Progress to suit its reader: bars on a terminal, a line per finished task elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Called after each unit of work, with a short note on how it stands.
Advance = Callable[..., None]


class ProgressLog:
    """Reports tasks on standard error, so that standard output holds results alone."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """Show a task while the block runs; the block calls what it gets: advance(note="", by=1).

        Args:
            label: what is done, at most about 35 characters.
            total: units of work, or None where it cannot be known.
        """
        start, last = time.perf_counter(), ""
        bars = Progress(
            TextColumn("{task.description:<36}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with bars:
            bar = bars.add_task(label, total=total, note="")

            def advance(note: str = "", by: float = 1) -> None:
                nonlocal last
                last = note or last
                bars.update(bar, advance=by, note=last)

            yield advance
            bars.update(bar, completed=total or 1, total=total or 1)
        if not self.console.is_terminal:
            seconds = time.perf_counter() - start
            self.say(f"{label:<36} {seconds:6.1f} s  {last}".rstrip())

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)
