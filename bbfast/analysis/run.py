"""Run a tool on a result: numbers first, then the figure, side by side in one folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbfast._hashing import to_json
from bbfast._record import versions
from bbfast.analysis.base import Tool, create
from bbfast.analysis.files import write_set
from bbfast.analysis.numbers import ARRAYS, Numbers
from bbfast.analysis.subject import Subject
from bbfast.defenses._measure import peak_memory
from bbfast.errors import DataRequirementError

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["AnalysisResult", "look", "name_of", "opened", "run"]


@dataclasses.dataclass(frozen=True)
class AnalysisResult:
    """What a tool left behind.

    Args:
        name: Of the tool.
        figure: ``figure.png``, 200 dots an inch; ``figure.pdf`` lies beside it. None if none was asked for.
        data: ``numbers.npz``; ``table.csv`` and ``meta.json`` lie beside it.
        summary: The few figures that are compared across runs.
        numbers: All of them.
    """

    name: str
    figure: Path | None
    data: Path
    summary: dict[str, Any]
    numbers: Numbers


def run(
    name: str | Tool,
    attack_result: AttackResult | str | Path,
    defense_result: DefenseResult | str | Path | None = None,
    out: str | Path = "analysis",
    *,
    device: str | torch.device = "auto",
    figures: bool = True,
    result: str | None = None,
    **options: Any,
) -> AnalysisResult:
    """Look at a model with a tool.

    The results are left as they are: the tool has a copy of the model, and torch's random state is restored. The same
    arguments give the same numbers.

    Args:
        name: Name or alias of a tool, or a tool with its settings.
        attack_result: Result of an attack, or its folder.
        defense_result: Result of a defense of it, or its folder: its model is looked at instead.
        out: Folder of the figure and the numbers; made if missing, an analysis in it is replaced as a whole.
        device: Where to compute.
        figures: Draw the figure.
        result: Name of the result that is looked at, for the record; that of its folder if it is given as one.
        **options: Settings of the tool, if it is given by name.

    Raises:
        UnknownNameError, ConfigError: if there is no such tool, setting or layer.
        UnsupportedModelError, DataRequirementError: if the tool cannot look at this, or the defense was run on another
            attack; before any work.
        MissingExtraError: if it needs a package that is not installed.
    """
    from bbfast.training.device import resolve_device

    tool = create(name, **options) if isinstance(name, str) else name
    if not isinstance(name, str) and options:
        raise TypeError("give either a tool or its settings by name, not both")
    attack, defense = opened(attack_result, defense_result)
    result = result or name_of(attack_result, defense_result)
    return look(tool, attack, defense, Path(out), resolve_device(device), figures, result)


def name_of(attack_result: AttackResult | str | Path, defense_result: DefenseResult | str | Path | None) -> str | None:
    """Name of the folder of the result that is looked at; None if it is given as what was read from it."""
    looked_at = attack_result if defense_result is None else defense_result
    return Path(looked_at).resolve().name if isinstance(looked_at, str | Path) else None


def opened(
    attack_result: AttackResult | str | Path, defense_result: DefenseResult | str | Path | None
) -> tuple[AttackResult, DefenseResult | None]:
    """Both results, read if they are given as folders.

    Raises:
        DataRequirementError: if the defense was run on another attack.
        ArtifactError: if a folder holds no such result.
    """
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

    attack = attack_result if isinstance(attack_result, AttackResult) else AttackResult.load(Path(attack_result))
    defense = DefenseResult.load(Path(defense_result)) if isinstance(defense_result, str | Path) else defense_result
    if defense is not None:
        _of_that_attack(defense.config.get("attack"), attack.config, str(defense.config.get("defense")))
    return attack, defense


def look(
    tool: Tool,
    attack: AttackResult,
    defense: DefenseResult | None,
    folder: Path,
    device: torch.device,
    figures: bool,
    result: str | None,
) -> AnalysisResult:
    """What :func:`run` does with a tool and results at hand."""
    subject = Subject(attack, defense, device, tool.config.seed)
    tool.check(subject)
    subject.taken.clear()
    gpus = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), peak_memory(device) as memory:
        torch.manual_seed(tool.config.seed)
        started = time.perf_counter()
        numbers = tool.measure(subject)
        seconds = time.perf_counter() - started
    numbers.meta = {
        **numbers.meta,
        "tool": tool.name,
        "options": tool.config.model_dump(mode="json"),
        "result": result,
        "ids_sha256": subject.taken.sha256(),
        "caption": subject.caption(),
        "class_names": subject.class_names,
        "seconds": seconds,
        "peak_bytes": memory.bytes,
        "device": str(device),
        "versions": versions(),
    }
    figure = write_set(numbers, folder, tool.draw if figures else None)
    return AnalysisResult(tool.name, figure, folder / ARRAYS, numbers.summary, numbers)


def _of_that_attack(told: Any, config: Mapping[str, Any], defense: str) -> None:
    """Refuse a defense of another attack; one made by hand that does not say what it was run on may be of any."""
    if not isinstance(told, Mapping) or not told:
        return
    keys = [key for key in {**config, **told} if key not in ("device", "versions")]
    differ = [key for key in keys if to_json(told.get(key)) != to_json(config.get(key))]
    if differ:
        raise DataRequirementError(
            f"the defense {defense} was run on another attack: on {_said(told)}, and this is {_said(config)}; "
            f"they differ in {', '.join(differ)}"
        )


def _said(config: Mapping[str, Any]) -> str:
    data, model = (config.get(key) or {} for key in ("data", "model"))
    ratio = (config.get("attack_config") or {}).get("ratio")
    parts = [config.get("attack"), data.get("name"), model.get("name"), f"ratio {ratio}", f"seed {config.get('seed')}"]
    return " ".join(map(str, parts))
