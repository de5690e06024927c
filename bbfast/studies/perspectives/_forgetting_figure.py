"""The figure of the study of forgetting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, OTHER, POISONED, figure
from bbfast.training.recorder import NEVER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn"]

_BINS = 20
"""Events up to which a bar is one number."""


def drawn(numbers: Numbers) -> Figure:
    """A column a cell; of several seeds the first."""
    meta, arrays = numbers.meta, numbers.arrays
    shown = [i for i, status in enumerate(meta["status"]) if status == "done" and meta["seeds"][i] == meta["seeds"][0]]
    tuned = any(f"finetuned_{i}" in arrays for i in shown)
    with figure(1.6 + 2.3 * len(shown), 8.6 if tuned else 6.6, meta["caption"]) as made:
        axes: Any = made.subplots(4 if tuned else 3, len(shown), sharey="row", squeeze=False)
        for column, i in enumerate(shown):
            own = axes[:, column]
            own[0].set_title(f"{meta['labels'][i]}\nASR {100 * meta['asr'][i]:.0f} %")
            _bars(own[0], arrays, i)
            epochs = np.arange(1, len(arrays[f"mean_{i}"]) + 1)
            for j, (colour, line) in enumerate(((CLEAN, "-"), (POISONED, "--"))):
                own[1].plot(epochs, arrays[f"mean_{i}"][:, j], color=colour, ls=line)
            own[1].set_xlabel("epoch")
            own[2].plot(epochs, arrays[f"auroc_{i}"], color="#333333")
            own[2].axhline(0.5, color="#BBBBBB", lw=0.8, ls=":")
            own[2].set(xlabel="epoch", ylim=(-0.03, 1.03))
            if tuned:
                looks = ((POISONED, "--"), (OTHER, ":"), (CLEAN, "-"))
                for values, (colour, line) in zip(100 * arrays[f"finetuned_{i}"].T, looks, strict=True):
                    own[3].plot(values, color=colour, ls=line)
                own[3].set(xlabel="epoch of fine-tuning", ylim=(-3, 103))
        words = ("share of the group, %", "mean events", "AUROC of few events", "training samples, %")
        for axis, word in zip(axes[:, 0], words, strict=False):
            axis.set_ylabel(word)
        _legend(made, tuned)
    return made


def _bars(axis: Any, arrays: Any, i: int) -> None:
    """Shares by number of events, 0 .. 20 and more, and 'never', clean and poisoned side by side."""
    poisoned, events, learned_at = (arrays[f"{name}_{i}"] for name in ("poisoned", "events", "learned_at"))
    never = learned_at == NEVER
    top = int(min(_BINS, max(4, events.max())))
    bins = np.where(never, top + 2, np.minimum(events.astype(np.int64), top))
    for offset, colour, group in ((-0.2, CLEAN, ~poisoned), (0.2, POISONED, poisoned)):
        share = 100 * np.bincount(bins[group], minlength=top + 3) / group.sum()
        axis.bar(np.arange(top + 3) + offset, share, width=0.4, color=colour)
    step = 2 if top <= 10 else 5
    ticks = list(range(0, top, step))
    more = "+" if events.max() > top else ""
    axis.set_xticks([*ticks, top, top + 2], [*map(str, ticks), f"{top}{more}", "never"])
    axis.set(xlabel="forgetting events", yscale="log", ylim=(0.05, 150))
    axis.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])


def _legend(made: Figure, tuned: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=CLEAN, label="clean" + ("; fine-tuning: clean samples that lose their label" * tuned)),
        Line2D([], [], color=POISONED, ls="--", label="poisoned" + ("; those that lose the attacker's label" * tuned)),
    ]
    if tuned:
        handles.append(Line2D([], [], color=OTHER, ls=":", label="poisoned that get their true class"))
    made.legend(handles=handles, loc="outside upper center", ncols=len(handles))
