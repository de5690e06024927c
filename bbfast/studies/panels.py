"""Small multiples: how many panels stand in a row, shared labels, one legend for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bbfast.studies.looks import look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BANDS_UP_TO", "label_edges", "make_panels", "panel_size", "shared_legend"]

BANDS_UP_TO = 6
"""Defenses in a panel up to which bands and second lines can be told apart; with more they stay in the numbers."""
_ACROSS = 4
_WIDTH, _HEIGHT, _EXTRA = 2.7, 2.5, 1.0


def _shape(count: int) -> tuple[int, int]:
    """Rows and columns: up to four in a row."""
    rows = math.ceil(count / _ACROSS)
    return rows, math.ceil(count / rows)


def panel_size(count: int) -> tuple[float, float]:
    """Width and height in inches of a figure of ``count`` panels."""
    rows, columns = _shape(count)
    return max(_WIDTH * columns + 0.4, 6.0), _HEIGHT * rows + _EXTRA


def make_panels(made: Figure, count: int, *, share_x: bool = True, share_y: bool = True) -> list[Any]:
    """``count`` axes in reading order; places that are left over stay empty."""
    rows, columns = _shape(count)
    axes = made.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y).ravel().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    if share_x:
        # Where there is no panel below, the one above carries the numbers.
        for axis in axes[max(0, count - columns) : count]:
            axis.tick_params(labelbottom=True)
    return axes[:count]


def label_edges(axes: Sequence[Any], x: str, y: str) -> None:
    """Name the axes of the panels: ``x`` below the lowest of each column, ``y`` left of each row."""
    _, columns = _shape(len(axes))
    for i, axis in enumerate(axes):
        if i >= len(axes) - columns:
            axis.set_xlabel(x)
        if i % columns == 0:
            axis.set_ylabel(y)


def shared_legend(made: Figure, defenses: Sequence[str], lines: Mapping[str, str] | None = None) -> None:
    """One legend above all panels: a colour and marker for each defense, a line style for each kind of line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], lw=1.8, ms=5, label=name, **look(name)) for name in defenses]
    handles += [Line2D([], [], color="#555555", ls=style, label=kind) for kind, style in (lines or {}).items()]
    rows = math.ceil(len(handles) / max(3, int(made.get_figwidth() / 0.95)))
    made.legend(handles=handles, loc="outside upper center", ncols=math.ceil(len(handles) / rows), columnspacing=1.4)
