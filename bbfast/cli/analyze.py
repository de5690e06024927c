"""``bbfast analyze``: look into a stored model with a tool, or with several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast.cli._frame import command, emit_json, screen, usage
from bbfast.cli._options import Device, Json, parse_settings, parse_settings_of

if TYPE_CHECKING:
    from bbfast.analysis import Tool

__all__ = ["register"]

_EXAMPLES = """
bbfast analyze confusion_matrix --attack runs/attack-badnets-0123456789ab
bbfast analyze confusion_matrix --attack runs/attack-badnets-0123456789ab --defense runs/defense-ft-0123456789ab
bbfast analyze grad_cam --attack runs/attack-badnets-0123456789ab --set layer=stage2
bbfast analyze quick --attack runs/attack-badnets-0123456789ab
bbfast analyze tsne,grad_cam --attack runs/attack-badnets-0123456789ab --set grad_cam.layer=stage2
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
        settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=_SETTINGS)] = [],  # noqa: B006 - typer makes a new list for every call
        device: Device = "auto",
        out: Annotated[
            Path | None,
            typer.Option(
                help="Folder of figure and numbers, or of a folder for each of several tools; analysis/RUN/NAME in the "
                "store if left out."
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
        from bbfast.attacks import AttackResult
        from bbfast.cli._analyze_many import analyze_many
        from bbfast.cli.defend import locate
        from bbfast.defenses import DefenseResult

        with usage():
            many = name in GROUPS or "," in name
            tools = (
                planned(name, parse_settings_of(settings))
                if many
                else [analysis.create(name, **parse_settings(settings))]
            )
        folder = locate(attack)
        defended = None if defense is None else locate(defense)
        result = DefenseResult.load(defended) if defended is not None else None
        looked_at = defended or folder

        def place(tool: Tool) -> Path:
            if out is None:
                return _beside(looked_at, tool)
            return out.expanduser() / tool.name if many else out.expanduser()

        if many:
            attacked = AttackResult.load(folder)
            skip = name in GROUPS
            analyze_many(tools, attacked, result, place, skip=skip, device=device, figures=figures, json=json)
            return
        tool = tools[0]
        found = analysis.run(tool, AttackResult.load(folder), result, place(tool), device=device, figures=figures)
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


def _beside(result: Path, tool: Tool) -> Path:
    """Where a tool's files lie if nothing is said: not inside the result, an artefact whose files are accounted for;
    settings that are not the defaults have a place of their own."""
    from bbfast._hashing import sha256_json

    changed = tool.config.model_dump(mode="json", exclude_defaults=True)
    name = f"{tool.name}-{sha256_json(changed)[:8]}" if changed else tool.name
    return result.parent / "analysis" / result.name / name
