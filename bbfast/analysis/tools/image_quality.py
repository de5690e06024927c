"""Image quality: how visible the trigger is, image by image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast import metrics, ops
from bbfast.analysis._layers import finite
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import OTHER, POISONED, figure
from bbfast.analysis.subject import Pairs, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImageQuality", "ImageQualityConfig", "distances", "frechet"]

_WINDOW = 11
"""Side of SSIM's window: smaller images have none."""
_PART = 1024


class ImageQualityConfig(ToolConfig):
    """Settings of image quality.

    Args:
        n: Triggered test images; all if there are fewer.
        shown: Pairs in the figure.
        amplify: Factor of the differences that are shown.
        frechet: ``model`` adds the Frechet distance between the two sets in what the model's classifier sees. That is
            not FID, whose network is a download, and a backdoored model's features move because of the backdoor.
        border: Of SSIM: ``reflect`` has a window at every pixel; ``valid`` counts those that lie in the image, which
            hardly see a trigger in a corner.
    """

    n: int = Field(5000, ge=1)
    shown: int = Field(4, ge=1, le=8)
    amplify: float = Field(5.0, gt=0)
    frechet: Literal["off", "model"] = "off"
    border: Literal["reflect", "valid"] = "reflect"


def distances(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """How far apart the images of each pair are, from whole numbers, so without rounding before the end.

    Args:
        a: uint8 ``[n, C, H, W]``.
        b: Likewise.

    Returns:
        float64 ``[n]`` each, of values in 0..1: ``mse``; ``l0``, pixels with a changed channel; ``l1``; ``l2``;
        ``linf``.
    """
    parts: list[dict[str, Tensor]] = []
    for x, y in zip(a.split(_PART), b.split(_PART), strict=True):
        gap = (x.int() - y.int()).abs()
        squares = gap.square().sum((1, 2, 3)).double() / 255**2
        parts.append(
            {
                "mse": squares / math.prod(a.shape[1:]),
                "l0": gap.any(1).sum((1, 2)).double(),
                "l1": gap.sum((1, 2, 3)).double() / 255,
                "l2": squares.sqrt(),
                "linf": gap.amax((1, 2, 3)).double() / 255,
            }
        )
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two clouds: ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, in float64.

    The last trace is the sum of the roots of the eigenvalues of the symmetric ``C1^(1/2) C2 C1^(1/2)``.

    Args:
        a: Features ``[n, D]``.
        b: Features ``[m, D]``.
    """
    both, which = torch.cat([a, b]), torch.tensor([0, 1]).repeat_interleave(torch.tensor([len(a), len(b)]))
    moments = ops.class_moments(both, which.to(both.device), 2)
    first, second = (moments.scatter / (moments.count - 1).clamp(min=1)[:, None, None]).cpu()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    gap = (moments.mean[0] - moments.mean[1]).square().sum().cpu()
    return float((gap + first.trace() + second.trace() - 2 * cross).clamp(min=0))


@register_tool("image_quality")
class ImageQuality(Tool):
    """PSNR, SSIM and the norms of what the trigger changes, for test images with and without it.

    The pixels are the stored ones, never normalised and denormalised again. PSNR is ``10 log10(1 / MSE)`` dB for pixels
    in 0..1: infinite for an image that the trigger leaves alone, so means are over the changed ones, whose share is
    said, and the PSNR of the mean MSE over all stands beside. SSIM has an 11 x 11 Gaussian window (sigma 1.5) at
    every pixel, the image mirrored at its edges.

    Arrays (n pairs): ``id`` int64, ``mse``, ``psnr``, ``ssim``, ``l0``, ``l1``, ``l2``, ``linf`` float32 ``[n]``;
    ``shown_clean``, ``shown_bd`` uint8 ``[s, C, H, W]``. Table: mean, deviation and quantiles of each.

    Source: Wang et al., IEEE Transactions on Image Processing 13(4), 2004 (SSIM); Heusel et al., NeurIPS 2017 (the
    distance).
    """

    card = ToolCard(
        title="Image quality",
        question="How visible is the trigger?",
        paper="Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13(4), 2004",
        deviations=(
            "Only triggered images count, each against its own original; BackdoorBench takes as many images from the "
            "front of the set, clean ones among them.",
            "Values come from bytes with a data range of 1; BackdoorBench takes the range from the data.",
            "FID and LPIPS are left out, as their networks are downloads.",
            "SSIM is missing (NaN) for images smaller than its window.",
        ),
        quick=True,
    )
    Config = ImageQualityConfig

    def check(self, subject: Subject) -> None:
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        config: ImageQualityConfig = self.config
        pairs = subject.pairs(config.n)
        found = distances(pairs.clean, pairs.triggered)
        found["psnr"] = metrics.psnr(pairs.clean, pairs.triggered)
        small = min(pairs.clean.shape[-2:]) < _WINDOW
        missing = torch.full_like(found["mse"], torch.nan)
        found["ssim"] = missing if small else metrics.ssim(pairs.clean, pairs.triggered, border=config.border)
        changed = found["l0"] > 0
        table = [_row(key, found[key][changed].numpy()) for key in ("psnr", "ssim", "mse", "l0", "l1", "l2", "linf")]
        error = float(found["mse"].mean())
        summary = {str(row["metric"]): row["mean"] for row in table}
        summary["psnr_of_mean_mse"] = -10 * math.log10(error) if error else math.inf
        summary["unchanged"] = float((~changed).double().mean())
        if config.frechet == "model":
            summary["fd_model"] = _distance(subject, pairs)
        some = torch.randperm(len(pairs), generator=subject.generator("shown"))[: config.shown].sort().values
        arrays = {key: value.float().numpy() for key, value in found.items()}
        return Numbers(
            arrays={
                "id": pairs.ids.numpy(),
                **arrays,
                "shown_clean": pairs.clean[some].numpy(),
                "shown_bd": pairs.triggered[some].numpy(),
            },
            table=table,
            summary=summary,
            meta={"n": len(pairs), "changed": int(changed.sum())},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        clean, bad = (numbers.arrays[key].astype(int) for key in ("shown_clean", "shown_bd"))
        amplify, count = numbers.meta["options"]["amplify"], len(clean)
        with figure(3.4 + 1.15 * max(count, 3), 4.4, numbers.meta["caption"]) as made:
            halves: Any = made.subfigures(1, 2, width_ratios=(3.2, 1.15 * max(count, 3)))
            left, right = halves
            changed = numbers.arrays["l0"] > 0
            axes = left.subplots(1, 2)
            for axis, key, label in zip(axes, ("psnr", "ssim"), ("PSNR (dB)", "SSIM"), strict=True):
                _violin(axis, numbers.arrays[key][changed].astype(float), label)
            left.suptitle(f"{numbers.meta['changed']} changed of {numbers.meta['n']} triggered images", fontsize=10)
            grid = right.subplots(3, count, squeeze=False)
            rows = (clean, bad, np.clip(127.5 + amplify * (bad - clean), 0, 255))
            for i, (images, word) in enumerate(
                zip(rows, ("clean", "triggered", f"{amplify:g} x difference"), strict=True)
            ):
                for axis, image in zip(grid[i], images, strict=True):
                    picture = image.astype(np.uint8).transpose(1, 2, 0)
                    grey = picture.shape[2] == 1
                    axis.imshow(picture[..., 0] if grey else picture, cmap="gray", vmin=0, vmax=255)
                    axis.set(xticks=[], yticks=[])
                    axis.spines[:].set_visible(True)
                grid[i][0].set_ylabel(word)
        return made


def _row(key: str, values: np.ndarray) -> dict[str, Any]:
    stats = [float("nan")] * 7
    if len(values):
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        stats = [float(values.mean()), spread, *map(float, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))]
    return {"metric": key, **dict(zip(("mean", "sd", "min", "q25", "median", "q75", "max"), stats, strict=True))}


def _distance(subject: Subject, pairs: Pairs) -> float:
    from bbfast.models import features

    with torch.no_grad():
        sets = [
            torch.cat([features(subject.model, x, "penultimate").flatten(1) for x in subject.batches(images)])
            for images in (pairs.clean, pairs.triggered)
        ]
    for values in sets:
        finite("penultimate", "image_quality", values)
    return frechet(*sets)


def _violin(axis: Any, values: np.ndarray, label: str) -> None:
    values = values[np.isfinite(values)]
    axis.set(ylabel=label, xticks=[], xlim=(0.5, 1.5))
    if not len(values):
        axis.text(1, 0.5, "none", ha="center")
        return
    if np.ptp(values) > 0:
        for body in axis.violinplot(values, widths=0.8, showextrema=False)["bodies"]:
            body.set(facecolor=POISONED, edgecolor=POISONED, alpha=0.35)
    style = {"color": "#333333"}
    axis.boxplot(
        values,
        widths=0.25,
        medianprops={"color": POISONED, "lw": 2},
        boxprops=style,
        flierprops={"marker": ".", "ms": 3},
    )
    axis.set_xticks([])
    axis.set_xlabel(f"median {np.median(values):.4g}", color="#333333")
    axis.grid(axis="y", color=OTHER, alpha=0.3, lw=0.5)
