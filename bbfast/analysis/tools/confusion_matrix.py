"""Confusion matrix: what each class is taken for, without and with the trigger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure, short_name
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ConfusionMatrix", "confusion"]

_TEXT_UP_TO, _WORST, _LETTERS = 20, 20, 18
_GAP, _EDGE = 0.6, 0.02
"""Between the matrix and the column beside it, as a share of the column's width; around, as a share of the matrix's."""


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts int64 ``[K, K]``: how many of class row were taken for class column."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


@register_tool("confusion_matrix")
class ConfusionMatrix(Tool):
    """Rows are true classes, columns what the model says, for clean and for triggered test images.

    Beside the triggered matrix stands the share of each class that goes where the attacker wants, to its own target if
    there are several. With more than 20 classes there are no numbers in the cells, and classes are sorted by that
    share, those without triggered images first; the pairs most confused are in the summary.

    Arrays: ``clean``, ``bd``: int64 ``[K, K]``; ``to_target`` int64 ``[K]``: triggered images of each class that go
    where the attacker wants. Table: recall and precision of each class on clean images, the
    share of its triggered images that go where the attacker wants, and its rows of both matrices as shares
    (``clean_0`` .. ``bd_K-1``; NaN without images). A class without images has an empty (grey) row.
    """

    card = ToolCard(
        title="Confusion matrix",
        question="What is each class taken for, without and with the trigger?",
        deviations=(
            "Rows are true classes in both matrices; BackdoorBench's are the labels given, so that triggered images "
            "fill a single row.",
        ),
        quick=True,
    )
    Config = ToolConfig

    def check(self, subject: Subject) -> None:
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        k, names = subject.num_classes, subject.class_names
        clean, bad = subject.view("clean_test"), subject.view("bd_test")
        said = [subject.logits(v.images).argmax(1) for v in (clean, bad)]
        matrices = [confusion(v.labels, found, k).numpy() for v, found in zip((clean, bad), said, strict=True)]
        counts, hit = matrices[0].astype(float), said[1] == bad.given
        with np.errstate(invalid="ignore"):
            recall, precision = np.diag(counts) / counts.sum(1), np.diag(counts) / counts.sum(0)
            to_target = torch.bincount(bad.labels[hit], minlength=k).numpy()
            turned = to_target / matrices[1].sum(1)
            shares = {key: m / m.sum(1, keepdims=True) for key, m in zip(("clean", "bd"), matrices, strict=True)}
        worst = [
            {"true": names[i], "predicted": names[j], "count": int(counts[i, j])}
            for i, j in sorted(np.argwhere(counts > 0).tolist(), key=lambda ij: (-counts[ij[0], ij[1]], ij))
            if i != j
        ][:_WORST]
        return Numbers(
            arrays={"clean": matrices[0], "bd": matrices[1], "to_target": to_target},
            table=[
                {"class": names[i], "recall": recall[i], "precision": precision[i], "to_target": turned[i]}
                | {f"{key}_{j}": share[i, j] for key, share in shares.items() for j in range(k)}
                for i in range(k)
            ],
            summary={
                "accuracy": float(np.diag(counts).sum() / counts.sum()),
                "asr": float(hit.double().mean()),
                "most_confused": worst,
            },
            meta={"target": subject.attack.target},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        import matplotlib

        names, arrays = numbers.meta["class_names"], numbers.arrays
        k = len(names)
        small = k <= _TEXT_UP_TO
        totals = arrays["bd"].sum(1)
        taken = np.ma.masked_where(totals == 0, arrays["to_target"] / np.maximum(totals, 1))
        order = np.arange(k) if small else np.argsort(-taken.filled(2.0), kind="stable")
        wide = max(1.0, k / 14)  # of the column beside the matrix, in cells
        side, more = (3.2 if small else 4.4), (wide + _GAP * wide) / k + _EDGE
        colours = matplotlib.colormaps["Blues"].with_extremes(bad="#D0D0D0")
        with figure((2 + more) * side + 1.4, side + 0.9, numbers.meta["caption"]) as made:
            axes = made.subplots(1, 2, width_ratios=(1, 1 + more))
            for axis, key, title in zip(axes, ("clean", "bd"), ("clean test images", "with trigger"), strict=True):
                counts = arrays[key][np.ix_(order, order)].astype(float)
                sums = counts.sum(1, keepdims=True)
                shares = np.ma.masked_where(np.broadcast_to(sums == 0, counts.shape), counts / np.maximum(sums, 1))
                shown = _cells(axis, shares, -0.5, k - 0.5, colours, small)
                axis.set(xlabel="predicted class" + ("" if small else ", in the same order"), ylim=(k - 0.5, -0.5))
                axis.set_ylabel("true class" + ("" if small else ", by share taken for the target"))
                axis.set_title(title)
                axis.spines[:].set_visible(False)
                if small:
                    words = [short_name(name, _LETTERS) for name in names]
                    axis.set_xticks(range(k), words, rotation=90 if max(map(len, words)) > 2 else 0)
                    axis.set_yticks(range(k), words)
                else:
                    axis.set(xticks=[], yticks=[])
            right = axes[1]
            left = k - 0.5 + _GAP * wide
            _cells(right, taken[order, None], left, left + wide, colours, small)
            right.set_xlim(-0.5, left + wide + _EDGE * k)
            right.text(left + wide / 2, -0.5 - _EDGE * k, "to\ntarget", ha="center", va="bottom", fontsize=9)
            made.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
        return made


def _cells(axis: Axes, shares: np.ma.MaskedArray, left: float, right: float, colours: Any, text: bool) -> Any:
    """Shares ``[K, columns]`` as cells between two places, framed, with their numbers."""
    from matplotlib.patches import Rectangle

    rows, columns = shares.shape
    shown = axis.imshow(shares, cmap=colours, vmin=0, vmax=1, extent=(left, right, rows - 0.5, -0.5), aspect="equal")
    axis.add_patch(Rectangle((left, -0.5), right - left, rows, fill=False, lw=0.8, clip_on=False))
    for i, j in np.argwhere(shares.filled(0) > 0).tolist() if text else ():
        share = shares[i, j]
        at = left + (j + 0.5) * (right - left) / columns
        words = f"{share:.2f}".removeprefix("0")
        axis.text(at, i, words, ha="center", va="center", fontsize=6.5, color="w" if share > 0.5 else "k")
    return shown
