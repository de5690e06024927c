"""The figure of the study of quick learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, POISONED, figure
from bbfast.studies.perspectives._early import early_scale, mark_early
from bbfast.studies.perspectives._probe import COLUMNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn"]

_LINES = ("-", "--", ":", "-.")
_FAINTEST = 1e-4


def drawn(numbers: Numbers) -> Figure:
    """A column an attack, a line a ratio; of several seeds the first."""
    meta = numbers.meta
    attacks, seed = meta["attacks"], meta["seeds"][0]
    with figure(1.6 + 3.1 * len(attacks), 8.6, meta["caption"]) as made:
        axes: Any = made.subplots(4, len(attacks), sharex=True, sharey="row", squeeze=False)
        last = max(numbers.arrays[name][-1, 0] for name in numbers.arrays if name.startswith("epochs_"))
        for i, (attack, ratio, of, status) in enumerate(meta["places"]):
            if of == seed and status == "done":
                line = _LINES[meta["ratios"].index(ratio) % len(_LINES)]
                _draw_cell(axes[:, attacks.index(attack)], numbers, i, line)
        for column, attack in enumerate(attacks):
            axes[0, column].set_title(attack)
            axes[3, column].set_xlabel("epochs")
            for axis in axes[:, column]:
                early_scale(axis, numbers.meta["fine_epochs"], last)
                mark_early(axis, numbers.meta["fine_epochs"])
        axes[0, 0].set(ylabel="training loss", yscale="log")
        axes[1, 0].set(ylabel="C-Acc, ASR, %", ylim=(-3, 103))
        axes[2, 0].set(ylabel="gradient norm", yscale="log")
        axes[3, 0].set(ylabel="cosine of the gradients")
        for axis in axes[3]:
            axis.axhline(0, color="#BBBBBB", lw=0.8)
        _legend(made, meta["ratios"])
    return made


def _draw_cell(axes: Any, numbers: Numbers, i: int, line: str) -> None:
    curve, probe, epochs = (numbers.arrays[f"{name}_{i}"] for name in ("curve", "probe", "epochs"))
    style: dict[str, Any] = {"ls": line, "lw": 1.4}
    for column, colour in ((1, CLEAN), (2, POISONED)):
        known = np.isfinite(curve[:, column])
        axes[0].plot(curve[known, 0], np.maximum(curve[known, column], _FAINTEST), color=colour, **style)
        # The probe's measurements of the first epochs, then those of the whole test sets.
        early = probe[probe[:, 0] <= numbers.meta["fine_epochs"]]
        late = epochs[epochs[:, 0] > numbers.meta["fine_epochs"]]
        share = 100 * np.concatenate([early[:, COLUMNS.index("c_acc") - 1 + column], late[:, column]])
        axes[1].plot(np.concatenate([early[:, 0], late[:, 0]]), share, color=colour, **style)
        if colour == POISONED:
            axes[1].plot(probe[:, 0], 100 * probe[:, COLUMNS.index("base")], color=colour, alpha=0.45, lw=0.8, ls=line)
        axes[2].plot(probe[:, 0], np.maximum(probe[:, column], _FAINTEST), color=colour, **style)
    axes[3].plot(probe[:, 0], probe[:, COLUMNS.index("cosine")], color="#333333", **style)
    first = numbers.meta["asr_at"][i]
    if np.isfinite(first):
        axes[1].plot(first, 90, marker="v", ms=7, color=POISONED, mec="k", mew=0.6, zorder=4)


def _legend(made: Figure, ratios: Sequence[float]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=CLEAN, label="clean"),
        Line2D([], [], color=POISONED, label="poisoned, ASR"),
        *(
            Line2D([], [], color="#333333", ls=_LINES[i % len(_LINES)], label=f"{100 * ratio:.3g} % poisoned")
            for i, ratio in enumerate(ratios)
        ),
        Line2D([], [], color=POISONED, alpha=0.45, lw=0.8, label="target without trigger"),
        Line2D([], [], color=POISONED, marker="v", mec="k", mew=0.6, ls="", label="ASR above 90 %"),
    ]
    made.legend(handles=handles, loc="outside upper center", ncols=len(handles))
