"""Tables of ``bbfast bench`` on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from bbfast.bench.results import METRICS, PLACE, pivots

__all__ = ["differences", "failures", "listed", "pivoted", "refused", "tracebacks"]

_SHOWN = 12
"""Reasons and differences that are listed; --json has all."""
_NAMED = 4
"""Names that are written out where a reason holds; of more there is the number."""
_WHERE = ("dataset", "model", "attack", "ratio", "defense")
_NUMBER = re.compile(r"\b\d+(\.\d+)?\b")
_GIB = 2**30
_COSTS = ("seconds", "peak_memory_bytes")


def refused(groups: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]]) -> Table:
    """Why cells are not applicable, the most frequent reasons first, and where; those that differ in numbers are one.

    Args:
        groups: See :func:`bbfast.bench.failures.refusals`.
        every: All cells.
    """
    table = _plain("not applicable")
    table.show_header = False
    table.add_column(justify="right")
    table.add_column()
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for group in groups:
        alike.setdefault(_NUMBER.sub("#", group["reason"]), []).append(group)
    ranked = sorted(
        ((sum(group["count"] for group in members), members) for members in alike.values()), key=lambda each: -each[0]
    )
    whole = {key: list(dict.fromkeys(row[key] for row in every)) for key in _WHERE}
    for count, members in ranked[:_SHOWN]:
        place = _place([cell for group in members for cell in group["cells"]], whole)
        others = " (and the like, with other numbers)" if len(members) > 1 else ""
        table.add_row(str(count), escape(f"{place}{': ' if place else ''}{members[0]['reason']}{others}"))
    if rest := ranked[_SHOWN:]:
        table.add_row(str(sum(count for count, _ in rest)), f"for {len(rest)} more reasons; --json has them all")
    return table


def _place(cells: Sequence[Mapping[str, Any]], whole: Mapping[str, Sequence[Any]]) -> str:
    """Where a reason holds, in words: what it does not depend on is left out."""
    parts = []
    for key, every in whole.items():
        found = {each for cell in cells for each in (cell["defenses"] if key == "defense" else (cell[key],))}
        values = [_text(value) for value in every if value in found]
        if len(values) < len(every):
            shown = ", ".join(values) if len(values) <= _NAMED else f"{len(values)} of {len(every)} {key}s"
            parts.append(f"ratio {shown}" if key == "ratio" and len(values) <= _NAMED else shown)
    return " / ".join(parts)


def failures(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each reason for which stages have failed: how many, the first of them, and why.

    Args:
        found: See :func:`bbfast.bench.failures.failures`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for each in found:
        groups.setdefault(each["reason"], []).append(each)
    for reason, members in groups.items():
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        yield f"  {members[0]['stage']}{more}: {reason}"


def tracebacks(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every failed stage with what is recorded of it."""
    for each in found:
        yield f"{each['stage']}: {each['reason']}"
        record = each["record"]
        versions = record.get("versions", {})
        facts = {
            "device": record.get("spec", {}).get("device"),
            "ended": record.get("ended"),
            **{name: versions.get(name) for name in ("bbfast", "commit", "protocol", "torch")},
            "attempts": each["attempts"],
            "seconds": f"{each['seconds']:.1f}",
            "cells that wait for it": each["waiting"] or None,
        }
        yield "  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        for line in each["traceback"].rstrip().splitlines() or ["(no traceback: its process was ended, or lost)"]:
            yield f"  {line}"


def listed(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a row, metrics in per cent; columns of figures that no row has are left out."""
    optional = (*METRICS, *(f"{key}_std" for key in METRICS), *_COSTS, *(f"{key}_std" for key in _COSTS))
    shown = [key for key in (*PLACE, "status", "n", *optional) if rows and key in rows[0]]
    shown = [key for key in shown if key not in optional or any(row[key] is not None for row in rows)]
    # What is the same in every row says nothing.
    shown = [key for key in shown if key != "status" or len({row[key] for row in rows}) > 1]
    table = _plain()
    for key in shown:
        name = key.removesuffix("_std").replace("peak_memory_bytes", "GiB") + (" ±" if key.endswith("_std") else "")
        table.add_column(name, justify="right" if key in optional else "left")
    for row in rows:
        table.add_row(*(_figure(key, row[key]) if key in optional else escape(_text(row[key])) for key in shown))
    return table


def pivoted(
    rows: Sequence[Mapping[str, Any]], value: str, width: int, index: str = "attack", columns: str = "defense"
) -> Iterator[tuple[str, Table]]:
    """A title and a table for each place, attacks by defenses if nothing else is asked for; seeds are averaged.

    What has no figure is left out. A table that is wider than ``width`` characters is continued in another.

    Raises:
        ValueError: as :func:`bbfast.bench.results.pivots`.
    """
    seeds = len({row["seed"] for row in rows}) if rows and "seed" in rows[0] and "seed" not in (index, columns) else 1
    for place, down, across, cells in pivots(rows, value, index, columns):
        where = ", ".join(f"ratio {each:g}" if key == "ratio" else _text(each) for key, each in place.items())
        title = f"{value}, {_unit(value)}: {where}" + (f", mean of {seeds} seeds" if seeds > 1 else "")
        for part in _split(across, width - max(len(index), *(len(_text(name)) for name in down))):
            table = _plain()  # a table's own title is broken where the table ends
            for i, name in enumerate((index, *map(_text, part))):
                table.add_column(escape(name), justify="right" if i else "left", no_wrap=True)
            for name in down:
                figures = (_figure(value, cells.get((name, other))) for other in part)
                table.add_row(escape(_text(name)), *figures)
            yield (title if part[0] == across[0] else f"{title} (continued)"), table


def differences(cells: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """The cells that differ most from the published ones."""
    key = f"{metric}_difference"
    ranked = sorted((cell for cell in cells if cell[key] is not None), key=lambda cell: -abs(cell[key]))
    table = _plain(f"{metric}, %: the largest differences")
    for name in (*_WHERE, "ours", "theirs", "difference"):
        table.add_column(name, justify="left" if name in _WHERE else "right")
    for cell in ranked[:_SHOWN]:
        figures = (_percent(cell[metric]), _percent(cell[f"{metric}_published"]), f"{100 * cell[key]:+.1f}")
        table.add_row(*(_text(cell[name]) for name in _WHERE), *figures)
    return table


def _split(names: Sequence[Any], width: int) -> Iterator[list[Any]]:
    """``names`` in parts whose columns fit, at least one in each."""
    part: list[Any] = []
    left = width
    for name in names:
        needed = max(len(_text(name)), len("100.0")) + 2
        if part and needed > left:
            yield part
            part, left = [], width
        part.append(name)
        left -= needed
    if part:
        yield part


def _plain(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def _unit(key: str) -> str:
    return {"seconds": "s", "peak_memory_bytes": "GiB"}.get(key.removesuffix("_std"), "%")


def _figure(key: str, value: float | None) -> str:
    if value is None or (unit := _unit(key)) == "%":
        return _percent(value)
    return f"{value:.1f}" if unit == "s" else f"{value / _GIB:.2f}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
