"""What a plan will take, from what its stages have taken before."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bbfast.bench.index import opened
from bbfast.bench.outcomes import Book
from bbfast.bench.plan import Plan, Task
from bbfast.store import Store

__all__ = ["Estimate", "estimate"]

_Place = tuple[str, str, str, str, bool]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left of a plan.

    Args:
        left: Stages that are not over.
        seconds: Of those that have a measurement, one after another.
        disk_bytes: Of those.
        unmeasured: Stages without one: no stage of that method on that data set and model lies in the store.
    """

    left: int
    seconds: float
    disk_bytes: float
    unmeasured: int

    @property
    def measured(self) -> int:
        """Stages that the estimate is of; without one it says nothing."""
        return self.left - self.unmeasured


def estimate(plan: Plan, store: Store) -> Estimate:
    """Time and disk that ``plan`` will take.

    For each stage that is not over, the mean of those in ``store`` of the same method on the same data set and model.
    What has no measurement is counted, not guessed.
    """
    known = Book(store).read_all(plan.tasks)
    left = [task for key, task in plan.tasks.items() if key not in known]
    if not store.root.is_dir():
        return Estimate(len(left), 0.0, 0.0, len(left))
    seconds: defaultdict[_Place, list[float]] = defaultdict(list)
    sizes: defaultdict[_Place, list[float]] = defaultdict(list)
    with opened(store) as (index, _):
        for row in index.rows():
            method = row["defense"] if row["stage"] == "defense" else row["attack"]
            control = row["stage"] == "attack" and row["ratio"] == 0
            place = (row["stage"], method, row["dataset"], row["model"], control)
            if row["seconds"] is not None:
                seconds[place].append(row["seconds"])
            sizes[place].append(_size(store.root / row["folder"]))
    places = [_place(task) for task in left]
    return Estimate(
        len(left),
        _total(seconds, places),
        _total(sizes, places),
        sum(place not in seconds for place in places),
    )


def _place(task: Task) -> _Place:
    # At ratio 0 an attack trains nothing but the clean model that all attacks share.
    control = task.kind == "attack" and task.spec["attack"]["settings"]["ratio"] == 0
    return task.kind, task.method, str(task.spec["data"]["name"]), str(task.spec["model"]), control


def _total(measured: defaultdict[_Place, list[float]], places: Iterable[_Place]) -> float:
    means = {place: statistics.fmean(values) for place, values in measured.items()}
    return sum(means.get(place, 0.0) for place in places)


def _size(folder: Path) -> float:
    """Bytes of a result, as its manifest says."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return float(sum(file["size"] for file in manifest["files"].values()))
