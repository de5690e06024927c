"""What a result folder says about how the attack was made, and what can be told from its labels."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bbfast import attacks
from bbfast.errors import BBFastError, ConfigError, UnknownNameError
from bbfast.interop._layout import COLUMNS, INFO, TABLE, Part
from bbfast.interop._torch_file import read_torch_file
from bbfast.training import Recipe

__all__ = ["BBFAST", "UNKNOWN", "attack_settings", "label_settings", "read_history", "read_options", "stored_recipe"]

BBFAST = "bbfast"
"""Key of info.pickle under which bbfast keeps its own settings."""
UNKNOWN = "unknown"
"""Recorded as the attack of a result whose attack bbfast does not know."""

_MOST_VALUES = 10_000
"""Settings with more values than this are none."""

_log = logging.getLogger(__name__)


def read_options(folder: Path) -> dict[str, Any]:
    """The plain values of info.pickle; empty if it is not there or refused: all else works without it."""
    path = folder / INFO
    if not path.exists():
        return {}
    try:
        content = read_torch_file(path)
    except BBFastError as error:
        _log.warning("the settings beside the result are left out: %s", error)
        return {}
    if not isinstance(content, dict):
        return {}
    return {str(key): value for key, value in content.items() if _is_plain(value)}


def label_settings(train: Part | None, test: Part, classes: Tensor, num_classes: int) -> dict[str, Any]:
    """``label_mode``, ``target`` and what belongs to them, from the labels of the poisoned samples.

    Args:
        train: Poisoned training samples, if there are.
        test: Poisoned test samples.
        classes: True labels of the clean test set.
        num_classes: K.
    """
    wanted = test.given.unique().tolist()
    shifts = ((test.given - test.original) % num_classes).unique().tolist()
    if len(wanted) != 1:
        target = int(test.given.mode().values) if wanted else 0
        return {"label_mode": "all2all", "target": target, "shift": shifts[0] if len(shifts) == 1 else 1}
    target = int(wanted[0])
    relabelled = train is not None and bool((train.given != train.original).any())
    if train is not None and len(train.index) and not relabelled and bool((train.original == target).all()):
        return {"label_mode": "clean_label", "target": target}
    attacked, others = set(test.original.tolist()), set(classes.tolist()) - {target}
    if attacked and attacked < others:
        return {"label_mode": "one2one", "target": target, "source_classes": sorted(attacked)}
    return {"label_mode": "all2one", "target": target}


def attack_settings(
    name: str | None, options: Mapping[str, Any], found: Mapping[str, Any], ratio: float
) -> tuple[str, dict[str, Any]]:
    """The registered name of the attack and settings that it accepts; else ``UNKNOWN`` and what the labels say.

    Args:
        name: What the caller says; None takes that of info.pickle.
        options: Of info.pickle.
        found: Of :func:`label_settings`.
        ratio: Share of poisoned training samples; 0 if unknown.
    """
    own = options.get(BBFAST)
    given = name if name is not None else options.get("attack")
    plain = {**found, "compat": "reference"}
    candidates: list[dict[str, Any]] = [plain | {"ratio": ratio}] if ratio else []
    candidates.append(plain)
    if isinstance(own, dict) and isinstance(own.get("attack"), str) and isinstance(own.get("attack_config"), dict):
        given = own["attack"] if name is None else name
        candidates.insert(0, own["attack_config"])
    if isinstance(given, str) and given != UNKNOWN:
        for settings in candidates:
            try:
                method = attacks.create(given, **settings)
            except UnknownNameError:
                break
            except (ConfigError, TypeError) as error:
                _log.debug("%s does not take %s: %s", given, settings, error)
            else:
                return method.name, method.config.model_dump(mode="json")
        _log.warning("bbfast has no attack %r with %s: it is recorded as %r", given, candidates[-1], UNKNOWN)
    return UNKNOWN, candidates[-1]


def stored_recipe(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe that bbfast left in info.pickle, if it is a valid one."""
    own = options.get(BBFAST)
    recipe = own.get("recipe") if isinstance(own, dict) else None
    if not isinstance(recipe, dict):
        return None
    try:
        return Recipe(**recipe).model_dump(mode="json")
    except (ValueError, TypeError) as error:
        _log.warning("the recipe beside the result is left out: %s", error)
        return None


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of attack_df.csv under bbfast's names, cells that are no number left out; empty if it is not there."""
    path = folder / TABLE
    names = {column: key for key, column in COLUMNS.items()}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeError, csv.Error) as error:
        _log.warning("the figures beside the result are left out: %s cannot be read: %s", path, error)
        return []
    history = []
    for number, row in enumerate(rows):
        figures = {names.get(key, key): value for key, value in ((k, _figure(v)) for k, v in row.items() if k) if value}
        numbers = {key: value[0] for key, value in figures.items()}
        epoch = numbers.pop("epoch", number)
        history.append({"epoch": int(epoch), **numbers})
    return history


def _figure(cell: object) -> tuple[float] | None:
    """The number of a cell, in a tuple because 0 is one, too."""
    try:
        value = float(cell) if isinstance(cell, str) else math.nan
    except ValueError:
        return None
    return (value,) if math.isfinite(value) else None


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is text, numbers and lists and dicts of them, and of a size that can be shown."""
    left, todo = _MOST_VALUES, [value]
    while todo:
        left -= 1
        item = todo.pop()
        if isinstance(item, dict):
            if not all(isinstance(key, str) and not key.startswith("$") for key in item):
                return False
            todo.extend(item.values())
        elif isinstance(item, (list, tuple)):
            todo.extend(item)
        elif item is not None and not isinstance(item, (str, int, float)):
            return False
        # A list that holds itself has no end.
        if len(todo) > left:
            return False
    return True
