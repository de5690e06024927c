"""Results as tables: a grid's cells or a store's records, over seeds, pivoted, exported."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bbfast.bench.index import COLUMNS, opened
from bbfast.bench.outcomes import Book
from bbfast.bench.plan import Plan
from bbfast.errors import UnknownNameError
from bbfast.store import Store

__all__ = ["COSTS", "METRICS", "PLACE", "aggregate", "grid_rows", "pivot", "select", "to_csv", "to_json"]

PLACE = ("dataset", "model", "attack", "ratio", "seed", "defense")
"""Where a cell stands."""
METRICS = ("c_acc", "asr", "r_acc", "der", "rir", "tpr", "fpr", "auroc")
"""What is measured: fractions."""
COSTS = ("seconds", "peak_memory_bytes")
"""What it took."""


def grid_rows(plan: Plan, store: Store, *, costs: bool = False, folders: bool = False) -> list[dict[str, Any]]:
    """Every cell of a grid: its place, how it stands, and its figures.

    ``status`` is ``done``, ``failed``, ``not_applicable``, ``blocked`` (its attack failed) or ``missing``; ``reason``
    is one line where there are no figures. Two runs of a grid give the same rows, whatever they went through, unless
    costs are asked for.

    Args:
        plan: The grid's plan.
        store: Where it ran.
        costs: Add seconds and memory, which differ from run to run.
        folders: Add ``folder``, where the result lies; empty if there is none.
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
        rows.append({**row, "status": status, "reason": reason, **where, **{key: figures.get(key) for key in kept}})
    return rows


def select(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows at certain places.

    Args:
        rows: See :func:`grid_rows`.
        where: Key of a place, or ``status``, to the value or list of values that a row must have.

    Raises:
        ValueError: if there is no such key.
        UnknownNameError: if no row has such a value, with the nearest that there are.
    """
    kept = [dict(row) for row in rows]
    for key, wanted in where.items():
        if key not in (*PLACE, "status"):
            raise ValueError(f"where takes {', '.join(PLACE)} and status, got {key!r}")
        known = {row[key] for row in rows}
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


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header; what is not there is empty, floats are written so that they can be read back exactly."""
    out = io.StringIO()
    fields = list(rows[0]) if rows else list(COLUMNS)
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return out.getvalue()


def to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON list of the rows."""
    return json.dumps([{key: _finite(value) for key, value in row.items()} for row in rows], indent=1) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
