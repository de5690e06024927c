"""P6: how fast the backdoor is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import described
from bbfast.studies.perspectives._learning_figure import drawn
from bbfast.studies.perspectives._probe import COLUMNS, GradientProbe
from bbfast.studies.perspectives._recorded import Recorded, record, refuse_limits
from bbfast.studies.results import Results
from bbfast.studies.statistics import nanmean
from bbfast.training import SampleRecorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["QuickLearning", "first_above", "group_curves"]

_HIGH = 0.9
_TRIVIAL = 0.5


class QuickLearningConfig(DataConfig):
    """Settings of the study of quick learning.

    Args:
        model: Name of the model.
        attacks: Attacks that poison the data alone: names, or mappings with name, label and set; all is every one.
        ratios: Shares of the training set that are poisoned.
        fine_epochs: First epochs that are looked at every few steps.
        every: How many; null is an eighth of an epoch.
        probe: Samples of each group whose gradients are taken; 512 in the benchmark's protocol.
    """

    model: str = "small_cnn"
    attacks: Listed = Field(("badnets", "blended", "ftrojan"), min_length=1)
    ratios: tuple[Share, ...] = Field((0.01, 0.1), min_length=1)
    fine_epochs: int = Field(2, ge=0)
    every: int | None = Field(None, ge=1)
    probe: int = Field(256, ge=1)


def first_above(at: NDArray[np.float64], values: NDArray[np.float64], limit: float) -> float:
    """The first of the places ``at`` where ``values`` exceed ``limit``; NaN if none does."""
    above = np.flatnonzero(values > limit)
    return float(at[above[0]]) if len(above) else float("nan")


def group_curves(
    loss: NDArray[np.float64],
    correct: NDArray[np.bool_],
    steps: NDArray[np.int64],
    groups: Sequence[NDArray[np.bool_]],
    per_epoch: int,
    every: int,
) -> NDArray[np.float64]:
    """Mean loss and accuracy of groups of samples while they are trained on.

    Args:
        loss: ``[E, N]``, NaN where a sample was not presented.
        correct: ``[E, N]``.
        steps: Step of each presentation within its epoch, ``[F, N]``, F <= E; -1: none.
        groups: bool ``[N]`` each.
        per_epoch: Steps an epoch.
        every: Steps that are averaged in the first F epochs; later ones are whole.

    Returns:
        f64 ``[points, 1 + 2 G]``: middle of the interval, in epochs; the groups' losses; their accuracies. NaN where
        an interval has none of a group.
    """
    rows = []
    for epoch in range(len(loss)):
        seen = np.isfinite(loss[epoch])
        if epoch >= len(steps):
            parts = [(epoch + 0.5, seen)]
        else:
            ends = range(0, per_epoch, every)
            parts = [
                (
                    epoch + (start + min(start + every, per_epoch)) / 2 / per_epoch,
                    seen & (steps[epoch] >= start) & (steps[epoch] < start + every),
                )
                for start in ends
            ]
        for at, which in parts:
            own = [which & group for group in groups]
            rows.append(
                [at, *(nanmean(loss[epoch][part]) for part in own), *(nanmean(correct[epoch][part]) for part in own)]
            )
    return np.array(rows, dtype=np.float64).reshape(-1, 1 + 2 * len(groups))


@register_study("quick_learning")
class QuickLearning(Study):
    """Each attack is trained once with a recorder: loss and correctness of every training sample as the training itself
    computes them (augmented, before the step), clean and poisoned samples apart; and a fixed probe of stored samples
    whose mean gradients are taken in eval mode, with C-Acc and ASR on as many test images. Both look every few steps in
    the first epochs, then once an epoch.

    ``asr_epoch``: first epoch, from 1, whose ASR exceeds 90 % while of the same images without the trigger less than
    half have the wanted label (a model that calls everything the target has no backdoor); ``c_acc_epoch``: first whose
    C-Acc exceeds 90 % of the last; ``asr_at``: as the first, from the probe, in fractions of an epoch; ``area``:
    integral over the epochs of mean clean less mean poisoned loss, in nats times epochs, positive if the poisoned
    samples are learned first; ``cosine``: mean over the epochs of the cosine between the groups' gradients,
    ``cosine_first`` in the first measurement. NaN: never.

    Arrays (c: place of the cell in the table, from 0): ``curve_c`` f64 ``[points, 5]``: place in epochs, clean and
    poisoned loss, clean and poisoned accuracy; ``probe_c`` f64 ``[measurements, 9]`` (see ``_probe.COLUMNS``);
    ``epochs_c`` f64 ``[epochs, 3]``: epoch from 1, C-Acc and ASR of the whole test sets. Table: a row a cell.
    """

    card = StudyCard(
        title="Quick learning of the backdoor",
        question="Is the backdoor learned before the task?",
        reading=(
            "A column is an attack, solid and dashed lines are poisoning ratios; blue is clean, red is poisoned. The "
            "shaded left part shows the first epochs, step by step on a logarithmic axis. First row: a red loss that "
            "falls before the blue one is a backdoor that is learned first, as ABL and other defenses presume; where "
            "red stays above blue they cannot work. Second row: test accuracy (blue) and ASR (red); thin and pale, the "
            "share of the same images that are called the target without the trigger: where it is high, the model "
            "calls everything the target, and the ASR says nothing. The triangle marks the first measurement with an "
            "ASR above 90 % that does. Third row: the norm of each group's mean gradient, which is how hard it still "
            "pulls: a group that is learned pulls no more. Fourth row: the cosine between the two; near 0 the groups "
            "do not meet in the weights, below 0 one undoes the other."
        ),
        paper="Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571",
    )
    Config = QuickLearningConfig

    def grids(self) -> Sequence[Grid]:
        refuse_limits(self.config)
        self._grid()
        return ()

    def _grid(self) -> Grid:
        config = self.config
        return config.grid(self.name, models=[config.model], attacks=config.attacks, ratios=config.ratios)

    def measure(self, results: Results) -> Numbers:
        config, grid = self.config, self._grid()

        def watch() -> dict[str, Any]:
            probe = GradientProbe(config.probe, config.fine_epochs, config.every)
            return {"samples": SampleRecorder(fine_epochs=config.fine_epochs), "probe": probe}

        cells = record(grid, results.store, results.device, watch)
        arrays: dict[str, NDArray[Any]] = {}
        table = []
        for i, cell in enumerate(cells):
            found, row = _measured(cell, config.every) if cell.status == "done" else ({}, {})
            arrays |= {f"{name}_{i}": values for name, values in found.items()}
            table.append({**cell.row(), **dict.fromkeys(_NUMBERS, float("nan")), **row, "reason": cell.reason})
        results.count(table)
        done = [row for row in table if row["status"] == "done"]
        summary: dict[str, Any] = {
            "cells": len(table),
            "backdoors_learned": sum(bool(np.isfinite(row["asr_epoch"])) for row in done),
            "backdoor_first": sum(row["ratio_of_epochs"] < 1 for row in done),
        }
        for name in ("asr_epoch", "c_acc_epoch", "ratio_of_epochs", "area", "cosine", "cosine_first"):
            summary[f"mean_{name}"] = float(nanmean([row[name] for row in done]))
        return Numbers(
            arrays,
            table,
            summary,
            {
                "attacks": [entry.label for entry in grid.attacks],
                "ratios": list(grid.ratios),
                "seeds": list(grid.seeds),
                "fine_epochs": config.fine_epochs,
                "places": [[row["attack"], row["ratio"], row["seed"], row["status"]] for row in table],
                "asr_at": [row["asr_at"] for row in table],
                "caption": f"{described(grid)}; probe of up to {config.probe} + {config.probe} training samples",
                "findings": _findings(table, summary),
            },
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return drawn(numbers)


_NUMBERS = ("asr_epoch", "c_acc_epoch", "ratio_of_epochs", "asr_at", "area", "cosine", "cosine_first")


def _measured(cell: Recorded, every: int | None) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Arrays and the row of a cell."""
    samples, probe = cell.tensors["samples"], cell.tensors["probe"]["rows"].double().numpy()
    loss, poisoned = samples["loss"].double().numpy(), cell.poisoned.numpy()
    correct = np.unpackbits(samples["correct"].numpy(), axis=1, count=len(poisoned)).astype(bool)
    steps = samples["steps"].long().numpy()
    per_epoch = int(steps.max()) + 1 if steps.size else 1
    curve = group_curves(loss, correct, steps, (~poisoned, poisoned), per_epoch, every or max(1, per_epoch // 8))
    history = [[row["epoch"] + 1.0, *(row.get(key, float("nan")) for key in ("c_acc", "asr"))] for row in cell.history]
    epochs = np.array(history, dtype=np.float64).reshape(-1, 3)
    known = epochs[np.isfinite(epochs[:, 1])]
    c_acc_epoch = first_above(known[:, 0], known[:, 1], _HIGH * known[-1, 1]) if len(known) else float("nan")
    whole = probe[probe[:, 0] % 1 == 0]
    cosine, asr, base = (COLUMNS.index(name) for name in ("cosine", "asr", "base"))
    asr_epoch = first_above(epochs[:, 0], np.where(whole[:, base] < _TRIVIAL, epochs[:, 2], 0.0), _HIGH)
    gap = np.array([nanmean(row[~poisoned]) - nanmean(row[poisoned]) for row in loss])
    return {"curve": curve, "probe": probe, "epochs": epochs}, {
        "asr_epoch": asr_epoch,
        "c_acc_epoch": c_acc_epoch,
        "ratio_of_epochs": asr_epoch / c_acc_epoch,
        "asr_at": first_above(probe[:, 0], np.where(probe[:, base] < _TRIVIAL, probe[:, asr], 0.0), _HIGH),
        "area": float(np.nansum(gap)),
        "cosine": float(nanmean(whole[:, cosine])),
        "cosine_first": float(probe[0, cosine]) if len(probe) else float("nan"),
    }


def _findings(table: Sequence[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    lines = []
    for row in table:
        where = f"{row['attack']} at {100 * row['ratio']:.3g} %, seed {row['seed']}"
        if row["status"] != "done":
            lines.append(f"{where}: {row['status'].replace('_', ' ')}: {row['reason']}.")
            continue
        asr, acc = row["asr_epoch"], row["c_acc_epoch"]
        learned = f"ASR above 90 % from epoch {asr:.0f}" if np.isfinite(asr) else "ASR never above 90 %"
        lines.append(
            f"{where}: {learned}, 90 % of the final C-Acc from epoch {acc:.0f}; area between the losses "
            f"{row['area']:+.1f} nats x epochs, cosine of the gradients {row['cosine']:+.2f}."
        )
    lines.append(
        f"The backdoor came before the task in {summary['backdoor_first']} of {summary['backdoors_learned']} cells in "
        "which it was learned (epochs until ASR > 90 % against epochs until 90 % of the final C-Acc)."
    )
    return lines
