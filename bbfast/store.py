"""Results found again by what made them: one folder per stage, named by the hash of its settings.

A key is the SHA-256 of everything a stage's result depends on. The same key is made once: whoever asks for it while
another process makes it waits and then reads that one. Folders appear whole (see :mod:`bbfast.artifact`); one that was
damaged since is put aside, never loaded.

    <root>/<stage>-<name>-<first 12 digits of the key>/   an artefact
    <root>/.work/<key>/         checkpoints of an unfinished one
    <root>/.locks/<key>         held while it is being made
    <root>/.quarantine/         damaged artefacts
    <root>/.shared/             a store of its own: what defenses make alike, see bbfast.defenses.DefenderView.obtain
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from bbfast import _atomic, artifact
from bbfast._artifact_read import MANIFEST
from bbfast._hashing import sha256_json
from bbfast._lock import file_lock
from bbfast.artifact import Artifact
from bbfast.errors import ArtifactError, CorruptArtifactError, UnknownNameError

__all__ = ["PROTOCOL_VERSION", "Content", "Entry", "Savable", "Store"]

PROTOCOL_VERSION = 1
"""Part of every key; raised when the evaluation protocol changes, so that results of two protocols never meet."""

_log = logging.getLogger(__name__)
_STAGE = re.compile(r"[a-z][a-z0-9_]*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KEY = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(rf"({_STAGE.pattern})-({_NAME.pattern})-([0-9a-f]{{12}})")
_SHOWN = 12
_MIN_AGE, _MAX_AGE = 3600.0, 7 * 86400.0


@dataclasses.dataclass(frozen=True)
class Content:
    """What :func:`bbfast.artifact.write` takes, before it has a place."""

    kind: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()

    def save(self, folder: Path) -> object:
        """Write the content as the artefact ``folder``."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return artifact.write(folder, parts.pop("kind"), **parts)


class Savable(Protocol):
    """A result that writes itself as one artefact, as AttackResult, DefenseResult and :class:`Content` do."""

    def save(self, folder: Path, /) -> object: ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """One artefact of a store."""

    stage: str
    name: str
    short_key: str
    path: Path


class Store:
    """A folder of artefacts.

    Args:
        root: The folder; made when something is first written.

    Raises:
        ArtifactError: if ``root`` is a file.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise ArtifactError(f"the store {self.root} is a file; choose a folder")
        self._swept = False

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    @staticmethod
    def key(stage: str, config: Mapping[str, Any], *, seed: int | None = None, version: int | str = 1) -> str:
        """The key of a result.

        Args:
            stage: What is done ("attack", "defense").
            config: Everything the result depends on, with full defaults; the order of its keys does not matter, 1 and
                1.0 differ.
            seed: Of the stage; None if it has none or ``config`` holds it.
            version: Of the method; another version makes another key.

        Returns:
            64 hexadecimal digits.
        """
        _check("stage", stage, _STAGE)
        parts = {"stage": stage, "config": config, "seed": seed, "protocol": PROTOCOL_VERSION, "version": version}
        return sha256_json(parts)

    def path(self, stage: str, name: str, key: str) -> Path:
        """Where the artefact stands or would stand: ``<root>/<stage>-<name>-<key[:12]>``."""
        _check("stage", stage, _STAGE)
        _check("name", name, _NAME)
        _check("key", key, _KEY)
        return self.root / f"{stage}-{name}-{key[:_SHOWN]}"

    def has(self, stage: str, name: str, key: str) -> bool:
        """Whether the artefact is there; its files are checked when it is read."""
        return artifact.exists(self.path(stage, name, key))

    def read(
        self, stage: str, name: str, key: str, *, kind: str | None = None, verify: bool | Literal["lazy"] = True
    ) -> Artifact | None:
        """The artefact, or None if it is absent.

        A damaged one is moved to ``.quarantine`` with a logged warning and counts as absent. With ``verify="lazy"``
        damage to tensors shows only when they are asked for, as a CorruptArtifactError.

        Raises:
            ArtifactError: if it cannot be read for another reason, is of another kind, or of a newer format.
        """
        folder = self.path(stage, name, key)
        if not artifact.exists(folder) and not (folder.is_dir() and any(folder.iterdir())):
            return None
        seen = _inode(folder)
        try:
            return artifact.read(folder, kind, verify=verify)
        except CorruptArtifactError as error:
            self._quarantine(folder, seen, error)
            return None

    def check(self, folder: Path) -> bool:
        """Whether every file of an artefact is what was written; a damaged one is put aside, as by :meth:`read`.

        Raises:
            ArtifactError: if it cannot be read for another reason, or is of a newer format.
        """
        seen = _inode(folder)
        try:
            artifact.read(folder)
        except CorruptArtifactError as error:
            self._quarantine(folder, seen, error)
            return False
        return True

    def write(self, stage: str, name: str, key: str, content: Savable) -> Path:
        """Write the artefact and remove its work folder.

        Args:
            content: :class:`Content`, or a result with ``save(folder)``.

        Raises:
            ArtifactError: if it is there already, or the store cannot be written to; nothing half-written is left.
        """
        folder = self.path(stage, name, key)
        self._sweep()
        content.save(folder)
        shutil.rmtree(self._work_path(key), ignore_errors=True)
        return folder

    def work(self, key: str) -> Path:
        """The folder for checkpoints of the artefact with that key; made now, removed when the artefact is written."""
        folder = self._work_path(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot make {folder}: {error.strerror}; choose a store that may be written to"
            ) from error
        return folder

    @contextlib.contextmanager
    def lock(
        self, key: str, timeout: float | None = None, on_wait: Callable[[float], None] | None = None
    ) -> Iterator[None]:
        """Be the only process and thread that makes the artefact with that key.

        Args:
            timeout: Seconds to wait for another holder; None waits for ever, 0 tries once.
            on_wait: Called with the seconds waited so far, again and again while waiting.

        Raises:
            ArtifactError: if the lock was not free within ``timeout`` or cannot be made.
        """
        _check("key", key, _KEY)
        with file_lock(self.root / ".locks" / key, f"result {key[:_SHOWN]}", timeout, on_wait):
            yield

    def get_or_make(
        self,
        stage: str,
        name: str,
        config: Mapping[str, Any],
        make: Callable[[Path], Savable],
        *,
        seed: int | None = None,
        version: int | str = 1,
        kind: str | None = None,
        verify: bool | Literal["lazy"] = True,
        timeout: float | None = None,
        on_wait: Callable[[float], None] | None = None,
    ) -> Artifact:
        """The artefact of these settings, made now if it is not there.

        Of several processes that ask at once, one makes it; the others wait and read what it made. If ``make`` fails or
        the process is killed, the work folder stays, and the next call goes on from its checkpoints.

        Args:
            stage: See :meth:`key`.
            name: The method's name, part of the folder's name.
            config: See :meth:`key`.
            make: Called with the work folder; returns what is to be stored.
            seed: See :meth:`key`.
            version: See :meth:`key`.
            kind: See :func:`bbfast.artifact.read`.
            verify: See :func:`bbfast.artifact.read`.
            timeout: See :meth:`lock`.
            on_wait: See :meth:`lock`.

        Raises:
            ArtifactError: if the store cannot be read or written, or the lock was not free within ``timeout``.
        """
        key = self.key(stage, config, seed=seed, version=version)
        found = self.read(stage, name, key, kind=kind, verify=verify)
        if found is not None:
            return found
        with self.lock(key, timeout, on_wait):
            found = self.read(stage, name, key, kind=kind, verify=verify)
            if found is None:
                self.write(stage, name, key, make(self.work(key)))
                found = self.read(stage, name, key, kind=kind, verify=verify)
        if found is None:
            raise ArtifactError(f"{self.path(stage, name, key)} was damaged right after it was written; check the disk")
        return found

    def find(self, text: str | Path) -> Path:
        """The artefact that a user means by a folder, a folder's name, its beginning, or the beginning of its key.

        Raises:
            UnknownNameError: if nothing fits, with the nearest names.
            ArtifactError: if several do.
        """
        folder = Path(text)
        if artifact.exists(folder):
            return folder
        entries = self.list()
        wanted = folder.name
        for rule in (_is_named, _begins):
            fitting = [entry.path for entry in entries if rule(entry, wanted)]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                names = ", ".join(path.name for path in fitting)
                raise ArtifactError(f"{str(text)!r} fits several results of {self.root}: {names}; write more of it")
        raise UnknownNameError(f"result in {self.root}", str(text), [entry.path.name for entry in entries])

    def sweep(self, *, min_age: float = _MIN_AGE, max_age: float = _MAX_AGE) -> Sequence[Path]:
        """Remove temporary folders left by dead processes; returns them.

        Args:
            min_age: Younger ones (seconds) are kept in any case.
            max_age: Older ones are removed even if the process that made them, on another machine, cannot be asked.
        """
        return _atomic.remove_stale(self.root, min_age=min_age, max_age=max_age) if self.root.is_dir() else []

    def list(self, stage: str | None = None, name: str | None = None) -> Sequence[Entry]:
        """The artefacts of a stage and a method (None: of all), sorted by folder name; not verified."""
        matches = (_FOLDER.fullmatch(folder) for folder in self.stamps())
        entries = [Entry(match[1], match[2], match[3], self.root / match[0]) for match in matches if match]
        return [e for e in entries if stage in (None, e.stage) and name in (None, e.name)]

    def stamps(self) -> dict[str, str]:
        """The folders' names, sorted, each with a text that changes when the folder is replaced by another.

        One call of the system a folder: a store of 100,000 results is looked through in a second.
        """
        if not self.root.is_dir():
            return {}
        root, found = os.fspath(self.root), {}
        for name in sorted(name for name in os.listdir(root) if _FOLDER.fullmatch(name)):
            try:
                seen = os.stat(f"{root}/{name}/{MANIFEST}")
            except OSError:
                if not artifact.exists(self.root / name):
                    continue
                found[name] = ""  # another process is replacing it
            else:
                found[name] = f"{seen.st_ino} {seen.st_mtime_ns} {seen.st_size}"
        return found

    def _work_path(self, key: str) -> Path:
        _check("key", key, _KEY)
        return self.root / ".work" / key

    def _sweep(self) -> None:
        if not self._swept:
            self._swept = True
            for folder in self.sweep():
                _log.info("removed %s, left by a process that was killed", folder)

    def _quarantine(self, folder: Path, seen: int | None, error: CorruptArtifactError) -> None:
        """Put a damaged artefact aside, unless another process has replaced it since it was ``seen``."""
        aside = self.root / ".quarantine" / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        try:
            aside.parent.mkdir(exist_ok=True)
            if _inode(folder) != seen:
                return
            os.rename(folder, aside)
            if _inode(aside) != seen:
                os.rename(aside, folder)
                return
        except OSError as failure:
            _log.warning("%s; it is ignored, and stays where it is (%s)", error, failure.strerror)
            return
        _log.warning("%s; it was moved to %s and counts as missing", error, aside)


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _is_named(entry: Entry, wanted: str) -> bool:
    return entry.path.name == wanted


def _begins(entry: Entry, wanted: str) -> bool:
    return bool(wanted) and (entry.path.name.startswith(wanted) or entry.short_key.startswith(wanted[:_SHOWN]))


def _check(argument: str, value: str, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{argument} must match {pattern.pattern}, got {value!r}")
