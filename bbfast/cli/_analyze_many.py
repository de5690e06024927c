"""``bbfast analyze`` with several tools or several results: a line each, and the exit status of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbfast.cli._frame import emit_json, note, screen
from bbfast.errors import BBFastError

if TYPE_CHECKING:
    from bbfast.analysis import AnalysisResult, Outcome, Tool
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["Run", "analyze_many", "beside", "runs_of"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A stored result that is looked at: that in ``folder``."""

    folder: Path
    attack: AttackResult
    defense: DefenseResult | None = None


def runs_of(attack: Path, defense: Path | None, others: Sequence[Path]) -> list[Run]:
    """What ``--attack``, ``--defense`` and ``--compare`` name, read; an attack that several need is read once.

    Raises:
        ArtifactError: if there is no such result.
        DataRequirementError: if a defense was run on another attack.
    """
    from bbfast import artifact
    from bbfast.analysis.run import opened
    from bbfast.attacks import AttackResult
    from bbfast.cli.defend import locate
    from bbfast.defenses import DefenseResult

    home = locate(attack)
    defended = None if defense is None else locate(defense)
    folders = [locate(other) for other in others]
    attacked = AttackResult.load(home)
    first = Run(home, attacked) if defended is None else Run(defended, attacked, DefenseResult.load(defended))
    runs = [first]
    for folder in folders:
        if folder == home:
            runs.append(Run(home, attacked))
        elif artifact.read_manifest(folder)["kind"] == "attack":
            runs.append(Run(folder, AttackResult.load(folder)))
        else:
            runs.append(Run(folder, attacked, DefenseResult.load(folder)))
    for run in runs:
        opened(run.attack, run.defense)  # a defense of another attack is refused before any work
    return runs


def analyze_many(
    tools: Sequence[Tool],
    runs: Sequence[Run],
    out: Path | None,
    *,
    skip: bool,
    compared: bool,
    device: str,
    figures: bool,
    json: bool,
) -> None:
    """Run the tools on each result, then place their figures side by side, and tell what became of each.

    Raises:
        BBFastError: at the end, if one failed that was not skipped.
    """
    from bbfast.analysis import compare, run_all

    console, width = screen(), max(len(tool.name) for tool in tools)

    def say(name: str, words: str) -> None:
        line = f"{name:<{width}}  {words}"
        if json:
            note(line)
        else:
            console.print(line, markup=False, soft_wrap=True)

    said: list[dict[str, Any]] = []
    done: dict[str, list[AnalysisResult]] = {}
    failed: list[str] = []
    for run in runs:

        def place(tool: Tool, run: Run = run) -> Path:
            if out is None:
                return beside(run.folder, tool)
            return (out.expanduser() / run.folder.name if compared else out.expanduser()) / tool.name

        for found in run_all(
            tools,
            run.attack,
            run.defense,
            place,
            device=device,
            figures=figures,
            skip=skip,
            result=run.folder.name,
            say=lambda found: say(found.tool.name, _words(found)),
        ):
            said.append({"run": run.folder.name, **_plain(found)} if compared else _plain(found))
            failed += [found.tool.name] if found.status == "failed" else []
            if found.result is not None:
                done.setdefault(found.tool.name, []).append(found.result)
    for tool in tools if compared else ():
        if len(parts := done.get(tool.name, [])) < 2:
            continue
        folder = _together(runs, tool) if out is None else out.expanduser() / "compare" / tool.name
        made = compare(parts, folder, figures=figures)
        say(tool.name, f"side by side  {folder}")
        more = {"summary": made.summary, "figure": made.figure, "data": made.data}
        said.append({"run": None, "tool": tool.name, "status": "done", **more})
    if json:
        emit_json(said)
    if failed:
        number = len(tools) * len(runs)
        raise BBFastError(f"{len(failed)} of {number} tools failed: {', '.join(failed)} (--debug shows where)")


def beside(result: Path, tool: Tool) -> Path:
    """Where a tool's files lie if nothing is said: not inside the result, an artefact whose files are accounted for;
    settings that are not the defaults have a place of their own."""
    return result.parent / "analysis" / result.name / _named(tool)


def _together(runs: Sequence[Run], tool: Tool) -> Path:
    """Beside the first result, a place for each choice of others."""
    from bbfast._hashing import sha256_json

    first, *others = (run.folder for run in runs)
    return beside(first, tool).with_name(f"compare-{_named(tool)}-{sha256_json([o.name for o in others])[:8]}")


def _named(tool: Tool) -> str:
    from bbfast._hashing import sha256_json

    changed = tool.config.model_dump(mode="json", exclude_defaults=True)
    return f"{tool.name}-{sha256_json(changed)[:8]}" if changed else tool.name


def _words(found: Outcome) -> str:
    if found.result is None:
        return f"{found.status}: {found.why}"
    return f"{found.result.numbers.meta['seconds']:7.1f} s  {found.folder}"


def _plain(found: Outcome) -> dict[str, Any]:
    said: dict[str, Any] = {"tool": found.tool.name, "status": found.status}
    if found.result is None:
        return {**said, "why": found.why}
    result = found.result
    more = {"summary": result.summary, "seconds": result.numbers.meta["seconds"]}
    return {**said, **more, "figure": result.figure, "data": result.data}
