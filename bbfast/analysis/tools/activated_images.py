"""Activated images: what excites each neuron most, and whether it is the trigger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from bbfast.analysis._mosaic import EDGE, FOOT, HEAD, mosaic
from bbfast.analysis._named import usable_layer
from bbfast.analysis._topk import classes_of, in_order, majority, top_images
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import POISONED, figure
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ActivatedImages", "ActivatedImagesConfig"]

_ROWS = 12
"""Neurons in the figure: more would be too small to see."""


class ActivatedImagesConfig(ToolConfig):
    """Settings of the activated images.

    Args:
        layer: Name or role of the layer.
        view: Images to choose from, see :meth:`bbfast.analysis.Subject.view`.
        n: How many of them.
        num_neuron: Neurons in the table; the figure shows the first twelve.
        num_image: Images of each neuron.
        order: ``poison_share``: neurons with the largest share of poisoned images first; ``ordered``: as they are
            numbered; ``random``.
    """

    layer: str = "last_conv"
    view: str = "mixed"
    n: int = Field(5000, ge=1)
    num_neuron: int = Field(50, ge=1)
    num_image: int = Field(10, ge=1)
    order: Literal["poison_share", "ordered", "random"] = "poison_share"


@register_tool("activated_images")
class ActivatedImages(Tool):
    """The images with the largest sum of activation over space, for each channel of a layer.

    Of equal activations the image with the smaller id comes first. One pass keeps the best images of each channel and
    nothing else.

    Arrays (C channels, k images of each): ``top_id`` int32 ``[C, k]``, sample numbers; ``top_value`` float32 and
    ``top_poisoned`` bool ``[C, k]``; ``share`` float32 ``[C]``, share of poisoned ones; ``neurons`` int32, in the order
    chosen; ``shown`` uint8 ``[r, k, c, H, W]``, the images of the first neurons. Table: poisoned share, most frequent
    true class (poisoned is one of its own) and its share.
    """

    card = ToolCard(
        title="Activated images",
        question="What excites each neuron most, and does it carry the trigger?",
        deviations=(
            "Neurons with the largest poisoned share come first; BackdoorBench takes the first ones, and its random "
            "order breaks off.",
            "Images come from the test set, a tenth of it triggered; BackdoorBench's are the poisoned training set, "
            "which view=bd_train gives.",
            "The figure shows twelve neurons.",
        ),
        quick=True,
    )
    Config = ActivatedImagesConfig

    def check(self, subject: Subject) -> None:
        usable_layer(subject, self.name, self.config.layer)
        subject.view(self.config.view, 1)

    def measure(self, subject: Subject) -> Numbers:
        config: ActivatedImagesConfig = self.config
        name, layer = subject.layer(config.layer)
        view = in_order(subject.view(config.view, config.n))
        k, classes = min(config.num_image, len(view)), classes_of(view, subject.num_classes)
        found = top_images(subject, view, {name: layer}, k, self.name)[name]
        ids, values = found.ids.cpu(), found.values.cpu()
        poisoned = view.poisoned[ids]
        share = poisoned.float().mean(1)
        most, part = majority(classes[ids], subject.num_classes + 1)
        if config.order == "poison_share":
            order = share.argsort(descending=True, stable=True)
        elif config.order == "ordered":
            order = torch.arange(len(share))
        else:
            order = torch.randperm(len(share), generator=subject.generator("neurons"))
        order = order[: config.num_neuron]
        names = [*subject.class_names, "poisoned"]
        return Numbers(
            arrays={
                "top_id": view.ids[ids].int().numpy(),
                "top_value": values.numpy(),
                "top_poisoned": poisoned.numpy(),
                "share": share.numpy(),
                "neurons": order.int().numpy(),
                "shown": view.images[ids[order[:_ROWS]]].numpy(),
            },
            table=[
                {
                    "neuron": j,
                    "share": float(share[j]),
                    "majority": names[int(most[j])],
                    "majority_share": float(part[j]),
                }
                for j in order.tolist()
            ],
            summary={
                "largest_share": float(share.max()),
                "neurons_above_half": int((share > 0.5).sum()),
                "mean_share": float(share.mean()),
                "base_rate": float(view.poisoned.float().mean()),
                "neurons": len(share),
            },
            meta={"layer": name, "view": config.view, "n": len(view)},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        shown, neurons = numbers.arrays["shown"], numbers.arrays["neurons"].tolist()
        count, k = shown.shape[:2]
        meta = numbers.meta
        with figure(1.5 + 0.72 * max(k, 6), 1.2 + 0.8 * count, meta["caption"]) as made:
            axis = made.subplots()
            # One picture: a hundred pairs of axes would take seconds to lay out.
            axis.imshow(mosaic(shown), interpolation="none", extent=(0, k, count, 0), aspect="equal")
            for i, j in enumerate(neurons[:count]):
                for rank in range(k):
                    framed = bool(numbers.arrays["top_poisoned"][j, rank])
                    _mark(axis, rank, i, numbers.arrays["top_value"][j, rank], framed)
            percent = [100 * numbers.arrays["share"][j] for j in neurons[:count]]
            labels = [f"{j}: {share:.0f} %" for j, share in zip(neurons, percent, strict=False)]
            axis.set_yticks(np.arange(count) + 0.55, labels)
            axis.set_xticks(np.arange(k) + 0.5, [str(rank + 1) for rank in range(k)])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set(xlabel="rank (activation above the image)", ylabel="neuron: share of triggered images (framed)")
            base = 100 * numbers.summary["base_rate"]
            title = f"{meta['layer']}: strongest of {meta['n']} images, {base:.0f} % of them triggered"
            axis.set_title(title)
        return made


def _mark(axis: Any, column: int, row: int, value: float, framed: bool) -> None:
    from matplotlib.patches import Rectangle

    left, top, width, height = column + EDGE, row + HEAD, 1 - 2 * EDGE, 1 - HEAD - FOOT
    colour, line = (POISONED, 2.2) if framed else ("#BBBBBB", 0.5)
    axis.add_patch(Rectangle((left, top), width, height, fill=False, ec=colour, lw=line))
    axis.text(column + 0.5, row + HEAD / 2 + 0.01, f"{value:.3g}", ha="center", va="center", fontsize=6.5)
