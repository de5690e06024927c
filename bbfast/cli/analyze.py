"""``bbfast analyze``: look into a stored model with a tool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbfast.cli._frame import command, emit_json, screen, usage
from bbfast.cli._options import Device, Json, Settings, parse_settings

if TYPE_CHECKING:
    from bbfast.analysis import Tool

__all__ = ["register"]

_EXAMPLES = """
bbfast analyze confusion_matrix --attack runs/attack-badnets-0123456789ab
bbfast analyze confusion_matrix --attack runs/attack-badnets-0123456789ab --defense runs/defense-ft-0123456789ab
bbfast analyze grad_cam --attack runs/attack-badnets-0123456789ab --set layer=stage2
"""


def register(app: typer.Typer) -> None:
    @command(app, "analyze", examples=_EXAMPLES)
    def analyze(
        name: Annotated[str, typer.Argument(help="The tool; `bbfast list analysis` shows them.")],
        attack: Annotated[Path, typer.Option(help="Folder of the attack's result.")],
        defense: Annotated[Path | None, typer.Option(help="Folder of a defense's: its model is looked at.")] = None,
        settings: Settings = [],  # noqa: B006 - typer makes a new list for every call
        device: Device = "auto",
        out: Annotated[
            Path | None, typer.Option(help="Folder of figure and numbers; analysis/RUN/NAME in the store if left out.")
        ] = None,
        figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figure.")] = True,
        json: Json = False,
    ) -> None:
        """Look at an attacked or defended model: a figure, and the numbers behind it."""
        from bbfast import analysis
        from bbfast.attacks import AttackResult
        from bbfast.cli.defend import locate
        from bbfast.defenses import DefenseResult

        with usage():
            tool = analysis.create(name, **parse_settings(settings))
        folder = locate(attack)
        defended = None if defense is None else locate(defense)
        result = DefenseResult.load(defended) if defended is not None else None
        looked_at = defended or folder
        place = _beside(looked_at, tool) if out is None else out.expanduser()
        found = analysis.run(tool, AttackResult.load(folder), result, place, device=device, figures=figures)
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
