"""``bbfast analyze``: look into a stored model with a tool, or with several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bbfast.cli._frame import command, emit_json, screen, usage
from bbfast.cli._options import Device, Json, parse_settings, parse_settings_of

__all__ = ["register"]

_EXAMPLES = """
bbfast analyze confusion_matrix --attack runs/attack-badnets-0123456789ab
bbfast analyze confusion_matrix --attack runs/attack-badnets-0123456789ab --defense runs/defense-ft-0123456789ab
bbfast analyze grad_cam --attack runs/attack-badnets-0123456789ab --set layer=stage2
bbfast analyze quick --attack runs/attack-badnets-0123456789ab
bbfast analyze tsne,grad_cam --attack runs/attack-badnets-0123456789ab --set grad_cam.layer=stage2
bbfast analyze metrics --attack runs/attack-badnets-0123456789ab --compare runs/defense-ft-0123456789ab
"""
_SETTINGS = "A setting of the tool, of several TOOL.KEY=VALUE; may be repeated. `bbfast info analysis NAME` lists them."


def register(app: typer.Typer) -> None:
    @command(app, "analyze", examples=_EXAMPLES)
    def analyze(
        name: Annotated[
            str,
            typer.Argument(
                help="The tool; `bbfast list analysis` shows them. Several with commas between, `all`, or `quick`: "
                "those that cost a few passes over the test images at most."
            ),
        ],
        attack: Annotated[Path, typer.Option(help="Folder of the attack's result.")],
        defense: Annotated[Path | None, typer.Option(help="Folder of a defense's: its model is looked at.")] = None,
        compare: Annotated[
            list[Path],
            typer.Option(
                metavar="RUN",
                help="Folder of another result, a defense of this attack or another attack, that is looked at too, and "
                "placed beside it; may be repeated.",
            ),
        ] = [],  # noqa: B006 - typer makes a new list for every call
        settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=_SETTINGS)] = [],  # noqa: B006 - typer makes a new list for every call
        device: Device = "auto",
        out: Annotated[
            Path | None,
            typer.Option(
                help="Folder of figure and numbers, or of a folder for each of several tools (with --compare for each "
                "result, and in it for each tool); analysis/RUN/NAME in the store if left out."
            ),
        ] = None,
        figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figure.")] = True,
        json: Json = False,
    ) -> None:
        """Look at an attacked or defended model: a figure, and the numbers behind it.

        Under `all` and `quick` a tool that does not apply, or whose package is not installed, is skipped, and one that
        fails does not stop the others.
        """
        from bbfast import analysis
        from bbfast.analysis.several import GROUPS, planned
        from bbfast.cli import _analyze_many as several

        many = name in GROUPS or "," in name
        with usage():
            if many:
                tools = planned(name, parse_settings_of(settings))
            else:
                tools = [analysis.create(name, **parse_settings(settings))]
        runs = several.runs_of(attack, defense, compare)
        if many or compare:
            several.analyze_many(
                tools, runs, out, skip=name in GROUPS, compared=bool(compare), device=device, figures=figures, json=json
            )
            return
        (run,), (tool,) = runs, tools
        place = several.beside(run.folder, tool) if out is None else out.expanduser()
        found = analysis.run(
            tool, run.attack, run.defense, place, device=device, figures=figures, result=run.folder.name
        )
        if json:
            said: dict[str, Any] = {
                "tool": tool.name,
                "summary": found.summary,
                "seconds": found.numbers.meta["seconds"],
            }
            emit_json({**said, "figure": found.figure, "data": found.data})
            return
        console = screen()
        for key, value in found.summary.items():
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                console.print(f"  {key.replace('_', ' ')}: {shown}", markup=False)
        for path in (found.figure, found.data):
            if path is not None:
                console.print(str(path), markup=False, soft_wrap=True)
