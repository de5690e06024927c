"""Our results beside a published leaderboard."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bbfast.bench.published import FIGURES, Place

__all__ = ["COMPARED", "Comparison", "compare"]

_PLACE = ("dataset", "model", "attack", "ratio", "defense")
COMPARED = (*_PLACE, "n", *(f"{metric}{end}" for metric in FIGURES for end in ("", "_published", "_difference")))
"""The keys of a compared cell."""


class Comparison(dict[str, Any]):
    """``cells``: rows with both figures and their difference (ours minus theirs); ``coverage``: counts;
    ``summary``: mean and mean absolute difference of each metric; ``apart``: of what part of a place (data set, model,
    attack, ratio, defense) the two tables have nothing in common, with both sides' values."""


def compare(rows: Sequence[Mapping[str, Any]], published: Mapping[Place, Mapping[str, float | None]]) -> Comparison:
    """Match results with a published table; several of ours at one place (seeds) are averaged. What is not a finite
    number, on either side, counts as not there.

    Args:
        rows: With the keys dataset, model, attack, ratio, defense and the metrics; see
            :func:`bbfast.bench.results.grid_rows`.
        published: See :func:`bbfast.bench.read_published`.
    """
    ours: dict[Place, list[Mapping[str, Any]]] = {}
    for row in rows:
        if _known(row.get("c_acc")) and row.get("ratio") is not None:
            place = (row["dataset"], row["model"], row["attack"], float(row["ratio"]), row["defense"])
            ours.setdefault(place, []).append(row)
    filled = {place for place, figures in published.items() if _known(figures["c_acc"])}
    cells = []
    for place in sorted(filled & ours.keys()):
        cell: dict[str, Any] = dict(zip(_PLACE, place, strict=True), n=len(ours[place]))
        for metric in FIGURES:
            mine = [float(row[metric]) for row in ours[place] if _known(row.get(metric))]
            theirs = published[place][metric] if _known(published[place][metric]) else None
            cell[metric] = statistics.fmean(mine) if mine else None
            cell[f"{metric}_published"] = theirs
            cell[f"{metric}_difference"] = cell[metric] - theirs if mine and theirs is not None else None
        cells.append(cell)
    summary = {}
    for metric in FIGURES:
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


def _known(figure: float | None) -> bool:
    return figure is not None and math.isfinite(figure)


def _apart(ours: Iterable[Place], theirs: Iterable[Place]) -> dict[str, tuple[list[Any], list[Any]]]:
    sides = [[sorted(set(values)) for values in zip(*places, strict=True)] for places in (list(ours), list(theirs))]
    if not all(sides):
        return {}
    return {key: (a, b) for key, a, b in zip(_PLACE, *sides, strict=True) if not set(a) & set(b)}
