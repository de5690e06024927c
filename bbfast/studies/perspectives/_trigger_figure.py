"""The figure of the study of trigger generalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.studies.looks import MARKERS, look
from bbfast.studies.perspectives._variants import FAMILIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn"]

_LOW = 0.5
_COLUMNS = 4


def drawn(numbers: Numbers) -> Figure:
    """A block an attack: a panel a family, and a map."""
    from matplotlib.lines import Line2D

    meta = numbers.meta
    shown = [i for i, own in enumerate(meta["own"]) if own]
    lines = [max(2, -(-len(meta["own"][i]) // _COLUMNS)) for i in shown]
    with figure(12.4, 0.9 + 1.95 * sum(lines), meta["caption"]) as made:
        places = made.add_gridspec(sum(lines), _COLUMNS + 1, width_ratios=[*[1.0] * _COLUMNS, 1.75])
        start = 0
        for i, count in zip(shown, lines, strict=True):
            block = slice(start, start + count)
            _draw_curves(made, places[block, :_COLUMNS].subgridspec(count, _COLUMNS), numbers, i)
            if meta["maps"][i]:
                _draw_map(made, places[block, _COLUMNS], numbers, i)
            start += count
        handles = [Line2D([], [], **_style(name, j), label=name) for j, name in enumerate(meta["defenses"])]
        handles.append(Line2D([], [], color="#777777", ls=":", label="trained value"))
        made.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return made


def _style(defense: str, place: int) -> dict[str, Any]:
    return {**look(defense), "marker": MARKERS[place % len(MARKERS)], "ms": 3.5, "lw": 1.3}


def _draw_curves(made: Any, places: Any, numbers: Numbers, i: int) -> None:
    meta, own = numbers.meta, numbers.meta["own"][i]
    for k, (family, trained) in enumerate(own.items()):
        axis = made.add_subplot(places[divmod(k, _COLUMNS)])
        values, asr = numbers.arrays[f"values_{family}_{i}"], numbers.arrays[f"asr_{family}_{i}"]
        for j, defense in enumerate(meta["defenses"]):
            axis.plot(values, 100 * asr[j], clip_on=False, zorder=3 - 0.1 * j, **_style(defense, j))
        axis.axvline(trained, color="#777777", ls=":", lw=1)
        axis.axhline(50, color="#DDDDDD", lw=0.7, zorder=0)
        axis.set(xlabel=FAMILIES[family].title, ylim=(0, 103), yticks=[0, 50, 100])
        if k % _COLUMNS == 0:
            axis.set_ylabel("ASR, %")
        else:
            axis.set_yticklabels([])
        if k == 0:
            axis.set_title(meta["attacks"][i], loc="left", fontweight="bold")


def _draw_map(made: Any, place: Any, numbers: Numbers, i: int) -> None:
    meta, (down, across) = numbers.meta, numbers.meta["maps"][i]
    shares, rows, columns = (numbers.arrays[f"{name}_{i}"] for name in ("map", "map_rows", "map_columns"))
    axis = made.add_subplot(place)
    shown = axis.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100, origin="lower", aspect="auto")
    if shares.min() < _LOW < shares.max():
        axis.contour(shares, levels=[_LOW], colors="w", linewidths=1.4)
    own = meta["own"][i]
    place = [int(np.flatnonzero(values == own[name])[0]) for values, name in ((columns, across), (rows, down))]
    axis.plot(*place, "*", ms=13, color="w", mec="k", mew=0.8)
    axis.set_xticks(range(len(columns)), [f"{v:g}" for v in columns])
    axis.set_yticks(range(len(rows)), [f"{v:g}" for v in rows])
    axis.set(xlabel=FAMILIES[across].title, ylabel=FAMILIES[down].title)
    axis.spines[:].set_visible(True)
    made.colorbar(shown, ax=axis, label="ASR, no defense, %")
