"""The bars of the studies of models and of data sets, drawn from their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bbfast.studies.cells import STATES
from bbfast.studies.looks import series
from bbfast.studies.statistics import nanmean

__all__ = ["draw_bars", "draw_plain", "draw_spread"]


def _order(numbers: Any) -> list[int]:
    """Defenses (without none) by falling mean DER, those without figures last."""
    mean = nanmean(numbers.arrays["level_der"], 1)
    return [int(i) for i in np.argsort(np.where(np.isfinite(mean), -mean, np.inf), kind="stable")]


def draw_plain(axis: Any, numbers: Any) -> None:
    """ASR without a defense: a group an attack, a bar a level."""
    asr = 100 * nanmean(numbers.arrays["asr"][:, 0], 2)
    _grouped(axis, numbers, asr, numbers.meta["attacks"], asr, asr, list(range(len(asr))))
    axis.set(title="without a defense", ylabel="ASR, %", ylim=(0, 105), xlabel="attack")


def draw_bars(axis: Any, numbers: Any) -> None:
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


def draw_spread(axis: Any, numbers: Any) -> None:
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
    axis.set_xticks(range(len(order)), labels, rotation=45 if sum(map(len, labels)) > 36 else 0)


def _filled(values: NDArray[np.float64], empty: float) -> NDArray[np.float64]:
    """Without columns that are unknown throughout, of which no extreme can be taken."""
    return np.where(np.isfinite(values).any(axis=0), values, empty)
