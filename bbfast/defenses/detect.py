"""Many detectors on one attacked model, with one forward pass over each set for all that read features."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from bbfast.defenses.base import Defense, create, find
from bbfast.defenses.features import Apart, Reader, read_set
from bbfast.defenses.result import DefenseResult
from bbfast.defenses.run import Population, build_view, check_run, check_seed, resolve_attack, run_and_judge
from bbfast.defenses.view import DefenderView, Readings
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
    :func:`bbfast.defend`, bit for bit. ``ac``, ``ss``, ``scan``, ``spectre``, ``beatrix`` and ``asset`` share passes;
    the others run as always.

    What is held at once, however many detectors there are: one private copy of the sets and of the model, for the
    detector whose turn it is; what the shared passes left for those still to run (features: 4 bytes a sample and
    dimension, once for all who want the same ones); and the results. A view lasts for one call of a detector's
    ``check``, ``readers`` or ``run``: what is read goes on to the next, what is changed in a set or model does not.

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
    make = partial(build_view, attack=attack, clean_fraction=clean_fraction, seed=seed, device=target)
    runs: dict[str, _Run] = {}
    for each in detectors:
        method = _method(each).for_dataset(str(attack.config["data"]["name"]))
        if method.name in runs:
            raise ValueError(f"detectors must not name {method.name!r} twice: results are kept by name")
        folder = None if checkpoint is None else Path(checkpoint) / method.name
        runs[method.name] = run = _Run(
            method, partial(make, method, checkpoint=folder, progress=progress, recipe=recipe)
        )
        run.check(attack)
    if not runs:
        raise ValueError("detectors must name at least one detector, got none")

    for source in _SOURCES:
        _share(runs, source)
    results: dict[str, DefenseResult] = {}
    failures: dict[str, Exception] = {name: run.failure for name, run in runs.items() if run.failure is not None}
    for name in [name for name in runs if name not in failures]:
        run = runs.pop(name)  # with it goes what the passes left for it
        try:
            results[name] = run.result(attack, clean_fraction)
        except Exception as error:  # whatever it is, it must not cost the others their results
            _log.warning("detect_all: %s failed: %s", name, error)
            failures[name] = _light(error)
        else:
            results[name].metrics["seconds_shared"] = run.shared
    if failures:
        raise DetectionError(results, failures) from next(iter(failures.values()))
    return results


class _Run:
    """One detector. Its view is made anew whenever it is needed, so that no two detectors hold the sets at a time.

    Args:
        method: The detector.
        build: Makes its view, and what it is judged on.

    ``shared``: seconds of the passes it took part in; ``failure``: why it is out; ``draws``: see :class:`Population`.
    """

    def __init__(self, method: Defense, build: Callable[[], tuple[DefenderView, Population]]) -> None:
        self.method = method
        self.shared = 0.0
        self.failure: Exception | None = None
        self.draws: Mapping[str, Hashable] = {}
        self._build = build
        self._read: Readings | None = None

    def view(self) -> tuple[DefenderView, Population]:
        """A view that knows what was read so far."""
        view, population = self._build()
        if self._read is not None:
            view.go_on(self._read)
        return view, population

    def check(self, attack: AttackResult) -> None:
        """As :func:`bbfast.defenses.run.check_run`."""
        view, population = self.view()
        check_run(self.method, attack, view)
        self._read, self.draws = view.readings(), population.draws

    def readers(self, source: str) -> list[Apart]:
        """What the detector will read of ``source``; none after a failure."""
        if source not in self.method.card.needs or type(self.method).readers is Defense.readers:
            return []
        try:
            return self._ask(source)
        except Exception as error:
            self.fail(error)
            return []

    def _ask(self, source: str) -> list[Apart]:
        view, _ = self.view()
        found = [Apart(reader) for reader in self.method.readers(view, source)]
        self._read = view.readings()
        return found

    def keep(self, source: str, reader: Reader, outcome: Callable[[], Any]) -> None:
        """Take what a pass gave ``reader``, or fail as it did."""
        if self._read is None:
            return
        try:
            self._read.keep(source, reader, outcome())
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """The detector is out, and what was read for it is dropped."""
        self.failure, self._read = _light(error), None

    def result(self, attack: AttackResult, clean_fraction: float | None) -> DefenseResult:
        """The judged result."""
        view, population = self.view()
        self._read = None
        return run_and_judge(self.method, attack, view, population, clean_fraction)


def _light(error: Exception) -> Exception:
    """The error without the local variables of the calls that are over, among which are sets and models."""
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            over: FrameType | None = frame
            while over is not None:  # and those that called it: a frame holds them, seen in the traceback or not
                try:
                    over.clear()
                except RuntimeError:  # still at work
                    break
                over = over.f_back
        cause = cause.__cause__ or cause.__context__
    return error


def _method(given: str | Defense) -> Defense:
    if isinstance(given, str):
        return create(given, **find(given).Config.detect_only)
    if not isinstance(given, Defense):
        raise TypeError(f"detectors must be names or defenses, got {type(given).__qualname__}")
    return given


def _share(runs: Mapping[str, _Run], source: str) -> None:
    """One pass over each draw of ``source`` for all that read it."""
    draws: dict[Hashable, list[tuple[_Run, Apart]]] = {}
    for run in runs.values():
        if run.failure is None:
            for reader in run.readers(source):
                draws.setdefault(run.draws[source], []).append((run, reader))
    for taking in draws.values():
        apart: dict[Hashable, Apart] = {}
        for _, reader in taking:
            apart.setdefault(reader.key, reader)
        view = taking[0][0].view()[0]
        images = getattr(view, source).images
        clock = time.perf_counter()
        read_set(view.model, images, list(apart.values()), view.mean, view.std, view.device)
        del view, images
        for run, reader in taking:
            run.keep(source, reader.wrapped, apart[reader.key].outcome)
        seconds = time.perf_counter() - clock
        for run in {id(run): run for run, _ in taking}.values():
            run.shared += seconds
