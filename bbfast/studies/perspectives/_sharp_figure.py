"""The figure of the study of sharpness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast.analysis._layers import log_ticks
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, OTHER, POISONED, figure
from bbfast.bench.grid import NO_DEFENSE
from bbfast.studies.looks import colours_apart, series
from bbfast.studies.statistics import nanmean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn"]

_CEILING, _FLOOR = 10.0, 1e-3


def drawn(numbers: Numbers) -> Figure:
    """Scatters on top, cuts and paths below, a column an attack."""
    meta = numbers.meta
    attacks, defenses = meta["attacks"], meta["defenses"]
    width = max(7.6, 1.2 + 3.1 * len(attacks))
    with figure(width, 4.0 + 2.1 * (1 + len(defenses)), meta["caption"]) as made:
        halves: Any = made.subfigures(2, 1, height_ratios=(3.4, 2.1 * (1 + len(defenses))))
        top, below = halves
        left, right = top.subplots(1, 2)
        _against_asr(left, numbers)
        _radii(right, numbers)
        axes: Any = below.subplots(1 + len(defenses), len(attacks), sharey="row", squeeze=False)
        for column, attack in enumerate(attacks):
            axes[0, column].set_title(attack)
            _cuts(axes[0, column], numbers, attack)
            for line, defense in enumerate(defenses, 1):
                _paths(axes[line, column], numbers, attack, defense)
        axes[0, 0].set_ylabel("cross-entropy,\nno defense")
        for line, defense in enumerate(defenses, 1):
            axes[line, 0].set_ylabel(f"on the way to\n{defense}, %")
        _legend(below)
    return made


def _of(numbers: Numbers, attack: str, defense: str) -> list[int]:
    return [i for i, row in enumerate(numbers.meta["models"]) if (row["attack"], row["defense"]) == (attack, defense)]


def _against_asr(axis: Any, numbers: Numbers) -> None:
    meta = numbers.meta
    reach = []
    for attack, style in zip(meta["attacks"], series(meta["attacks"]), strict=True):
        rows = [meta["models"][i] for i in _of(numbers, attack, NO_DEFENSE)]
        known = [row for row in rows if np.isfinite(row["lambda_bd"]) and np.isfinite(row["asr_after"])]
        if not known:
            continue
        x, sd, y = (np.array([row[key] for row in known]) for key in ("lambda_bd", "lambda_bd_sd", "asr_after"))
        # A logarithmic axis has no room for what reaches below zero.
        low = np.minimum(np.nan_to_num(sd), 0.99 * x)
        bars = {"xerr": [low, np.nan_to_num(sd)], "ecolor": "#999999", "elinewidth": 1, "ls": "", "ms": 8, "mec": "w"}
        if len(x) > 1:
            bars["yerr"] = np.full(len(y), 100 * float(np.std(y, ddof=1)))
        axis.errorbar(x, 100 * y, label=attack, clip_on=False, zorder=3, **bars, **style)
        reach += [*(x - low), *(x + np.nan_to_num(sd))]
    rho = numbers.summary["spearman_lambda_bd_asr_after"]
    axis.set(
        xlabel="largest eigenvalue of the Hessian, triggered images",
        ylabel=f"ASR after {meta['after']}, %",
        ylim=(-3, 103),
        title="curvature before and ASR after" + (f", Spearman {rho:+.2f}" if np.isfinite(rho) else ""),
    )
    if reach and min(reach) > 0:
        log_ticks(axis, "x", [np.array(reach)])
    axis.legend(title="attack", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _radii(axis: Any, numbers: Numbers) -> None:
    meta, extent = numbers.meta, numbers.meta["extent"]
    marks = dict(zip(meta["attacks"], series(meta["attacks"]), strict=True))
    colours = colours_apart([row["defense"] for row in meta["models"]])
    edge, named = 1.04 * extent, []
    for row in meta["models"]:
        if np.isnan(row["radius_asr"]) or np.isnan(row["radius_c_acc"]):
            continue
        x, y = (min(row[key], edge) for key in ("radius_c_acc", "radius_asr"))
        style = {"color": colours[row["defense"]], "marker": marks[row["attack"]]["marker"]}
        axis.plot(x, y, ms=8, mec="w", ls="", clip_on=False, zorder=3, **style)
        # What lies beyond the cut.
        for beyond, step in ((row["radius_c_acc"] > extent, (1, 0)), (row["radius_asr"] > extent, (0, 1))):
            if beyond:
                to = (x + 0.07 * extent * step[0], y + 0.07 * extent * step[1])
                axis.annotate(
                    "", to, (x, y), arrowprops={"arrowstyle": "->", "color": "#555555"}, annotation_clip=False
                )
        named.append(row["defense"])
    axis.plot([0, extent], [0, extent], color="#BBBBBB", lw=0.8, ls=":")
    axis.set(
        xlim=(0, 1.08 * extent),
        ylim=(0, 1.08 * extent),
        xlabel="distance at which C-Acc halves",
        ylabel="distance at which ASR halves",
        title="random moves that a model stands",
    )
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker="s", ms=8, color=colours[name], label=name) for name in dict.fromkeys(named)
    ]
    axis.legend(handles=handles, title="defense", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _cuts(axis: Any, numbers: Numbers, attack: str) -> None:
    a = numbers.arrays["a"]
    for i in _of(numbers, attack, NO_DEFENSE)[:1]:
        for side, (colour, line) in enumerate(((CLEAN, "-"), (POISONED, "--"))):
            loss = np.clip(numbers.arrays["cuts"][i, :, :, side], _FLOOR, _CEILING)
            axis.plot(a, loss.T, color=colour, lw=0.6, alpha=0.5, ls=line)
            axis.plot(a, np.exp(nanmean(np.log(loss), 0)), color=colour, lw=1.8, ls=line)
    for i in _of(numbers, "", "benign")[:1]:
        loss = np.clip(numbers.arrays["cuts"][i, :, :, 0], _FLOOR, _CEILING)
        axis.plot(a, np.exp(nanmean(np.log(loss), 0)), color=OTHER, lw=1.4, ls="-.", zorder=1)
    axis.set(yscale="log", ylim=(_FLOOR, 1.3 * _CEILING), xlabel="random direction, filter lengths")


def _paths(axis: Any, numbers: Numbers, attack: str, defense: str) -> None:
    t = numbers.arrays["path_t"]
    for i in _of(numbers, attack, defense)[:1]:
        for path, (width, mark) in enumerate(((1.2, "o"), (1.8, ""))):
            for column, colour in ((2, CLEAN), (3, POISONED)):
                values = 100 * numbers.arrays["paths"][i, path, :, column]
                axis.plot(t, values, color=colour, lw=width, ls=":" if path == 0 else "-", marker=mark, ms=2.5)
    axis.set(ylim=(-3, 103), xlim=(0, 1), xticks=[0, 0.5, 1])
    axis.set_xticklabels(["attacked", "0.5", defense])


def _legend(block: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=CLEAN, label="clean: loss, C-Acc"),
        Line2D([], [], color=POISONED, ls="--", label="triggered: loss"),
        Line2D([], [], color=OTHER, ls="-.", label="benign model, clean loss"),
        Line2D([], [], color=POISONED, label="ASR"),
        Line2D([], [], color="#555555", ls=":", marker="o", ms=2.5, label="straight line"),
        Line2D([], [], color="#555555", lw=1.8, label="Bezier curve"),
    ]
    block.legend(handles=handles, loc="outside upper center", ncols=3)
