"""A published leaderboard, read strictly: one reader for every comparison with it."""

from __future__ import annotations

import csv
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bbfast.bench.grid import NO_DEFENSE
from bbfast.errors import ArtifactError, UnknownNameError

__all__ = ["FIGURES", "Place", "read_published"]

_log = logging.getLogger(__name__)

Place = tuple[str, str, str, float, str]
"""Data set, model, attack, ratio, defense; in our names."""

FIGURES = {"c_acc": "test_acc", "asr": "test_asr", "r_acc": "test_ra"}
"""Our metrics to the columns of the table."""

_COLUMNS = ("dataset", "backbone", "attack_name", "defense_name", "ratio", *FIGURES.values())
_DATASETS = {"tiny": "tiny_imagenet"}
_NOT_MEASURED = -1.0
"""What the published table has where a run gave no figures."""


def read_published(path: str | Path) -> dict[Place, dict[str, float | None]]:
    """A published table: place (data set, model, attack, ratio, defense) in our names to ``c_acc``, ``asr``, ``r_acc``.

    Args:
        path: CSV in UTF-8 with the columns dataset, backbone, attack_name, defense_name, ratio, test_acc, test_asr,
            test_ra in any order; fractions in 0..1; a figure that was not measured is empty or -1. Other columns are
            not read, and a warning names them.

    Raises:
        ArtifactError: if it cannot be read, a column is missing, a line is short or long, a number is none or out of
            range, or a place stands there twice; naming file, line and column, what was expected and what came.
    """
    path = Path(path).expanduser()
    table: dict[Place, dict[str, float | None]] = {}
    lines: dict[Place, int] = {}
    attack, defense = functools.cache(_attack), functools.cache(_defense)
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        names = {key: _name(line[key], f"{where}, column {key}") for key in ("dataset", "backbone", "attack_name")}
        ratio = _fraction(line["ratio"], f"{where}, column ratio")
        if ratio is None:
            raise ArtifactError(f"{where}, column ratio: expected a fraction in 0..1, got {line['ratio']!r}")
        place = (
            _DATASETS.get(names["dataset"], names["dataset"]),
            names["backbone"],
            attack(names["attack_name"]),
            ratio,
            defense(line["defense_name"].strip()),
        )
        if place in lines:
            raise ArtifactError(f"{where}: expected each place once, {place} stands in line {lines[place]} already")
        lines[place] = number
        table[place] = {ours: _fraction(line[theirs], f"{where}, column {theirs}") for ours, theirs in FIGURES.items()}
    return table


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Every line after the head with its number; all have the same columns."""
    try:
        # Spreadsheets begin a file with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            try:
                head = [name.strip() for name in next(reader, [])]
                _check_head(head, path)
                for fields in reader:
                    if not fields:
                        continue
                    if len(fields) != len(head):
                        raise ArtifactError(
                            f"{path}, line {reader.line_num}: expected {len(head)} fields, got {len(fields)}"
                        )
                    yield reader.line_num, dict(zip(head, fields, strict=True))
            except (csv.Error, UnicodeDecodeError) as error:
                raise ArtifactError(f"{path}, after line {reader.line_num}: {error}") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


def _check_head(head: list[str], path: Path) -> None:
    # A table that was written with its index has a column without a name.
    unknown = [name for name in head if name and name not in _COLUMNS]
    missing = [name for name in _COLUMNS if name not in head]
    if missing:
        others = f"; not known: {unknown}" if unknown else ""
        raise ArtifactError(f"{path}: expected the columns {', '.join(_COLUMNS)}; missing: {missing}{others}")
    if twice := sorted({name for name in head if name and head.count(name) > 1}):
        raise ArtifactError(f"{path}: expected each column once, twice: {twice}")
    if unknown:
        _log.warning("%s: these columns are not read: %s", path, ", ".join(unknown))


def _name(text: str, where: str) -> str:
    if not text.strip():
        raise ArtifactError(f"{where}: expected a name, got nothing")
    return text.strip()


def _fraction(text: str, where: str) -> float | None:
    """None of an empty cell and of one that was not measured."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value == _NOT_MEASURED:
        return None
    if not 0 <= value <= 1:
        hint = "; per cent are divided by 100" if 1 < value <= 100 else ""
        raise ArtifactError(f"{where}: expected a fraction in 0..1, got {text!r}{hint}")
    return value


def _attack(name: str) -> str:
    from bbfast import attacks

    return _known(lambda: str(attacks.info(name)["name"]), name)


def _defense(name: str) -> str:
    from bbfast import defenses

    if name in ("no defense", "no_defense", "none", ""):
        return NO_DEFENSE
    return _known(lambda: defenses.find(name).name, name)


def _known(ours: Callable[[], str], name: str) -> str:
    """A published method that we do not have keeps its name."""
    try:
        return ours()
    except UnknownNameError:
        return name
