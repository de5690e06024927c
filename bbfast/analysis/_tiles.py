"""Finished figures on one sheet: their axes and colours made comparable, then laid out as tiles."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast.analysis.style import DPI, figure, put_caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["share", "tiled"]

_GAP, _HEAD, _LINE = 0.3, 0.5, 0.2
"""Inches between tiles, of the title, and of a line of a tile's name."""
_PROPORTION = 1.4
"""Width over height of the sheet that the tiles are laid out for."""


def share(figures: Sequence[Figure]) -> bool:
    """Give corresponding axes of figures the same limits, and corresponding images the same colours.

    Axes correspond by their order. Limits are shared where scales (linear, logarithmic) are the same, colours where
    the map and the kind of its scale are; each spans what all of them need.

    Returns:
        False if the figures have different numbers of axes: then nothing is changed.
    """
    own = [[axes for axes in made.axes if axes.get_label() != "<colorbar>"] for made in figures]
    if len({len(axes) for axes in own}) != 1:
        return False
    for twins in zip(*own, strict=True):
        if all(axes.name == "rectilinear" for axes in twins):
            for which in ("x", "y"):
                _share_limits(twins, which)
        held = [_coloured(axes) for axes in twins]
        if len({len(some) for some in held}) == 1:
            for same in zip(*held, strict=True):
                _share_colours(same)
    return True


def tiled(figures: Sequence[Figure], names: Sequence[str], title: str, shared: bool) -> Figure:
    """All figures on one sheet at their own size, each under its name.

    Args:
        figures: As the tool draws them.
        names: One each; a figure's own caption does not repeat it.
        title: Of the sheet.
        shared: Make axes and colours the same first, see :func:`share`.
    """
    shared = shared and share(figures)
    tiles = [_pixels(made, name) for made, name in zip(figures, names, strict=True)]
    wide, high = (max(tile.shape[i] for tile in tiles) / DPI for i in (1, 0))
    heads = [textwrap.wrap(name, max(20, int(wide * 11))) for name in names]
    head = _LINE * max(len(lines) for lines in heads) + 0.1
    columns = _columns(len(tiles), wide + _GAP, high + head + _GAP)
    rows = -(-len(tiles) // columns)
    width, height = columns * (wide + _GAP) + _GAP, _HEAD + rows * (head + high + _GAP)
    with figure(width, height) as sheet:
        sheet.set_layout_engine("none")
        sheet.text(
            _GAP / width,
            1 - 0.17 / height,
            f"{title}: {'shared axes and colour scales' if shared else 'each with its own axes'}",
            fontsize=13,
            weight="bold",
            va="top",
        )
        for i, (tile, lines) in enumerate(zip(tiles, heads, strict=True)):
            row, column = divmod(i, columns)
            left, top = _GAP + column * (wide + _GAP), _HEAD + row * (head + high + _GAP)
            sheet.text(
                (left + tile.shape[1] / DPI / 2) / width,
                1 - (top + head - 0.07) / height,
                "\n".join(lines),
                fontsize=11,
                weight="bold",
                ha="center",
                va="bottom",
            )
            # Edges on whole pixels, so that the tile is neither blurred nor loses a line.
            x, y = (round(value * DPI) for value in (left, height - top - head))
            box = (x, y - tile.shape[0], tile.shape[1], tile.shape[0])
            scale = (width * DPI, height * DPI) * 2
            axes = sheet.add_axes(tuple(part / whole for part, whole in zip(box, scale, strict=True)))
            axes.imshow(tile, interpolation="none", aspect="auto")
            axes.axis("off")
    return sheet


def _columns(count: int, wide: float, high: float) -> int:
    """How many tiles side by side come nearest to the sheet's proportion."""

    def off(columns: int) -> float:
        return abs(math.log(columns * wide / (-(-count // columns) * high) / _PROPORTION))

    return min(range(1, count + 1), key=off)


def _pixels(made: Figure, name: str) -> np.ndarray:
    """The figure in the resolution of print, uint8 ``[H, W, 4]``, its caption without ``name``, which stands above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    said = " ".join(made.get_supxlabel().split())
    start = " ".join(name.split())
    if said.startswith(start):
        put_caption(made, said.removeprefix(start).lstrip("; ,"))
    canvas = FigureCanvasAgg(made)
    made.savefig(io.BytesIO(), format="rgba")
    return np.array(canvas.buffer_rgba())


def _share_limits(twins: Sequence[Axes], which: str) -> None:
    kinds = {(getattr(axes, f"get_{which}scale")(), _threshold(getattr(axes, f"{which}axis"))) for axes in twins}
    if len(kinds) != 1:
        return
    ends = [sorted(getattr(axes, f"get_{which}lim")()) for axes in twins]
    limits = min(low for low, _ in ends), max(high for _, high in ends)
    for axes in twins:
        # Of images the first row is on top.
        turned = getattr(axes, f"{which}axis_inverted")()
        getattr(axes, f"set_{which}lim")(limits[::-1] if turned else limits)


def _threshold(axis: Axis) -> float | None:
    """Up to where an axis that is logarithmic on both sides of zero is linear; None of others."""
    return getattr(axis.get_transform(), "linthresh", None)


def _coloured(axes: Axes) -> list[Any]:
    """What shows values as colours: images and areas, not pictures that have colours of their own."""
    parts = (part for part in (*axes.images, *axes.collections))
    return [part for part in parts if (values := part.get_array()) is not None and values.ndim < 3]


def _share_colours(same: Sequence[Any]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    kinds = {(type(part.norm), part.get_cmap().name) for part in same}
    ends = [part.get_clim() for part in same]
    if len(kinds) == 1 and type(same[0].norm) in (Normalize, LogNorm) and all(None not in end for end in ends):
        for part in same:
            part.set_clim(min(low for low, _ in ends), max(high for _, high in ends))
