"""The table of an attack and its defenses on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bbfast.cli._frame import screen
from bbfast.report.page import METRICS, Row

__all__ = ["show_results"]


def show_results(rows: Sequence[Row], title: str) -> None:
    """Print one line a row, metrics in per cent; columns that no row fills are left out, other gaps show a dash."""
    console = screen()
    console.print(_table(rows, title))
    text = "In per cent." + (
        " * There already; seconds of the run that made it." if any(r.reused for r in rows) else ""
    )
    console.print(text, style="dim")


def _table(rows: Sequence[Row], title: str) -> Table:
    # No lines between columns: with them the demo's table does not fit the 80 columns of a usual terminal.
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, pad_edge=False
    )
    table.add_column("Method", no_wrap=True, style="cyan")
    table.add_column("Kind", no_wrap=True, style="dim")
    used = [column for column in METRICS if any(_defined(row.metrics.get(column.key)) for row in rows)]
    for column in used:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("Sec.", justify="right", no_wrap=True)
    for row in rows:
        cells = [_percent(row.metrics.get(column.key)) for column in used]
        seconds = (f"{row.seconds:.1f}" if _defined(row.seconds) else "-") + ("*" if row.reused else "")
        table.add_row(escape(row.name), row.kind, *cells, seconds, end_section=row.kind == "attack" and len(rows) > 1)
    return table


def _defined(value: float | None) -> bool:
    return value is not None and value == value


def _percent(value: float | None) -> Text:
    if value is None or value != value:
        return Text("-", style="dim")
    return Text(f"{100 * value:.2f}")
