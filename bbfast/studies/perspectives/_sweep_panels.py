"""A panel of the study of hyper-parameters: lines over values, or boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bbfast.studies.statistics import nanmean

__all__ = ["draw_boxes", "draw_lines"]


def draw_lines(axis: Any, panel: dict[str, Any], der: Any, asr: Any, styles: list[dict[str, Any]]) -> dict[str, Any]:
    """DER over the values, a line a method; returns what stands for each in a legend."""
    from matplotlib.lines import Line2D

    at, start = np.arange(len(der)), int(panel["auto"])
    handles: dict[str, Any] = {}
    if asr is not None:
        bars = axis.bar(at, np.nan_to_num(nanmean(asr, 1)), 0.9, color="#E2E2E2", zorder=0)
        handles["ASR without a defense"] = bars
    for name, values, style in zip(panel["lines"], nanmean(der, 2).T, styles, strict=True):
        handles[name] = Line2D([], [], lw=1.8, ms=5, **style)
        # A default that follows from the data has no place among the values: a point without a line. A line without
        # points is left out: unclipped, it would upset the layout.
        parts = (
            (slice(start), {"ls": "", "ms": 6, "mfc": "w", "mew": 1.5}),
            (slice(start, None), {"lw": 1.8, "ms": 5}),
        )
        for part, how in parts:
            if np.isfinite(values[part]).any():
                axis.plot(at[part], values[part], **style, **how, clip_on=False, zorder=3)
    _ticks(axis, panel)
    return handles


def draw_boxes(axis: Any, panel: dict[str, Any], der: Any, styles: list[dict[str, Any]]) -> None:
    """DER of all values at once, a box a method, a star at the default."""
    for k, style in enumerate(styles):
        values = der[:, k].ravel()
        known = values[np.isfinite(values)]
        box = {"boxprops": {"facecolor": style["color"], "alpha": 0.35}, "medianprops": {"color": "#222222"}}
        if len(known):
            axis.boxplot(known, positions=[k], widths=0.5, patch_artist=True, showfliers=False, **box)
            spaced = k + 0.3 * (np.linspace(-1, 1, len(known)) if len(known) > 1 else np.zeros(1)) * 0.5
            axis.plot(spaced, known, "o", color=style["color"], ms=3.5, alpha=0.8)
        axis.plot(k, nanmean(der[panel["default"], k]), "*", color="#222222", ms=10, zorder=4)
    axis.set_xticks(range(len(styles)), panel["lines"])
    axis.set_xlim(-0.6, len(styles) - 0.4)


def _ticks(axis: Any, panel: Mapping[str, Any]) -> None:
    """The values as evenly spaced ticks, the default marked by a vertical line."""
    texts = panel["texts"]
    axis.axvline(panel["default"], color="#777777", lw=1.0, ls=":")
    axis.set_xticks(range(len(texts)), texts, rotation=45 if sum(map(len, texts)) > 22 else 0)
    axis.set_xlim(-0.5, len(texts) - 0.5)
