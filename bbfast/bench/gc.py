"""What a store holds that no grid of yours refers to."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from bbfast.bench.outcomes import Book
from bbfast.bench.plan import Plan
from bbfast.errors import ArtifactError
from bbfast.store import Store

__all__ = ["Garbage", "find_garbage", "remove_garbage"]

_RESULTS = ("attack", "defense")


@dataclasses.dataclass(frozen=True)
class Garbage:
    """What may go.

    Args:
        results: Folders of attacks and defenses that are no stage of the grids.
        outcomes: Notes about stages that are no stage of the grids.
        quarantine: Damaged results that were put aside.
        size: Bytes of all of it.
    """

    results: tuple[Path, ...]
    outcomes: tuple[Path, ...]
    quarantine: tuple[Path, ...]
    size: int

    def __len__(self) -> int:
        return len(self.results) + len(self.outcomes) + len(self.quarantine)


def find_garbage(store: Store, plans: Iterable[Plan]) -> Garbage:
    """What lies in ``store`` and is not of ``plans``.

    A plan refers to the results that its stages have ended with, and to the attacks of its defenses. What attacks share
    (surrogates, encoders), checkpoints of unfinished stages and what is being written are never listed.

    Raises:
        ArtifactError: if the store is not there, or no stage of the plans has been run in it: then everything would go.
    """
    if not store.root.is_dir():
        raise ArtifactError(f"there is no store at {store.root}")
    book, keys, folders = Book(store), set(), set()
    for plan in plans:
        for key, outcome in book.read_all(plan.tasks).items():
            keys.add(key)
            folders.add(outcome.folder)
    if not keys:
        raise ArtifactError(f"no stage of these grids has been run in {store.root}; all of it would be removed")
    results = [e.path for e in store.list() if e.stage in _RESULTS and e.path.name not in folders]
    notes = [path for path in _inside(store.root / ".bench") if path.suffix == ".json" and path.stem not in keys]
    aside = _inside(store.root / ".quarantine")
    size = sum(_size(path) for path in [*results, *notes, *aside])
    return Garbage(tuple(results), tuple(notes), tuple(aside), size)


def remove_garbage(found: Garbage) -> None:
    """Remove it, results first.

    Raises:
        ArtifactError: if something cannot be removed; the rest stays.
    """
    try:
        for path in [*found.results, *found.quarantine]:
            shutil.rmtree(path)
        for path in found.outcomes:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot remove {error.filename}: {error.strerror}") from error


def _inside(folder: Path) -> Sequence[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
