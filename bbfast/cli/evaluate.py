"""``bbfast evaluate``: measure a stored result again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer
from rich.table import Table

from bbfast.cli._frame import FAILED, command, emit_json, note, screen
from bbfast.cli._options import Device, Json
from bbfast.cli.defend import locate

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["compare", "register"]

TOLERANCE = 0.005
"""Largest difference (of a fraction) that another device or torch version may make: more is not the same result."""

_EXAMPLES = """
bbfast evaluate runs/attack-badnets-0123456789ab
bbfast evaluate runs/defense-nc-0123456789ab --json
bbfast evaluate elsewhere/defense-nc-0123456789ab --attack runs/attack-badnets-0123456789ab
"""


def register(app: typer.Typer) -> None:
    @command(app, "evaluate", examples=_EXAMPLES)
    def evaluate(
        folder: Annotated[Path, typer.Argument(help="Folder of an attack's or a defense's result.")],
        attack: Annotated[
            Path | None, typer.Option(help="Attack that the defense was run on, if it does not lie beside it.")
        ] = None,
        device: Device = "auto",
        json: Json = False,
    ) -> None:
        """Measure a stored result again and compare with the figures that are recorded in it.

        Ends with status 1 if they differ by more than half a per cent.
        """
        from bbfast import artifact

        folder = locate(folder)
        stored = artifact.read_manifest(folder)["kind"]
        recorded, measured = _attack(folder, device) if stored == "attack" else _defense(folder, attack, device)
        rows = compare(recorded, measured)
        same = all(row["same"] for row in rows.values())
        if json:
            emit_json({"folder": folder, "kind": stored, "metrics": measured, "recorded": recorded, "same": same})
        else:
            screen().print(_table(folder.name, rows))
        if not same:
            note(f"the figures differ from the recorded ones by more than {TOLERANCE:g}")
            raise typer.Exit(FAILED)


def compare(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers that both have, and whether each is the same within the tolerance; undefined equals undefined."""
    rows = {}
    for key, now in measured.items():
        before = recorded.get(key)
        if not _is_number(now) or not _is_number(before):
            continue
        both_undefined = math.isnan(now) and math.isnan(before)
        rows[key] = {"recorded": before, "now": now, "same": both_undefined or abs(now - before) <= TOLERANCE}
    return rows


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _attack(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from bbfast.attacks import AttackResult
    from bbfast.evaluation import evaluate

    result = AttackResult.load(folder)
    return result.metrics, evaluate(result.model, result.test, result.backdoor_test, device=device)


def _defense(folder: Path, attack: Path | None, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from bbfast._hashing import sha256_json
    from bbfast.attacks import AttackResult
    from bbfast.bench.stages import find_attack, identity
    from bbfast.defenses import DefenseResult
    from bbfast.errors import ArtifactError
    from bbfast.store import Store

    result = DefenseResult.load(folder)
    found = find_attack(Store(folder.parent), result.config) if attack is None else locate(attack)
    attacked = AttackResult.load(found)
    if sha256_json(identity(attacked.config)) != sha256_json(identity(result.config["attack"])):
        raise ArtifactError(f"the defense in {folder} was run on another attack than {found}; give that one's folder")
    return result.metrics, _judged(result, attacked, device)


def _judged(result: DefenseResult, attack: AttackResult, device: str) -> dict[str, Any]:
    """What the runner measures, from the stored outcome; the defense itself is not run."""
    from bbfast.defenses import create
    from bbfast.defenses._judge import judge
    from bbfast.defenses.run import build_view
    from bbfast.training.device import resolve_device

    config, where = result.config, resolve_device(device)
    method = create(config["defense"], **config["defense_config"])
    _, population = build_view(method, attack, config["clean_fraction"], config["seed"], where, progress=False)
    return judge(result, attack, population, where)


def _number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=name, title_justify="left", title_style="bold")
    table.add_column("Metric", style="cyan", no_wrap=True)
    for title in ("Recorded", "Now", "Difference"):
        table.add_column(title, justify="right", no_wrap=True)
    for key, row in rows.items():
        style = None if row["same"] else "bold red"
        difference = row["now"] - row["recorded"]
        cells = (_number(row["recorded"]), _number(row["now"]), "-" if math.isnan(difference) else f"{difference:+.4f}")
        table.add_row(key, *cells, style=style)
    return table
