"""Many detectors on one attacked model, with one forward pass over each set for all that read features."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbfast.defenses.base import Defense, create, find
from bbfast.defenses.features import Reader, read_set
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.run import Population, build_view, check_run, check_seed, resolve_attack, run_and_judge
from bbfast.defenses.view import DefenderView
from bbfast.errors import DetectionError

if TYPE_CHECKING:
    from bbfast.attacks.result import AttackResult
    from bbfast.training import Recipe

__all__ = ["detect_all"]

_log = logging.getLogger(__name__)

# Calibration sets first: what is read of an inspected set may depend on them.
_SOURCES = ("clean", "reserve", "poisoned_train", "stream")


def detect_all(
    attack_result: AttackResult | str | Path,
    detectors: Iterable[str | Defense],
    clean_fraction: float | None = 0.05,
    seed: int = 0,
    device: str | torch.device = "auto",
    *,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    recipe: Recipe | None = None,
) -> dict[str, DefenseResult]:
    """Run several detectors on one attacked model; those that read features share one pass over each set.

    Each detector still has its own view with what its card names and no more, and gets what it would get from
    :func:`bbfast.defend`, bit for bit. ``ac``, ``ss``, ``scan``, ``spectre`` and ``beatrix`` share passes; the others
    run as always. What is held at once: the features that the detectors keep (4 bytes a sample and dimension) and one
    batch of everything else.

    Args:
        attack_result: Result of an attack, or its folder.
        detectors: Names or aliases, or defenses with settings. One given by name only detects: ``ac`` and ``ss`` train
            no new model, ``abl`` stops after isolation.
        clean_fraction, seed, device, progress, recipe: As in :func:`bbfast.defend`.
        checkpoint: Folder in which methods that train for long keep their state, each in a folder of its own.

    Returns:
        Name to result, in the order given. ``metrics["seconds"]`` is the detector's own time;
        ``metrics["seconds_shared"]`` is that of the passes it took part in, spent once for all.

    Raises:
        ValueError: if there is no detector, or one twice.
        UnknownNameError, DataRequirementError, UnsupportedModelError: as :func:`bbfast.defend` does, before any work.
        DetectionError: if detectors failed at work; the others have been run and their results are in ``.results``.
    """
    from bbfast.training.device import resolve_device

    attack = resolve_attack(attack_result)
    check_seed(seed)
    target = resolve_device(device)
    runs: dict[str, _Run] = {}
    for each in detectors:
        method = _method(each).for_dataset(str(attack.config["data"]["name"]))
        if method.name in runs:
            raise ValueError(f"detectors must not name {method.name!r} twice: results are kept by name")
        folder = None if checkpoint is None else Path(checkpoint) / method.name
        view, population = build_view(
            method, attack, clean_fraction, seed, target, checkpoint=folder, progress=progress, recipe=recipe
        )
        check_run(method, attack, view)
        runs[method.name] = _Run(method, view, population)
    if not runs:
        raise ValueError("detectors must name at least one detector, got none")

    for source in _SOURCES:
        _share(runs, source)
    results: dict[str, DefenseResult] = {}
    failures: dict[str, Exception] = {name: run.failure for name, run in runs.items() if run.failure is not None}
    for name in [name for name in runs if name not in failures]:
        run = runs.pop(name)  # with it goes its copy of the sets
        try:
            results[name] = run_and_judge(run.method, attack, run.view, run.population, clean_fraction)
        except Exception as error:  # whatever it is, it must not cost the others their results
            _log.warning("detect_all: %s failed: %s", name, error)
            failures[name] = error
        else:
            results[name].metrics["seconds_shared"] = run.shared
    if failures:
        raise DetectionError(results, failures) from next(iter(failures.values()))
    return results


@dataclasses.dataclass(eq=False)
class _Run:
    """One detector with its view. ``shared``: seconds of the passes it took part in; ``failure``: why it is out."""

    method: Defense
    view: DefenderView
    population: Population
    shared: float = 0.0
    failure: Exception | None = None


def _method(given: str | Defense) -> Defense:
    if isinstance(given, str):
        return create(given, **find(given).Config.detect_only)
    if not isinstance(given, Defense):
        raise TypeError(f"detectors must be names or defenses, got {type(given).__qualname__}")
    return given


def _share(runs: Mapping[str, _Run], source: str) -> None:
    """One pass over each draw of ``source`` for all that read it."""
    draws: dict[Hashable, list[tuple[_Run, _Apart]]] = {}
    for run in runs.values():
        if source not in run.view.needs or run.failure is not None:
            continue
        try:
            draws.setdefault(run.population.draws[source], []).extend(
                (run, _Apart(reader)) for reader in run.method.readers(run.view, source)
            )
        except Exception as error:
            run.failure = error
    for taking in draws.values():
        if not taking:
            continue
        clock = time.perf_counter()
        apart: dict[Hashable, _Apart] = {}
        for _, reader in taking:
            apart.setdefault(reader.key, reader)
        view = taking[0][0].view
        images = getattr(view, source).images
        read_set(view.model, images, list(apart.values()), view.mean, view.std, view.device)
        for run, reader in taking:
            try:
                run.view.keep(source, reader.wrapped, apart[reader.key].outcome())
            except Exception as error:
                run.failure = error
        seconds = time.perf_counter() - clock
        for run in {id(run): run for run, _ in taking}.values():
            run.shared += seconds


class _Apart(Reader):
    """A reader whose failure does not end the pass for the others: it is raised by :meth:`outcome`."""

    def __init__(self, wrapped: Reader) -> None:
        self.wrapped = wrapped
        self._failure: Exception | None = None
        self._made: list[Any] = []

    @property
    def roles(self) -> tuple[str, ...]:
        return self.wrapped.roles

    @property
    def key(self) -> Hashable:
        return self.wrapped.key

    def begin(self, total: int, device: torch.device) -> None:
        self.wrapped.begin(total, device)

    def batch(self, index: Tensor, found: Mapping[str, Tensor], logits: Tensor) -> None:
        if self._failure is None:
            try:
                self.wrapped.batch(index, found, logits)
            except Exception as error:
                self._failure = error

    def outcome(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if not self._made:
            self._made.append(self.wrapped.outcome())
        return self._made[0]
