"""Several tools on one result: read once, checked together, looked at one after the other."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from bbfast.analysis.base import Tool, available, create, find
from bbfast.analysis.run import AnalysisResult, look, name_of, opened
from bbfast.errors import ConfigError, DataRequirementError, MissingExtraError, UnknownNameError, UnsupportedModelError

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["GROUPS", "Outcome", "planned", "run_all"]

GROUPS = ("all", "quick")
"""Names of sets of tools: every one, and those whose card says that they are quick."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one tool of several.

    Args:
        tool: With its settings.
        status: ``skipped``: it does not apply to this model or data, or needs a package that is not installed;
            ``failed``: of something that was not foreseen.
        folder: Where its files lie, if it is done.
        result: What it found; None unless it is done.
        why: Why it is not.
    """

    tool: Tool
    status: Literal["done", "skipped", "failed"]
    folder: Path
    result: AnalysisResult | None = None
    why: str = ""


def planned(names: str | Sequence[str], settings: Mapping[str, Mapping[str, Any]] | None = None) -> list[Tool]:
    """The tools of ``names``, made with their settings.

    Args:
        names: ``all``, ``quick``, names or aliases with commas between, or a sequence of them.
        settings: Of each tool by name or alias.

    Raises:
        UnknownNameError: if there is no such tool.
        ConfigError: if a setting is wrong, a tool comes twice, or settings are of a tool that is not among them.
    """
    if names in GROUPS:
        wanted = [name for name in available() if names == "all" or find(name).card.quick]
    else:
        listed = names.split(",") if isinstance(names, str) else list(names)
        wanted = [find(name.strip()).name for name in listed]
    if not wanted:
        raise ConfigError("no analysis tool is named")
    if twice := [name for name in wanted if wanted.count(name) > 1]:
        raise ConfigError(f"the analysis tool {twice[0]} is named twice")
    own: dict[str, dict[str, Any]] = {}
    for name, values in (settings or {}).items():
        own.setdefault(find(name).name, {}).update(values)
    if strangers := [name for name in own if name not in wanted]:
        raise ConfigError(f"settings of {strangers[0]}, which is not among the tools: {', '.join(wanted)}")
    return [create(name, **own.get(name, {})) for name in wanted]


def run_all(
    names: str | Sequence[str] | Sequence[Tool],
    attack_result: AttackResult | str | Path,
    defense_result: DefenseResult | str | Path | None = None,
    out: str | Path | Callable[[Tool], Path] = "analysis",
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | torch.device = "auto",
    figures: bool = True,
    skip: bool | None = None,
    result: str | None = None,
    say: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Look at a model with several tools.

    Names and settings are checked before anything is read, and results are read once. Each tool has a copy of the model
    of its own, as with :func:`bbfast.analysis.run`: what one finds does not depend on those before it.

    Args:
        names: ``all``, ``quick``, names with commas between, a sequence of names, or tools with their settings.
        attack_result: Result of an attack, or its folder.
        defense_result: Result of a defense of it, or its folder: its model is looked at instead.
        out: Each tool has the folder of its name in this one; or a function that gives a tool's folder.
        settings: Of each tool by name, where ``names`` are names.
        device: Where to compute.
        figures: Draw the figures.
        skip: A tool that does not apply to this model or data, or whose package is missing, is skipped, and one that
            fails does not stop the others; by default with ``all`` and ``quick`` alone. Otherwise the first error ends
            it, and what was done before stays.
        result: Name of the result that is looked at, for the record; that of its folder if it is given as one.
        say: Called after each tool.

    Returns:
        One outcome a tool, in the order of ``names``.

    Raises:
        UnknownNameError, ConfigError: if there is no such tool or setting.
        DataRequirementError: if the defense was run on another attack.
        BBFastError: without ``skip``, whatever stops a tool, see :func:`bbfast.analysis.run`.
    """
    from bbfast.training.device import resolve_device

    given = [] if isinstance(names, str) else [tool for tool in names if isinstance(tool, Tool)]
    if given and settings:
        raise TypeError("give either tools or their settings by name, not both")
    tools = given or planned([str(name) for name in names] if not isinstance(names, str) else names, settings)
    lenient = names in GROUPS if skip is None else skip
    result = result or name_of(attack_result, defense_result)
    attack, defense = opened(attack_result, defense_result)
    where, found = resolve_device(device), []
    for tool in tools:
        folder = out(tool) if callable(out) else Path(out) / tool.name
        try:
            outcome = Outcome(tool, "done", folder, look(tool, attack, defense, folder, where, figures, result))
        except Exception as error:
            if not lenient:
                raise
            # At --debug; the others go on.
            _log.debug("%s", traceback.format_exc())
            outcome = Outcome(tool, "skipped" if _does_not_apply(tool, error) else "failed", folder, why=_said(error))
        found.append(outcome)
        say(outcome)
    return found


def _does_not_apply(tool: Tool, error: Exception) -> bool:
    """A layer that the model lacks is the model's doing only if it is the tool's own choice."""
    foreseen = UnsupportedModelError | DataRequirementError | MissingExtraError
    return isinstance(error, foreseen) or (isinstance(error, UnknownNameError) and not tool.config.model_fields_set)


def _said(error: Exception) -> str:
    """One line; of what was not foreseen with its type."""
    from bbfast.errors import BBFastError

    text = " ".join(str(error).split())
    return text if isinstance(error, BBFastError) and text else f"{type(error).__name__}: {text or 'no message'}"
