"""Trigger activation change: how far the trigger moves each channel of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from bbfast.analysis._change import changes
from bbfast.analysis._layers import channel_layers, joined, split, strip, strip_width
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, POISONED, figure
from bbfast.analysis.subject import Subject
from bbfast.models import roles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TriggerActivationChange", "TriggerActivationChangeConfig"]

_TOP = 10


class TriggerActivationChangeConfig(ToolConfig):
    """Settings of the trigger activation change.

    Args:
        n: Test images; all if there are fewer.
        norm: Over space, in the figure and the table's order: ``l2``, the pruning literature's, or ``l1_sum``,
            BackdoorBench's.
        normalize_by_layer: Colours are shares of each layer's largest change.
    """

    n: int = Field(5000, ge=1)
    norm: Literal["l2", "l1_sum"] = "l2"
    normalize_by_layer: bool = False


@register_tool("trigger_activation_change")
class TriggerActivationChange(Tool):
    """How far the trigger moves each channel of every convolution, linear and BatchNorm layer.

    With ``F_j(x)`` the map of channel j, its mean over test images x and their triggered twins x': ``l2`` is that of
    ``|F_j(x') - F_j(x)|_2``, ``l1`` that of ``|F_j(x') - F_j(x)|_1``, both norms over space. ``z`` is l2 as a
    root mean square over space, in standard deviations of the channel's values on clean images (at least a hundredth of
    the layer's): comparable across layers. One pass over both halves, nothing is kept of it.

    The summary names the channel of the largest z before the classifier.

    Arrays (L layers, C channels of all): ``offsets`` int32 ``[L + 1]``; ``l1``, ``l2``, ``z`` float32 ``[C]``. Table:
    the ten most changed channels of each layer. The layers' names are in ``meta``.

    Source: Zheng et al., ECCV 2022, arXiv 2208.03111.
    """

    card = ToolCard(
        title="Trigger activation change",
        question="Which channels does the trigger move?",
        paper="Zheng et al., ECCV 2022, arXiv 2208.03111",
        deviations=(
            "The norm over space is L2, as in the paper; BackdoorBench's sum of absolute values is an option, and both "
            "are kept.",
            "A change in standard deviations of the channel is added, which compares layers.",
            "In the figure each layer has the full height, and lines below show its largest change.",
            "The overlap with the channels of the largest Lipschitz bound is found in the tool lipschitz.",
        ),
        quick=True,
    )
    Config = TriggerActivationChangeConfig

    def check(self, subject: Subject) -> None:
        channel_layers(subject.model, self.name)
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        config: TriggerActivationChangeConfig = self.config
        pairs, layers = subject.pairs(config.n), channel_layers(subject.model, self.name)
        found = {
            sums.name: [part.numpy() for part in sums.means()] for sums in changes(subject, pairs, layers, self.name)
        }
        names = list(found)
        (offsets, l1), (_, l2), (_, z) = (joined([values[i] for values in found.values()]) for i in range(3))
        table = []
        for name, values in found.items():
            order = np.argsort(-values[0 if config.norm == "l1_sum" else 1], kind="stable")[:_TOP]
            for rank, j in enumerate(order.tolist()):
                row: dict[str, Any] = {"layer": name, "rank": rank, "channel": j}
                table.append({**row, **dict(zip(("l1", "l2", "z"), (float(v[j]) for v in values), strict=True))})
        # The target's logit always moves: it is no finding.
        logits = [i for i, name in enumerate(names) if name in roles(subject.model).table["classifier"]]
        inner = z.copy()
        for i in logits if len(names) > len(logits) else []:
            inner[offsets[i] : offsets[i + 1]] = -1
        best = int(inner.argmax())
        place = int(np.searchsorted(offsets, best, side="right")) - 1
        return Numbers(
            arrays={"offsets": offsets, "l1": l1, "l2": l2, "z": z},
            table=table,
            summary={
                "top_layer": names[place],
                "top_channel": best - int(offsets[place]),
                "top_z": float(z[best]),
                "median_z": float(np.median(z)),
                "top_over_median": float(z[best] / max(np.median(z), 1e-12)),
                "channels": len(z),
            },
            meta={"layers": names, "n": len(pairs)},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        names, options = numbers.meta["layers"], numbers.meta["options"]
        offsets, z = numbers.arrays["offsets"], split(numbers.arrays["z"], numbers.arrays["offsets"])
        columns = split(numbers.arrays["l1" if options["norm"] == "l1_sum" else "l2"], offsets)
        word = "L1" if options["norm"] == "l1_sum" else "L2"
        label = f"mean change, {word} norm over space"
        if options["normalize_by_layer"]:
            columns = [values / max(values.max(), 1e-30) for values in columns]
            label = f"change ({word}), share of the layer's largest"
        with figure(strip_width(len(names)), 6.2, numbers.meta["caption"]) as made:
            top, below = made.subplots(2, 1, sharex=True, height_ratios=(2, 1))
            highest = max(float(values.max()) for values in columns)
            shown = strip(top, columns, "Blues", 0, highest or 1)
            made.colorbar(shown, ax=top, label=label, location="top", aspect=50, pad=0.02)
            largest = np.array([values.max() for values in z])
            high, middle = (np.array([np.quantile(values, q) for values in z]) for q in (0.95, 0.5))
            at = range(len(names))
            below.plot(at, largest, color=POISONED, marker="o", ms=3.5, label="largest")
            below.plot(at, high, color=CLEAN, marker="s", ms=3, label="95th percentile")
            below.plot(at, middle, color="#777777", ls="--", label="median")
            below.set_yscale("symlog", linthresh=0.01)
            below.set(ylabel="change in clean\nstandard deviations")
            below.set_ylim(bottom=0)
            below.set_xticks(at, names, rotation=90, fontsize=8 if len(names) > 24 else 9)
            below.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1)
            below.grid(axis="y", color="#DDDDDD", lw=0.5)
        return made
