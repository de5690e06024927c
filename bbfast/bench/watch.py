"""What one stage takes, and what ends it when it takes too much."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from pathlib import Path

from bbfast._lock import waits_told
from bbfast.bench.outcomes import Outcome

__all__ = ["Clock", "Watch", "ended_reason", "forget_ended", "resident", "too_much"]

_POLL = 0.5


class Clock:
    """Seconds of a stage; it stands still while the stage waits for what another process makes."""

    def __init__(self) -> None:
        # Seconds before it last went on, and when that was: one value, since another thread may read it.
        self._state: tuple[float, float | None] = (0.0, None)

    def start(self) -> None:
        """Begin at 0."""
        self._state = (0.0, time.monotonic())

    def waits(self, now: bool) -> None:
        """Stand still, or go on."""
        self._state = (self.spent(), None if now else time.monotonic())

    def spent(self) -> float:
        """Seconds so far."""
        before, since = self._state
        return before + (0.0 if since is None else time.monotonic() - since)


class Watch:
    """Ends its own process when a stage takes more than it may, where the runner cannot see it; a context manager.

    The reason is left beside the outcomes (:func:`ended_reason`), since a dead process tells none.

    Args:
        root: The store.
        key: Of the stage.
        memory_gib: Limit of resident memory; None is none.
        seconds: Limit of time, as :class:`Clock` counts it; None is none.
    """

    def __init__(self, root: str, key: str, memory_gib: float | None = None, seconds: float | None = None) -> None:
        self._note = _note(root, key)
        self._memory, self._seconds = memory_gib, seconds
        self._peak, self._clock = 0, Clock()
        self._over, self._told = threading.Event(), contextlib.ExitStack()

    def __enter__(self) -> Watch:
        self._note.unlink(missing_ok=True)
        self._told.enter_context(waits_told(self._clock.waits))
        self._clock.start()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._told.close()

    def measured(self, outcome: Outcome) -> Outcome:
        """The outcome with what the stage took."""
        peak = max(self._peak, resident(os.getpid()))
        return dataclasses.replace(outcome, seconds=self._clock.spent(), peak_memory=peak)

    def _look(self) -> None:
        while not self._over.wait(_POLL):
            spent, memory = self._clock.spent(), resident(os.getpid())
            self._peak = max(self._peak, memory)
            reason = too_much(spent, memory, self._seconds, self._memory)
            if reason:
                with contextlib.suppress(OSError):
                    self._note.parent.mkdir(parents=True, exist_ok=True)
                    self._note.write_text(reason, encoding="utf-8")
                os._exit(1)


def ended_reason(root: str, key: str) -> str | None:
    """Why a :class:`Watch` ended the process of a stage; None if it did not."""
    try:
        return _note(root, key).read_text(encoding="utf-8")
    except OSError:
        return None


def forget_ended(root: str, key: str) -> None:
    """Before a stage is begun again: what an earlier process died of is not what this one will."""
    with contextlib.suppress(OSError):
        _note(root, key).unlink(missing_ok=True)


def _note(root: str, key: str) -> Path:
    return Path(root) / ".bench" / f"{key}.ended"


def too_much(spent: float, memory: int, seconds: float | None, memory_gib: float | None) -> str:
    """Why a stage is to be ended; empty if it is not."""
    if seconds is not None and spent > seconds:
        return f"ended after {spent:.0f} s: the limit is {seconds:g} s"
    if memory_gib is not None and memory > memory_gib * 2**30:
        return f"ended at {memory / 2**30:.2f} GiB of memory: the limit is {memory_gib:g} GiB"
    return ""


def resident(pid: int | None) -> int:
    """Resident memory of a process in bytes; 0 where it cannot be known."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
