"""What lies in a store: every result's figures and settings, and which attack each defense was run on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from bbfast._hashing import from_json, sha256_json
from bbfast.bench import Index
from bbfast.bench.stages import identity
from bbfast.report.commands import changed_settings
from bbfast.store import Store

__all__ = ["Record", "failure", "read_records", "settings_text", "short"]


@dataclasses.dataclass(frozen=True)
class Record:
    """One stored result.

    Args:
        folder: Its name in the store.
        row: Its line of the index, see :data:`bbfast.bench.index.COLUMNS`.
        config: How it was made.
        changed: Settings that are not defaults, as text; of a defense, those of its attack as well.
        attack: Folder of the attack that it defends; None of an attack, and if that is not in the store.
    """

    folder: str
    row: Mapping[str, Any]
    config: Mapping[str, Any]
    changed: str
    attack: str | None = None


def read_records(store: Store) -> tuple[dict[str, Record], dict[str, str]]:
    """Every result by its folder, attacks first; and what is wrong with those that cannot be read.

    Raises:
        ArtifactError: if there is no store.
    """
    records: dict[str, Record] = {}
    with Index(store) as index:
        damaged = index.refresh()
        rows = index.rows()
    attacks: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["stage"] != "attack"):
        folder = str(row["folder"])
        try:
            config = from_json(json.loads((store.root / folder / "config.json").read_text(encoding="utf-8")))
            if row["stage"] == "attack":
                attacks[sha256_json(identity(config))] = folder
                parent = None
            else:
                parent = attacks.get(sha256_json(identity(config["attack"])))
            row["seed"] = None if row["seed"] is None else int(row["seed"])  # the index has floats only
            records[folder] = Record(folder, row, config, settings_text(config), parent)
        except Exception as error:  # whatever a damaged file may hold costs this result alone
            damaged[folder] = f"config.json: {failure(error)}"
    return records, damaged


def settings_text(config: Mapping[str, Any]) -> str:
    """What distinguishes a result from one with defaults: ``s = 1, epochs = 60``; of a defense, of its attack first."""
    own = ", ".join(f"{key} = {short(value)}" for key, value in changed_settings(config).items())
    if "defense" not in config:
        return own
    attack = settings_text(config["attack"])
    return "; ".join(
        f"{config[kind] if kind == 'defense' else config['attack']['attack']}: {text}"
        for kind, text in (("attack", attack), ("defense", own))
        if text
    )


def failure(error: BaseException) -> str:
    """What went wrong, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def short(value: Any) -> str:
    """A setting in at most 40 characters."""
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
