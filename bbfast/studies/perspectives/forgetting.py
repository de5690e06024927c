"""P7: which samples are memorised, which forgotten, and what fine-tuning makes the model forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bbfast import metrics
from bbfast.analysis.numbers import Numbers
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import described
from bbfast.studies.perspectives._forgetting_figure import drawn
from bbfast.studies.perspectives._recorded import Recorded, record, refuse_limits
from bbfast.studies.perspectives._relabelled import SIDES, finetuned
from bbfast.studies.results import Results
from bbfast.studies.statistics import nanmean
from bbfast.training import SampleRecorder
from bbfast.training.recorder import NEVER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["Forgetting", "event_curves"]


class ForgettingConfig(DataConfig):
    """Settings of the study of forgetting.

    Args:
        model: Name of the model.
        attacks: Attacks that poison the data alone: names, or mappings with name, label and set; all is every one.
        ratios: Shares of the training set that are poisoned.
        mode: train: the training forward pass of the augmented images; eval: a pass over the stored ones after each
            epoch.
        finetune: Whether to fine-tune each model (the defense ft) and watch it forget.
        finetune_settings: Settings of ft.
        watched: Poisoned and clean training samples, of each at most, that fine-tuning is watched on.
    """

    model: str = "small_cnn"
    attacks: Listed = Field(("badnets", "blended", "ftrojan"), min_length=1)
    ratios: tuple[Share, ...] = Field((0.01, 0.1), min_length=1)
    mode: Literal["train", "eval"] = "train"
    finetune: bool = True
    finetune_settings: dict[str, Any] = Field(default_factory=dict)
    watched: int = Field(2000, ge=1)


def event_curves(correct: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Forgetting events of each sample up to each epoch, int64 ``[E, N]``, of bits ``[E, N]``."""
    events = np.zeros(correct.shape, dtype=np.int64)
    events[1:] = np.cumsum(correct[:-1] & ~correct[1:], axis=0)
    return events


@register_study("forgetting")
class Forgetting(Study):
    """Each attack is trained once with a recorder, one bit a sample and epoch: right or wrong at its presentation. A
    forgetting event is a right one followed by a wrong one; right means the label that the learner was given, for
    poisoned samples the attacker's.

    ``mean_events``, ``unforgettable`` (share of learned samples without an event) and ``never`` (share never right) are
    of the clean and the poisoned samples; ``auroc``: of minus the events, samples that were never right last, as a
    detector of poison (0.5: none; above: poisoned samples are forgotten less).

    Fine-tuning is the defense ft with the study's clean fraction and seed. After each of its epochs ``relabelled`` is
    the share of poisoned training samples, of those whose label the attacker changed, that the model does not give the
    attacker's label, ``restored`` of those whose true class it names, ``clean`` the share of clean training samples
    that it does not give their label. A clean-label attack changes none: all its poisoned samples count, and
    ``restored`` is NaN.

    Arrays (c: place of the cell in the table, from 0; N samples, E epochs): ``poisoned_c`` bool ``[N]``; ``correct_c``
    uint8 ``[E, ceil(N / 8)]``, bits packed along the samples; ``events_c``, ``learned_at_c`` uint16 ``[N]`` (65535:
    never); ``mean_c`` f64 ``[E, 2]``: mean events up to each epoch, clean and poisoned; ``auroc_c`` f64 ``[E]``;
    ``finetuned_c`` f64 ``[epochs + 1, 3]``: relabelled, restored, clean, before and after each epoch. Table: a row a
    cell.

    Source: Toneva et al., ICLR 2019, arXiv 1812.05159.
    """

    card = StudyCard(
        title="Memorisation and forgetting",
        question="Are poisoned samples forgotten less than clean ones, and how fast does fine-tuning forget them?",
        reading=(
            "A column is an attack at a poisoning ratio. First row: how many samples were forgotten how often, as a "
            "share of their group (logarithmic); 'never' are those that were not learned once. Red bars further left "
            "than blue ones are poisoned samples that are memorised early and kept; a high red bar at 'never' is an "
            "attack that was not learned. Second row: mean events so far; the line that flattens first is the group "
            "that is settled. Third row: how well few events tell poisoned samples from clean ones (AUROC), from the "
            "epochs up to there: above 0.5 the poisoned are the ones that are not forgotten, below they are the hard "
            "ones, near 0.5 forgetting says nothing about poison. Fourth row: fine-tuning on clean data; the red line "
            "is the share of poisoned samples that lose the attacker's label, the blue one that of clean samples that "
            "lose theirs."
        ),
        paper="Toneva et al., An Empirical Study of Example Forgetting, ICLR 2019, arXiv 1812.05159",
    )
    Config = ForgettingConfig

    def grids(self) -> Sequence[Grid]:
        from bbfast import defenses

        refuse_limits(self.config)
        self._grid()
        defenses.create("ft", **self.config.finetune_settings)
        return ()

    def _grid(self) -> Grid:
        config = self.config
        return config.grid(self.name, models=[config.model], attacks=config.attacks, ratios=config.ratios)

    def measure(self, results: Results) -> Numbers:
        config, grid = self.config, self._grid()
        cells = list(record(grid, results.store, results.device, lambda: {"samples": SampleRecorder(config.mode)}))
        arrays: dict[str, NDArray[Any]] = {}
        table = []
        for i, cell in enumerate(tuple(cells)):
            found: dict[str, NDArray[Any]] = {}
            row: dict[str, float] = {}
            if cell.status == "done":
                try:
                    found, row = _measured(cell)
                    if config.finetune:
                        found["finetuned"] = curve = finetuned(cell, results, config)
                        row |= _after(curve)
                except Exception as error:  # its fine-tuning is a stage like its training
                    found, row, cells[i] = {}, {}, (cell := cell.but_failed(error))
            arrays |= {f"{name}_{i}": values for name, values in found.items()}
            table.append({**cell.row(), **dict.fromkeys(_NUMBERS, float("nan")), **row, "reason": cell.reason})
        results.count(table)
        done = [row for row in table if row["status"] == "done"]
        summary: dict[str, Any] = {"cells": len(table)}
        summary |= {f"mean_{name}": float(nanmean([row[name] for row in done])) for name in _NUMBERS[:7]}
        return Numbers(
            arrays,
            table,
            summary,
            {
                "labels": [cell.label for cell in cells],
                "seeds": [cell.cell.seed for cell in cells],
                "status": [cell.status for cell in cells],
                "asr": [row["asr"] for row in table],
                "mode": config.mode,
                "caption": f"{described(grid)}; bits of the {config.mode} pass",
                "findings": [_finding(row) for row in table],
            },
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        return drawn(numbers)


_NUMBERS = (
    "mean_events_clean",
    "mean_events_poisoned",
    "unforgettable_clean",
    "unforgettable_poisoned",
    "never_clean",
    "never_poisoned",
    "auroc",
    *(f"finetuned_{side}" for side in SIDES),
    "half_relabelled_at",
)


def _measured(cell: Recorded) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Arrays and the row of a cell."""
    kept, poisoned = cell.tensors["samples"], cell.poisoned.numpy()
    bits = kept["correct"].numpy()
    correct = np.unpackbits(bits, axis=1, count=len(poisoned)).astype(bool)
    events, learned_at = (kept[name].numpy().astype(np.uint16) for name in ("events", "learned_at"))
    so_far = event_curves(correct)
    learned = np.logical_or.accumulate(correct, axis=0)
    groups = {"clean": ~poisoned, "poisoned": poisoned}
    row: dict[str, float] = {}
    for name, group in groups.items():
        known = group & (learned_at != NEVER)
        row[f"mean_events_{name}"] = float(events[group].mean())
        row[f"unforgettable_{name}"] = float(nanmean(events[known] == 0))
        row[f"never_{name}"] = float(1 - known.sum() / group.sum())
    auroc = np.array([_auroc(e, known, poisoned) for e, known in zip(so_far, learned, strict=True)])
    row["auroc"] = _auroc(events, learned_at != NEVER, poisoned)
    mean = np.stack([so_far[:, group].mean(axis=1) for group in groups.values()], axis=1)
    return {
        "poisoned": poisoned,
        "correct": bits,
        "events": events,
        "learned_at": learned_at,
        "mean": mean,
        "auroc": auroc,
    }, row


def _after(curve: NDArray[np.float64]) -> dict[str, float]:
    """The row's figures of fine-tuning."""
    half = np.flatnonzero(curve[:, 0] > 0.5)
    return {
        **{f"finetuned_{side}": float(curve[-1, j]) for j, side in enumerate(SIDES)},
        "half_relabelled_at": float(half[0]) if len(half) else float("nan"),
    }


def _auroc(events: NDArray[Any], learned: NDArray[np.bool_], poisoned: NDArray[np.bool_]) -> float:
    """Of minus the events; what was never learned counts as forgotten most."""
    import torch

    scores = -np.where(learned, events, np.inf)
    return float(metrics.detection(torch.from_numpy(scores), torch.from_numpy(poisoned))["auroc"])


def _finding(row: dict[str, Any]) -> str:
    where = f"{row['attack']} at {100 * row['ratio']:.3g} %, seed {row['seed']}"
    if row["status"] != "done":
        return f"{where}: {row['status'].replace('_', ' ')}: {row['reason']}."
    text = (
        f"{where} (ASR {100 * row['asr']:.0f} %): {row['mean_events_poisoned']:.2f} events a poisoned sample, "
        f"{row['mean_events_clean']:.2f} a clean one; {100 * row['never_poisoned']:.0f} % of the poisoned never "
        f"learned; AUROC {row['auroc']:.2f}"
    )
    if np.isfinite(row["finetuned_relabelled"]):
        text += (
            f"; fine-tuning relabels {100 * row['finetuned_relabelled']:.0f} % of the poisoned and "
            f"{100 * row['finetuned_clean']:.0f} % of the clean samples"
        )
    return text + "."
