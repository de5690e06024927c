"""Who is at work on a store: runners beside one another, whoever removes results alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from bbfast.errors import ArtifactError
from bbfast.store import Store

__all__ = ["alone", "running"]


@contextlib.contextmanager
def running(store: Store) -> Iterator[None]:
    """Be one of the runners of a store during the block; waits while results are removed from it.

    The kernel frees the lock when the process ends, however it ends.
    """
    descriptor = _open(store)
    try:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def alone(store: Store) -> Iterator[None]:
    """Keep runners out of a store during the block.

    Raises:
        ArtifactError: if one is at work, or a single command is making a result.
    """
    descriptor = _open(store)
    try:
        if descriptor is not None and not _free(descriptor, fcntl.LOCK_EX):
            raise ArtifactError(f"a runner is at work on {store.root}; wait for it, or stop it")
        for path in _inside(store.root / ".locks"):
            if _held(path):
                raise ArtifactError(f"a result is being made in {store.root} (lock {path}); wait for it, or stop it")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(store: Store) -> int | None:
    """The lock's file; None where it cannot be made: what is to be written there fails, and says why."""
    path = store.root / ".bench" / "runners.lock"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    return None


def _free(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False  # free since it was listed
    try:
        return not _free(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
