"""P2: what the share of poisoned samples does to attacks and defenses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import cube, described, with_none
from bbfast.studies.looks import look, percent
from bbfast.studies.panels import BANDS_UP_TO, label_edges, make_panels, panel_size, shared_legend
from bbfast.studies.results import Results, table
from bbfast.studies.statistics import nanmean, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["PoisoningRatio", "curve"]

_RISE, _FALL = 0.05, 0.2


class PoisoningRatioConfig(DataConfig):
    """Settings of the study of poisoning ratios.

    Args:
        model: Name of the model.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratios: Shares of the training set to poison, rising.
        defenses: Defenses, like attacks; none is always added.
    """

    model: str = "small_cnn"
    attacks: Listed = Field(("badnets", "blended"), min_length=1)
    ratios: tuple[Share, ...] = Field((0.01, 0.02, 0.05, 0.1, 0.2), min_length=1)
    defenses: Listed = Field(("ft", "clp", "bnp"), min_length=1)


def curve(ratios: Sequence[float], values: NDArray[np.float64]) -> dict[str, float]:
    """What a curve over the ratio does.

    Args:
        ratios: Rising.
        values: One a ratio; NaN where it is not known.

    Returns:
        ``argmax_ratio``, the smallest ratio with the largest value; ``peak``, that value; ``spearman`` with the ratio;
        ``drop_after_peak``: the peak minus the smallest value at a larger ratio, 0 if there is none. All NaN without
        values.
    """
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return dict.fromkeys(("argmax_ratio", "peak", "spearman", "drop_after_peak"), float("nan"))
    top = known[int(np.argmax(values[known]))]
    return {
        "argmax_ratio": float(ratios[top]),
        "peak": float(values[top]),
        "spearman": spearman(ratios, values),
        "drop_after_peak": float(values[top] - np.nanmin(values[top:])),
    }


@register_study("poisoning_ratio")
class PoisoningRatio(Study):
    """ASR and R-Acc of every attack over the poisoning ratio, without and with defenses.

    For the mean over seeds of each curve of ASR: the ratio of its largest value, Spearman's correlation with the ratio,
    and the drop after the peak (:func:`curve`).

    Arrays (A attacks, R ratios, D defenses with ``none`` first, S seeds): ``asr``, ``r_acc``, ``c_acc`` f64
    ``[A, R, D, S]``; ``argmax_ratio``, ``peak``, ``spearman``, ``drop_after_peak`` f64 ``[A, D]``. Table: a row a cell.
    """

    card = StudyCard(
        title="Poisoning ratio",
        question="Does a stronger attack make a stronger backdoor, also after a defense?",
        reading=(
            "A panel is an attack; solid lines are the ASR, dashed ones the R-Acc of the same defense, bands reach "
            "from the lowest to the highest seed (with more than six defenses the last two are in the numbers alone). "
            "The black line, without a defense, rises with the ratio. Under several defenses the paper saw the ASR "
            "rise and then fall sharply at high ratios: a stronger backdoor is easier to find or to unlearn. Look for "
            "solid lines with a peak in the middle, and whether the dashed line of the same colour rises where they "
            "fall: only then are the images recognised again."
        ),
        paper="Wu et al., BackdoorBench, arXiv 2401.15002",
    )
    Config = PoisoningRatioConfig

    def grids(self) -> Sequence[Grid]:
        config = self.config
        return [
            config.grid(
                self.name,
                models=[config.model],
                attacks=config.attacks,
                ratios=sorted(config.ratios),
                defenses=with_none(config.defenses),
            )
        ]

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        attacks, defenses = ([entry.label for entry in part] for part in (grid.attacks, grid.defenses))
        axes: dict[str, Any] = {
            "attack": attacks,
            "ratio": list(grid.ratios),
            "defense": defenses,
            "seed": list(grid.seeds),
        }
        found = cube(results.rows, axes)
        mean = nanmean(found["asr"], 3)
        curves = [[curve(grid.ratios, mean[i, :, j]) for j in range(len(defenses))] for i in range(len(attacks))]
        arrays: dict[str, Any] = {key: found[key] for key in ("asr", "r_acc", "c_acc")}
        for key in curves[0][0]:
            arrays[key] = np.array([[one[key] for one in row] for row in curves])
        none = defenses.index("none")
        others = np.delete(np.arange(len(defenses)), none)
        defended = {key: arrays[key][:, others] for key in ("spearman", "drop_after_peak", "argmax_ratio")}
        known = int(np.isfinite(defended["argmax_ratio"]).sum())
        # A rise and a fall: the peak is neither at the first nor at the last ratio, and both sides are no noise.
        first = np.where(np.isfinite(mean), mean, np.inf).min(axis=1)[:, others]
        falls = (defended["drop_after_peak"] > _FALL) & (arrays["peak"][:, others] - first > _RISE)
        summary = {
            "spearman_without_defense": float(nanmean(arrays["spearman"][:, none])),
            "spearman_with_defense": float(nanmean(defended["spearman"])),
            "mean_drop_after_peak": float(nanmean(defended["drop_after_peak"])),
            "curves": known,
            "curves_that_fall": int(falls.sum()),
        }
        return Numbers(
            arrays,
            table(results.rows),
            summary,
            {
                "attacks": attacks,
                "defenses": defenses,
                "ratios": list(grid.ratios),
                "caption": described(grid),
                "findings": _findings(summary, arrays, attacks, defenses),
            },
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        meta, arrays = numbers.meta, numbers.arrays
        ratios, few = np.array(meta["ratios"]), len(meta["defenses"]) <= BANDS_UP_TO
        lines = [("asr", "-", 1.8), ("r_acc", "--", 1.0)] if few else [("asr", "-", 1.4)]
        with figure(*panel_size(len(meta["attacks"])), meta["caption"]) as made:
            axes = make_panels(made, len(meta["attacks"]))
            for i, (axis, attack) in enumerate(zip(axes, meta["attacks"], strict=True)):
                for j, name in enumerate(meta["defenses"]):
                    style = look(name)
                    for key, line, width in lines:
                        values = 100 * arrays[key][i, :, j]
                        if not np.isfinite(values).any():
                            continue  # an empty line, unclipped, would upset the layout
                        wide = {"lw": width + (0.6 if name == "none" else 0), "ms": 5 if key == "asr" else 0}
                        axis.plot(ratios, nanmean(values, 1), line, **style, **wide, clip_on=False, zorder=3)
                        if few and key == "asr" and values.shape[1] > 1 and np.isfinite(values).any(axis=1).all():
                            low, high = np.nanmin(values, 1), np.nanmax(values, 1)
                            axis.fill_between(ratios, low, high, color=style["color"], alpha=0.13, lw=0)
                axis.set(title=attack, xscale="log", ylim=(0, 100))
                axis.set_xticks(ratios, [percent(r).removesuffix(" %") for r in ratios])
                axis.minorticks_off()
                axis.grid(axis="y", color="#E5E5E5", lw=0.6)
            label_edges(axes, "poisoned, % of the training set (log)", "share of triggered images, %")
            shared_legend(made, meta["defenses"], {"ASR": "-", "R-Acc": "--"} if few else {"ASR": "-"})
        return made


def _findings(
    summary: dict[str, Any], arrays: dict[str, Any], attacks: Sequence[str], defenses: Sequence[str]
) -> list[str]:
    lines = [
        f"Without a defense the ASR's Spearman correlation with the ratio is {summary['spearman_without_defense']:.2f} "
        f"in the mean over attacks, after defenses {summary['spearman_with_defense']:.2f}.",
        f"{summary['curves_that_fall']} of {summary['curves']} curves after a defense rise by more than "
        f"{100 * _RISE:.0f} points and then fall by more than {100 * _FALL:.0f}.",
    ]
    drops = [
        (arrays["drop_after_peak"][i, j], attacks[i], defenses[j], arrays["argmax_ratio"][i, j])
        for i, j in np.argwhere(np.isfinite(arrays["drop_after_peak"])).tolist()
        if defenses[j] != "none"
    ]
    if drops and max(drops)[0] > 0:
        drop, attack, defense, ratio = max(drops)
        lines.append(
            f"The largest fall is that of {attack} under {defense}: {100 * drop:.0f} points after its peak at "
            f"{percent(ratio)}."
        )
    return lines
