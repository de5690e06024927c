"""Run a study: its grids through the benchmark, then the numbers, the figure, and what to read in it."""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bbfast._version import __version__
from bbfast.analysis.files import write_set
from bbfast.analysis.numbers import ARRAYS, Numbers
from bbfast.bench import Plan, make_plan, make_pool, run_plan
from bbfast.store import Store
from bbfast.studies.base import Study, create
from bbfast.studies.results import Results

__all__ = ["StudyResult", "command", "plans_of", "run"]

_log = logging.getLogger(__name__)

READING = "reading.md"


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """What a study left behind.

    Args:
        name: Of the study.
        figure: ``figure.png``, 200 dots an inch; ``figure.pdf`` lies beside it. None if none was asked for.
        data: ``numbers.npz``; ``table.csv``, ``meta.json`` and ``reading.md`` lie beside it.
        summary: The few figures that are compared across runs.
        numbers: All of them.
        reading: What to read in the figure, and the findings, as in ``reading.md``.
        cells: Status (``done``, ``failed``, ``not_applicable``, ``blocked``) to number of cells.
    """

    name: str
    figure: Path | None
    data: Path
    summary: dict[str, Any]
    numbers: Numbers
    reading: str
    cells: dict[str, int]


def plans_of(study: Study, device: str = "auto") -> list[Plan]:
    """The plans of a study's grids; every name and setting is checked.

    Raises:
        ConfigError, UnknownNameError: naming the setting.
    """
    plans = [make_plan(grid.model_copy(update={"device": device})) for grid in study.grids()]
    names = [plan.grid.name for plan in plans]
    if len(set(names)) < len(names):
        raise ValueError(f"study {study.name!r}: names of grids must differ, got {names}")
    return plans


def run(
    name: str | Study,
    out: str | Path = "study",
    *,
    store: str | Path | Store = "runs",
    device: str = "auto",
    workers: int | None = None,
    executor: str = "local",
    gpus: float = 0.0,
    figures: bool = True,
    retry_failed: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> StudyResult:
    """Answer a study's question.

    What is in the store is not run again, so a study that was stopped goes on, and one with another figure or more
    seeds costs only what is new. Cells that failed or are not applicable are counted, in the caption and ``meta.json``.

    Args:
        name: Name of a study, or a study with its settings.
        out: Folder of the figure, the numbers and ``reading.md``; made if missing, a study in it is replaced whole.
        store: Where results of attacks and defenses lie, or go.
        device: Where to compute.
        workers: Stages at once; None is what there is. Of a study that trains by itself (it has no grids) this, the
            executor and the retries have no effect, and a warning says so.
        executor: ``local``, ``ray`` or ``slurm``, see :func:`bbfast.bench.make_pool`.
        gpus: GPUs of each worker of Ray or Slurm.
        figures: Draw the figure.
        retry_failed: Begin stages again that failed in an earlier run.
        progress: Show a bar; None decides by the terminal.
        say: Called with a line for each stage that is over, where no bar is shown.
        **settings: Settings of the study, if it is given by name.

    Raises:
        UnknownNameError, ConfigError: if there is no such study, setting, attack, defense, model or data set.
        DataRequirementError: if no cell of its grids has figures.
        ArtifactError: if the store cannot be read or written.
    """
    from bbfast.training.device import resolve_device

    if not isinstance(name, str) and settings:
        raise TypeError("give either a study or its settings by name, not both")
    study = create(name, **settings) if isinstance(name, str) else name
    where, place, folder = resolve_device(device), store if isinstance(store, Store) else Store(store), Path(out)
    started = time.perf_counter()
    plans = plans_of(study, device)
    if plans:
        whole = _joined(study.name, plans)
        pool = make_pool(executor, place.root, whole, workers, gpus)
        run_plan(whole, place, pool, retry_failed=retry_failed, progress=progress, say=say)
    else:
        _say_what_has_no_effect(study.name, workers, executor, gpus, retry_failed)
    results = Results(plans, place, where, study.name)
    results.require()
    with torch.random.fork_rng(devices=[where.index or 0] if where.type == "cuda" else []):
        torch.manual_seed(0)
        numbers = study.measure(results)
    cells, reasons = results.counts(), results.reasons()
    parts = [text for text in (numbers.meta.get("caption", ""), _gaps(cells)) if text]
    numbers.meta = {
        **numbers.meta,
        "study": study.name,
        "options": study.config.model_dump(mode="json"),
        "caption": "; ".join(parts),
        "cells": cells,
        "reasons": reasons,
        "command": command(study, place.root, folder),
        "seconds": time.perf_counter() - started,
        "device": str(where),
        "versions": {"bbfast": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    reading = _reading(study, numbers)
    figure = write_set(numbers, folder, study.draw if figures else None, {READING: reading})
    return StudyResult(study.name, figure, folder / ARRAYS, numbers.summary, numbers, reading, cells)


def _say_what_has_no_effect(name: str, workers: int | None, executor: str, gpus: float, retry_failed: bool) -> None:
    """Of a study without grids: nothing of it goes through the benchmark."""
    given = {
        "workers": workers not in (None, 1),
        "executor": executor != "local",
        "gpus": bool(gpus),
        "retry_failed (what failed is tried again anyway)": retry_failed,
    }
    if unused := [key for key, value in given.items() if value]:
        _log.warning(
            "study %s trains one cell after the other in this process; without effect: %s", name, ", ".join(unused)
        )


def _joined(name: str, plans: Sequence[Plan]) -> Plan:
    """One plan with the stages of all, so that workers are started once and none waits for the next grid."""
    cells = tuple(cell for plan in plans for cell in plan.cells)
    tasks = {key: task for plan in plans for key, task in plan.tasks.items()}
    return Plan(plans[0].grid.model_copy(update={"name": name}), cells, tasks)


def command(study: Study, store: Path, out: Path) -> str:
    """The command that makes the study again."""
    changed = study.config.model_dump(mode="json", exclude_defaults=True)
    sets = [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in changed.items()]
    places = [f"--store {shlex.quote(str(store))}", f"--out {shlex.quote(str(out))}"]
    return " ".join([f"bbfast study {study.name}", *sets, *places])


def _gaps(cells: Mapping[str, int]) -> str:
    """How many cells have no figures; empty if all have."""
    missing = {status: count for status, count in sorted(cells.items()) if status != "done"}
    said = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in missing.items())
    return f"of {sum(cells.values())} cells {said}" if said else ""


def _reading(study: Study, numbers: Numbers) -> str:
    meta = numbers.meta
    findings: Sequence[str] = meta.get("findings") or _words(numbers.summary)
    lines = [f"# {study.card.title}", "", study.card.question, "", study.card.reading, ""]
    lines += ["## What came out", "", f"{meta['caption']}.", "", *(f"- {line}" for line in findings), ""]
    if meta["reasons"]:
        lines += ["## Cells without figures", ""]
        lines += [f"- {count} {_plain(reason)}" for reason, count in sorted(meta["reasons"].items())]
        lines += [""]
    lines += ["## Again", "", "```text", meta["command"], "```", ""]
    return "\n".join(lines)


def _words(summary: Mapping[str, Any]) -> list[str]:
    """A line for each figure of a summary."""
    shown = ((key.replace("_", " "), value) for key, value in summary.items() if isinstance(value, int | float | str))
    return [f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}" for key, value in shown]


def _plain(text: str) -> str:
    """One line without mark-up of its own."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")
