"""The grids that were run on a store, kept beside their outcomes: a report shows what is missing of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bbfast._hashing import sha256_json
from bbfast.bench.grid import Grid, load_grid
from bbfast.bench.outcomes import write_whole
from bbfast.errors import BBFastError
from bbfast.store import Store

__all__ = ["grid_path", "keep_grid", "kept_grids"]


def keep_grid(store: Store, grid: Grid) -> None:
    """Note that ``grid`` is run on ``store``; nothing happens if that is known.

    Raises:
        ArtifactError: if the store cannot be written to.
    """
    path = grid_path(store, grid)
    if not path.is_file():
        write_whole(path, json.dumps(grid.model_dump(mode="json"), indent=1, sort_keys=True))


def grid_path(store: Store, grid: Grid) -> Path:
    """Where a grid is, or would be, kept."""
    return _folder(store) / f"{sha256_json(grid.model_dump(mode='json'))[:16]}.json"


def kept_grids(store: Store) -> tuple[list[Grid], Mapping[str, str]]:
    """The grids that were run on ``store``, by name, and what is wrong with those that can no longer be read: a method
    that they list may be gone, or the file damaged."""
    grids, damaged = [], {}
    for path in sorted(_folder(store).glob("*.json")):
        try:
            grids.append(load_grid(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, BBFastError) as error:
            damaged[path.name] = str(error)
    return sorted(grids, key=lambda grid: grid.name), damaged


def _folder(store: Store) -> Path:
    return store.root / ".bench" / "grids"
