"""Confusion matrix: what each class is taken for, without and with the trigger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure, short_name
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ConfusionMatrix", "confusion"]

_TEXT_UP_TO, _WORST, _LETTERS = 20, 20, 18


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts int64 ``[K, K]``: how many of class row were taken for class column."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


@register_tool("confusion_matrix")
class ConfusionMatrix(Tool):
    """Rows are true classes, columns what the model says, for clean and for triggered test images.

    Arrays: ``clean``, ``bd``: int64 ``[K, K]``. Table: recall and precision of each class on clean images, the
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
            turned = torch.bincount(bad.labels[hit], minlength=k).numpy() / matrices[1].sum(1)
            shares = {key: m / m.sum(1, keepdims=True) for key, m in zip(("clean", "bd"), matrices, strict=True)}
        worst = [
            {"true": names[i], "predicted": names[j], "count": int(counts[i, j])}
            for i, j in sorted(np.argwhere(counts > 0).tolist(), key=lambda ij: (-counts[ij[0], ij[1]], ij))
            if i != j
        ][:_WORST]
        return Numbers(
            arrays={"clean": matrices[0], "bd": matrices[1]},
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
        names = numbers.meta["class_names"]
        k = len(names)
        side = 3.2 if k <= _TEXT_UP_TO else 4.4
        with figure(2 * side + 1.4, side + 0.9, numbers.meta["caption"]) as made:
            axes = made.subplots(1, 2)
            for axis, key, title in zip(axes, ("clean", "bd"), ("clean test images", "with trigger"), strict=True):
                counts = numbers.arrays[key].astype(float)
                totals = counts.sum(1, keepdims=True)
                shares = np.ma.masked_where(np.broadcast_to(totals == 0, counts.shape), counts / np.maximum(totals, 1))
                axis.set_facecolor("#D0D0D0")
                shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
                axis.set(title=title, xlabel="predicted class", ylabel="true class")
                axis.spines[:].set_visible(True)
                if k <= _TEXT_UP_TO:
                    words = [short_name(name, _LETTERS) for name in names]
                    turn = 90 if max(map(len, words)) > 2 else 0
                    axis.set_xticks(range(k), words, rotation=turn)
                    axis.set_yticks(range(k), words)
                    for i, j in np.argwhere(counts > 0).tolist():
                        dark = shares[i, j] > 0.5
                        text = f"{shares[i, j]:.2f}".removeprefix("0")
                        axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color="w" if dark else "k")
            made.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
        return made
