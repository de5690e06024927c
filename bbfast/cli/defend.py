"""``bbfast defend``: run a defense on a stored attack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bbfast.cli._frame import command, emit_json, note, screen, usage
from bbfast.cli._options import Device, Fresh, Json, Seed, Settings, parse_settings

__all__ = ["locate", "register"]

_EXAMPLES = """
bbfast defend nc --attack runs/attack-badnets-0123456789ab
bbfast defend ft --attack runs/attack-badnets-0123456789ab --clean-fraction 0.1 --set epochs=20
bbfast defend strip --attack runs/attack-badnets-0123456789ab --json
"""


def register(app: typer.Typer) -> None:
    @command(app, "defend", examples=_EXAMPLES, resume="run the same command again to go on")
    def defend(
        name: Annotated[str, typer.Argument(help="The defense; `bbfast list defenses` shows them.")],
        attack: Annotated[Path, typer.Option(help="Folder of the attack's result, as `bbfast attack` printed it.")],
        clean_fraction: Annotated[
            float, typer.Option(help="Share of the clean training images that the defender holds.")
        ] = 0.05,
        settings: Settings = [],  # noqa: B006 - typer makes a new list for every call
        seed: Seed = 0,
        device: Device = "auto",
        out: Annotated[Path | None, typer.Option(help="Folder of results; that of the attack if left out.")] = None,
        fresh: Fresh = False,
        json: Json = False,
    ) -> None:
        """Run a defense on an attacked model and measure what it achieves.

        The defense sees only what its threat model grants; the figures come from what it does not see.
        """
        from bbfast import defenses
        from bbfast.attacks import AttackResult
        from bbfast.bench.stages import defense_stage
        from bbfast.cli.tables import show_results
        from bbfast.report.run_page import Finished, attack_row, defense_row
        from bbfast.store import Store

        with usage():
            method = defenses.create(name, **parse_settings(settings))
            if not 0 < clean_fraction <= 1:
                raise ValueError(f"--clean-fraction must lie in (0, 1], got {clean_fraction:g}")
        folder = locate(attack)
        attacked = AttackResult.load(folder)
        made = defense_stage(
            Store(folder.parent if out is None else out.expanduser()),
            method,
            attacked,
            clean_fraction=clean_fraction,
            seed=seed,
            device=device,
            fresh=fresh,
            say=note,
            about=method.card.title,
        )
        if json:
            found: dict[str, Any] = {"defense": method.name, "kind": made.result.kind, **made.result.metrics}
            found |= {"verdict": made.result.verdict} if made.result.verdict else {}
            emit_json({**found, "seconds": made.result.seconds, "folder": made.folder, "reused": made.reused})
            return
        rows = [attack_row(attacked, True), defense_row(Finished(method.name, made.result, made.folder, made.reused))]
        show_results(rows, f"{method.name} against {attacked.config['attack']}")
        screen().print(f"Result: {made.folder}", markup=False, soft_wrap=True)


def locate(path: Path) -> Path:
    """The folder of a result: ``path``, or what begins with its last part in its parent folder.

    Raises:
        ArtifactError: if nothing, or more than one result, is meant; the reader of the folder says so for the first.
    """
    from bbfast import artifact
    from bbfast.errors import ArtifactError, UnknownNameError, nearest
    from bbfast.store import Store

    path = path.expanduser()
    if artifact.exists(path) or path.exists() or not path.parent.is_dir():
        return path
    try:
        return Store(path.parent).find(path.name)
    except UnknownNameError as error:
        # `find` looks names up; to the user it is a folder that is not there.
        close = nearest(path.name, error.known)
        hint = f"did you mean {', '.join(close)}?" if close else "give the folder that was printed when it was made"
        raise ArtifactError(f"no result at {path}: there is no such folder; {hint}") from None
