"""What a tool finds: arrays, a table and a summary, kept as files that anything can read."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bbfast._hashing import from_json, to_json
from bbfast.errors import ArtifactError

__all__ = ["Numbers"]

ARRAYS, TABLE, META = "numbers.npz", "table.csv", "meta.json"


@dataclasses.dataclass
class Numbers:
    """The numbers behind a figure.

    Args:
        arrays: Named arrays; no objects.
        table: Rows for reading, all with the same keys.
        summary: The few figures that are compared across runs.
        meta: How they came about: tool, options, view, layer, seed, versions, seconds, and what a drawing needs in
            words (class names, layer names).
    """

    arrays: dict[str, np.ndarray]
    table: Sequence[Mapping[str, Any]] = ()
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write ``numbers.npz``, ``table.csv`` and ``meta.json`` (meta and summary); returns the first."""
        folder.mkdir(parents=True, exist_ok=True)
        if bad := [name for name, array in self.arrays.items() if array.dtype == object]:
            raise TypeError(f"arrays must hold numbers or text, {bad[0]!r} holds objects")
        np.savez_compressed(folder / ARRAYS, **self.arrays)  # type: ignore[arg-type]
        with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.table[0]) if self.table else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.table)
        text = json.dumps(to_json({"meta": self.meta, "summary": self.summary}), indent=1, sort_keys=True)
        (folder / META).write_text(text + "\n", encoding="utf-8")
        return folder / ARRAYS

    @classmethod
    def load(cls, folder: Path) -> Numbers:
        """What :meth:`save` wrote; cells of the table come back as text.

        Raises:
            ArtifactError: if a file is missing or damaged.
        """
        try:
            with np.load(folder / ARRAYS, allow_pickle=False) as found:
                arrays = dict(found)
            with (folder / TABLE).open(newline="", encoding="utf-8") as file:
                table = list(csv.DictReader(file))
            words = from_json(json.loads((folder / META).read_text(encoding="utf-8")))
            return cls(arrays, table, words["summary"], words["meta"])
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"cannot read the numbers in {folder}: {error}") from error
