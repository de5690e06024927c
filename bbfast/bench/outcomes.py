"""How each stage of a benchmark ended, kept in the store beside the results: one small file a stage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from bbfast.errors import ArtifactError
from bbfast.store import Store

__all__ = ["Book", "Outcome", "Sourced", "Status", "write_whole"]

Status = Literal["done", "failed", "not_applicable", "damaged", "full"]
_KEPT = ("done", "failed", "not_applicable")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Args:
        status: ``done``; ``failed``; ``not_applicable``: refused before any work, for a reason that stays; ``damaged``:
            what it builds on cannot be read (never kept: the runner makes that anew); ``full``: a disk has no space
            left (never kept: the run stops).
        folder: Name of the result's folder in the store, if done.
        reason: One line, if not.
        traceback: Where it failed.
        seconds: Wall-clock time of the stage in its process.
        peak_memory: Highest resident memory of its process, bytes; 0 if not known.
        attempts: How often it was begun.
        source: What the files behind it were when it was planned (:attr:`bbfast.bench.plan.Task.source`); None if that
            was not noted.
        record: What it was about, when it ended, and versions; empty where there is a result, which has them.
    """

    status: Status
    folder: str = ""
    reason: str = ""
    traceback: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    attempts: int = 1
    source: str | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Sourced(Protocol):
    """A stage, as far as its outcome need know it."""

    @property
    def source(self) -> str:
        """What the files behind it are now; empty if there are none, or not here."""


class Book:
    """The outcomes in a store: ``<store>/.bench/<key>.json``.

    They say which folder a stage's result is in, so that nothing need be loaded to know what is done; a lost or damaged
    file only means that the stage is asked for again, and found in the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.root / ".bench"

    def read(self, key: str, source: str = "") -> Outcome | None:
        """The outcome of a stage; None if there is none, it cannot be read, its result is gone, or the files behind it
        were others than ``source`` says (empty takes any)."""
        try:
            found = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            outcome = Outcome(**found)
        except (OSError, ValueError, TypeError):
            return None
        if outcome.status not in _KEPT:
            return None
        if outcome.status == "done" and not (self._store.root / outcome.folder / "manifest.json").is_file():
            return None
        if source and outcome.source not in (source, None):
            return None
        return outcome

    def read_all(self, stages: Mapping[str, Sourced]) -> dict[str, Outcome]:
        """The outcomes that there are of stages by key, and that are of the files that are there now."""
        found = ((key, self.read(key, stage.source)) for key, stage in stages.items())
        return {key: outcome for key, outcome in found if outcome is not None}

    def write(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome; the file appears whole. Nothing but another result replaces one that is there.

        Raises:
            ArtifactError: if the store cannot be written to.
        """
        noted = None if outcome.status == "done" else self.read(key, outcome.source or "")
        if noted is not None and noted.status == "done":
            return
        text = json.dumps(dataclasses.asdict(outcome), sort_keys=True)
        write_whole(self._folder / f"{key}.json", text)


def write_whole(path: Path, text: str) -> None:
    """Write a small file, whole or not at all; its folder is made.

    Raises:
        ArtifactError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ArtifactError(
            f"cannot write to {path.parent}: {error.strerror}; free some space, or choose a store that may be "
            "written to"
        ) from error
