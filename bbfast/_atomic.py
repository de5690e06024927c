"""Folders that appear whole or not at all: written beside their place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TEMP_PREFIX", "new_folder", "remove_stale", "retired", "sync", "write_bytes"]

TEMP_PREFIX = ".bbfast-tmp-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well and vanishes when it does not.

    What is in the folder must be flushed by whoever writes it (:func:`write_bytes`, :func:`sync`).

    Args:
        target: Where the folder shall stand; its parents are made.
        replace: Whether a folder already there is replaced. A reader finds the old one or the new one at every moment.

    Raises:
        OSError: whatever the file system says; ``ENOTEMPTY`` or ``EEXIST`` if ``target`` exists, ``replace`` is false.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.parent / f"{TEMP_PREFIX}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    temp.mkdir()
    try:
        yield temp
        sync(temp)
        _publish(temp, target, replace)
        sync(target.parent)
    finally:
        # After an exchange the temporary name holds the replaced folder; after a failure, the unfinished one.
        shutil.rmtree(temp, ignore_errors=True)


def retired(target: Path) -> Path:
    """Where a replaced folder waits during the two renames of a file system that cannot exchange names."""
    return target.parent / f".{target.name}.old"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; its files are flushed all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_stale(parent: Path, *, min_age: float, max_age: float) -> list[Path]:
    """Remove temporary folders that dead processes left in ``parent``.

    Args:
        parent: Where to look (not below it).
        min_age: Younger ones (seconds since their last change) are never touched.
        max_age: Older ones are removed even if they come from another machine, whose processes cannot be asked.

    Returns:
        The folders removed.
    """
    removed = []
    for folder in parent.glob(TEMP_PREFIX + "*"):
        try:
            age = time.time() - folder.stat().st_mtime
        except FileNotFoundError:
            continue
        host, _, rest = folder.name.removeprefix(TEMP_PREFIX).partition("-")
        pid = rest.partition("-")[0]
        dead_here = host == _host() and pid.isdigit() and not _alive(int(pid))
        if age > max_age or (age > min_age and dead_here):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _publish(temp: Path, target: Path, replace: bool) -> None:
    if not replace or not target.exists():
        os.rename(temp, target)
    elif not _exchange(temp, target):
        old = retired(target)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(temp, target)
    shutil.rmtree(retired(target), ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; false where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
