"""What the files behind a stage are now, by names, sizes and times: a result of other files is no longer current."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bbfast._hashing import sha256_json
from bbfast.bench.grid import DataEntry, Entry
from bbfast.errors import BBFastError

__all__ = ["attack_source", "both", "data_source"]


def data_source(data: DataEntry) -> str | None:
    """Signature of the files of a data set; empty if it has none, None if they are not here. Nothing is decoded."""
    from bbfast._config import build_config
    from bbfast.data.cache import signature
    from bbfast.data.datasets._base import DATASETS, Dataset

    made = DATASETS.get(data.name)
    if data.root is None or not issubclass(made, Dataset):
        return ""
    root = Path(data.root).expanduser()
    try:
        options = build_config(made.Options, f"data set {data.name!r}", data.options)
        return signature(made().sources(root, options), root)
    except (BBFastError, OSError):
        return None


def attack_source(attack: Entry) -> str:
    """Signature of the files and folders that an attack's settings name; empty if there are none."""
    from bbfast import attacks
    from bbfast.data.cache import signature

    try:
        settings = attacks.create(attack.name, **attack.settings).config.model_dump()
        files = sorted({file for path in _paths(settings) for file in _files(path)})
        return signature(files, Path("/")) if files else ""
    except (ValueError, OSError):
        return ""


def both(data: str | None, attack: str) -> str:
    """One for a stage; empty if there are no files, or not here."""
    return "" if data is None or not (data or attack) else sha256_json([data, attack])


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _paths(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _paths(each)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
