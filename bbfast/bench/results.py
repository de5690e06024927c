"""Results as tables: a grid's cells or a store's records, over seeds, pivoted, exported."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bbfast.bench.index import COLUMNS, opened
from bbfast.bench.outcomes import Book
from bbfast.bench.plan import Plan
from bbfast.errors import UnknownNameError
from bbfast.store import Store

__all__ = [
    "COSTS",
    "METRICS",
    "PLACE",
    "RECORD",
    "STATUSES",
    "aggregate",
    "grid_rows",
    "pivot",
    "pivot_rows",
    "pivots",
    "select",
    "to_csv",
    "to_json",
]

PLACE = ("dataset", "model", "attack", "ratio", "seed", "defense")
"""Where a cell stands."""
METRICS = ("c_acc", "asr", "r_acc", "der", "rir", "tpr", "fpr", "auroc")
"""What is measured: fractions."""
COSTS = ("seconds", "peak_memory_bytes")
"""What it took."""
RECORD = ("protocol", "version", "commit", "device")
"""What made it: versions of protocol and method (its number), commit and device; None where there is no result."""
STATUSES = ("done", "failed", "not_applicable", "blocked", "missing")
"""How a cell may stand."""


def grid_rows(
    plan: Plan, store: Store, *, costs: bool = False, folders: bool = False, records: bool = False
) -> list[dict[str, Any]]:
    """Every cell of a grid: its place, how it stands, and its figures.

    ``status`` is ``done``, ``failed``, ``not_applicable``, ``blocked`` (its attack failed) or ``missing``; ``reason``
    is one line where there are no figures. Two runs of a grid give the same rows, whatever they went through, unless
    costs are asked for.

    Args:
        plan: The grid's plan.
        store: Where it ran.
        costs: Add seconds and memory, which differ from run to run.
        folders: Add ``folder``, where the result lies; empty if there is none.
        records: Add the keys :data:`RECORD`.
    """
    known = Book(store).read_all(plan.tasks)
    kept = (*METRICS, *(COSTS if costs else ()))
    with opened(store) as (index, damaged):
        found = index.by_folder([outcome.folder for outcome in known.values() if outcome.folder])
    rows = []
    for cell in plan.cells:
        row: dict[str, Any] = {key: getattr(cell, key) for key in PLACE}
        status, reason, figures = "missing", "", {}
        if cell.task is None:
            status, reason = "not_applicable", cell.reason or ""
        else:
            outcome, parent = known.get(cell.task), plan.tasks[cell.task].parent
            if outcome is not None:
                status, reason = outcome.status, outcome.reason
                figures = found.get(outcome.folder, {})
                if status == "done" and not figures:
                    status, reason = "missing", damaged.get(outcome.folder, "its result is gone")
            elif parent is not None and parent in known and known[parent].status == "failed":
                status, reason = "blocked", known[parent].reason
        where = {"folder": figures.get("folder", "")} if folders else {}
        made = _record(figures) if records else {}
        rows.append(
            {**row, "status": status, "reason": reason, **where, **{key: figures.get(key) for key in kept}, **made}
        )
    return rows


def select(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows at certain places.

    Args:
        rows: See :func:`grid_rows`.
        where: Key of a place, or ``status``, to the value or list of values that a row must have.

    Raises:
        ValueError: if there is no such key.
        UnknownNameError: if no row has such a value, or it is no status; with the nearest that there are.
    """
    kept = [dict(row) for row in rows]
    for key, wanted in where.items():
        if key not in (*PLACE, "status"):
            raise ValueError(f"where takes {', '.join(PLACE)} and status, got {key!r}")
        known = set(STATUSES) if key == "status" else {row[key] for row in rows}
        values = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        if absent := [value for value in values if value not in known]:
            raise UnknownNameError(key, str(absent[0]), [str(value) for value in known])
        kept = [row for row in kept if row[key] in values]
    return kept


def aggregate(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = METRICS) -> list[dict[str, Any]]:
    """One row for each place, over its seeds: ``n`` seeds that have figures, mean and ``<metric>_std`` (of the sample;
    None for one seed)."""
    places: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    keys = [key for key in PLACE if key != "seed"]
    for row in rows:
        places.setdefault(tuple(row[key] for key in keys), []).append(row)
    table = []
    for place, members in places.items():
        members = [row for row in members if row.get("status", "done") == "done"]
        out: dict[str, Any] = {**dict(zip(keys, place, strict=True)), "n": len(members)}
        for metric in metrics:
            values = [float(row[metric]) for row in members if row.get(metric) is not None]
            out[metric] = statistics.fmean(values) if values else None
            out[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(out)
    return table


def pivot(
    rows: Sequence[Mapping[str, Any]], value: str, index: str = "attack", columns: str = "defense"
) -> tuple[list[Any], list[Any], dict[tuple[Any, Any], float]]:
    """Mean of ``value`` by two of the rows' keys.

    Returns:
        The keys down and across, in the order in which they come, and the means by (down, across).

    Raises:
        ValueError: if the rows have no such key.
    """
    for name in (value, index, columns):
        if rows and name not in rows[0]:
            raise ValueError(f"the results have no {name!r}; they have {', '.join(rows[0])}")
    groups: dict[tuple[Any, Any], list[float]] = {}
    down, across = dict.fromkeys(row[index] for row in rows), dict.fromkeys(row[columns] for row in rows)
    for row in rows:
        if row.get(value) is not None:
            groups.setdefault((row[index], row[columns]), []).append(float(row[value]))
    return list(down), list(across), {key: statistics.fmean(values) for key, values in groups.items()}


def pivots(
    rows: Sequence[Mapping[str, Any]], value: str, index: str = "attack", columns: str = "defense"
) -> Iterator[tuple[dict[str, Any], list[Any], list[Any], dict[tuple[Any, Any], float]]]:
    """A pivot for each combination of the other keys of a place; seeds are averaged. What has no figure is left out.

    Returns:
        The place, and the keys down and across with the means, as of :func:`pivot`.

    Raises:
        ValueError: if an axis is no key of a place, both are one, or ``value`` is no figure.
    """
    for name, axis in (("rows", index), ("columns", columns)):
        if axis not in PLACE:
            raise ValueError(f"{name} must be one of {', '.join(PLACE)}, got {axis!r}")
    if index == columns:
        raise ValueError(f"rows and columns must differ, got {index!r} for both")
    if value in (*PLACE, "status", "reason", "n", *RECORD):
        raise ValueError(f"{value!r} is no figure; a pivot takes {', '.join((*METRICS, *COSTS))}")
    fixed = [key for key in PLACE if key not in (index, columns, "seed")]
    places: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row[key] for key in fixed), []).append(row)
    for place, members in places.items():
        down, across, cells = pivot(members, value, index, columns)
        filled_down, filled_across = {key for key, _ in cells}, {key for _, key in cells}
        if cells:
            kept = [key for key in down if key in filled_down], [key for key in across if key in filled_across]
            yield dict(zip(fixed, place, strict=True)), *kept, cells


def pivot_rows(
    rows: Sequence[Mapping[str, Any]], value: str, index: str = "attack", columns: str = "defense"
) -> list[dict[str, Any]]:
    """All :func:`pivots` as one list of rows: the place, the key down, and a column for each key across.

    Raises:
        ValueError: as :func:`pivots`, or if a key across is called as a column that there is.
    """
    tables = list(pivots(rows, value, index, columns))
    present = {key for _, _, across, _ in tables for key in across}
    names = [key for key in dict.fromkeys(row[columns] for row in rows) if key in present]
    if taken := {str(name) for name in names} & {*PLACE, index}:
        raise ValueError(f"a column cannot be called {sorted(taken)[0]!r}; give that {columns} another label")
    return [
        {**place, index: name, **{_column(other): cells.get((name, other)) for other in names}}
        for place, down, _, cells in tables
        for name in down
    ]


def _column(key: Any) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)


def to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """CSV with a header; what is not there is empty, floats are written so that they can be read back exactly.

    Args:
        rows: All with the same keys.
        columns: The header; None takes the keys of the first row, those of the index where there is none.
    """
    out = io.StringIO()
    fields = list(columns or (rows[0] if rows else COLUMNS))
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return out.getvalue()


def to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON list of the rows."""
    return json.dumps([{key: _finite(value) for key, value in row.items()} for row in rows], indent=1) + "\n"


def _record(figures: Mapping[str, Any]) -> dict[str, Any]:
    protocol, version = (None if (n := figures.get(key)) is None else int(n) for key in ("protocol", "version"))
    commit, device = figures.get("commit_id") or None, figures.get("device")
    return {"protocol": protocol, "version": version, "commit": commit, "device": device}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
