"""``bbfast list``: what there is to choose from."""

from __future__ import annotations

import importlib
import importlib.util
from enum import Enum
from typing import Annotated, Any

import typer
from rich.table import Table

from bbfast.cli._frame import command, emit_json, screen
from bbfast.cli._options import Json

__all__ = ["Kind", "names", "register"]


class Kind(str, Enum):
    """Everything that is found by name."""

    attacks = "attacks"
    defenses = "defenses"
    datasets = "datasets"
    models = "models"
    analysis = "analysis"
    studies = "studies"


def names(kind: str) -> list[str]:
    """The registered names of a kind, third-party ones included; none for a part that is not installed."""
    if importlib.util.find_spec(f"bbfast.{kind}") is None:
        return []
    found: list[str] = importlib.import_module(f"bbfast.{kind}").available()
    return found


def describe(kind: str, name: str) -> dict[str, Any]:
    """What is known about one entry, as plain data; empty for kinds that tell only their name."""
    info = getattr(importlib.import_module(f"bbfast.{kind}"), "info", None)
    return dict(info(name)) if callable(info) else {}


def register(app: typer.Typer) -> None:
    @command(app, "list", examples="bbfast list\nbbfast list attacks\nbbfast list defenses --json")
    def list_names(
        kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
        json: Json = False,
    ) -> None:
        """List the attacks, defenses, data sets, models, analysis tools and studies by name."""
        kinds = [kind] if kind else list(Kind)
        found = {k.value: names(k.value) for k in kinds}
        if json:
            emit_json(found[kind.value] if kind else found)
            return
        for k in kinds:
            screen().print(_table(k.value, found[k.value]))


def _table(kind: str, found: list[str]) -> Table:
    table = Table(
        title=f"{kind} ({len(found)})",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True)
    for name in found:
        card = describe(kind, name)
        table.add_row(name, str(card.get("year") or ""), str(card.get("title") or card.get("summary") or ""))
    return table
