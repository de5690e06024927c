"""Attacks trained with something that watches: run once, kept in the store beside the attack's result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bbfast import artifact
from bbfast.bench import Cell, Grid, make_plan
from bbfast.bench.stages import attack_place, recipe_for
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.store import Content, Store
from bbfast.training import StartInfo

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.data import DataPair
    from bbfast.studies.base import StudyConfig

__all__ = ["Keeps", "Recorded", "Truth", "record", "refuse_limits"]

STAGE = "recording"


class Keeps(Protocol):
    """A callback whose state can be stored."""

    def state(self) -> dict[str, Tensor]: ...
    def describe(self) -> dict[str, Any]: ...


class Truth:
    """Callback that knows which samples are poisoned, and refuses an attack of which that is not fixed."""

    poisoned: Tensor | None = None

    def on_poisoned(self, flags: Tensor) -> None:
        """Before the training of a poison-only attack."""
        self.poisoned = flags

    def on_start(self, info: StartInfo) -> None:
        """Nothing may start without it."""
        if self.poisoned is None:
            raise DataRequirementError(
                "the attack poisons every batch anew, so no training sample is poisoned or clean; a recording needs an "
                "attack that poisons the data alone"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A cell and what was recorded in its training.

    Args:
        cell: Where it stands.
        status: ``done``, ``not_applicable`` or ``failed``.
        reason: Why there is nothing.
        poisoned: Which training samples are poisoned, bool ``[N]``.
        tensors: What each callback kept, by its name.
        history: One row an epoch.
        metrics: Of the attack's result.
        folder: Of the attack's result.
    """

    cell: Cell
    status: str
    reason: str = ""
    poisoned: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    tensors: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path = Path()

    @property
    def label(self) -> str:
        """What the cell is called in a figure."""
        return f"{self.cell.attack}, {100 * self.cell.ratio:.3g} %"

    def but_failed(self, error: Exception) -> Recorded:
        """The same cell without figures, as something went wrong."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Recorded(self.cell, "failed", reason, metrics=self.metrics, folder=self.folder)

    def attack(self) -> AttackResult:
        """The result of the recorded training."""
        from bbfast.attacks import AttackResult

        return AttackResult.load(self.folder)

    def row(self) -> dict[str, Any]:
        """Its place, status and figures, for a table."""
        place = {key: getattr(self.cell, key) for key in ("dataset", "model", "attack", "ratio", "seed")}
        return {**place, "status": self.status, **{key: self.metrics.get(key) for key in ("c_acc", "asr", "r_acc")}}


def refuse_limits(config: StudyConfig) -> None:
    """Of a study that trains in its own process, where nothing ends a stage.

    Raises:
        ConfigError: if a limit is set.
    """
    for key in ("seconds", "memory_gib"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}: this study trains in its own process, where no limit is kept; leave it out")


def record(
    grid: Grid, store: Store, device: torch.device, watch: Callable[[], Mapping[str, Keeps]]
) -> tuple[Recorded, ...]:
    """Train every attack of a grid with callbacks of its own, or find what they kept in the store.

    The attack's result is put where the benchmark looks for it. A run that is killed goes on from its checkpoint,
    recording included. Whatever goes wrong with one cell is its ``reason``.

    Args:
        grid: The attacks; its defenses do not matter.
        store: Where recordings and results lie, or go.
        device: Where to train.
        watch: Makes the callbacks of one training, by the name that their state is kept under.

    Raises:
        DataRequirementError: if no cell could be recorded; with the first reason.
    """
    from bbfast import datasets

    plan = make_plan(grid.model_copy(update={"device": str(device)}))
    pairs: dict[str, DataPair] = {}
    found = []
    for cell in plan.cells:
        if cell.task is None:
            found.append(Recorded(cell, "not_applicable", cell.reason or ""))
            continue
        task = plan.tasks[cell.task]
        spec = (plan.tasks[task.parent] if task.parent else task).spec
        try:
            entry = spec["data"]
            if cell.dataset not in pairs:
                pairs = {cell.dataset: datasets.load(entry["name"], entry["root"], **entry["options"])}
            found.append(_recorded(cell, spec, pairs[cell.dataset], store, device, watch()))
        except DataRequirementError as error:
            found.append(Recorded(cell, "not_applicable", str(error)))
        except Exception as error:
            found.append(Recorded(cell, "failed").but_failed(error))
    if not any(one.status == "done" for one in found):
        raise DataRequirementError(f"none of {len(found)} attacks could be recorded; the first: {found[0].reason}")
    return tuple(found)


def _recorded(
    cell: Cell,
    spec: Mapping[str, Any],
    data: DataPair,
    store: Store,
    device: torch.device,
    watching: Mapping[str, Keeps],
) -> Recorded:
    from bbfast import attacks

    method = attacks.create(spec["attack"]["name"], **spec["attack"]["settings"])
    recipe = recipe_for(method, spec["preset"], data.name, spec["model"]).replace(**spec["recipe"])
    folder = attack_place(store, method, data, spec["model"], recipe, seed=spec["seed"])
    truth = Truth()

    def make(work: Path) -> Content:
        result = attacks.attack(
            method,
            data,
            spec["model"],
            recipe,
            spec["seed"],
            device,
            checkpoint=work,
            store=store,
            progress=False,
            callbacks=[truth, *watching.values()],
        )
        if not artifact.exists(folder):
            result.save(folder)
        return Content(
            STAGE,
            config,
            metrics=result.metrics,
            tensors={"truth": {"poisoned": result.poisoned}, **{name: k.state() for name, k in watching.items()}},
            log=result.history,
        )

    # The attack's folder is named by its key: all that its result depends on.
    config = {"attack": folder.name, "watching": {name: kept.describe() for name, kept in watching.items()}}
    kept = store.get_or_make(STAGE, method.name, config, make, seed=spec["seed"], kind=STAGE)
    return Recorded(
        cell,
        "done",
        poisoned=kept.tensors("truth")["poisoned"],
        tensors={name: kept.tensors(name) for name in watching},
        history=kept.log,
        metrics=kept.metrics,
        folder=folder,
    )
