"""``bbfast analyze`` with several tools: a line each, and the exit status of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbfast.cli._frame import emit_json, note, screen
from bbfast.errors import BBFastError

if TYPE_CHECKING:
    from bbfast.analysis import Outcome, Tool
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["analyze_many"]


def analyze_many(
    tools: Sequence[Tool],
    attack: AttackResult,
    defense: DefenseResult | None,
    place: Callable[[Tool], Path],
    *,
    skip: bool,
    device: str,
    figures: bool,
    json: bool,
) -> None:
    """Run the tools and tell what became of each.

    Raises:
        BBFastError: at the end, if one failed that was not skipped.
    """
    from bbfast.analysis import run_all

    console, width = screen(), max(len(tool.name) for tool in tools)

    def say(found: Outcome) -> None:
        line = f"{found.tool.name:<{width}}  {_words(found)}"
        if json:
            note(line)
        else:
            console.print(line, markup=False, soft_wrap=True)

    outcomes = run_all(tools, attack, defense, place, device=device, figures=figures, skip=skip, say=say)
    if json:
        emit_json([_plain(found) for found in outcomes])
    if failed := [found.tool.name for found in outcomes if found.status == "failed"]:
        raise BBFastError(f"{len(failed)} of {len(outcomes)} tools failed: {', '.join(failed)} (--debug shows where)")


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
