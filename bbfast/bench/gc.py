"""What a store holds that no grid of yours refers to."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from bbfast import artifact
from bbfast.bench.holders import alone
from bbfast.bench.kept import grid_path, kept_grids
from bbfast.bench.outcomes import Book
from bbfast.bench.plan import Plan, make_plan
from bbfast.bench.refer import recorded, wanted
from bbfast.errors import ArtifactError, BBFastError
from bbfast.store import Entry, Store

__all__ = ["Garbage", "find_garbage", "remove_garbage"]

_RESULTS = ("attack", "defense")


@dataclasses.dataclass(frozen=True)
class Garbage:
    """What may go.

    Args:
        root: The store.
        results: Folders of attacks and defenses that are no stage of the grids.
        outcomes: Notes about stages that are no stage of the grids, and kept grids that do not count.
        quarantine: Damaged results that were put aside.
        size: Bytes of all of it.
        grids: Names of the grids that count.
        seen: When the store's notes had last changed.
    """

    root: Path
    results: tuple[Path, ...]
    outcomes: tuple[Path, ...]
    quarantine: tuple[Path, ...]
    size: int
    grids: tuple[str, ...]
    seen: int

    def __len__(self) -> int:
        return len(self.results) + len(self.outcomes) + len(self.quarantine)


def find_garbage(store: Store, plans: Iterable[Plan], *, kept: bool = True) -> Garbage:
    """What lies in ``store`` and is not of ``plans``.

    A plan refers to the results that its stages have ended with, to those whose recorded settings are those of its
    stages (a runner may have been killed before it noted one, a single command notes none), and to the attacks of its
    defenses. What attacks share (surrogates, encoders), checkpoints of unfinished stages, what is being written and
    what cannot be read are never listed.

    Args:
        store: Where to look.
        plans: Whose results stay.
        kept: Every grid that was run on the store counts too (:func:`bbfast.bench.kept_grids`).

    Raises:
        ArtifactError: if the store is not there, a runner is at work on it, a kept grid cannot be read, or no stage of
            the plans has been run in it: then everything would go.
    """
    if not store.root.is_dir():
        raise ArtifactError(f"there is no store at {store.root}")
    with alone(store):
        return _found(store, [*plans, *(_kept(store) if kept else ())])


def remove_garbage(found: Garbage) -> None:
    """Remove it, results first.

    Raises:
        ArtifactError: if a runner is at work on the store or has been since it was looked at, or something cannot be
            removed; the rest stays.
    """
    with alone(Store(found.root)):
        if _changed(found.root) != found.seen:
            raise ArtifactError(f"{found.root} has changed since it was looked at; look again")
        try:
            for path in [*found.results, *found.quarantine]:
                shutil.rmtree(path)
            for path in found.outcomes:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot remove {error.filename}: {error.strerror}") from error


def _found(store: Store, plans: Sequence[Plan]) -> Garbage:
    book, keys, folders = Book(store), set(), set()
    for plan in plans:
        for key, outcome in book.read_all(plan.tasks).items():
            keys.add(key)
            folders.add(outcome.folder)
    unnoted = [e for e in store.list() if e.stage in _RESULTS and e.path.name not in folders]
    # Settings are compared only where there is something to tell apart: a large grid's take seconds to work out.
    asked = {each for plan in plans for each in wanted(plan)} if unnoted else set()
    results = [entry.path for entry in unnoted if _known_other(entry, asked)]
    if not keys and len(results) == len(unnoted):
        raise ArtifactError(f"no stage of these grids has been run in {store.root}; all of it would be removed")
    notes = [path for path in _inside(store.root / ".bench") if path.suffix == ".json" and path.stem not in keys]
    counted = {grid_path(store, plan.grid) for plan in plans}
    notes += [path for path in _inside(store.root / ".bench" / "grids") if path not in counted]
    aside = _inside(store.root / ".quarantine")
    size = sum(_size(path) for path in [*results, *notes, *aside])
    names = tuple(dict.fromkeys(plan.grid.name for plan in plans))
    return Garbage(store.root, tuple(results), tuple(notes), tuple(aside), size, names, _changed(store.root))


def _kept(store: Store) -> Sequence[Plan]:
    grids, damaged = kept_grids(store)
    for name, reason in damaged.items():
        raise ArtifactError(
            f"the grid {store.root / '.bench' / 'grids' / name} was run here and cannot be read ({reason}), so that "
            "its results are not known; remove that file, or let only the grids count that you name (--only)"
        )
    return [make_plan(grid) for grid in grids]


def _known_other(entry: Entry, asked: set[str]) -> bool:
    """Whether a result is known to be of none of the stages asked for."""
    try:
        return recorded(artifact.read(entry.path, verify="lazy").config) not in asked
    except (BBFastError, KeyError, TypeError, ValueError):
        return False


def _changed(root: Path) -> int:
    return (root / ".bench").stat().st_mtime_ns if (root / ".bench").is_dir() else 0


def _inside(folder: Path) -> Sequence[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
