"""Rows as a Parquet file, by DuckDB, which also queries it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bbfast.bench.results import to_json
from bbfast.errors import ArtifactError, MissingExtraError

__all__ = ["write_parquet"]

_TEXT = ("dataset", "model", "attack", "defense", "status", "reason", "commit", "device")
_WHOLE = ("seed", "n", "protocol", "version")


def write_parquet(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows of :func:`bbfast.bench.grid_rows` or :func:`bbfast.bench.aggregate` as one Parquet file.

    Names, status, reason, commit and device are text, seeds, counts and versions 64-bit integers, everything else
    float64; what is not there is NULL. A file that is there is replaced when the new one is whole.

    Args:
        rows: At least one; all with the same keys.
        path: The file.

    Raises:
        MissingExtraError: if DuckDB is not installed.
        ValueError: if there are no rows, which would be a file without columns.
        ArtifactError, OSError: if it cannot be written.
    """
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtraError("writing Parquet", "DuckDB", "query") from error
    if not rows:
        raise ValueError("there are no rows to write; a Parquet file needs columns")
    path = Path(path).expanduser()
    types = ", ".join(f"{_text(name)}: {_text(_type(name))}" for name in rows[0])
    # Row by row takes DuckDB minutes for a large grid; it reads JSON at once, and every float exactly.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".bbfast-parquet-") as folder:
        source, made = Path(folder) / "rows.json", Path(folder) / "rows.parquet"
        source.write_text(to_json(rows), encoding="utf-8")
        query = f"SELECT * FROM read_json({_text(source)}, format='array', columns={{{types}}})"
        try:
            with duckdb.connect() as db:
                db.execute(f"COPY ({query}) TO {_text(made)} (FORMAT parquet)")
        except duckdb.Error as error:
            raise ArtifactError(f"cannot write {path}: {' '.join(str(error).split())}") from error
        os.replace(made, path)
    return path


def _type(name: str) -> str:
    return "VARCHAR" if name in _TEXT else "BIGINT" if name in _WHOLE else "DOUBLE"


def _text(value: object) -> str:
    """As SQL quotes text."""
    return "'" + str(value).replace("'", "''") + "'"
