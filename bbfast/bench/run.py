"""Run a grid: what is not done yet, in an order in which every defense finds its attack, whatever goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from bbfast._progress import bar
from bbfast.bench.failures import recorded
from bbfast.bench.holders import running
from bbfast.bench.kept import keep_grid
from bbfast.bench.outcomes import Book, Outcome
from bbfast.bench.plan import Plan, Task
from bbfast.bench.pool import Ended, Pool
from bbfast.bench.progress import Pace
from bbfast.bench.sound import sound
from bbfast.errors import ArtifactError
from bbfast.store import Store

__all__ = ["Summary", "run_plan"]

_ATTEMPTS = 3
"""How often a stage whose worker died is begun: a machine that kills for memory is not helped by more."""
_TICK = 1.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Args:
        done, failed, not_applicable: Stages.
        begun: Stages that this run did, or tried; the others were there.
        blocked: Defenses whose attack failed.
        seconds: Of this run.
    """

    done: int
    failed: int
    not_applicable: int
    begun: int
    blocked: int
    seconds: float


def run_plan(
    plan: Plan,
    store: Store,
    pool: Pool,
    *,
    retry_failed: bool = False,
    verify: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Do every stage of ``plan`` that is not done.

    A failed stage is recorded with its traceback and does not stop the others. One whose worker died is begun again, up
    to three times. A damaged result is put aside and made anew. Killed at any moment, the same call goes on: what is in
    the store is not done again.

    Args:
        plan: What to do.
        store: Where results lie.
        pool: Where to do it; closed at the end.
        retry_failed: Begin stages again that failed in an earlier run.
        verify: Compare every file of the results that are there with its checksum first; without it damage is found
            where a result is used.
        progress: Show a bar; None decides by the terminal.
        say: Called with a line for each stage that is over, where no bar is shown.

    Raises:
        ArtifactError: if the store cannot be written to, holds a result of a newer bbfast, or a worker's disk is full:
            the stages that found it so are not noted, and the same call goes on when there is space.
        KeyboardInterrupt: when interrupted; the workers are ended, their checkpoints stay.
    """
    book, clock = Book(store), time.monotonic()
    with contextlib.closing(pool), running(store):
        keep_grid(store, plan.grid)
        desk = _Desk(plan, sound(store, book.read_all(plan.tasks), verify), retry_failed)
        pace = Pace(plan, desk.outcomes)
        with bar(plan.grid.name, len(plan.tasks), progress, done=desk.over, left=False) as shown:
            while True:
                while pool.free and (task := desk.next()) is not None:
                    pool.submit(task.key, desk.order(task))
                shown.say(pace.shown(len(desk.running)))
                if not desk.running:
                    break
                full = ""
                for ended in pool.wait(_TICK):
                    if ended.outcome.status == "full":
                        full = ended.outcome.reason  # what has ended beside it is noted first
                        continue
                    before = desk.over
                    pace.took(over := desk.take(_standing(book, ended, plan.tasks[ended.key])))
                    for key, outcome in over.items():
                        book.write(key, recorded(outcome, plan.tasks[key].spec))
                        say(pace.line(plan.tasks[key], outcome))
                    shown.advance(desk.over - before)
                if full:
                    raise ArtifactError(f"{full}; free some space, and the same command goes on")
    return desk.summary(time.monotonic() - clock)


def _standing(book: Book, ended: Ended, task: Task) -> Ended:
    """What counts of a stage: the result that another runner has made meanwhile, before a failure of our own."""
    if ended.outcome.status != "done":
        noted = book.read(ended.key, task.source)
        if noted is not None and noted.status == "done":
            return Ended(ended.key, noted)
    return ended


class _Desk:
    """Which stages are over, which may begin, and in what order: defenses of a finished attack before new attacks."""

    def __init__(self, plan: Plan, known: Mapping[str, Outcome], retry_failed: bool) -> None:
        self._plan = plan
        self._outcomes = {k: o for k, o in known.items() if not (retry_failed and o.status == "failed")}
        self._attempts: Counter[str] = Counter()
        self._children: defaultdict[str, list[str]] = defaultdict(list)
        self._order = {key: i for i, key in enumerate(plan.tasks)}
        self._ready: list[tuple[int, int, str]] = []
        self._offered: set[str] = set()
        self.running: set[str] = set()
        self._begun = 0
        for key, task in plan.tasks.items():
            if task.parent is not None:
                self._children[task.parent].append(key)
        for key, task in plan.tasks.items():
            if key not in self._outcomes and (task.parent is None or self._status(task.parent) == "done"):
                self._offer(key)

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        """Of the stages that are over; changes as they end."""
        return self._outcomes

    @property
    def over(self) -> int:
        return len(self._outcomes)

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self._outcomes.values())

    def next(self) -> Task | None:
        """A stage that may begin, now counted as running."""
        while self._ready:
            key = heapq.heappop(self._ready)[-1]
            self._offered.discard(key)
            parent = self._plan.tasks[key].parent
            if parent is not None and self._status(parent) != "done":
                continue  # its attack is being made anew, and offers it again
            self.running.add(key)
            self._attempts[key] += 1
            self._begun += self._attempts[key] == 1
            return self._plan.tasks[key]
        return None

    def order(self, task: Task) -> dict[str, Any]:
        """What the worker is given."""
        parent = None if task.parent is None else self._outcomes[task.parent].folder
        return {"kind": task.kind, "spec": task.spec, "parent": parent}

    def take(self, ended: Ended) -> dict[str, Outcome]:
        """Note that a stage is over; the outcomes to be kept: none if it will be begun again, those of its defenses as
        well if it is an attack that cannot be made."""
        key, outcome = ended.key, ended.outcome
        self.running.discard(key)
        parent = self._plan.tasks[key].parent
        again = self._attempts[key] < _ATTEMPTS
        if outcome.status == "damaged" and parent is not None and again:
            if self._outcomes.pop(parent, None) is not None:
                self._offer(parent)
            return {}
        if ended.lost and again:
            self._offer(key)
            return {}
        if outcome.status == "damaged":
            outcome = dataclasses.replace(outcome, status="failed")
        outcome = dataclasses.replace(outcome, source=self._plan.tasks[key].source)
        over = {key: dataclasses.replace(outcome, attempts=self._attempts[key])}
        if outcome.status == "not_applicable":
            over |= {child: dataclasses.replace(outcome, seconds=0.0, attempts=0) for child in self._children[key]}
        self._outcomes |= over
        if outcome.status == "done":
            for child in self._children[key]:
                if child not in self._outcomes and child not in self.running:
                    self._offer(child)
        return over

    def summary(self, seconds: float) -> Summary:
        return Summary(
            done=self.count("done"),
            failed=self.count("failed"),
            not_applicable=self.count("not_applicable"),
            begun=self._begun,
            blocked=len(self._plan.tasks) - self.over,
            seconds=seconds,
        )

    def _status(self, key: str) -> str | None:
        outcome = self._outcomes.get(key)
        return None if outcome is None else outcome.status

    def _offer(self, key: str) -> None:
        if key not in self._offered:
            self._offered.add(key)
            last = self._plan.tasks[key].kind == "attack"
            heapq.heappush(self._ready, (int(last), self._order[key], key))
