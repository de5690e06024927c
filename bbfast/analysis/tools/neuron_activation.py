"""Neuron activation: which neurons of a layer answer to the trigger and not to what the image shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast import ops
from bbfast.analysis._layers import by_channel, finite, paired_pass
from bbfast.analysis._named import usable_layer
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, POISONED, figure
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NeuronActivation", "NeuronActivationConfig", "gini"]

_TOP, _MARKED, _LARGE = 20, 10, 0.8


class NeuronActivationConfig(ToolConfig):
    """Settings of the neuron activation.

    Args:
        layer: Name or role of the layer.
        reduce: ``mean``: a neuron is a channel, its value the mean over space; ``flatten``: each channel at each place
            is one, as in BackdoorBench.
        n: Test images; all if there are fewer.
    """

    layer: str = "last_conv"
    reduce: Literal["mean", "flatten"] = "mean"
    n: int = Field(5000, ge=1)


def gini(values: np.ndarray) -> float:
    """Gini coefficient of values >= 0: 0 if all are equal, near 1 if one has everything; 0 if all are 0."""
    ordered, total = np.sort(values.astype(float)), float(values.sum())
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if total else 0.0


@register_tool("neuron_activation")
class NeuronActivation(Tool):
    """Mean activation of each neuron of a layer on test images without and with the trigger, and of their difference.

    With d the difference of a neuron's value on an image and on its triggered twin: ``t = mean(d) sqrt(n) / sd(d)``;
    Cohen's d is ``(mean_bd - mean_clean) / sqrt((sd_clean^2 + sd_bd^2) / 2)``. Neurons whose difference never varies
    have no t (NaN) and are counted.

    Arrays (C neurons): ``mean_clean``, ``mean_bd``, ``sd_clean``, ``sd_bd``, ``t``, ``cohen_d`` float32 ``[C]``;
    ``order`` int32 ``[C]``, neurons by mean on clean images, largest first. Table: the twenty that change most.
    """

    card = ToolCard(
        title="Neuron activation",
        question="Which neurons answer to the trigger?",
        deviations=(
            "A neuron is a channel; BackdoorBench's channel at each place is an option.",
            "Statistics of the difference of each pair are added.",
            "The poison indicator of the data is left as it is; BackdoorBench overwrites it.",
        ),
        quick=True,
    )
    Config = NeuronActivationConfig

    def check(self, subject: Subject) -> None:
        usable_layer(subject, self.name, self.config.layer)
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        config: NeuronActivationConfig = self.config
        name, layer = subject.layer(config.layer)
        pairs = subject.pairs(config.n)
        stats: dict[str, ops.ChannelStats] = {}
        shape: list[int] = []

        def add(clean: Tensor, triggered: Tensor) -> None:
            a, b = (finite(name, self.name, by_channel(layer, half)) for half in (clean, triggered))
            shape[:] = a.shape[1:]
            a, b = (x.mean(2) if config.reduce == "mean" else x.flatten(1) for x in (a, b))
            for key, values in (("clean", a), ("bd", b), ("gap", b.double() - a.double())):
                stats[key] = ops.channel_stats(values, state=stats.get(key))

        paired_pass(subject, pairs, {name: add})
        mean, sd = ({key: getattr(found, what).cpu() for key, found in stats.items()} for what in ("mean", "var"))
        sd = {key: value.sqrt() for key, value in sd.items()}
        t = mean["gap"] * len(pairs) ** 0.5 / sd["gap"]
        constant = sd["gap"] == 0
        t = torch.where(constant, torch.nan, t)
        both = ((sd["clean"] ** 2 + sd["bd"] ** 2) / 2).sqrt()
        cohen = torch.where(both > 0, mean["gap"] / both, 0)
        change = mean["gap"].abs()
        top = change.argsort(descending=True, stable=True)[:_TOP].tolist()
        places = shape[1] if config.reduce == "flatten" else 1
        columns = {
            "mean_clean": mean["clean"],
            "mean_bd": mean["bd"],
            "sd_clean": sd["clean"],
            "sd_bd": sd["bd"],
            "t": t,
            "cohen_d": cohen,
        }
        return Numbers(
            arrays={
                **{key: value.float().numpy() for key, value in columns.items()},
                "order": mean["clean"].argsort(descending=True, stable=True).int().numpy(),
            },
            table=[
                {"neuron": j, "channel": j // places, "place": j % places}
                | {key: float(value[j]) for key, value in columns.items()}
                for j in top
            ],
            summary={
                "top_neuron": top[0],
                "largest_change": float(change[top[0]]),
                "median_change": float(change.median()),
                "gini_of_change": gini(change.numpy()),
                "share_large_effect": float((cohen.abs() > _LARGE).double().mean()),
                "constant": int(constant.sum()),
            },
            meta={"layer": name, "n": len(pairs), "neurons": len(t), "top": top},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        order, meta = numbers.arrays["order"], numbers.meta
        clean, bad = (numbers.arrays[key].astype(float) for key in ("mean_clean", "mean_bd"))
        top = np.array(meta["top"][:_MARKED])
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(len(order))
        with figure(9.6, 4.0, meta["caption"]) as made:
            left, right = made.subplots(1, 2, width_ratios=(2.1, 1))
            at = np.arange(len(order))
            # The triggered series is the ragged one: it lies behind, so that both are seen.
            left.fill_between(at, 0, bad[order], step="mid", color=POISONED, alpha=0.65, lw=0, label="triggered")
            left.step(at, clean[order], where="mid", color=CLEAN, lw=1.8, label="clean")
            left.plot(rank[top], bad[top], "v", color="k", ms=5, ls="none", label=f"{len(top)} largest changes")
            left.axhline(0, color="#555555", lw=0.6)
            left.set(
                xlabel="neuron, by its mean on clean images", ylabel="mean activation", xlim=(-0.5, len(order) - 0.5)
            )
            left.set_title(f"{meta['neurons']} neurons of {meta['layer']}, {meta['n']} pairs", pad=24)
            left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, borderaxespad=0.1)
            _largest(right, numbers, top)
        return made


def _largest(axis: Any, numbers: Numbers, top: np.ndarray) -> None:
    at = np.arange(len(top))
    for key, colour, shift in (("clean", CLEAN, -0.2), ("bd", POISONED, 0.2)):
        mean, sd = (numbers.arrays[f"{what}_{key}"][top].astype(float) for what in ("mean", "sd"))
        bars = {"ecolor": "#333333", "elinewidth": 0.8, "capsize": 2}
        axis.barh(at + shift, mean, 0.4, xerr=sd, color=colour, error_kw=bars)
    axis.set_yticks(at, [str(j) for j in top])
    axis.invert_yaxis()
    axis.axvline(0, color="#555555", lw=0.6)
    axis.set(xlabel="mean activation (bar: sd over images)", ylabel="neuron")
    axis.set_title("largest changes", pad=24)
