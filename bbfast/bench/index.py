"""A store's results as one table: an sqlite3 file beside the folders, made from them and never more than a copy."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bbfast import artifact
from bbfast.errors import ArtifactError, BBFastError
from bbfast.store import Store

__all__ = ["COLUMNS", "Index"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_VERSION = 2
_STAGES = ("attack-", "defense-")
_TEXT = (
    "folder",
    "stage",
    "dataset",
    "model",
    "attack",
    "defense",
    "kind",
    "bbfast",
    "commit_id",
    "torch",
    "device",
    "created",
)
_NUMBERS = (
    "protocol",
    "version",
    "ratio",
    "seed",
    "epochs",
    "clean_fraction",
    "c_acc",
    "asr",
    "r_acc",
    "der",
    "rir",
    "tpr",
    "fpr",
    "auroc",
    "seconds",
    "peak_memory_bytes",
)
COLUMNS = (*_TEXT, *_NUMBERS)
"""What a row has; a number that a result does not have is NULL."""


class Index:
    """The table of a store; use it as a context manager.

    The file is in WAL mode, so that readers and writers do not wait for one another. It holds nothing that is not in
    the folders: delete it, and the next :meth:`refresh` makes it anew. One of another version, or damaged, is replaced.
    Where the store may only be read, the table is kept in memory.

    Args:
        store: The store.

    Raises:
        ArtifactError: if the store is not there.
    """

    def __init__(self, store: Store) -> None:
        if not store.root.is_dir():
            raise ArtifactError(f"there is no store at {store.root}; name the folder that results were written to")
        self._store = store
        self._path = store.root / "index.sqlite"
        try:
            self._db = self._opened()
        except (sqlite3.OperationalError, OSError):
            # A store that may only be read, or a full disk: the table is made for this time alone.
            self._db = self._open(":memory:")

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def refresh(self) -> dict[str, str]:
        """Take in what has come since the last time, and forget what is gone.

        Returns:
            Folder to what is wrong with it, for results that cannot be read; they are left out.
        """
        return self._sure(self._refresh)

    def _refresh(self) -> dict[str, str]:
        known = dict(self._db.execute("SELECT folder, stamp FROM records"))
        present = {name: stamp for name, stamp in self._store.stamps().items() if name.startswith(_STAGES)}
        damaged: dict[str, str] = {}
        rows = []
        for name in [name for name, stamp in present.items() if known.get(name) != stamp]:
            try:
                rows.append((present[name], *_row(self._store.root / name)))
            except (BBFastError, OSError, KeyError, TypeError, ValueError) as error:
                if artifact.exists(self._store.root / name):
                    damaged[name] = str(error)
                else:
                    del present[name]  # removed, or put aside, since it was listed
        gone = [(name,) for name in known if name not in present or name in damaged]
        try:
            with self._db:
                self._db.executemany("DELETE FROM records WHERE folder = ?", gone)
                marks = ", ".join("?" * (1 + len(COLUMNS)))
                self._db.executemany(f"INSERT OR REPLACE INTO records VALUES ({marks})", rows)
        except sqlite3.OperationalError as error:
            raise ArtifactError(f"cannot write {self._path}: {error}; choose a store that may be written to") from error
        return damaged

    def rows(self, where: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Results as dicts with the keys :data:`COLUMNS`, sorted by place in the grid.

        Args:
            where: Column to the value, or a list of values, that it must have.

        Raises:
            ValueError: if there is no such column.
        """
        where = dict(where or {})
        if unknown := [column for column in where if column not in COLUMNS]:
            raise ValueError(f"where must name columns of {COLUMNS}, got {unknown}")
        terms, values = [], []
        for column, wanted in where.items():
            choices = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
            terms.append(f"{column} IN ({', '.join('?' * len(choices))})")
            values.extend(choices)
        query = f"SELECT {', '.join(COLUMNS)} FROM records" + (f" WHERE {' AND '.join(terms)}" if terms else "")
        query += " ORDER BY dataset, model, attack, ratio, seed, stage, defense, folder"
        found = self._sure(lambda: self._db.execute(query, values).fetchall(), self._refresh)
        return [dict(zip(COLUMNS, row, strict=True)) for row in found]

    def by_folder(self, folders: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The rows of some folders; those that are not there are left out."""
        query = f"SELECT {', '.join(COLUMNS)} FROM records WHERE folder IN (SELECT value FROM json_each(?))"
        found = self._sure(lambda: self._db.execute(query, [json.dumps(list(folders))]).fetchall(), self._refresh)
        return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found}

    def _sure(self, step: Callable[[], T], first: Callable[[], object] = lambda: None) -> T:
        """What ``step`` gives; a file that turns out to be damaged is made anew, then ``first`` and ``step`` again."""
        try:
            return step()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            _log.warning("%s is damaged (%s); it is made anew from the folders", self._path, error)
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        try:
            self._db = self._anew()
        except (sqlite3.OperationalError, OSError):
            self._db = self._open(":memory:")
        first()
        return step()

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._open(self._path)
        except _OtherVersion:
            return self._anew()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            _log.warning("%s is damaged (%s); it is made anew from the folders", self._path, error)
            return self._anew()

    def _anew(self) -> sqlite3.Connection:
        for ending in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
        return self._open(self._path)

    def _open(self, path: Path | str) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=60)
        with contextlib.suppress(sqlite3.OperationalError):  # a store that may only be read
            db.execute("PRAGMA journal_mode=WAL")
        if db.execute("PRAGMA user_version").fetchone()[0] not in (0, _VERSION):
            db.close()
            raise _OtherVersion
        kinds = ", ".join([*(f"{name} TEXT" for name in _TEXT), *(f"{name} REAL" for name in _NUMBERS)])
        with db:
            db.execute(f"CREATE TABLE IF NOT EXISTS records (stamp TEXT, {kinds}, PRIMARY KEY (folder))")
            db.execute("CREATE INDEX IF NOT EXISTS place ON records (dataset, model, attack, ratio, seed, defense)")
            db.execute(f"PRAGMA user_version = {_VERSION}")
        return db


class _OtherVersion(sqlite3.DatabaseError):
    """The file is of another version of the table."""


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # A file that is locked or may not be written is whole; text that is none is not.
    return not isinstance(error, sqlite3.OperationalError) or "UTF-8" in str(error)


def _row(folder: Path) -> list[Any]:
    """The columns of one result, from its JSON files; tensors are not touched."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = artifact.read(folder, verify="lazy")
    defended = manifest["kind"] == "defense"
    own = found.config
    attack = own["attack"] if defended else own
    # Of an attack that was imported, and of what bbfast wrote before it kept them, nothing is known.
    versions = own.get("versions") or {}
    values: dict[str, Any] = {
        "folder": folder.name,
        "stage": manifest["kind"],
        "dataset": attack["data"]["name"],
        "model": attack["model"]["name"],
        "attack": attack["attack"],
        "ratio": attack["attack_config"].get("ratio"),
        "seed": own.get("seed"),
        "epochs": (attack.get("recipe") or {}).get("epochs"),
        "defense": own["defense"] if defended else "none",
        "kind": found.extra.get("kind") if defended else "attack",
        "clean_fraction": own.get("clean_fraction") if defended else None,
        "bbfast": manifest["bbfast"],
        "commit_id": manifest.get("commit", ""),
        "protocol": versions.get("protocol"),
        "version": versions.get("method"),
        "torch": manifest["torch"],
        "created": manifest["created"],
        "device": own.get("device"),
    }
    metrics = {key: found.metrics.get(key) for key in COLUMNS if key not in values}
    return [_plain({**metrics, **values}[column]) for column in COLUMNS]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def opened(store: Store) -> Iterator[tuple[Index, dict[str, str]]]:
    """The refreshed index of a store, and what in it cannot be read."""
    with Index(store) as index:
        yield index, index.refresh()
