"""Metrics: how accurate the model is and how well the backdoor works, with intervals, by class and calibrated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast import metrics
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, OTHER, POISONED, TARGET, figure, short_name
from bbfast.analysis.subject import Subject, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Metrics", "MetricsConfig", "calibration_error", "wilson"]

RATES = ("c_acc", "asr", "r_acc")
_WORDS = {"c_acc": "C-Acc", "asr": "ASR", "r_acc": "R-Acc", "der": "DER", "rir": "RIR"}
_NAMES_UP_TO, _LETTERS = 20, 18


class MetricsConfig(ToolConfig):
    """Settings of the metrics.

    Args:
        plot: ``bars`` with their intervals, or BackdoorBench's ``radar``, whose areas mislead.
        bins: Of the confidence, for the calibration error.
    """

    plot: Literal["bars", "radar"] = "bars"
    bins: int = Field(15, ge=1)


def wilson(right: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a rate, 95 % by default; NaN without samples.

    ``(p + z^2/2n -+ z sqrt(p (1-p) / n + z^2 / 4n^2)) / (1 + z^2/n)`` with ``p = right / n``.
    """
    if not total:
        return float("nan"), float("nan")
    p, part = right / total, z * z / total
    half = z * (p * (1 - p) / total + part / (4 * total)) ** 0.5
    return max(0.0, (p + part / 2 - half) / (1 + part)), min(1.0, (p + part / 2 + half) / (1 + part))


def calibration_error(confidence: Tensor, right: Tensor, bins: int) -> float:
    """Expected calibration error: ``sum_b n_b / n |accuracy_b - confidence_b|`` over bins of equal width.

    Args:
        confidence: Probability of the predicted class, ``[n]``.
        right: Whether it is the true one, bool ``[n]``.
        bins: How many; a bin holds its upper edge.

    Returns:
        A fraction; NaN without samples.
    """
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return float(gap.abs().sum() / len(place)) if len(place) else float("nan")


@register_tool("metrics")
class Metrics(Tool):
    """C-Acc, ASR and R-Acc with Wilson's 95 % intervals; DER and RIR of a defended model; all of it by class.

    C-Acc is the share of clean test images given their class; ASR and R-Acc are the shares of triggered ones given
    what the attacker wants and their true class. DER and RIR are those of :mod:`bbfast.metrics`. The expected
    calibration error counts the true class as right, so that of a backdoored model is near one on triggered images.

    Arrays (R models: the attacked one, then the defended one; K classes): ``counts`` int64 ``[R, 3, 2]``, right and all
    for C-Acc, ASR, R-Acc; ``by_class`` int64 ``[R, K, 6]``: clean right, clean all, triggered to the target, triggered
    right, triggered to another class, triggered all; ``ece`` float64 ``[R, 2]``, clean and triggered. Table: a row a
    model.

    Source: Wu et al., BackdoorBench, arXiv 2401.15002.
    """

    card = ToolCard(
        title="Metrics",
        question="How accurate is the model, and how well does the backdoor work?",
        paper="Wu et al., BackdoorBench, arXiv 2401.15002",
        deviations=(
            "Bars with Wilson intervals are drawn instead of a radar, which is an option.",
            "DER and RIR come from the rates alone; BackdoorBench's helpers for predictions add the accuracy drop.",
            "Figures by class and the calibration error are added.",
        ),
        quick=True,
    )
    Config = MetricsConfig

    def check(self, subject: Subject) -> None:
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        defended = subject.defense is not None
        models = [("no defense", subject.attacked_model)] if defended else []
        name = str(subject.defense.config["defense"]) if subject.defense is not None else "no defense"
        models.append((name, subject.model))
        clean, bad = subject.view("clean_test"), subject.view("bd_test")
        found = [self._of(subject, model, clean, bad) for _, model in models]
        table: list[dict[str, Any]] = []
        for (label, _), (counts, _, ece) in zip(models, found, strict=True):
            row: dict[str, Any] = {"model": label}
            for rate, (right, total) in zip(RATES, counts.tolist(), strict=True):
                row[rate] = right / total if total else float("nan")
                row[f"{rate}_low"], row[f"{rate}_high"] = wilson(right, total)
            row |= {"ece_clean": float(ece[0]), "ece_bd": float(ece[1]), "der": "", "rir": ""}
            table.append(row)
        last = table[-1]
        if defended:
            before = table[0]
            last["der"] = metrics.der(before["c_acc"], before["asr"], last["c_acc"], last["asr"])
            last["rir"] = metrics.rir(before["c_acc"], before["r_acc"], last["c_acc"], last["r_acc"])
        keys = (*RATES, "ece_clean", "ece_bd", *(("der", "rir") if defended else ()))
        counts, by_class, ece = (np.stack(part) for part in zip(*found, strict=True))
        return Numbers(
            arrays={"counts": counts, "by_class": by_class, "ece": ece},
            table=table,
            summary={key: last[key] for key in keys},
            meta={"models": [label for label, _ in models], "target": subject.attack.target},
        )

    def _of(self, subject: Subject, model: nn.Module, clean: View, bad: View) -> tuple[np.ndarray, ...]:
        k = subject.num_classes
        held, subject.model = subject.model, model
        try:
            sure, said = subject.logits(clean.images).softmax(1).max(1)
            sure_bad, said_bad = subject.logits(bad.images).softmax(1).max(1)
        finally:
            subject.model = held
        right, hit, kept = said == clean.labels, said_bad == bad.given, said_bad == bad.labels
        cases = [(clean, right), (clean, right | True), (bad, hit), (bad, kept), (bad, ~hit & ~kept), (bad, hit | True)]
        by_class = torch.stack([torch.bincount(view.labels[which], minlength=k) for view, which in cases], 1)
        counts = torch.tensor([[int(v.sum()), len(v)] for v in (right, hit, kept)])
        ece = [calibration_error(*pair, self.config.bins) for pair in ((sure, right), (sure_bad, kept))]
        return counts.numpy(), by_class.numpy(), np.array(ece)

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        names = numbers.meta["class_names"]
        with figure(9.6, 3.9, numbers.meta["caption"]) as made:
            radar = numbers.meta["options"]["plot"] == "radar"
            grid = made.add_gridspec(1, 2, width_ratios=(1, 1.35))
            left = made.add_subplot(grid[0], projection="polar" if radar else None)
            (_radar if radar else _bars)(left, numbers)
            axis = made.add_subplot(grid[1])
            by_class = numbers.arrays["by_class"][-1].astype(float)
            with np.errstate(invalid="ignore"):
                accuracy, taken = by_class[:, 0] / by_class[:, 1], by_class[:, 2] / by_class[:, 5]
            at = np.arange(len(names))
            axis.bar(at - 0.2, accuracy, 0.4, color=CLEAN, label="clean: right")
            axis.bar(at + 0.2, taken, 0.4, color=POISONED, label="triggered: taken for the target")
            axis.set(xlabel="true class", ylabel="share of the class", ylim=(0, 1.02), xlim=(-0.7, len(names) - 0.3))
            if len(names) <= _NAMES_UP_TO:
                words = [short_name(name, _LETTERS) for name in names]
                axis.set_xticks(at, words, rotation=90 if max(map(len, words)) > 2 else 0)
            axis.set_title(f"by class, {numbers.meta['models'][-1]}", pad=26)
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.2)
        return made


def _bars(axis: Any, numbers: Numbers) -> None:
    labels, table = numbers.meta["models"], numbers.table
    keys = [*RATES, *(("der", "rir") if len(labels) > 1 else ())]
    width = 0.8 / len(labels)
    for i, (label, row) in enumerate(zip(labels, table, strict=True)):
        shown = keys if i == len(labels) - 1 else list(RATES)
        at = np.array([keys.index(key) for key in shown]) + (i - (len(labels) - 1) / 2) * width
        if i == len(labels) - 1:
            at[len(RATES) :] = np.arange(len(RATES), len(keys))
        values = np.array([float(row[key]) for key in shown])
        ends = np.array([[float(row.get(f"{key}_{end}", row[key])) for key in shown] for end in ("low", "high")])
        # Rounding may put an end of the interval on the wrong side of the rate.
        errors = np.maximum(np.abs(ends - values), 0)
        errors[:, len(RATES) :] = np.nan
        colour = (CLEAN if len(labels) == 1 else OTHER) if i == 0 else TARGET
        axis.bar(at, values, width, yerr=errors, capsize=3, color=colour, edgecolor="#333333", lw=0.5, label=label)
        for x, value, top in zip(at, values, np.fmax(values, ends[1]), strict=True):
            axis.text(x, top + 0.015, f"{value:.3f}", ha="center", va="bottom", fontsize=6.5)
    axis.set_xticks(range(len(keys)), [_WORDS[key] for key in keys])
    axis.set(ylabel="rate (95 % intervals)", ylim=(0, 1.1), yticks=np.linspace(0, 1, 6))
    axis.set_title("test set", pad=26)
    if len(labels) > 1:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.2)


def _radar(axis: Any, numbers: Numbers) -> None:
    labels = numbers.meta["models"]
    keys = [*RATES, *(("der", "rir") if len(labels) > 1 else ())]
    angles = np.linspace(0, 2 * np.pi, len(keys), endpoint=False)
    for i, (label, row) in enumerate(zip(labels, numbers.table, strict=True)):
        # Before a defense, DER and RIR are those of a defense that changes nothing.
        values = [0.5 if row[key] == "" else 1 - float(row[key]) if key == "asr" else float(row[key]) for key in keys]
        colour = CLEAN if i == len(labels) - 1 else OTHER
        axis.plot([*angles, angles[0]], [*values, values[0]], color=colour, label=label, marker="o", ms=4)
        axis.fill(angles, values, color=colour, alpha=0.15)
    axis.set_xticks(angles, ["1 - ASR" if key == "asr" else _WORDS[key] for key in keys])
    axis.set(ylim=(0, 1), yticks=[0.25, 0.5, 0.75, 1.0])
    axis.set_rlabel_position(45)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.12), ncols=2, borderaxespad=0.2)
