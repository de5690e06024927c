"""The bars of the studies of models and of data sets, drawn from their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbfast.studies.cells import STATES
from bbfast.studies.looks import series
from bbfast.studies.statistics import nanmean

__all__ = ["draw_factor", "factor_size"]

_ROW_UP_TO = 13.0
"""Inches up to which all three panels stand in one row."""


def _widths(numbers: Any) -> tuple[float, float, float]:
    """Of the panels, inches: attacks, defenses, stability."""
    meta = numbers.meta
    levels, a, d = len(meta["levels"]), len(meta["attacks"]), len(meta["defenses"]) - 1
    return max(2.2, (0.17 * levels + 0.2) * a), max(2.8, (0.17 * levels + 0.2) * d), 2.6


def _above(numbers: Any) -> float:
    """Height in inches at which the names of the stability panel do not touch."""
    return max(3.4, 0.19 * len(numbers.meta["defenses"]) + 1.3)


def factor_size(numbers: Any) -> tuple[float, float]:
    """Width and height in inches that :func:`draw_factor` needs."""
    plain, bars, spread = _widths(numbers)
    if plain + bars + spread <= _ROW_UP_TO:
        return plain + bars + spread + 2.2, max(3.7, _above(numbers))
    return max(plain + spread, bars) + 1.8, _above(numbers) + 3.6


def draw_factor(spec: Any, numbers: Any) -> None:
    """ASR without a defense, DER with each, and stability, in one row or, where that is too wide, in two.

    Args:
        spec: The part of a figure's grid to fill.
        numbers: Of a study whose arrays are those of ``measure_factor``.
    """
    plain, bars, spread = _widths(numbers)
    figure = spec.get_gridspec().figure
    if plain + bars + spread <= _ROW_UP_TO:
        grid = spec.subgridspec(1, 3, width_ratios=(plain, bars, spread))
        axes = [figure.add_subplot(grid[0, i]) for i in range(3)]
    else:
        rows = spec.subgridspec(2, 1, height_ratios=(_above(numbers), 3.6))
        above = rows[0].subgridspec(1, 2, width_ratios=(plain, spread))
        axes = [figure.add_subplot(part) for part in (above[0], rows[1], above[1])]
    _plain(axes[0], numbers)
    _bars(axes[1], numbers)
    _spread(axes[2], numbers)
    levels = numbers.meta["levels"]
    if len(levels) > 1:
        for axis in axes[:2]:
            axis.set_title(axis.get_title(), pad=22 + 14 * ((len(levels) - 1) // 4))
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(levels)), borderaxespad=0.2)


def _order(numbers: Any) -> list[int]:
    """Defenses (without none) by falling mean DER, those without figures last."""
    mean = nanmean(numbers.arrays["level_der"], 1)
    return [int(i) for i in np.argsort(np.where(np.isfinite(mean), -mean, np.inf), kind="stable")]


def _plain(axis: Any, numbers: Any) -> None:
    """ASR without a defense: a group an attack, a bar a level."""
    asr = 100 * nanmean(numbers.arrays["asr"][:, 0], 2)
    _grouped(axis, numbers, asr, numbers.meta["attacks"], asr, asr, list(range(len(asr))))
    axis.set(title="without a defense", ylabel="ASR, %", ylim=(0, 105), xlabel="attack")


def _bars(axis: Any, numbers: Any) -> None:
    """Mean DER: a group a defense, ordered by mean, a bar a level; whiskers from the worst attack to the best."""
    arrays, order = numbers.arrays, _order(numbers)
    der = nanmean(arrays["der"], 3)[:, 1:]
    worst, best = np.nanmin(_filled(der, np.inf), axis=0), np.nanmax(_filled(der, -np.inf), axis=0)
    names = numbers.meta["defenses"][1:]
    _grouped(axis, numbers, arrays["level_der"], names, worst, best, order)
    state = arrays["state"][:, 1:]
    count = len(numbers.meta["levels"])
    for place, j in enumerate(order):
        for k in range(count):
            if (state[:, j, k] == STATES.index("not applicable")).all():
                at = place + (k - (count - 1) / 2) * 0.8 / count
                axis.text(at, 0.02, "n/a", rotation=90, ha="center", va="bottom", fontsize=7.5, color="#555555")
    axis.axhline(0.5, color="#777777", lw=0.8, ls=":")
    axis.set(title="mean DER over attacks; whiskers: worst and best", ylabel="DER", ylim=(0, 1.02), xlabel="defense")


def _spread(axis: Any, numbers: Any) -> None:
    """How far each defense's DER varies over the levels, least first."""
    values, names = numbers.arrays["spread_der"], numbers.meta["defenses"][1:]
    order = np.argsort(np.where(np.isfinite(values), values, np.inf), kind="stable")[::-1]
    axis.barh(range(len(order)), np.nan_to_num(values[order]), color="#9E9E9E", height=0.6)
    for place, j in enumerate(order):
        text = f" {values[j]:.3f}" if np.isfinite(values[j]) else " not known"
        axis.text(np.nan_to_num(values[j]), place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(order)), [names[j] for j in order])
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    axis.set(title=f"stability over {numbers.meta['factor']}s", xlabel="sd of mean DER", xlim=(0, 1.35 * top or 1))


def _grouped(
    axis: Any,
    numbers: Any,
    values: NDArray[np.float64],
    names: Sequence[str],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    order: Sequence[int],
) -> None:
    levels = numbers.meta["levels"]
    width = 0.8 / len(levels)
    for k, (level, style) in enumerate(zip(levels, series(levels), strict=True)):
        at = np.arange(len(order)) + (k - (len(levels) - 1) / 2) * width
        shown = values[order, k]
        ends = np.abs(np.stack([low[order, k], high[order, k]]) - shown)
        wide = (ends > 1e-9).any()
        axis.bar(
            at,
            np.nan_to_num(shown),
            0.92 * width,
            color=style["color"],
            label=level,
            yerr=np.nan_to_num(ends, posinf=0) if wide else None,
            error_kw={"lw": 0.9, "ecolor": "#333333"},
            capsize=2,
        )
    labels = [names[j] for j in order]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, labels)) > 36 else {}
    axis.set_xticks(range(len(order)), labels, **turned)


def _filled(values: NDArray[np.float64], empty: float) -> NDArray[np.float64]:
    """Without columns that are unknown throughout, of which no extreme can be taken."""
    return np.where(np.isfinite(values).any(axis=0), values, empty)
