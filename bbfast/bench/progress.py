"""How far a run is, in words: what is over, how fast, how long it will take, and what a stage is called."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from bbfast.bench.grid import NO_DEFENSE
from bbfast.bench.outcomes import Outcome
from bbfast.bench.plan import Plan, Task

__all__ = ["Pace", "duration", "labels", "places"]


class Pace:
    """Counts of a run, its rate, and the time left: over all stages that this run has finished, however long ago.

    Args:
        plan: What is run.
        known: Key to outcome of all stages that are over; the run goes on changing it.
        clock: Seconds.
    """

    def __init__(self, plan: Plan, known: Mapping[str, Outcome], clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._known, self._clock, self._labels = plan, known, clock, labels(plan)
        self._children: dict[str, list[str]] = {}
        for key, task in plan.tasks.items():
            if task.parent is not None:
                self._children.setdefault(task.parent, []).append(key)
        self._began, self._finished = clock(), 0
        self._counts = Counter(outcome.status for outcome in known.values())
        broken = [key for key, outcome in known.items() if outcome.status == "failed"]
        self._blocked = sum(self._waiting(key) for key in broken)

    def took(self, over: Mapping[str, Outcome]) -> None:
        """Note what has ended, after it was added to what is known."""
        for key, outcome in over.items():
            self._counts[outcome.status] += 1
            self._finished += outcome.attempts > 0  # a defense of a refused attack was not begun
            if outcome.status == "failed":
                self._blocked += self._waiting(key)

    def speed(self) -> str:
        """``"12/min, 1 h 20 min left"``; empty before the first stage has ended."""
        spent = self._clock() - self._began
        if not self._finished or spent <= 0:
            return ""
        left = max(0, len(self._plan.tasks) - len(self._known) - self._blocked)
        return f"{_rate(self._finished / spent)}, {duration(left * spent / self._finished)} left"

    def shown(self, running: int) -> str:
        """The words beside a bar."""
        failed = self._counts["failed"]
        done = len(self._known) - failed - self._counts["not_applicable"]
        parts = [f"{done}/{len(self._plan.tasks)} done", f"{running} running", f"{failed} failed", self.speed()]
        return ", ".join(part for part in parts if part)

    def line(self, task: Task, outcome: Outcome) -> str:
        """The line about a stage that is over."""
        said = outcome.status.replace("_", " ") + (f": {outcome.reason}" if outcome.reason else "")
        counts = f"{self._counts['failed']} failed" + (f", {speed}" if (speed := self.speed()) else "")
        return (
            f"[{len(self._known)}/{len(self._plan.tasks)}] {self._labels[task.key]}: {said} ({outcome.seconds:.1f} s), "
            f"{counts}"
        )

    def _waiting(self, key: str) -> int:
        """Defenses that a failed attack leaves undone."""
        return sum(child not in self._known for child in self._children.get(key, ()))


def places(plan: Plan) -> dict[str, dict[str, Any]]:
    """Key of each stage to dataset, model, attack, ratio, seed and defense in the grid's labels: two entries of one
    method differ by them alone. An attack's defense is ``none``; one that no cell needs has the methods' names."""
    keys = ("dataset", "model", "attack", "ratio", "seed", "defense")
    found: dict[str, dict[str, Any]] = {}
    for cell in plan.cells:
        if cell.task is None:
            continue
        place, parent = {key: getattr(cell, key) for key in keys}, plan.tasks[cell.task].parent
        found.setdefault(cell.task, place)
        if parent is not None:
            found.setdefault(parent, {**place, "defense": NO_DEFENSE})
    for key, task in plan.tasks.items():
        if key not in found:
            spec = task.spec
            own = (spec["data"]["name"], spec["model"], task.method, spec["attack"]["settings"]["ratio"], spec["seed"])
            found[key] = dict(zip(keys, (*own, NO_DEFENSE), strict=True))
    return found


def labels(plan: Plan) -> dict[str, str]:
    """:func:`places` in words."""
    words = {}
    for key, place in places(plan).items():
        defense = "" if plan.tasks[key].kind == "attack" else f" {place['defense']}"
        attack = f"{place['dataset']} {place['model']} {place['attack']} {place['ratio']:g}"
        words[key] = f"{attack}{defense}, seed {place['seed']}"
    return words


def duration(seconds: float) -> str:
    """``"1 h 20 min"``, ``"3 min 5 s"``, ``"12 s"``."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _rate(per_second: float) -> str:
    per_minute = 60 * per_second
    if per_minute >= 1:
        return f"{per_minute:.0f}/min" if per_minute >= 10 else f"{per_minute:.1f}/min"
    return f"{60 * per_minute:.1f}/h"
