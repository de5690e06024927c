"""P4: data sets, and the number of classes apart from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.bench.grid import DataEntry
from bbfast.studies.base import Listed, Share, Study, StudyCard, StudyConfig, register_study
from bbfast.studies.cells import cube, described, with_none
from bbfast.studies.looks import look
from bbfast.studies.panels import BANDS_UP_TO, shared_legend
from bbfast.studies.perspectives._factor import anova_arrays, factor_findings, factor_summary, measure_factor
from bbfast.studies.perspectives._factor_bars import draw_factor, factor_size
from bbfast.studies.results import Results, Row, table
from bbfast.studies.statistics import nanmean, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["DatasetSensitivity", "contamination"]

SETS, SWEEP = "data sets", "classes"


class DatasetSensitivityConfig(StudyConfig):
    """Settings of the study of data sets.

    Args:
        datasets: Data sets: names, or mappings with name, root, options and label.
        classes: Numbers of classes of the sweep: the first so many of one data set; none for no sweep.
        classes_of: The data set of the sweep, like an entry of datasets.
        model: Name of the model.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratio: Share of the training set that is poisoned.
        defenses: Defenses, like attacks; none is always added.
    """

    datasets: tuple[str | dict[str, Any], ...] = Field(("digits",), min_length=1)
    classes: tuple[int, ...] = (3, 5, 10)
    classes_of: str | dict[str, Any] = "digits"
    model: str = "small_cnn"
    attacks: Listed = Field(("badnets", "blended"), min_length=1)
    ratio: Share = 0.1
    defenses: Listed = Field(("ft", "clp", "bnp"), min_length=1)


def contamination(ratio: float, classes: int) -> float:
    """Share of the target class that is poisoned: ``r N / (r N + N / K)`` for K classes of equal size, when the
    poisoned samples come from other classes."""
    return ratio / (ratio + 1 / classes)


@register_study("dataset_sensitivity")
class DatasetSensitivity(Study):
    """Every attack and defense on several data sets; and on the first K classes of one, for several K.

    The sweep keeps the images of a class and their number, so that what changes with K is the number of classes (and,
    with it, that of images) and not what they show. At a constant ratio the poisoned samples outgrow the target class
    as K rises: its contamination is ``r / (r + 1/K)``; the measured one is read from the poisoned training sets.

    Arrays of the data sets: see :func:`bbfast.studies.perspectives._factor.measure_factor`; ``anova_share``,
    ``anova_p``. Of the sweep (K numbers of classes, none first of D): ``sweep_asr``, ``sweep_c_acc``,
    ``sweep_d_c_acc``, ``sweep_der`` f64 ``[A, D, K, S]``, ``classes`` int64 ``[K]``, ``contamination`` f64 ``[K]``,
    ``measured_contamination`` f64 ``[A, K]``. Table: a row a cell of both.
    """

    card = StudyCard(
        title="Data sets and number of classes",
        question="What does the data set decide, and what of it is only its number of classes?",
        reading=(
            "Below, the first K classes of one data set at the same number of images a class: the ASR (black: without "
            "a defense), the accuracy that a defense costs, and the contamination, the share of the images labelled as "
            "the target that are poisoned. Where the ASR after a defense follows the contamination, it is the number "
            "of classes that makes a data set easy to attack, not its images. Fewer classes are fewer images too, so "
            "fewer steps at the same number of epochs: where even the black line falls, train longer before reading "
            "on. Above, if several data sets are given: ASR without a defense, mean DER of each defense with its worst "
            "and best attack, and how much that moves between data sets."
        ),
        paper="Wu et al., BackdoorBench, arXiv 2401.15002",
    )
    Config = DatasetSensitivityConfig

    def grids(self) -> Sequence[Grid]:
        config = self.config
        common = {
            "models": [config.model],
            "attacks": config.attacks,
            "ratios": [config.ratio],
            "defenses": with_none(config.defenses),
        }
        grids = [config.grid(SETS, datasets=config.datasets, **common)]
        if config.classes:
            entry = DataEntry.model_validate(config.classes_of)
            data = [
                {
                    "name": entry.name,
                    "root": entry.root,
                    "options": {**entry.options, "classes": count},
                    "label": f"{entry.label} K={count}",
                }
                for count in sorted(config.classes)
            ]
            grids.append(config.grid(SWEEP, datasets=data, **common))
        return grids

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        levels = [entry.label for entry in grid.datasets]
        arrays, names, analyses = measure_factor(results.of(SETS), grid, "dataset", levels)
        arrays |= anova_arrays(analyses)
        summary = factor_summary(arrays, names) if len(levels) > 1 else {}
        findings = factor_findings(arrays, names, analyses) if len(levels) > 1 else []
        meta = {**names, "anova": analyses, "caption": described(grid), "ratio": self.config.ratio}
        if len(results.plans) > 1:
            swept, found, said = self._sweep(results, names)
            arrays, summary, findings = arrays | swept, summary | found, findings + said
            meta["caption"] += f"; sweep: {', '.join(entry.label for entry in results.plans[1].grid.datasets)}"
        meta["findings"] = findings or None
        return Numbers(arrays, table(results.rows), summary, meta)

    def _sweep(self, results: Results, names: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        grid, rows, ratio = results.plans[1].grid, results.of(SWEEP), self.config.ratio
        labels, counts = [entry.label for entry in grid.datasets], sorted(self.config.classes)
        axes = {"attack": names["attacks"], "defense": names["defenses"], "dataset": labels, "seed": list(grid.seeds)}
        found = cube(rows, axes)
        arrays: dict[str, Any] = {f"sweep_{key}": found[key] for key in ("asr", "c_acc", "d_c_acc", "der")}
        arrays["classes"] = np.array(counts)
        arrays["contamination"] = np.array([contamination(ratio, count) for count in counts])
        arrays["measured_contamination"] = np.array(
            [[_measured(results, rows, attack, label) for label in labels] for attack in names["attacks"]]
        )
        mean = nanmean(found["asr"], (0, 3))
        rises = {name: spearman(counts, mean[j]) for j, name in enumerate(names["defenses"])}
        summary = {
            "contamination_least": float(arrays["contamination"][0]),
            "contamination_most": float(arrays["contamination"][-1]),
            "asr_spearman_with_classes": rises["none"],
        }
        said = [
            f"At {100 * ratio:.3g} % poisoned the target class is contaminated to "
            f"{100 * arrays['contamination'][0]:.0f} % with {counts[0]} classes and to "
            f"{100 * arrays['contamination'][-1]:.0f} % with {counts[-1]}, if the classes are of one size."
        ]
        for j, name in enumerate(names["defenses"]):
            when = "Without a defense" if name == "none" else f"After {name}"
            rho = f", Spearman with K {rises[name]:.2f}" if np.isfinite(rises[name]) else ""
            ends = [f"{100 * value:.0f} %" if np.isfinite(value) else "unknown" for value in mean[j, [0, -1]]]
            places = f"from {ends[0]} at K = {counts[0]} to {ends[1]} at {counts[-1]}"
            said.append(f"{when} the mean ASR goes {places}{rho}.")
        return arrays, summary, said

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        swept = "classes" in numbers.arrays
        several = len(numbers.meta["levels"]) > 1 or not swept
        width, height = factor_size(numbers) if several else (0.0, 0.0)
        with figure(max(width, 10.2), height + 3.9 * swept + 0.2, numbers.meta["caption"]) as made:
            heights = [height] * several + [3.7] * swept
            grid = made.add_gridspec(len(heights), 1, height_ratios=heights)
            if several:
                draw_factor(grid[0], numbers)
            if swept:
                spec = grid[len(heights) - 1].subgridspec(1, 3)
                _draw_sweep([made.add_subplot(spec[0, i]) for i in range(3)], numbers)
                shared_legend(made, numbers.meta["defenses"])
        return made


def _measured(results: Results, rows: Sequence[Row], attack: str, dataset: str) -> float:
    """Share of poisoned samples among those labelled as the target, in the training sets that were made."""
    shares = []
    for row in rows:
        if (row["attack"], row["dataset"], row["defense"], row["status"]) == (attack, dataset, "none", "done"):
            found = results.attack(row)
            labelled = found.train.labels[found.poisoned]
            if len(labelled):
                target = int(labelled.mode().values)
                shares.append(float(found.poisoned[found.train.labels == target].double().mean()))
    return float(np.mean(shares)) if shares else float("nan")


def _draw_sweep(axes: Any, numbers: Numbers) -> None:
    meta, arrays = numbers.meta, numbers.arrays
    counts, few = arrays["classes"], len(meta["defenses"]) <= BANDS_UP_TO
    for axis, key, label in (
        (axes[0], "sweep_asr", "ASR, %"),
        (axes[1], "sweep_d_c_acc", "accuracy lost to the defense, points"),
    ):
        values = 100 * nanmean(arrays[key], 0)
        for j, name in enumerate(meta["defenses"]):
            if not np.isfinite(values[j]).any():
                continue
            style = look(name)
            axis.plot(counts, nanmean(values[j], 1), "-", **style, ms=5, lw=1.8, zorder=3)
            if few and values.shape[2] > 1 and np.isfinite(values[j]).any(axis=1).all():
                low, high = np.nanmin(values[j], 1), np.nanmax(values[j], 1)
                axis.fill_between(counts, low, high, color=style["color"], alpha=0.13, lw=0)
        axis.set(title="mean over attacks", ylabel=label)
    axes[0].set_ylim(0, 102)
    axes[1].axhline(0, color="#777777", lw=0.8, ls=":")
    fine = np.linspace(counts[0], counts[-1], 100)
    ratio = meta["ratio"]
    axes[2].plot(fine, 100 * ratio / (ratio + 1 / fine), color="#777777", lw=1.2, label="r / (r + 1/K)")
    measured = 100 * arrays["measured_contamination"]
    if np.isfinite(measured).any():
        mean = nanmean(measured, 0)
        ends = np.abs(np.stack([np.nanmin(measured, 0), np.nanmax(measured, 0)]) - mean)
        what = {"label": "measured, mean and range over attacks"}
        axes[2].errorbar(counts, mean, ends, fmt="o", ms=5, capsize=3, color="#222222", **what)
    axes[2].set(title="contamination of the target class", ylabel="poisoned, % of its images", ylim=(0, 102))
    axes[2].legend(fontsize=8, loc="lower right", title=None)
    for axis in axes:
        axis.set(xscale="log", xlabel="classes K (log)")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(axis="y", color="#E5E5E5", lw=0.6)
