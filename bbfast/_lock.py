"""One holder per file, among processes and threads; a dead process's lock frees itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bbfast.errors import ArtifactError

__all__ = ["file_lock", "waits_told"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
_listeners: list[Callable[[bool], object]] = []


@contextlib.contextmanager
def waits_told(listener: Callable[[bool], object]) -> Iterator[None]:
    """During the block ``listener(True)`` is called when this process begins to wait for any lock, ``listener(False)``
    when it no longer does: that time is another's work."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def file_lock(
    path: Path, what: str, timeout: float | None = None, on_wait: Callable[[float], None] | None = None
) -> Iterator[None]:
    """Hold the lock file ``path`` during the block.

    The kernel frees the lock when its process ends, however it ends, so no lock is ever stale. Not re-entrant: a thread
    that asks for a lock it holds waits for itself.

    Args:
        path: The lock file; made if missing, removed when it is free again.
        what: What the lock guards, for messages.
        timeout: Seconds to wait; None waits for ever, 0 tries once.
        on_wait: Called with the seconds waited so far each time the lock was found taken.

    Raises:
        ArtifactError: if the lock was not free within ``timeout``, naming its holder, or its file cannot be made.
    """
    descriptor = _acquire(path, what, timeout, on_wait)
    try:
        yield
    finally:
        # Removed while still held: whoever opened the old file sees that it is no longer the one at this path.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, what: str, timeout: float | None, on_wait: Callable[[float], None] | None) -> int:
    with contextlib.ExitStack() as waiting:
        return _acquired(path, what, timeout, on_wait, waiting)


def _acquired(
    path: Path,
    what: str,
    timeout: float | None,
    on_wait: Callable[[float], None] | None,
    waiting: contextlib.ExitStack,
) -> int:
    start, pause, told = time.monotonic(), _FIRST_PAUSE, False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ArtifactError(
                f"cannot lock {what} with {path}: {error.strerror}; choose a store that may be written to"
            ) from error
        if _try(descriptor, path):
            if _is_at(descriptor, path):
                _sign(descriptor)
                return descriptor
            # The holder removed the file between our open and our lock: the lock is another file now, or none.
            os.close(descriptor)
            continue
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        waited = time.monotonic() - start
        if timeout is not None and waited >= timeout:
            raise ArtifactError(
                f"{what} is being made by {holder} (lock {path}), still so after {waited:.0f} s; wait for it or stop it"
            )
        if not told:
            told = True
            for listener in _listeners:
                waiting.callback(listener, False)
                listener(True)
        if on_wait is not None:
            on_wait(waited)
        time.sleep(pause if timeout is None else min(pause, max(timeout - waited, 0.001)))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _try(descriptor: int, path: Path) -> bool:
    """Lock the open file without waiting; false if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        os.close(descriptor)
        raise ArtifactError(
            f"cannot lock {path}: {error.strerror}; the store must lie on a file system with locks"
        ) from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock, for the message of whoever waits; a full disk must not keep anyone from the lock."""
    with contextlib.suppress(OSError):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
