"""Lipschitz: how much each channel can amplify, which needs no data, and whether the trigger's channels do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bbfast.analysis._change import changes
from bbfast.analysis._layers import channel_layers, joined, log_ticks, split, strip, strip_width
from bbfast.analysis._lipschitz import agreement, channel_bounds, operator_norm, paired
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, OTHER, POISONED, figure
from bbfast.analysis.subject import Subject
from bbfast.models import roles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Lipschitz", "LipschitzConfig"]


class LipschitzConfig(ToolConfig):
    """Settings of the Lipschitz bounds.

    Args:
        u: A channel stands out if its bound is this many standard deviations above its layer's mean.
        steps: Of the power iteration for a convolution's norm; 0 leaves the norms of whole layers out.
        n: Test images for the change by the trigger that bounds are compared with; 0 leaves it out.
        normalize_by_layer: Colours are shares of each layer's largest bound.
    """

    u: float = Field(3.0, ge=0)
    steps: int = Field(30, ge=0)
    n: int = Field(500, ge=0)
    normalize_by_layer: bool = False


@register_tool("lipschitz")
class Lipschitz(Tool):
    """An upper bound of how much each channel amplifies, from the weights alone.

    For channel c of a convolution it is ``sigma_max(W_c)``, the largest singular value of its kernel as ``[C_in,
    kh kw]`` matrix; of a linear layer the length of row c; of a BatchNorm ``|gamma_c| / sqrt(var_c + eps)``. A
    BatchNorm is paired with the convolution that feeds it: ``sigma_max(W_c) |gamma_c| / sqrt(var_c + eps)`` bounds the
    two together. Which one feeds it is read from the graph of ``torch.fx``; behind a residual sum it is none. Beside
    it the spectral norm of each whole layer at its actual input size. If there are triggered images, bounds are
    compared with the change that the trigger makes in the same channel (see trigger_activation_change).

    Arrays (L layers, C channels of all): ``offsets`` int32 ``[L + 1]``; ``L`` float32 ``[C]``, of the layer alone;
    ``L_bn`` float32 ``[C]``, with the BatchNorm, at the convolution and the BatchNorm of a pair and NaN elsewhere;
    ``true_norm`` float32 ``[L]``, NaN if left out; ``tac`` float32 ``[C]``, NaN if left out. Table: mean, deviation and
    outliers of each layer.

    Source: Zheng et al., ECCV 2022, arXiv 2208.03111.
    """

    card = ToolCard(
        title="Channel Lipschitz bounds",
        question="Which channels can amplify most, and are they the trigger's?",
        paper="Zheng et al., ECCV 2022, arXiv 2208.03111",
        deviations=(
            "A BatchNorm is paired with the convolution that feeds it, or none; BackdoorBench takes the one registered "
            "last before it, which in pre-activation networks is often another block's.",
            "BatchNorm's eps is counted under the root.",
            "Norms of whole layers and the comparison with the change by the trigger are added.",
            "In the figure each layer has the full height.",
        ),
        quick=True,
    )
    Config = LipschitzConfig

    def check(self, subject: Subject) -> None:
        channel_layers(subject.model, self.name)

    def measure(self, subject: Subject) -> Numbers:
        config: LipschitzConfig = self.config
        layers, pairing = channel_layers(subject.model, self.name), paired(subject.model, subject.image_size)
        names = list(layers)
        alone = {name: channel_bounds(layer).numpy() for name, layer in layers.items()}
        missing = {name: np.full(len(values), np.nan) for name, values in alone.items()}
        both, tac = dict(missing), dict(missing)
        for norm, conv in pairing.convs.items():
            both[norm] = both[conv] = channel_bounds(layers[norm], layers[conv]).numpy()
        if config.n and len(subject.attack.backdoor_test):
            for sums in changes(subject, subject.pairs(config.n), layers, self.name):
                tac[sums.name] = sums.means()[1].double().numpy()
        norms = self._norms(subject, layers)
        table = [
            _row(name, pairing.convs.get(name, ""), both[name] if name in pairing.convs else alone[name], config.u)
            | {"norm": norm}
            for name, norm in zip(names, norms, strict=True)
        ]
        logits = roles(subject.model).table["classifier"]
        scored = list(pairing.convs) or [name for name in names if name not in logits] or names
        summary: dict[str, Any] = {
            "pairs": len(pairing.convs),
            "outliers": sum(row["outliers"] for row in table if row["layer"] in scored),
            "channels": sum(row["channels"] for row in table if row["layer"] in scored),
            **agreement(both if pairing.convs else alone, tac, scored),
        }
        if config.steps:
            with np.errstate(divide="ignore"):
                summary["log10_norm_product"] = float(np.nansum(np.log10(norms)))
        parts = [joined([group[name] for name in names]) for group in (alone, both, tac)]
        return Numbers(
            arrays={
                "offsets": parts[0][0],
                "L": parts[0][1].astype(np.float32),
                "L_bn": parts[1][1].astype(np.float32),
                "tac": parts[2][1].astype(np.float32),
                "true_norm": np.array(norms, dtype=np.float32),
            },
            table=table,
            summary=summary,
            meta={"layers": names, "pairs": dict(pairing.convs), "pairing": pairing.how, "scored": scored},
        )

    def _norms(self, subject: Subject, layers: dict[str, nn.Module]) -> list[float]:
        if not self.config.steps:
            return [float("nan")] * len(layers)
        shapes: dict[str, tuple[int, ...]] = {}

        def shape(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                shapes[name] = tuple(inputs[0].shape)

            return hook

        hooks = [layer.register_forward_pre_hook(shape(name)) for name, layer in layers.items()]
        try:
            with torch.no_grad():
                subject.model(torch.zeros(1, *subject.image_size, device=subject.device))
        finally:
            for handle in hooks:
                handle.remove()
        generator, steps = subject.generator("power iteration"), self.config.steps
        return [
            operator_norm(layer, shapes[name], steps, generator) if name in shapes else float("nan")
            for name, layer in layers.items()
        ]

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        names, offsets, options = numbers.meta["layers"], numbers.arrays["offsets"], numbers.meta["options"]
        alone, both, tac = (split(numbers.arrays[key], offsets) for key in ("L", "L_bn", "tac"))
        # A convolution shows its own bound, a paired BatchNorm that of the pair.
        columns = [both[i] if name in numbers.meta["pairs"] else alone[i] for i, name in enumerate(names)]
        label = "bound of the channel (a paired BatchNorm's: with its convolution)"
        shown_as = columns
        if options["normalize_by_layer"]:
            shown_as = [values / max(np.nanmax(values), 1e-30) for values in columns]
            label = "bound, share of the layer's largest"
        width = strip_width(len(names))
        compared = bool(np.isfinite(numbers.arrays["tac"]).any())
        with figure(width + (3.6 if compared else 0), 6.2, numbers.meta["caption"]) as made:
            widths = (width, 3.6) if compared else (width,)
            halves: Any = made.subfigures(1, len(widths), width_ratios=widths, squeeze=False)
            halves = halves[0]
            top, below = halves[0].subplots(2, 1, sharex=True, height_ratios=(2, 1))
            highest = max(float(np.nanmax(values)) for values in shown_as)
            drawn = strip(top, shown_as, "Oranges", 0, highest or 1)
            halves[0].colorbar(drawn, ax=top, label=label, location="top", aspect=50, pad=0.02)
            _lines(below, columns, names, options["u"])
            if compared:
                _scatter(halves[1].subplots(), numbers, both if numbers.meta["pairs"] else alone, tac)
        return made


def _row(name: str, conv: str, bounds: np.ndarray, u: float) -> dict[str, Any]:
    good = bounds[np.isfinite(bounds)]
    mean, spread = (float(good.mean()), float(good.std(ddof=1))) if len(good) > 1 else (float("nan"),) * 2
    out = np.flatnonzero(bounds > mean + u * spread)
    return {
        "layer": name,
        "convolution": conv,
        "channels": len(bounds),
        "mean": mean,
        "sd": spread,
        "largest": float(good.max()) if len(good) else float("nan"),
        "outliers": len(out),
        "outlying": " ".join(map(str, out.tolist())),
    }


def _lines(axis: Any, columns: list[np.ndarray], names: list[str], u: float) -> None:
    at = np.arange(len(names))
    largest, mean = (np.array([f(values) for values in columns]) for f in (np.nanmax, np.nanmean))
    limit = mean + u * np.array([np.nanstd(values, ddof=1) if len(values) > 1 else np.nan for values in columns])
    axis.plot(at, largest, "o", color=POISONED, ms=4, label="largest")
    axis.plot(at, limit, "_", color="k", ms=8, label=f"mean + {u:g} sd")
    axis.plot(at, mean, "s", color=CLEAN, ms=3, label="mean")
    log_ticks(axis, "y", [largest, mean, limit])
    axis.set(ylabel="bound")
    axis.set_xticks(at, names, rotation=90, fontsize=8 if len(names) > 24 else 9)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1)
    axis.grid(axis="y", color="#DDDDDD", lw=0.5)


def _scatter(axis: Any, numbers: Numbers, bounds: list[np.ndarray], tac: list[np.ndarray]) -> None:
    names, scored, u = numbers.meta["layers"], numbers.meta["scored"], numbers.meta["options"]["u"]
    seen: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for word, colour, size, out in (("channel", OTHER, 10, False), (f"above mean + {u:g} sd", POISONED, 26, True)):
        points = []
        for name, x, y in zip(names, bounds, tac, strict=True):
            if name in scored and np.isfinite(x).sum() > 1:
                high = x > np.nanmean(x) + u * np.nanstd(x, ddof=1)
                points.append(np.stack([x, y])[:, (high == out) & (x > 0) & (y > 0)])
        x, y = np.concatenate(points, 1) if points else np.zeros((2, 0))
        axis.scatter(x, y, s=size, color=colour, alpha=0.6, lw=0, label=f"{word} ({len(x)})", rasterized=True)
        for kept, values in zip(seen, (x, y), strict=True):
            kept.append(values)
    log_ticks(axis, "x", seen[0])
    log_ticks(axis, "y", seen[1])
    axis.set(xlabel="bound", ylabel="change by the trigger (L2 over space)")
    rho, inside = (numbers.summary.get(f"spearman_tac{end}", np.nan) for end in ("", "_within_layers"))
    kind = "paired BatchNorm" if numbers.meta["pairs"] else "convolution and linear"
    axis.set_title(f"{kind} channels\nSpearman {rho:.2f}, within layers {inside:.2f}", pad=40)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1, borderaxespad=0.1)
