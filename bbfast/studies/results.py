"""What a study measures: the cells that its grids left in the store, and the results behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbfast.bench import Plan, grid_rows
from bbfast.bench.grid import NO_DEFENSE
from bbfast.bench.outcomes import Book
from bbfast.bench.results import PLACE
from bbfast.errors import ArtifactError, DataRequirementError
from bbfast.store import Store

if TYPE_CHECKING:
    from bbfast.attacks import AttackResult
    from bbfast.defenses import DefenseResult

__all__ = ["ATTACK_FAILED_BELOW", "TABLE", "Results", "Row", "known", "table", "with_attack"]

Row = dict[str, Any]
"""A cell: ``grid``, its place, ``status``, ``reason``, figures (None where there are none), ``seconds``,
``peak_memory_bytes``, ``key``, and what :func:`with_attack` adds."""

ATTACK_FAILED_BELOW = 0.2
"""ASR without a defense below which there is nothing to defend against."""

TABLE = (*PLACE, "status", "c_acc", "asr", "r_acc", "der", "rir", "d_c_acc", "seconds", "peak_gb", "key", "reason")
"""Columns of the table of cells."""


def with_attack(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows with the figures of the same attack without a defense: ``attack_c_acc``, ``attack_asr``, ``attack_r_acc``;
    ``d_c_acc``, how much accuracy the defense costs; ``attack_failed``, whether the ASR is below 20 % even without a
    defense. None where the grid has no such cell, or no figures for it."""

    def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return (row.get("grid"), *(row[key] for key in PLACE if key != "defense"))

    plain = {cell(row): row for row in rows if row["defense"] == NO_DEFENSE}
    out = []
    for row in rows:
        without = plain.get(cell(row), {})
        before = {f"attack_{key}": without.get(key) for key in ("c_acc", "asr", "r_acc")}
        drop = None
        if row["defense"] != NO_DEFENSE and row.get("c_acc") is not None and before["attack_c_acc"] is not None:
            drop = before["attack_c_acc"] - row["c_acc"]
        failed = None if before["attack_asr"] is None else before["attack_asr"] < ATTACK_FAILED_BELOW
        out.append({**row, **before, "d_c_acc": drop, "attack_failed": failed})
    return out


class Results:
    """The cells of a study's grids and the results behind them.

    Args:
        plans: One a grid.
        store: Where they ran.
        device: Where a study computes.
        name: Of the study.
        rows: The cells, if they are not to be read from the store: what :func:`bbfast.bench.grid_rows` gives, and
            ``grid``.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        store: Store,
        device: torch.device,
        name: str = "study",
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.plans, self.store, self.device, self._name = tuple(plans), store, device, name
        self._keys = {
            (plan.grid.name, *(getattr(cell, key) for key in PLACE)): (plan, cell.task)
            for plan in plans
            for cell in plan.cells
        }
        self.rows = self._read() if rows is None else with_attack(rows)
        self._own: list[Mapping[str, Any]] = []

    @property
    def work(self) -> Path:
        """A folder that stays, for what a study makes itself; in the store, made now."""
        folder = self.store.root / ".studies" / self._name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def of(self, grid: str) -> list[Row]:
        """The cells of one grid."""
        return [row for row in self.rows if row["grid"] == grid]

    def attack(self, row: Mapping[str, Any]) -> AttackResult:
        """The attack's result of a cell, whatever its defense.

        Raises:
            ArtifactError: if there is none in the store.
        """
        from bbfast.attacks import AttackResult

        plan, key = self._task(row)
        return AttackResult.load(self._folder(plan.tasks[key].parent or key))

    def defense(self, row: Mapping[str, Any]) -> DefenseResult | None:
        """The defense's result of a cell; None for a cell without a defense.

        Raises:
            ArtifactError: if there is none in the store.
        """
        from bbfast.defenses import DefenseResult

        plan, key = self._task(row)
        return None if plan.tasks[key].parent is None else DefenseResult.load(self._folder(key))

    def count(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Count cells of no grid, that the study ran itself; each has ``status`` and ``reason``.

        Raises:
            DataRequirementError: as :meth:`require`.
        """
        self._own.extend(cells)
        self.require()

    def counts(self) -> dict[str, int]:
        """Status to number of cells."""
        return dict(Counter(row["status"] for row in self._cells))

    def reasons(self) -> dict[str, int]:
        """Why cells have no figures, to how many."""
        return dict(Counter(f"{row['status']}: {row['reason']}" for row in self._cells if row["status"] != "done"))

    def require(self) -> None:
        """Refuse to measure nothing.

        Raises:
            DataRequirementError: if there are cells, and none is done; with the first reason.
        """
        if self._cells and "done" not in self.counts():
            counts = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in self.counts().items())
            first = next((row["reason"] for row in self._cells if row["reason"]), "no reason is known")
            raise DataRequirementError(
                f"study {self._name!r} has nothing to measure: of {len(self._cells)} cells {counts}; the first: {first}"
            )

    @property
    def _cells(self) -> list[Mapping[str, Any]]:
        return [*self.rows, *self._own]

    def _read(self) -> list[Row]:
        rows: list[Row] = []
        for plan in self.plans:
            for cell, row in zip(plan.cells, grid_rows(plan, self.store, costs=True), strict=True):
                rows.append({"grid": plan.grid.name, **row, "key": (cell.task or "")[:12]})
        return with_attack(rows)

    def _task(self, row: Mapping[str, Any]) -> tuple[Plan, str]:
        found = self._keys.get((row["grid"], *(row[key] for key in PLACE)))
        if found is None or found[1] is None:
            raise ArtifactError(f"no stage makes the cell {[row[key] for key in PLACE]} of {row['grid']!r}")
        return found[0], found[1]

    def _folder(self, key: str) -> Path:
        outcome = Book(self.store).read(key)
        if outcome is None or outcome.status != "done":
            raise ArtifactError(f"the result of stage {key[:12]} is not in {self.store.root}; run the study again")
        return self.store.root / outcome.folder


def table(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for reading, with the columns :data:`TABLE`; a cell whose attack does not work says ``attack_failed``."""
    out = []
    for row in rows:
        bytes_ = row.get("peak_memory_bytes")
        more = {
            "status": "attack_failed" if row["status"] == "done" and row["attack_failed"] else row["status"],
            "peak_gb": None if bytes_ is None else bytes_ / 1e9,
        }
        out.append({key: {**row, **more}.get(key) for key in TABLE})
    return out


def known(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The figures ``key`` of those rows that have it."""
    return [float(row[key]) for row in rows if row.get(key) is not None]
