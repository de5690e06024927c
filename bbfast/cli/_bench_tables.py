"""Tables of ``bbfast bench`` on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from bbfast.bench import pivot
from bbfast.bench.results import METRICS, PLACE

__all__ = ["differences", "failures", "listed", "pivoted", "reasons"]

_SHOWN = 12
"""Reasons and differences that are listed; --json has all."""
_FIXED = ("dataset", "model", "ratio")
"""What a pivot does not average over."""


def reasons(counts: Mapping[str, int]) -> Table:
    """Why cells are not applicable, the most frequent reasons first."""
    table = _plain("not applicable")
    table.show_header = False
    table.add_column(justify="right")
    table.add_column()
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    for reason, count in ranked[:_SHOWN]:
        table.add_row(str(count), escape(reason))
    if rest := ranked[_SHOWN:]:
        table.add_row(str(sum(count for _, count in rest)), f"for {len(rest)} more reasons; --json has them all")
    return table


def failures(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each reason for which cells have failed: how many, the first of them, and why."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["reason"], []).append(row)
    for reason, members in groups.items():
        first = members[0]
        where = " ".join(_text(first[key]) for key in ("dataset", "model", "attack", "ratio", "defense"))
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        yield f"  {where}, seed {first['seed']}{more}: {reason}"


def listed(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a row, metrics in per cent; columns of figures that no row has are left out."""
    shown = [key for key in (*PLACE, "status", "n", *METRICS, *_deviations(), "seconds") if rows and key in rows[0]]
    optional = {*METRICS, *_deviations(), "seconds"}
    shown = [key for key in shown if key not in optional or any(row[key] is not None for row in rows)]
    # What is the same in every row says nothing.
    shown = [key for key in shown if key != "status" or len({row[key] for row in rows}) > 1]
    table = _plain()
    for key in shown:
        table.add_column(key.replace("_std", " ±"), justify="right" if key in optional else "left")
    for row in rows:
        table.add_row(*(_cell(key, row[key]) for key in shown))
    return table


def pivoted(rows: Sequence[Mapping[str, Any]], value: str, width: int) -> Iterator[tuple[str, Table]]:
    """Attacks by defenses, a title and a table for each data set, model and ratio; seeds are averaged.

    What has no figure is left out. A table that is wider than ``width`` characters is continued in another.

    Raises:
        ValueError: if the rows have no such figure.
    """
    places: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row[key] for key in _FIXED), []).append(row)
    for (dataset, model, ratio), members in places.items():
        down, across, cells = pivot(members, value)
        if not cells:
            continue
        seeds = len({row["seed"] for row in members}) if "seed" in members[0] else 1
        title = f"{value}, %: {dataset}, {model}, ratio {ratio:g}" + (f", mean of {seeds} seeds" if seeds > 1 else "")
        down = [name for name in down if any((name, other) in cells for other in across)]
        across = [other for other in across if any((name, other) in cells for name in down)]
        for part in _split(across, width - max(len("attack"), *(len(str(name)) for name in down))):
            table = _plain()  # a table's own title is broken where the table ends
            for name in ("attack", *map(str, part)):
                table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
            for name in down:
                table.add_row(str(name), *(_percent(cells.get((name, other))) for other in part))
            yield (title if part[0] == across[0] else f"{title} (continued)"), table


def differences(cells: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """The cells that differ most from the published ones."""
    key = f"{metric}_difference"
    ranked = sorted((cell for cell in cells if cell[key] is not None), key=lambda cell: -abs(cell[key]))
    table = _plain(f"{metric}, %: the largest differences")
    place = ("dataset", "model", "attack", "ratio", "defense")
    for name in (*place, "ours", "theirs", "difference"):
        table.add_column(name, justify="left" if name in place else "right")
    for cell in ranked[:_SHOWN]:
        figures = (_percent(cell[metric]), _percent(cell[f"{metric}_published"]), f"{100 * cell[key]:+.1f}")
        table.add_row(*(_text(cell[name]) for name in place), *figures)
    return table


def _split(names: Sequence[Any], width: int) -> Iterator[list[Any]]:
    """``names`` in parts whose columns fit, at least one in each."""
    part: list[Any] = []
    left = width
    for name in names:
        needed = max(len(str(name)), len("100.0")) + 2
        if part and needed > left:
            yield part
            part, left = [], width
        part.append(name)
        left -= needed
    if part:
        yield part


def _plain(title: str | None = None) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def _deviations() -> tuple[str, ...]:
    return tuple(f"{metric}_std" for metric in METRICS)


def _cell(key: str, value: Any) -> str:
    if key == "seconds":
        return "" if value is None else f"{value:.0f}"
    return _percent(value) if key in METRICS or key.endswith("_std") else escape(_text(value))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
