"""From a grid to the work that it takes: every cell, the stages behind them, and what is not applicable and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from bbfast._hashing import sha256_json
from bbfast._record import method_version
from bbfast.bench.facts import Facts, refused
from bbfast.bench.grid import NO_DEFENSE, DataEntry, Entry, Grid
from bbfast.bench.identity import attack_identity, defense_identity
from bbfast.bench.sources import attack_source, both, data_source
from bbfast.store import Store

__all__ = ["Cell", "Plan", "Task", "make_plan"]

Method = tuple[Entry, str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of the benchmark's table.

    Args:
        dataset, model, attack, ratio, seed, defense: Where it stands; labels of the grid.
        task: Key of the stage that makes it; None if it cannot be made.
        reason: Why it is not applicable; None if it is.
    """

    dataset: str
    model: str
    attack: str
    ratio: float
    seed: int
    defense: str
    task: str | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One stage: an attack, or a defense of one.

    Args:
        key: 64 hexadecimal digits: hash of what the result will record, every default filled in, and of where the data
            lie. When a default changes, so does the key.
        kind: ``attack`` or ``defense``.
        spec: What is to be done, plain JSON values.
        parent: Key of the attack that a defense needs.
        source: What the files of its data and its attack are now; empty if there are none, or not here. No part of the
            key, which is the same where the files are not.
    """

    key: str
    kind: str
    spec: Mapping[str, Any]
    parent: str | None = None
    source: str = ""

    @property
    def method(self) -> str:
        """Name of the attack or defense."""
        return str(self.spec[self.kind]["name"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells of a grid and the stages that make them; an attack comes before its defenses.

    Args:
        grid: The grid.
        cells: In the grid's order.
        tasks: Key to stage.
    """

    grid: Grid
    cells: tuple[Cell, ...]
    tasks: Mapping[str, Task]

    def not_applicable(self) -> dict[str, int]:
        """Reason to number of cells."""
        return dict(Counter(cell.reason for cell in self.cells if cell.reason is not None))

    def stages(self) -> dict[str, int]:
        """Number of stages by kind, and of cells that they serve."""
        kinds = Counter(task.kind for task in self.tasks.values())
        served = [cell for cell in self.cells if cell.task is not None]
        without_sharing = sum(1 if cell.defense == NO_DEFENSE else 2 for cell in served)
        return {
            "attack": kinds["attack"],
            "defense": kinds["defense"],
            "total": len(self.tasks),
            # What it would be if every cell trained its own attacked model.
            "saved_by_sharing": without_sharing - len(self.tasks),
        }


def make_plan(grid: Grid) -> Plan:
    """Every cell of ``grid`` with the stage that makes it. Nothing is trained; no data is read but the embedded sets
    and those that nothing but their files describes; of the others' files names, sizes and times are looked at.

    A cell is not applicable if the attack cannot poison that share of its classes, the model cannot be built for the
    images, or the defense refuses the model (:func:`bbfast.defenses.refusal`). What only the data can tell is found
    when the stage runs, and recorded the same way.
    """
    tasks: dict[str, Task] = {}
    cells = tuple(_cells(grid, tasks))
    return Plan(grid, cells, tasks)


def _cells(grid: Grid, tasks: dict[str, Task]) -> Iterator[Cell]:
    files = {a.label: attack_source(a) for a in grid.attacks}
    for data in grid.datasets:
        facts, here = Facts(data), data_source(data)
        methods = {d.label: (d, _identity(d, data)) for d in grid.defenses if d.name != NO_DEFENSE}
        unfit = {(a.label, ratio): facts.unfit(a, ratio) for a in grid.attacks for ratio in grid.ratios}
        for model in grid.models:
            network = facts.network(model)
            refusals = {d.label: refused(d, network, facts) for d in grid.defenses}
            for attack in grid.attacks:
                for ratio in grid.ratios:
                    reason = network if isinstance(network, str) else unfit[attack.label, ratio]
                    for seed in grid.seeds:
                        where = (data.label, model, attack.label, ratio, seed)
                        first = None if reason else _attack_task(grid, data, model, attack, ratio, seed)
                        if first is not None:
                            first = dataclasses.replace(first, source=both(here, files[attack.label]))
                            tasks[first.key] = first
                        for defense in grid.defenses:
                            label = defense.label
                            yield _cell(grid, where, first, reason or refusals[label], label, methods.get(label), tasks)


def _cell(
    grid: Grid,
    where: tuple[str, str, str, float, int],
    attack: Task | None,
    reason: str | None,
    label: str,
    method: Method | None,
    tasks: dict[str, Task],
) -> Cell:
    if attack is None or reason is not None:
        return Cell(*where, label, None, reason)
    if method is None:
        return Cell(*where, NO_DEFENSE, attack.key)
    task = _defense_task(grid, attack, *method)
    tasks[task.key] = task
    return Cell(*where, label, task.key)


def _identity(defense: Entry, data: DataEntry) -> str:
    return sha256_json(defense_identity(defense.name, defense.settings, _entry(data)))


def _entry(data: DataEntry) -> dict[str, Any]:
    return {"name": data.name, "root": data.root, "options": data.options}


def _attack_task(grid: Grid, data: DataEntry, model: str, attack: Entry, ratio: float, seed: int) -> Task:
    from bbfast.attacks.base import registry

    spec = {
        "data": _entry(data),
        "model": model,
        "attack": {
            "name": attack.name,
            "settings": {**attack.settings, "ratio": ratio},
            **method_version("attack", registry.get(attack.name).version),
        },
        "preset": grid.preset,
        "recipe": {**grid.recipe, **attack.recipe},
        "seed": seed,
        "device": grid.device,
    }
    # Where it is computed is not part of what it is.
    return Task(Store.key("attack_task", {**attack_identity(spec), "data": spec["data"]}), "attack", spec)


def _defense_task(grid: Grid, attack: Task, defense: Entry, identity: str) -> Task:
    from bbfast.defenses import find

    spec = {
        "defense": {
            "name": defense.name,
            "settings": defense.settings,
            **method_version("defense", find(defense.name).version),
        },
        "clean_fraction": grid.clean_fraction,
        "seed": attack.spec["seed"],
    }
    key = Store.key("defense_task", {"attack": attack.key, "method": identity, "clean_fraction": grid.clean_fraction})
    return Task(key, "defense", {**attack.spec, **spec}, attack.key, attack.source)
