"""An axis of epochs that enlarges the first ones: logarithmic up to them, linear behind."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["early_scale", "mark_early"]

_LEAST = 0.05
_SHARE = 0.5
"""Of the axis that the first epochs get."""


def early_scale(axis: Any, early: int, last: float) -> None:
    """Give the x axis the scale: ``early`` epochs on a logarithmic half, those up to ``last`` on a linear one."""
    if early <= 0 or last <= early:
        axis.set_xlim(left=_LEAST if early else 0, right=max(last, 1.0))
        if early:
            axis.set_xscale("log")
        return
    span = np.log(early / _LEAST)

    def forward(x: NDArray[np.float64]) -> NDArray[np.float64]:
        x = np.asarray(x, dtype=np.float64)
        low = _SHARE * np.log(np.maximum(x, 1e-9) / _LEAST) / span
        return np.where(x <= early, low, _SHARE + (1 - _SHARE) * (x - early) / (last - early))

    def inverse(z: NDArray[np.float64]) -> NDArray[np.float64]:
        z = np.asarray(z, dtype=np.float64)
        low = _LEAST * np.exp(np.minimum(z, _SHARE) / _SHARE * span)
        return np.where(z <= _SHARE, low, early + (z - _SHARE) / (1 - _SHARE) * (last - early))

    axis.set_xscale("function", functions=(forward, inverse))
    axis.set_xlim(_LEAST, last)
    ticks = [t for t in (0.1, 0.3, 1.0) if t < early] + [float(early)]
    step = max(1, round((last - early) / 3))
    ticks += [t for t in np.arange(early + step, last + 0.5, step).tolist() if t <= last]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axis.set_xticks([], minor=True)


def mark_early(axis: Any, early: int) -> None:
    """Shade the enlarged part."""
    if early > 0:
        axis.axvspan(_LEAST, early, color="#F3F1EA", zorder=0, lw=0)
