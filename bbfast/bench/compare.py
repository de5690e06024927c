"""Our results beside a published leaderboard."""

from __future__ import annotations

import csv
import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbfast.bench.grid import NO_DEFENSE
from bbfast.errors import ArtifactError, UnknownNameError

__all__ = ["Comparison", "compare", "load_published"]

_COLUMNS = ("dataset", "backbone", "attack_name", "defense_name", "ratio", "test_acc", "test_asr", "test_ra")
_DATASETS = {"tiny": "tiny_imagenet"}
_FIGURES = {"c_acc": "test_acc", "asr": "test_asr", "r_acc": "test_ra"}

Place = tuple[str, str, str, float, str]


class Comparison(dict[str, Any]):
    """``cells``: rows with both figures and their difference (ours minus theirs); ``coverage``: counts;
    ``summary``: mean and mean absolute difference of each metric; ``apart``: of what part of a place (data set, model,
    attack, ratio, defense) the two tables have nothing in common, with both sides' values."""


def load_published(path: str | Path) -> dict[Place, dict[str, float | None]]:
    """A published table: place (data set, model, attack, ratio, defense) in our names to ``c_acc``, ``asr``, ``r_acc``.

    Args:
        path: CSV with the columns dataset, backbone, attack_name, defense_name, ratio, test_acc, test_asr, test_ra;
            fractions; a cell that was not run is empty.

    Raises:
        ArtifactError: if it cannot be read, or columns or numbers are wrong; naming the line.
    """
    path = Path(path).expanduser()
    table: dict[Place, dict[str, float | None]] = {}
    attack, defense = functools.cache(_attack), functools.cache(_defense)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ArtifactError(f"{path}: expected the columns {', '.join(_COLUMNS)}; missing: {missing}")
            for line in reader:
                place = (
                    _DATASETS.get(line["dataset"], line["dataset"]),
                    line["backbone"],
                    attack(line["attack_name"]),
                    float(line["ratio"]),
                    defense(line["defense_name"]),
                )
                table[place] = {ours: _number(line[theirs]) for ours, theirs in _FIGURES.items()}
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}, line {reader.line_num}: {error}") from error
    return table


def compare(rows: Sequence[Mapping[str, Any]], published: Mapping[Place, Mapping[str, float | None]]) -> Comparison:
    """Match results with a published table; several of ours at one place (seeds) are averaged.

    Args:
        rows: With the keys dataset, model, attack, ratio, defense and the metrics; see
            :func:`bbfast.bench.results.grid_rows`.
        published: See :func:`load_published`.
    """
    ours: dict[Place, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("c_acc") is not None and row.get("ratio") is not None:
            place = (row["dataset"], row["model"], row["attack"], float(row["ratio"]), row["defense"])
            ours.setdefault(place, []).append(row)
    filled = {place for place, figures in published.items() if figures["c_acc"] is not None}
    cells = []
    for place in sorted(filled & ours.keys()):
        cell: dict[str, Any] = dict(
            zip(("dataset", "model", "attack", "ratio", "defense"), place, strict=True), n=len(ours[place])
        )
        for metric in _FIGURES:
            mine = [float(row[metric]) for row in ours[place] if row.get(metric) is not None]
            theirs = published[place][metric]
            both = bool(mine) and theirs is not None
            cell[metric] = statistics.fmean(mine) if mine else None
            cell[f"{metric}_published"] = theirs
            cell[f"{metric}_difference"] = cell[metric] - theirs if both and theirs is not None else None
        cells.append(cell)
    summary = {}
    for metric in _FIGURES:
        gaps = [c[f"{metric}_difference"] for c in cells if c[f"{metric}_difference"] is not None]
        summary[metric] = {
            "n": len(gaps),
            "mean_difference": statistics.fmean(gaps) if gaps else None,
            "mean_absolute_difference": statistics.fmean(map(abs, gaps)) if gaps else None,
        }
    coverage = {
        "published": len(filled),
        "published_empty": len(published) - len(filled),
        "ours": len(ours),
        "matched": len(cells),
        "ours_only": len(ours.keys() - filled),
    }
    return Comparison(cells=cells, coverage=coverage, summary=summary, apart=_apart(ours, filled))


def _apart(ours: Iterable[Place], theirs: Iterable[Place]) -> dict[str, tuple[list[Any], list[Any]]]:
    columns = ("dataset", "model", "attack", "ratio", "defense")
    sides = [[sorted(set(values)) for values in zip(*places, strict=True)] for places in (list(ours), list(theirs))]
    if not all(sides):
        return {}
    return {key: (a, b) for key, a, b in zip(columns, *sides, strict=True) if not set(a) & set(b)}


def _attack(name: str) -> str:
    from bbfast import attacks

    try:
        return str(attacks.info(name)["name"])
    except UnknownNameError:
        return name


def _defense(name: str) -> str:
    from bbfast import defenses

    if name in ("no defense", "no_defense", "none", ""):
        return NO_DEFENSE
    try:
        return defenses.find(name).name
    except UnknownNameError:
        return name


def _number(text: str) -> float | None:
    return float(text) if text.strip() else None
