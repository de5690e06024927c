"""The figure of the study of representations: a column an attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.looks import MARKERS, colours_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_depth"]

_FLOOR = 1e-12
_STEPS = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]


def draw_depth(numbers: Numbers) -> Figure:
    """The figure of :class:`Representation`."""
    meta = numbers.meta
    columns = [(attack, ratio) for attack in meta["attacks"] for ratio in meta["ratios"]]
    rows = 5 if meta["defenses"] else 4
    with figure(max(4.7, 1.8 + 2.9 * len(columns)), 2.3 * rows, meta["caption"]) as made:
        axes: Any = made.subplots(rows, len(columns), sharey="row", squeeze=False)
        for own, (attack, ratio) in zip(axes.T, columns, strict=True):
            here = [
                i
                for i, row in enumerate(meta["models"])
                if (row["attack"], row["ratio"]) == (attack, ratio) and row["seed"] == meta["models"][0]["seed"]
            ]
            _draw_column(own, numbers, here)
            plain = [meta["models"][i]["asr"] for i in here if meta["models"][i]["defense"] == NO_DEFENSE]
            said = f"ASR {100 * plain[0]:.0f} %" if plain else "not run"
            own[0].set_title(f"{attack}, {100 * ratio:.3g} %\n{said}")
        words = (
            "probe AUROC",
            "trigger neurons,\n% of the layer",
            "Gini of the change",
            "saliency with trigger\nover without",
            "change of the top 20\nchannels, clean sd",
        )
        for axis, word in zip(axes[:, 0], words, strict=False):
            axis.set_ylabel(word)
        # Of all columns, which share it: set while they are drawn, it would be that of the first.
        axes[1, 0].set_ylim(0, max(1.0, 105 * float(np.nanmax(numbers.arrays["neurons"], initial=0.0))))
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], **_style(name, meta["defenses"]), label=name) for name in (NO_DEFENSE, *meta["defenses"])
        ]
        made.legend(handles=handles, loc="outside upper center", ncols=len(handles), title="defense")
    return made


def _style(defense: str, defenses: Sequence[str]) -> dict[str, Any]:
    place = 1 + defenses.index(defense) if defense in defenses else 0
    return {
        "color": colours_apart(["none", *defenses])[defense],
        "marker": MARKERS[place % len(MARKERS)],
        "ms": 4,
        "lw": 1.4,
    }


def _draw_column(axes: Any, numbers: Numbers, here: Sequence[int]) -> None:
    meta, arrays = numbers.meta, numbers.arrays
    plain = next((i for i in here if meta["models"][i]["defense"] == NO_DEFENSE), None)
    for i in here:
        name = meta["models"][i]["defense"]
        for axis, key, scale in ((axes[0], "auroc", 1), (axes[1], "neurons", 100), (axes[2], "gini", 1)):
            axis.plot(scale * arrays[key][i], clip_on=False, zorder=3, **_style(name, meta["defenses"]))
        if plain is not None and i != plain:
            at = 1.6 * meta["defenses"].index(name)
            for before, after in zip(arrays["z_top"][plain], arrays["z_top"][i], strict=True):
                axes[4].plot(
                    [at, at + 1],
                    [before, after],
                    color=_style(name, meta["defenses"])["color"],
                    lw=0.8,
                    marker=".",
                    ms=4,
                )
    axes[0].axhline(0.5, color="#BBBBBB", lw=0.8, ls=":")
    axes[0].set(ylim=(0.4, 1.02))
    axes[2].set(ylim=(0, 1), xlabel="convolution or linear layer")
    axes[1].set_xlabel("convolution or linear layer")
    _named(axes[0], meta["blocks"])
    for axis in axes[1:3]:
        axis.set_xticks(range(0, len(meta["layers"]), max(1, len(meta["layers"]) // 7)))
    _draw_frequencies(axes[3], numbers, here)
    if not meta["defenses"]:
        return
    ends = [(1.6 * k + x, word) for k, name in enumerate(meta["defenses"]) for x, word in ((0, "none"), (1, name))]
    axes[4].set_xticks([x for x, _ in ends], [word for _, word in ends])
    # Changes of one channel differ by decades from those of another.
    top = 1.3 * float(np.nanmax(arrays["z_top"], initial=1.0))
    axes[4].set(yscale="symlog", ylim=(0, top))
    shown = [0.0, 0.5, *(x for x in _STEPS if 1 <= x <= top)]
    axes[4].set_yticks(shown, [f"{x:g}" for x in shown], minor=False)
    axes[4].minorticks_off()


def _draw_frequencies(axis: Any, numbers: Numbers, here: Sequence[int]) -> None:
    meta, arrays = numbers.meta, numbers.arrays
    cycles = np.arange(arrays["radial"].shape[2])
    for i in here:
        clean, triggered = np.maximum(arrays["radial"][i], _FLOOR)
        axis.plot(cycles, triggered / clean, zorder=3, **_style(meta["models"][i]["defense"], meta["defenses"]))
    axis.axhline(1, color="#BBBBBB", lw=0.8, ls=":")
    axis.set(yscale="log", xlabel="cycles an image")
    ratio = np.maximum(arrays["radial"][:, 1], _FLOOR) / np.maximum(arrays["radial"][:, 0], _FLOOR)
    low, high = min(0.5, float(ratio.min(initial=1.0)) / 1.2), max(2.0, 1.2 * float(ratio.max(initial=1.0)))
    shown = [x for x in _STEPS if low <= x <= high]
    axis.set_ylim(low, high)
    axis.set_yticks(shown, [f"{x:g}" for x in shown], minor=False)
    axis.minorticks_off()
    shade = axis.twinx()
    if here:
        shade.fill_between(cycles, 100 * arrays["energy"][here[0]], color="#DDDDDD", step="mid", lw=0)
    shade.set(ylim=(0, None), ylabel="trigger's energy, %")
    # Lines in front of the grey of the other axis.
    axis.set_zorder(shade.get_zorder() + 1)
    axis.patch.set_visible(False)


def _named(axis: Any, names: Sequence[str]) -> None:
    short = len(names) <= 10
    shown = names if short else [str(i) for i in range(len(names))]
    step = 1 if short else max(1, len(names) // 8)
    axis.set_xticks(
        range(0, len(names), step), shown[::step], rotation=35 if short else 0, ha="right" if short else "center"
    )
    axis.set_xlabel("after block")
