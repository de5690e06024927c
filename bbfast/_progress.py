"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bar", "bar", "wanted"]

# The display that is running, so that a training inside a defense adds a line to it: a terminal has room for one.
_display: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("bbfast_display", default=None)


_REMEMBERED = 3600.0
"""Seconds over which the speed is taken: of steps of a minute, rich's half minute holds none."""


class Bar:
    """One line of progress; does nothing when nobody looks."""

    def __init__(self, display: Progress | None, task: TaskID | None) -> None:
        self._display, self._task = display, task

    def advance(self, steps: float = 1) -> None:
        """Some steps are done."""
        if self._display is not None and self._task is not None:
            self._display.advance(self._task, steps)

    def show(self, fields: Mapping[str, Any]) -> None:
        """Show values beside the bar: numbers with four digits, the rest as text."""
        if self._display is not None:
            self.say("  ".join(f"{name} {_text(value)}" for name, value in fields.items()))

    def say(self, text: str) -> None:
        """Show words beside the bar."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, fields=text)


def wanted(progress: bool | None) -> bool:
    """Whether to show bars: as asked, or (None) if standard error is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


@contextlib.contextmanager
def bar(
    description: str, total: float | None, progress: bool | None = None, done: int = 0, *, left: bool = True
) -> Iterator[Bar]:
    """A progress line for the block, with the time left; removed afterwards if it stood inside another display.

    Args:
        description: What is being done.
        total: Steps in all; None if unknown.
        progress: True, False, or None: only on a terminal.
        done: Steps already done (a resumed run).
        left: Show percentage, elapsed time and time left; without them there is room for words (:meth:`Bar.say`).
    """
    if not wanted(progress):
        yield Bar(None, None)
        return
    running = _display.get()
    if running is not None:
        task = running.add_task(description, total=total, completed=done, fields="")
        try:
            yield Bar(running, task)
        finally:
            running.remove_task(task)
        return
    with _new_display(left) as display:
        token = _display.set(display)
        try:
            yield Bar(display, display.add_task(description, total=total, completed=done, fields=""))
        finally:
            _display.reset(token)


def _new_display(left: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    words = TextColumn("{task.fields[fields]}", markup=False)
    times = (words, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24 if left else 8),
        *((TextColumn("{task.percentage:>3.0f}%"), *times) if left else (words,)),
        console=Console(stderr=True),
        refresh_per_second=4,
        speed_estimate_period=_REMEMBERED,
    )


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
