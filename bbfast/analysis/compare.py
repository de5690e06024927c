"""The same tool on several results, side by side: figures and summaries from the saved numbers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast._record import versions
from bbfast.analysis._tiles import tiled
from bbfast.analysis.base import Tool, find
from bbfast.analysis.files import write_set
from bbfast.analysis.numbers import ARRAYS, Numbers
from bbfast.analysis.run import AnalysisResult
from bbfast.errors import DataRequirementError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare"]


def compare(
    analyses: Sequence[str | Path | AnalysisResult], out: str | Path, *, figures: bool = True
) -> AnalysisResult:
    """Place what a tool found on several results side by side.

    Every figure is drawn from its saved numbers; corresponding axes then have the same limits and corresponding colours
    the same meaning, where their scales are of a kind and the figures of the same classes and layers. Embeddings have
    no common coordinates, and keep their own.

    Args:
        analyses: Folders that :func:`bbfast.analysis.run` wrote, or what it returned, two at least; in the order of the
            tiles.
        out: Folder of the comparison: ``figure.png`` and ``figure.pdf``; ``table.csv`` with a row for each figure of
            the summaries and a column for each result; ``numbers.npz`` with those that are numbers, ``values`` f64
            ``[figures, results]`` (NaN where a result has none), ``figures`` and ``results`` their names;
            ``meta.json``.
        figures: Draw the figure.

    Raises:
        ArtifactError: if a folder holds no numbers, or damaged ones.
        DataRequirementError: if they are fewer than two, of several tools, or made with different settings.
        UnknownNameError: if there is no such tool here.
    """
    folders = [one.data.parent if isinstance(one, AnalysisResult) else Path(one) for one in analyses]
    parts = [Numbers.load(folder) for folder in folders]
    tool = _tool_of(parts)
    names = _told_apart([str(part.meta.get("caption", "")) for part in parts])
    keys = list(dict.fromkeys(key for part in parts for key in part.summary if _scalar(part.summary[key])))
    rows = [[part.summary.get(key) for part in parts] for key in keys]
    shared = tool.shared_axes and all(_kind(part) == _kind(parts[0]) for part in parts)
    numeric = [(key, row) for key, row in zip(keys, rows, strict=True) if not any(isinstance(v, str) for v in row)]
    numbers = Numbers(
        arrays={
            "values": np.array([[_number(v) for v in row] for _, row in numeric]).reshape(len(numeric), len(parts)),
            "figures": np.array([key for key, _ in numeric], dtype=str),
            "results": np.array(names, dtype=str),
        },
        table=[
            {"figure": key, **dict(zip(names, ("" if v is None else v for v in row), strict=True))}
            for key, row in zip(keys, rows, strict=True)
        ],
        summary={key: dict(zip(names, row, strict=True)) for key, row in zip(keys, rows, strict=True)},
        meta={
            "tool": tool.name,
            "options": parts[0].meta["options"],
            "compared": [
                {"caption": name, "result": part.meta.get("result")} for name, part in zip(names, parts, strict=True)
            ],
            "comparable": shared,
            "versions": versions(),
        },
    )

    def draw(_: Numbers) -> Figure:
        more = tool.common(parts) if shared else {}
        drawn = [tool.draw(dataclasses.replace(part, meta={**part.meta, **more})) for part in parts]
        return tiled(drawn, names, tool.card.title, shared)

    figure = write_set(numbers, Path(out), draw if figures else None)
    return AnalysisResult(tool.name, figure, Path(out) / ARRAYS, numbers.summary, numbers)


def _tool_of(parts: Sequence[Numbers]) -> type[Tool]:
    if len(parts) < 2:
        raise DataRequirementError(f"a comparison needs two analyses at least, got {len(parts)}")
    tools = list(dict.fromkeys(str(part.meta.get("tool")) for part in parts))
    if len(tools) > 1:
        raise DataRequirementError(f"a comparison is of one tool, these are of {', '.join(tools)}")
    options = [part.meta["options"] for part in parts]
    if differ := sorted({key for own in options for key in own if own[key] != options[0].get(key)}):
        raise DataRequirementError(f"the analyses were made with different settings: {', '.join(differ)}")
    return find(tools[0])


def _kind(part: Numbers) -> tuple[Any, ...]:
    """What must be the same for axes of two figures to mean the same."""
    return part.meta.get("class_names"), part.meta.get("layers")


def _told_apart(captions: Sequence[str]) -> list[str]:
    """Captions, numbered where the same one comes again: a defense with other settings."""
    seen: dict[str, int] = {}
    names = []
    for caption in captions:
        seen[caption] = seen.get(caption, 0) + 1
        names.append(caption if seen[caption] == 1 else f"{caption} ({seen[caption]})")
    return names


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
