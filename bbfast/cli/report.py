"""``bbfast report``: a store as a web site that opens from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bbfast.cli._frame import command, emit_json, note, screen, usage
from bbfast.cli._options import Json

__all__ = ["register"]

_EXAMPLES = """
bbfast report runs/ --out report/
bbfast report runs/ --out report/ --grid paper --published leaderboard.csv
"""


def register(app: typer.Typer) -> None:
    @command(app, "report", examples=_EXAMPLES)
    def report(
        store: Annotated[Path, typer.Argument(help="Folder of results.")],
        out: Annotated[Path, typer.Option(help="Folder of the site; a report in it is replaced.")] = Path("report"),
        grid: Annotated[
            list[str],
            typer.Option(metavar="GRID", help="Account for this grid's cells too; those run on the store always are."),
        ] = [],  # noqa: B006 - typer makes a new list for every call
        published: Annotated[
            Path | None, typer.Option(help="CSV of a published leaderboard, to show beside the results.")
        ] = None,
        title: Annotated[str, typer.Option(help="Headline of the site.")] = "Backdoor benchmark",
        json: Json = False,
    ) -> None:
        """Write a leaderboard, heat maps, coverage and a page for each run, to open in a browser without a network."""
        from bbfast.bench import load_grid
        from bbfast.report.site import write_site

        with usage():
            grids = [load_grid(source) for source in grid]
        site = write_site(store.expanduser(), out.expanduser(), grids=grids, published=published, title=title)
        for name, why in site.broken.items():
            note(f"left out {name}: {why}")
        if json:
            emit_json({"index": site.index, "runs": site.runs, "broken": dict(site.broken)})
        else:
            screen().print(f"{site.runs} runs: {site.index}", markup=False, soft_wrap=True)
