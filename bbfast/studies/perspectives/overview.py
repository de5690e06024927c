"""P1: every attack against every defense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.base import DataConfig, Listed, Share, Study, StudyCard, register_study
from bbfast.studies.cells import Cube, cube, described, legend_of, with_none
from bbfast.studies.looks import look
from bbfast.studies.results import Results, table
from bbfast.studies.statistics import compare_pairs, kendall, nanmean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bbfast.bench import Grid

__all__ = ["Overview"]

_DER_UP_TO = 18
"""Columns up to which a cell has room for two numbers."""


class OverviewConfig(DataConfig):
    """Settings of the overview.

    Args:
        model: Name of the model.
        attacks: Attacks: names, or mappings with name, label and set; all is every one.
        ratio: Share of the training set that is poisoned.
        defenses: Defenses, like attacks; none is always added.
    """

    seeds: tuple[int, ...] = Field((0, 1), min_length=1)
    model: str = "small_cnn"
    attacks: Listed = Field(("badnets", "blended", "lf", "wanet"), min_length=1)
    ratio: Share = 0.1
    defenses: Listed = Field(("ft", "fp", "clp", "bnp", "nc"), min_length=1)


@register_study("overview")
class Overview(Study):
    """Every attack against every defense on one data set and model.

    Cells whose attack has an ASR below 20 % without a defense are shown crossed out and enter no mean and no rank.
    Rank stability: Kendall's tau-b between the seeds, of the defenses' mean DER and of the DER of all cells. Two
    defenses are compared by Wilcoxon's signed-rank test over attacks and seeds, with Holm's correction. An attack's
    best defense is *clear* if its lead in mean DER is more than the standard deviation over seeds of either of the two.

    Arrays (A attacks, D defenses, S seeds): ``der``, ``asr``, ``r_acc``, ``rir``, ``c_acc``, ``d_c_acc`` f64
    ``[A, D, S]``; ``attack_asr``, ``attack_c_acc`` f64 ``[A, S]``; ``state`` int8 ``[A, D]`` (see
    :data:`bbfast.studies.cells.STATES`); ``tau_defenses``, ``tau_cells`` f64 ``[S, S]``; ``wins`` int64 ``[D]``;
    ``clear`` bool ``[A]``. Table: a row a cell.
    """

    card = StudyCard(
        title="Attacks against defenses",
        question="Which defense stops which attack, at what price, and does any dominate?",
        reading=(
            "Left, a row is an attack, a column a defense, both ordered by mean DER: blue is a defense that "
            "removes the backdoor and keeps the accuracy (DER near 1), white one that does nothing (0.5), red one "
            "that harms. A column that is blue from top to bottom would be a defense that dominates; look for the "
            "rows where the left-most columns fade. Bold marks an attack's best defense where its lead is larger "
            "than the spread over seeds. A crossed cell has no working attack to defend against, a hatched one is "
            "not applicable. Right, every point is an attack and a defense: lower left is good, upper left did "
            "nothing, lower right paid with accuracy."
        ),
        paper="Wu et al., BackdoorBench, arXiv 2401.15002",
    )
    Config = OverviewConfig

    def grids(self) -> Sequence[Grid]:
        config = self.config
        return [
            config.grid(
                self.name,
                models=[config.model],
                attacks=config.attacks,
                ratios=[config.ratio],
                defenses=with_none(config.defenses),
            )
        ]

    def measure(self, results: Results) -> Numbers:
        grid = results.plans[0].grid
        attacks = [entry.label for entry in grid.attacks]
        defenses = [entry.label for entry in grid.defenses if entry.label != NO_DEFENSE]
        found = cube(results.rows, {"attack": attacks, "defense": defenses, "seed": list(grid.seeds)})
        der = found["der"]
        mean = nanmean(der, 2)
        taus = kendall(nanmean(der, 0).T), kendall(der.reshape(-1, der.shape[2]).T)
        pairs = compare_pairs({name: der[:, i] for i, name in enumerate(defenses)})
        wins, clear = _best(der)
        worked = int((found["attack_asr"][:, 0] >= 0.2).any(axis=1).sum())
        order = [_falling(nanmean(mean, 1)), _falling(nanmean(mean, 0))]
        by_defense = nanmean(mean, 0)
        summary: dict[str, Any] = {
            "attacks": len(attacks),
            "attacks_that_work": worked,
            "mean_der": float(nanmean(mean)),
            "mean_asr": float(nanmean(found["asr"])),
            "tau_defenses": _off_diagonal(taus[0]),
            "tau_cells": _off_diagonal(taus[1]),
            "dominated_by_one": bool(worked > 1 and len(defenses) > 1 and wins.max(initial=0) == worked),
        }
        ranked = [i for i in order[1] if np.isfinite(by_defense[i])]
        if ranked:
            best = ranked[0]
            summary |= {
                "best_defense": defenses[best],
                "best_defense_der": float(by_defense[best]),
                "best_defense_wins": int(wins[best]),
            }
        arrays: dict[str, Any] = {key: found[key] for key in ("der", "asr", "r_acc", "rir", "c_acc", "d_c_acc")}
        arrays |= {key: found[key][:, 0] for key in ("attack_asr", "attack_c_acc")}
        arrays |= {"state": found.state, "tau_defenses": taus[0], "tau_cells": taus[1], "wins": wins, "clear": clear}
        return Numbers(
            arrays,
            table(results.rows),
            summary,
            {
                "attacks": attacks,
                "defenses": defenses,
                "rows": order[0],
                "columns": order[1],
                "pairs": pairs,
                "caption": described(grid),
                "findings": _findings(summary, pairs, len(grid.seeds)),
            },
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        meta = numbers.meta
        a, d = len(meta["attacks"]), len(meta["defenses"])
        width, height = max(3.2, 0.62 * d + 1.9), max(3.4, 0.5 * a + 1.6)
        with figure(width + 5.2, height, meta["caption"] + legend_of(numbers.arrays["state"])) as made:
            left, right = made.subplots(1, 2, width_ratios=(width, 4.6))
            _heat(made, left, numbers)
            _scatter(right, numbers)
        return made


def _best(der: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For how many attacks each defense is the best, and for which attacks that is clear."""
    mean = nanmean(der, 2)
    wins, clear = np.zeros(der.shape[1], dtype=np.int64), np.zeros(len(der), dtype=bool)
    for i, row in enumerate(mean):
        ranked = [j for j in _falling(row) if np.isfinite(row[j])]
        if not ranked:
            continue
        wins[ranked[0]] += 1
        spread = [np.nanstd(der[i, j], ddof=1) if np.isfinite(der[i, j]).sum() > 1 else np.inf for j in ranked[:2]]
        clear[i] = len(ranked) > 1 and row[ranked[0]] - row[ranked[1]] > max(spread)
    return wins, clear


def _falling(values: NDArray[np.float64]) -> list[int]:
    """Places from the largest value to the smallest, unknown ones last."""
    return [int(i) for i in np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")]


def _off_diagonal(matrix: NDArray[np.float64]) -> float:
    return float(nanmean(matrix[np.triu_indices(len(matrix), 1)]))


def _findings(summary: dict[str, Any], pairs: list[dict[str, Any]], seeds: int) -> list[str]:
    lines = [f"{summary['attacks_that_work']} of {summary['attacks']} attacks reach an ASR of 20 % without a defense."]
    if "best_defense" in summary:
        one = "; it dominates" if summary["dominated_by_one"] else ", so none dominates"
        lines.append(
            f"The highest mean DER is that of {summary['best_defense']}, {summary['best_defense_der']:.3f}; it is best "
            f"against {summary['best_defense_wins']} of {summary['attacks_that_work']} attacks{one}."
        )
    if np.isfinite(summary["tau_defenses"]):
        lines.append(
            f"Between {seeds} seeds the defenses' order has a Kendall tau of {summary['tau_defenses']:.2f}, that of "
            f"all cells {summary['tau_cells']:.2f}."
        )
    sure = [row for row in pairs if row["p_holm"] < 0.05]
    lines.append(
        f"Of {len(pairs)} pairs of defenses {len(sure)} differ in DER (Wilcoxon, Holm, 5 %)"
        + "".join(f"; {row['a']} minus {row['b']}: {row['median_difference']:+.3f}" for row in sure[:5])
        + "."
    )
    return lines


def _heat(made: Any, axis: Any, numbers: Numbers) -> None:
    meta, arrays = numbers.meta, numbers.arrays
    rows, columns = meta["rows"], meta["columns"]
    der, asr = (nanmean(arrays[key], 2)[np.ix_(rows, columns)] for key in ("der", "asr"))
    Cube.draw_states(axis, arrays["state"][np.ix_(rows, columns)])
    shown = axis.imshow(np.ma.masked_invalid(der), cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for i, j in np.argwhere(np.isfinite(der)).tolist():
        ink = "w" if abs(der[i, j] - 0.5) > 0.3 else "k"
        bold = "bold" if j == int(np.nanargmax(der[i])) and arrays["clear"][rows[i]] else "normal"
        if len(columns) <= _DER_UP_TO:
            axis.text(j, i - 0.12, f"{der[i, j]:.2f}", ha="center", va="center", fontsize=9, color=ink, weight=bold)
        axis.text(
            j, i + (0.24 if len(columns) <= _DER_UP_TO else 0), f"{100 * asr[i, j]:.0f}", ha="center", va="center",
            fontsize=6.5, color=ink,
        )  # fmt: skip
    labels = [f"{meta['attacks'][i]} ({100 * float(nanmean(arrays['attack_asr'][i])):.0f})" for i in rows]
    names = [meta["defenses"][j] for j in columns]
    axis.set_yticks(range(len(rows)), labels)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, names)) > 40 else {}
    axis.set_xticks(range(len(columns)), names, **turned)
    axis.spines[:].set_visible(True)
    axis.set(title="DER; small: ASR after the defense, %", ylabel="attack (its ASR, %)", xlabel="defense")
    made.colorbar(shown, ax=axis, label="mean DER", shrink=0.85)


def _scatter(axis: Any, numbers: Numbers) -> None:
    meta, arrays = numbers.meta, numbers.arrays
    drop, asr = (100 * nanmean(arrays[key], 2) for key in ("d_c_acc", "asr"))
    works = np.isfinite(nanmean(arrays["der"], 2))
    for j in meta["columns"]:
        name = meta["defenses"][j]
        at = works[:, j]
        style = {**look(name), "edgecolor": "w", "linewidth": 0.5, "alpha": 0.9}
        axis.scatter(drop[at, j], asr[at, j], s=42, label=name, clip_on=False, zorder=3, **style)
    axis.axvline(0, color="#BBBBBB", lw=0.8, ls=":")
    axis.set(title="a point is an attack and a defense", xlabel="accuracy lost to the defense, points")
    axis.set(ylabel="ASR after the defense, %", ylim=(0, 100))
    count = len(meta["defenses"])
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + (count - 1) // 16, title="defense")
