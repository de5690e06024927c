"""Activation distribution: through the depth of the network, whose images excite each neuron most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast.analysis._layers import channel_layers, joined, split, strip_width
from bbfast.analysis._topk import classes_of, in_order, top_images
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import OTHER, POISONED, TARGET, class_colours, figure, legend, short_name
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivationDistribution", "ActivationDistributionConfig", "histogram"]

_NAMED_UP_TO, _LETTERS = 20, 24
_FEW = 20
_ROWS, _COLUMNS = 240, 40
"""Of one layer's picture."""


class ActivationDistributionConfig(ToolConfig):
    """Settings of the activation distribution.

    Args:
        view: Images to choose from, see :meth:`bbfast.analysis.Subject.view`.
        n: How many of them.
        sort: Neurons of a layer by their poisoned share, so that the black area reads as a curve; or as numbered.
    """

    view: str = "mixed"
    n: int = Field(5000, ge=1)
    sort: bool = True


def histogram(classes: Tensor, count: int) -> Tensor:
    """How often each class comes in each row: int32 ``[C, count]`` of int64 ``[C, m]``."""
    ones = torch.ones(classes.shape, dtype=torch.int32)
    return torch.zeros(len(classes), count, dtype=torch.int32).scatter_add_(1, classes, ones)


@register_tool("activation_distribution")
class ActivationDistribution(Tool):
    """The classes of the images that excite each neuron most, for every convolution, linear and BatchNorm layer.

    Of each channel the m images with the largest sum over space count, m the number of poisoned images in the view, or
    a class's share if there are none; poisoned is a class of its own. If a channel told poisoned images from all
    others, its poisoned share would be one; by chance it is the view's. One pass serves all layers and keeps the m best
    images of each channel.

    Arrays (L layers, C channels of all, K classes): ``offsets`` int32 ``[L + 1]``; ``count`` int32 ``[C, K + 1]``, the
    last column poisoned; ``m`` int32. Table: largest and mean poisoned share of each layer and its neurons above a
    half.
    """

    card = ToolCard(
        title="Activation distribution",
        question="At which depth does the trigger become a feature?",
        deviations=(
            "Neurons of a layer are sorted by poisoned share, and each layer has the full height; sort=false keeps "
            "BackdoorBench's order.",
            "Images come from the test set, a tenth of it triggered; BackdoorBench's are the poisoned training set, "
            "which view=bd_train gives.",
        ),
        quick=True,
    )
    Config = ActivationDistributionConfig

    def check(self, subject: Subject) -> None:
        channel_layers(subject.model, self.name)
        subject.view(self.config.view, 1)

    def measure(self, subject: Subject) -> Numbers:
        config: ActivationDistributionConfig = self.config
        k = subject.num_classes
        view = in_order(subject.view(config.view, config.n))
        classes, bad = classes_of(view, k), int(view.poisoned.sum())
        m = bad or max(1, len(view) // k)
        found = top_images(subject, view, channel_layers(subject.model, self.name), m, self.name)
        counts = [histogram(classes[top.ids.cpu()], k + 1).numpy() for top in found.values()]
        offsets, count = joined(counts)
        shares = [part[:, k] / m for part in counts]
        table: list[dict[str, Any]] = [
            {
                "layer": name,
                "max": float(share.max()),
                "mean": float(share.mean()),
                "n_above_half": int((share > 0.5).sum()),
                "neurons": len(share),
            }
            for name, share in zip(found, shares, strict=True)
        ]
        first = next((row["layer"] for row in table if row["n_above_half"]), "")
        return Numbers(
            arrays={"offsets": offsets, "count": count, "m": np.array(m, dtype=np.int32)},
            table=table,
            summary={
                "trigger_neurons": sum(row["n_above_half"] for row in table),
                "first_layer": first,
                "largest_share": max(row["max"] for row in table),
                "mean_share": float(count[:, k].mean() / m),
                "base_rate": bad / len(view),
            },
            meta={"layers": list(found), "view": config.view, "n": len(view), "target": subject.attack.target},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        meta, arrays = numbers.meta, numbers.arrays
        layers, m = meta["layers"], int(arrays["m"])
        names, colours = _legend(meta["class_names"], meta["target"])
        with figure(strip_width(len(layers)) + 1.3, 6.4, meta["caption"]) as made:
            top, below = made.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
            parts = [_grouped(part, meta["target"]) for part in split(arrays["count"], arrays["offsets"])]
            picture = np.concatenate([_column(part, colours, meta["options"]["sort"]) for part in parts], axis=1)
            top.imshow(picture, aspect="auto", extent=(-0.5, len(layers) - 0.5, 1, 0), interpolation="none")
            kind = "by poisoned share" if meta["options"]["sort"] else "as numbered"
            top.set(ylabel=f"neuron of the layer, {kind}", yticks=[0, 0.25, 0.5, 0.75, 1])
            note = f", shares ± {100 / m**0.5:.0f} %" if m < _FEW else ""
            top.set_title(f"classes of each neuron's {m} strongest of {meta['n']} images{note}")
            from matplotlib.patches import Patch

            patches = [Patch(color=colour) for colour in colours]
            legend(made, patches[::-1], names[::-1], loc="outside right upper")
            shares = [part[:, -1] / m for part in parts]
            at = range(len(layers))
            below.plot(at, [s.max() for s in shares], "o-", color=POISONED, ms=3.5, label="largest")
            below.plot(at, [s.mean() for s in shares], "s-", color="#333333", ms=3, label="mean")
            below.axhline(numbers.summary["base_rate"], color=OTHER, ls="--", label="by chance")
            below.set(ylabel="poisoned share", ylim=(0, 1.05))
            below.set_xticks(at, layers, rotation=90, fontsize=8 if len(layers) > 24 else 9)
            below.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1)
        return made


def _legend(names: list[str], target: int) -> tuple[list[str], list[Any]]:
    if len(names) <= _NAMED_UP_TO:
        return [*(short_name(name, _LETTERS) for name in names), "poisoned"], [*class_colours(len(names)), "k"]
    return ["other classes", f"target ({short_name(names[target], _LETTERS)})", "poisoned"], [OTHER, TARGET, "k"]


def _grouped(count: np.ndarray, target: int) -> np.ndarray:
    """Counts in the legend's groups: all classes, or if there are too many the target and the rest."""
    k = count.shape[1] - 1
    if k <= _NAMED_UP_TO:
        return count
    return np.stack([count[:, :k].sum(1) - count[:, target], count[:, target], count[:, k]], axis=1)


def _column(count: np.ndarray, colours: list[Any], sort: bool) -> np.ndarray:
    """A layer as a picture ``[rows, columns, 3]``: in each row a neuron's stacked bar, poisoned first."""
    from matplotlib.colors import to_rgb

    share = count[:, ::-1] / count.sum(1, keepdims=True)
    order = np.argsort(-share[:, 0], kind="stable") if sort else np.arange(len(share))
    share = share[order[np.arange(_ROWS) * len(share) // _ROWS]]
    ends = np.cumsum(share, axis=1)
    place = (np.arange(_COLUMNS) + 0.5) / _COLUMNS
    which = (place[None, :, None] >= ends[:, None, :]).sum(2).clip(0, share.shape[1] - 1)
    picture: np.ndarray = np.array([to_rgb(colour) for colour in colours[::-1]])[which]
    picture[:, -3:] = 1.0  # a gap between the layers
    return picture
