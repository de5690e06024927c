"""Frequency saliency: which frequencies of an image decide on its class, without and with the trigger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bbfast import ops
from bbfast.analysis._attribution import SIDES, picture, shown, top_gradient
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, POISONED, figure
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FrequencySaliency", "amplitude", "rings"]

FLOOR = 1e-12


def amplitude(gradient: Tensor) -> Tensor:
    """``|ifft2(g)|``: how strongly the logit answers to each frequency, float32 ``[n, C, H, W]``, not shifted.

    For a real gradient this is ``|dz/dX|`` of the image's Fourier coefficients ``X`` up to a constant, and symmetric
    under ``(u, v) -> (-u, -v)``.
    """
    return torch.fft.ifft2(gradient.float()).abs()


def rings(height: int, width: int) -> np.ndarray:
    """Distance of every frequency from zero in cycles an image, float64 ``[H, W]``, zero in the centre."""
    rows, columns = (np.fft.fftshift(np.fft.fftfreq(n) * n) for n in (height, width))
    return np.hypot(rows[:, None], columns[None, :])


@register_tool("frequency_saliency")
class FrequencySaliency(Tool):
    """Which frequencies decide: the gradient of the largest logit, seen by frequency.

    ``g = d max_c z_c / dx`` for normalised pixels; ``|ifft2(g)|``, zero frequency in the centre. Statistics are of the
    amplitudes as they are; the maps shown of single images go from their least to their most. ``dct_*`` are the
    amplitudes of ``dct2(g)``, what a raised DCT coefficient does to the logit, for triggers that are planted there: the
    summary's ``dct_row``, ``dct_column`` is where the trigger raises them most.

    Arrays: ``map_clean``, ``map_bd`` f32 ``[H, W]``: mean of ``log10`` amplitudes over pairs and channels, zero
    frequency at ``[H // 2, W // 2]``; ``radial`` f32 ``[2, R]``: mean amplitude on rings of 0..R-1 cycles an image;
    ``dct_clean``, ``dct_bd`` f32 ``[H, W]``: mean ``|dct2(g)|``; ``fsm_clean``, ``fsm_bd`` f16 ``[shown, H, W]``, 0..1;
    ``id``, ``label``, ``pred_*``, ``prob_*``, ``image_*`` of the pairs shown. Table: ring, its mean amplitudes.

    Source: BackdoorBench's perspective "frequency saliency map", arXiv 2206.12654v2, section on trigger frequencies.
    """

    card = ToolCard(
        title="Frequency saliency map",
        question="Which frequencies of an image decide on its class, and does the trigger shift them?",
        deviations=(
            "Amplitudes are floored at 1e-12 before the logarithm; BackdoorBench takes that of zeros, which is minus "
            "infinity where a gradient vanishes.",
            "Statistics come from unscaled maps of 500 pairs of the same images; BackdoorBench scales and shows four.",
            "The model and the images are left as they are; BackdoorBench freezes the one and reshapes the others.",
            "The share of the DCT coefficients is measured besides that of the Fourier coefficients.",
        ),
        quick=True,
    )

    class Config(ToolConfig):
        """Settings of the frequency saliency map.

        Args:
            shown: Pairs in the figure.
            n_stat: Pairs that are measured.
        """

        shown: int = Field(4, ge=1, le=16)
        n_stat: int = Field(500, ge=1)

    def check(self, subject: Subject) -> None:
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        few, arrays = shown(subject, self.config.shown)
        pairs = subject.pairs(self.config.n_stat)
        height, width = few.clean.shape[2:]
        radius = rings(height, width)
        ring = np.rint(radius).astype(int)
        inside = ring <= min(height, width) // 2
        profiles, high = [], {}
        for side, images, many in zip(SIDES, (few.clean, few.triggered), (pairs.clean, pairs.triggered), strict=True):
            gradient = torch.cat(top_gradient(subject, images, _keep))
            arrays[f"fsm_{side}"] = _scaled(_logs(amplitude(gradient))).numpy().astype(np.float16)
            sums = _sums(subject, many)
            logs, plain, energy, cosine = (value.numpy() / len(many) for value in sums)
            arrays |= {f"map_{side}": logs.astype(np.float32), f"dct_{side}": cosine.astype(np.float32)}
            total = np.bincount(ring[inside], plain[inside])
            profiles.append(total / np.bincount(ring[inside]))
            high[side] = float(energy[radius > min(height, width) / 4].sum() / max(energy.sum(), FLOOR))
        arrays["radial"] = np.stack(profiles).astype(np.float32)
        change = arrays["dct_bd"] - arrays["dct_clean"]
        row, column = np.unravel_index(change.argmax(), change.shape)
        return Numbers(
            arrays,
            table=[
                {"cycles_per_image": i, "clean": float(clean), "triggered": float(bad)}
                for i, (clean, bad) in enumerate(zip(*profiles, strict=True))
            ],
            summary={
                "high_frequency_share_clean": high["clean"],
                "high_frequency_share_bd": high["bd"],
                "js_distance": _js(*profiles),
                "dct_row": int(row),
                "dct_column": int(column),
                "dct_change": float(change.max()),
            },
            meta={"pairs": len(pairs), "radius": "cycles per image"},
        )

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        arrays, count = numbers.arrays, numbers.meta["pairs"]
        rows = len(arrays["id"])
        height, width = arrays["map_clean"].shape
        extent = (-(width // 2) - 0.5, (width + 1) // 2 - 0.5, (height + 1) // 2 - 0.5, -(height // 2) - 0.5)
        note = f"{numbers.meta['caption']}; maps: frequencies in cycles per image, zero in the centre; means of {count}"
        with figure(8.2, 1.8 * rows + 3.4, f"{note} pairs") as made:
            top, below = made.subfigures(2, 1, squeeze=False, height_ratios=[1.8 * rows, 2.9])[:, 0]
            axes = top.subplots(rows, 4, squeeze=False)
            for row in range(rows):
                for column, side in enumerate(SIDES):
                    picture(axes[row, 2 * column], numbers, row, side)
                    axis = axes[row, 2 * column + 1]
                    values = arrays[f"fsm_{side}"][row].astype(float)
                    shown_map = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, extent=extent)
                    axis.set_title("with trigger" if side == "bd" else "without trigger")
                    axis.set(xticks=[-(width // 2), 0], yticks=[-(height // 2), 0])
            top.colorbar(shown_map, ax=axes, label="log amplitude, least to most of each image", shrink=0.7)
            left, middle, right = below.subplots(1, 3)
            change = arrays["map_bd"] - arrays["map_clean"]
            most = max(float(np.abs(change).max()), 1e-6)
            drawn = left.imshow(change, cmap="coolwarm", vmin=-most, vmax=most, extent=extent)
            left.set(title="change by the trigger", xlabel="cycles per image", ylabel="cycles per image")
            below.colorbar(drawn, ax=left, label="log10 ratio", shrink=0.8)
            # Not a ratio: where the clean gradient is next to nothing, a ratio is large for nothing.
            change = arrays["dct_bd"] - arrays["dct_clean"]
            most = max(float(np.abs(change).max()), 1e-12)
            drawn = middle.imshow(change, cmap="coolwarm", vmin=-most, vmax=most)
            place = numbers.summary["dct_row"], numbers.summary["dct_column"]
            middle.plot(place[1], place[0], "o", mfc="none", mec="k", ms=9, clip_on=False)
            middle.set(title=f"DCT: most at {place}", xlabel="DCT column", ylabel="DCT row")
            below.colorbar(drawn, ax=middle, label="logit per coefficient", shrink=0.8)
            cycles = np.arange(arrays["radial"].shape[1])
            for values, colour, words, line in zip(
                arrays["radial"], (CLEAN, POISONED), ("without trigger", "with trigger"), ("-", "--"), strict=True
            ):
                right.semilogy(cycles, np.maximum(values, FLOOR), line, color=colour, label=words)
            right.axvline(min(height, width) / 4, color="#BBBBBB", lw=0.8, ls=":")
            right.set(title="by distance from zero", xlabel="cycles per image", ylabel="mean amplitude")
            right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.12), borderaxespad=0.1)
        return made


def _keep(gradient: Tensor) -> Tensor:
    return gradient.detach().cpu()


def _logs(values: Tensor) -> Tensor:
    """Mean over channels of ``log10``, zero frequency in the centre: ``[n, H, W]``."""
    return torch.fft.fftshift(values.clamp_min(FLOOR).log10().mean(1), dim=(-2, -1))


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(FLOOR)


def _sums(subject: Subject, images: Tensor) -> list[Tensor]:
    """Sums over images of log amplitude, amplitude, its square, and DCT amplitude: float64 ``[H, W]`` each."""

    def step(gradient: Tensor) -> list[Any]:
        found = amplitude(gradient)
        middle = torch.fft.fftshift(found, dim=(-2, -1))
        parts = [_logs(found), middle.mean(1), middle.square().mean(1), ops.dct2(gradient).abs().mean(1)]
        return [part.double().sum(0).cpu() for part in parts]

    return [torch.stack(part).sum(0) for part in zip(*top_gradient(subject, images, step), strict=True)]


def _js(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon distance of two profiles as distributions, base 2, 0..1."""
    if first.sum() <= 0 or second.sum() <= 0:
        return float("nan")
    p, q = first / first.sum(), second / second.sum()
    middle = (p + q) / 2
    parts = [(a[a > 0] * np.log2(a[a > 0] / middle[a > 0])).sum() / 2 for a in (p, q)]
    return float(np.sqrt(max(sum(parts), 0.0)))
