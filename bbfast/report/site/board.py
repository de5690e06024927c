"""The lines of the leaderboard: a place in the grid each, with the mean over its seeds, or why there is none."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bbfast.bench import Plan, grid_rows
from bbfast.bench.published import Place
from bbfast.report.page import METRICS
from bbfast.report.site.records import Record
from bbfast.store import Store

__all__ = ["board_lines", "coverage", "per_run_rows", "reasons"]

Line = dict[str, Any]
STATUSES = ("done", "failed", "blocked", "not_applicable", "missing", "published")
_PLACE = ("dataset", "model", "attack", "ratio", "defense")
_METRICS = tuple(column.key for column in METRICS)


def board_lines(
    plans: Sequence[Plan],
    store: Store,
    records: Mapping[str, Record],
    published: Mapping[Place, Mapping[str, float | None]] | None = None,
) -> list[Line]:
    """Every cell of ``plans``, then the results that belong to none of them, then published cells that nothing matches.

    A line has the keys dataset, model, attack, ratio, defense, kind, status (one of :data:`STATUSES`: the best of its
    seeds), reason, settings, n, metrics, spread (standard deviations, from two seeds on), seconds, runs (seed and
    folder) and published (figures of the published table, or None). Nothing is merged that differs in more than its
    seed.
    """
    lines: list[Line] = []
    shown: set[str] = set()
    for plan in plans:
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for cell in grid_rows(plan, store, costs=True, folders=True):
            groups.setdefault(tuple(cell[key] for key in _PLACE), []).append(cell)
        for cells in groups.values():
            folders = {cell["folder"] for cell in cells if cell["folder"]}
            # Two grids may share cells; one line is enough.
            if folders and folders <= shown:
                continue
            shown |= folders
            lines.append(_line(cells, records))
    for record in records.values():
        if record.folder not in shown:
            lines.append(_line([{**record.row, "status": "done", "reason": ""}], records))
    return _beside(lines, published or {})


def per_run_rows(lines: Iterable[Line], records: Mapping[str, Record]) -> list[Line]:
    """A flat row for each run, and for each cell without one: what the CSV and JSON files hold."""
    rows = []
    for line in lines:
        place = {key: line[key] for key in (*_PLACE, "kind", "status", "reason", "settings")}
        theirs = line["published"] or {}
        pub = {f"published_{key}": theirs.get(key) for key in ("c_acc", "asr", "r_acc")}
        for run in line["runs"] or [None]:
            row = records[run["folder"]].row if run else {}
            figures = {key: row.get(key) for key in (*_METRICS, "seconds", "peak_memory_bytes")}
            rows.append(
                {**place, "seed": run and run["seed"], **figures, **pub, "folder": run["folder"] if run else ""}
            )
    return rows


def coverage(lines: Iterable[Line]) -> list[Line]:
    """Lines by data set and model: how many stand how; published ones that nothing matches are not counted."""
    table: dict[tuple[str, str], Counter[str]] = {}
    for line in lines:
        if line["status"] != "published":
            table.setdefault((line["dataset"], line["model"]), Counter())[line["status"]] += 1
    names = STATUSES[:-1]
    return [
        {"dataset": d, "model": m, "total": found.total(), **{name: found[name] for name in names}}
        for (d, m), found in sorted(table.items())
    ]


def reasons(lines: Iterable[Line]) -> list[Line]:
    """Why there are no figures: status, reason, how many lines; the most frequent first."""
    counts = Counter((line["status"], line["reason"]) for line in lines if line["reason"])
    return [{"status": status, "reason": reason, "count": n} for (status, reason), n in counts.most_common()]


def _line(cells: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> Line:
    done = [cell for cell in cells if cell["status"] == "done" and cell["folder"] in records]
    first = min(cells, key=lambda cell: STATUSES.index(cell["status"]))
    values = {key: [float(c[key]) for c in done if c.get(key) is not None] for key in (*_METRICS, "seconds")}
    record = records[done[0]["folder"]] if done else None
    return {
        **{key: first[key] for key in _PLACE},
        "kind": str(record.row["kind"] or "") if record else "",
        "status": first["status"] if done or first["status"] != "done" else "missing",
        "reason": "" if done else str(first["reason"]),
        "settings": record.changed if record else "",
        "n": len(done),
        "metrics": {key: statistics.fmean(values[key]) for key in _METRICS if values[key]},
        "spread": {key: statistics.stdev(values[key]) for key in _METRICS if len(values[key]) > 1},
        "seconds": statistics.fmean(values["seconds"]) if values["seconds"] else None,
        "runs": [{"seed": cell["seed"], "folder": cell["folder"]} for cell in done],
        "published": None,
    }


def _beside(lines: list[Line], published: Mapping[Place, Mapping[str, float | None]]) -> list[Line]:
    """The lines with the published figures of their place, then the published places that none of them has."""
    matched = set()
    for line in lines:
        if line["ratio"] is None:
            continue
        place = (line["dataset"], line["model"], line["attack"], float(line["ratio"]), line["defense"])
        found = published.get(place)
        if found is not None and found["c_acc"] is not None:
            line["published"] = {key: value for key, value in found.items() if value is not None}
            matched.add(place)
    blank = {"kind": "", "status": "published", "reason": "", "settings": "", "n": 0, "metrics": {}, "spread": {}}
    rest = [
        {
            **dict(zip(_PLACE, place, strict=True)),
            **blank,
            "seconds": None,
            "runs": [],
            "published": {key: value for key, value in figures.items() if value is not None},
        }
        for place, figures in published.items()
        if place not in matched and figures["c_acc"] is not None
    ]
    return lines + rest
