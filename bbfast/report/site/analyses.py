"""What ``bbfast analyze`` left beside a result, copied into the site."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bbfast import analysis
from bbfast._hashing import from_json
from bbfast.errors import ArtifactError, ConfigError, UnknownNameError
from bbfast.report.page import Analysis, Link
from bbfast.report.site.records import failure, short

__all__ = ["copy_analyses"]

_META, _NUMBERS, _PICTURE = "meta.json", "numbers.npz", "figure.png"
_FILES = (_NUMBERS, "table.csv", "figure.pdf")
_PNG = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
"""How a whole PNG begins and ends."""


def copy_analyses(store: Path, folder: str, out: Path) -> tuple[list[Analysis], dict[str, str]]:
    """The figures and numbers of a result's analyses copied to ``out``, what to say of them, and what is wrong with
    those that are broken or half written: these are left out, and nothing else is.

    Args:
        store: Folder of the store.
        folder: Name of the result in it.
        out: Folder of the site.
    """
    found, broken = [], {}
    home = store / "analysis" / folder
    for source in sorted(home.iterdir()) if home.is_dir() else ():
        # What is being written has a name with a dot; a folder without any of the files is somebody's own.
        if source.name.startswith(".") or not any((source / file).is_file() for file in (_META, _PICTURE, *_FILES)):
            continue
        place = out / "analysis" / folder / source.name
        try:
            found.append(_copied(source, place, f"../analysis/{quote(folder)}/{quote(source.name)}"))
        except Exception as error:  # whatever such a file may hold costs this figure and no page
            shutil.rmtree(place, ignore_errors=True)
            broken[f"analysis/{folder}/{source.name}"] = failure(error)
    return found, broken


def _copied(source: Path, place: Path, at: str) -> Analysis:
    """One analysis, copied to ``place``, whose address is ``at``; one without a figure has its numbers alone."""
    if lost := [file for file in (_META, _NUMBERS) if not (source / file).is_file()]:
        raise ArtifactError(f"half written: {' and '.join(lost)} missing; run bbfast analyze again")
    words = _object(from_json(json.loads((source / _META).read_text(encoding="utf-8"))), "what it holds")
    summary, meta = _object(words.get("summary"), "summary"), _object(words.get("meta", {}), "meta")
    if not zipfile.is_zipfile(source / _NUMBERS):
        raise ArtifactError(f"{_NUMBERS} is damaged: it is no archive")
    drawn = (source / _PICTURE).is_file()
    if drawn:
        picture = (source / _PICTURE).read_bytes()
        if not (picture.startswith(_PNG[0]) and picture.endswith(_PNG[1])):
            raise ArtifactError(f"{_PICTURE} is damaged: it is no whole PNG")
    files = [file for file in _FILES if (source / file).is_file()]
    place.mkdir(parents=True, exist_ok=True)
    for file in (*files, _PICTURE) if drawn else files:
        shutil.copyfile(source / file, place / file)
    name = str(meta.get("tool", source.name))
    title, question = name, ""
    with contextlib.suppress(UnknownNameError):
        card = analysis.info(name)
        title, question = str(card["title"]), str(card["question"])
    beside = _beside(meta.get("compared"))
    return Analysis(
        f"{title}, side by side" if beside else title,
        question,
        f"{at}/{_PICTURE}" if drawn else "",
        beside or _said(summary),
        [Link(file, f"{at}/{file}") for file in files],
        _settings(name, _object(meta.get("options", {}), "options")),
    )


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"{_META}: {name} must be an object, got {short(value)}")
    return value


def _beside(compared: Any) -> str:
    """The results that a comparison is of; empty for an analysis of one."""
    parts = compared if isinstance(compared, list) else []
    return "; ".join(str(part["caption"]) for part in parts if isinstance(part, dict) and part.get("caption"))


def _said(summary: Mapping[str, Any]) -> str:
    """The first figures of a summary, in words."""
    numbers = [
        (key, value)
        for key, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return "; ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in numbers[:5])


def _settings(tool: str, options: Mapping[str, Any]) -> str:
    """The settings that are not the tool's defaults; all of them, if there is no such tool here."""
    defaults: Mapping[str, Any] = {}
    with contextlib.suppress(UnknownNameError, ConfigError):
        defaults = analysis.create(tool).config.model_dump(mode="json")
    changed = {key: value for key, value in options.items() if key not in defaults or defaults[key] != value}
    return ", ".join(f"{key} = {short(value)}" for key, value in changed.items())
