"""What the commands of ``bbfast bench`` share: the grid, the store, and the words of a hint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast.cli._frame import usage
from bbfast.cli._options import parse_settings

if TYPE_CHECKING:
    from bbfast.bench import Plan

__all__ = ["RUNS", "Set", "Source", "StorePath", "again", "planned", "there"]

Source = Annotated[str, typer.Argument(metavar="GRID", help="A YAML file, or paper, paper-full, digits-full, smoke.")]
StorePath = Annotated[Path, typer.Option("--store", help="Folder of results.")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="A key of the grid, instead of the file's: seeds=[0,1].")
]
RUNS = Path("runs")


def planned(source: str, settings: list[str]) -> Plan:
    """The plan of a grid with changes.

    Raises:
        UsageFailure: if there is no such grid, or it is wrong.
    """
    from bbfast.bench import load_grid, make_plan

    with usage():
        return make_plan(load_grid(source, **parse_settings(settings)))


def there(store: Any) -> Any:
    """``store``, if its folder is there."""
    from bbfast.errors import ArtifactError

    if not store.root.is_dir():
        raise ArtifactError(f"there is no store at {store.root}; name the folder with --store")
    return store


def again(verb: str, source: str, store: Path, settings: list[str], *more: str) -> str:
    """The command line that does something else with the same grid."""
    changes = [word for setting in settings for word in ("--set", setting)]
    return shlex.join(["bbfast", "bench", verb, source, "--store", str(store), *changes, *more])
