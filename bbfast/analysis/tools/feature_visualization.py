"""Feature visualisation: the image that excites a channel most; does the trigger appear?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bbfast.analysis._layers import by_channel, finite
from bbfast.analysis._named import usable_layer
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import figure
from bbfast.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FeatureVisualization", "paint", "transform"]

_ACROSS, _DRAWN = 16, 64
_SHIFT, _TURN, _SCALE = 2, 5.0, 0.05


def paint(spectrum: Tensor, height: int, width: int) -> Tensor:
    """Images 0..1 from half spectra: ``sigmoid(irfft2(P / max(f, 1 / max(H, W))))``, ``f`` in cycles a pixel.

    Args:
        spectrum: Real and imaginary parts, float32 ``[n, C, H, W // 2 + 1, 2]``.
        height, width: Of the images.
    """
    rows = torch.fft.fftfreq(height, device=spectrum.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=spectrum.device)[None, :]
    scale = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    return torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(height, width), norm="ortho").sigmoid()


def transform(images: Tensor, move: Tensor) -> Tensor:
    """Turn, scale and shift all images by the same little: ``move`` is (degrees, factor, right, down), in pixels."""
    angle, factor, right, down = (float(value) for value in move)
    cosine, sine = (f(math.radians(angle)) / factor for f in (math.cos, math.sin))
    height, width = images.shape[2:]
    matrix = torch.tensor(
        [
            [cosine, -sine * height / width, 2 * right / width],
            [sine * width / height, cosine, 2 * down / height],
        ],
        device=images.device,
    )
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


@register_tool("feature_visualization")
class FeatureVisualization(Tool):
    """For each channel of a layer the image that excites it most, found without data.

    ``max mean act_j - l1 mean |x - 1/2| - l2 mean (x - 1/2)^2 - tv TV(x)`` by Adam over the image's Fourier spectrum;
    each step sees the images turned by up to 5 degrees, scaled by up to 5 % and shifted by up to 2 pixels, the same for
    all of them. An image depends on its channel and the seed alone, not on those it is optimised with. Channels are
    shown by trigger activation change, largest first. Weaker regularisers (``l1=0.02, tv=0.02``) show small triggers
    better. ``steps`` gradients for every channel: seconds on a GPU, on a CPU name few ``channels``.

    Arrays: ``img`` u8 ``[R, H, W, C]``, ``channel`` i32, ``act``, ``noise``, ``most`` (largest on clean test images),
    ``change`` (mean absolute change of the channel by the trigger) f32, all ``[R]``, in the order of ``change``.
    Table: one row for each channel; ``ratio`` is ``act / most``.

    Source: Olah, Mordvintsev and Schubert, Feature Visualization, Distill 2017.
    """

    card = ToolCard(
        title="Feature visualisation",
        question="What does each channel look for, and is it the trigger?",
        paper="C. Olah et al., Feature Visualization, Distill 2017",
        deviations=(
            "All channels are optimised at once in batches; BackdoorBench goes through omniXAI one by one.",
            "The training augmentation is replaced by small turns, shifts and scalings, so that triggers of a few "
            "pixels are not lost.",
            "Channels come in the order of what the trigger changes; BackdoorBench's come in the layer's.",
        ),
    )

    class Config(ToolConfig):
        """Settings of the feature visualisation.

        Args:
            layer: Name or role of a convolution, a norm over maps, or a linear layer.
            steps: Of Adam.
            lr: Its learning rate.
            l1, l2, tv: Weights of distance from grey, its square, and total variation.
            batch: Channels at a time.
            channels: How many, those that the trigger changes most; None takes all.
            n_stat: Test images that the channels are measured on.
        """

        layer: str = "last_conv"
        steps: int = Field(300, ge=1)
        lr: float = Field(0.05, gt=0)
        l1: float = Field(0.15, ge=0)
        l2: float = Field(0.0, ge=0)
        tv: float = Field(0.25, ge=0)
        batch: int = Field(128, ge=1)
        channels: int | None = Field(None, ge=1)
        n_stat: int = Field(2000, ge=1)

    def check(self, subject: Subject) -> None:
        usable_layer(subject, self.name, self.config.layer, _channels)
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        config = self.config
        name, module = subject.layer(config.layer)
        clean = self._activations(subject, name, module, subject.view("clean_test", config.n_stat).images)
        pairs = subject.pairs(config.n_stat)
        both = [self._activations(subject, name, module, images) for images in (pairs.triggered, pairs.clean)]
        change = (both[0] - both[1]).abs().mean(0)
        order = change.argsort(descending=True, stable=True)[: config.channels]
        channels, height, width = subject.image_size
        total = len(change)
        # Drawn for all channels, so that an image is the same whichever others are asked for.
        start = (
            torch.randn((total, channels, height, width // 2 + 1, 2), generator=subject.generator("spectrum"))[order]
            * 0.01
        )
        moves = torch.rand((config.steps, 4), generator=subject.generator("moves")) * 2 - 1
        moves = moves * torch.tensor([_TURN, _SCALE, _SHIFT, _SHIFT]) + torch.tensor([0, 1, 0, 0])
        images, reached, noise = [], [], []
        for rows in torch.arange(len(order)).split(config.batch):
            found, value, first = self._ascend(subject, name, module, order[rows], start[rows], moves)
            images.append(found)
            reached.append(value)
            noise.append(first)
        act, before, most = torch.cat(reached).numpy(), torch.cat(noise).numpy(), clean.amax(0)[order].numpy()
        ratio = np.divide(act, most, out=np.full_like(act, np.nan), where=most > 0)
        changes = change[order].numpy()
        table = [
            {"channel": int(c), "change": float(d), "act": float(a), "most_on_clean": float(m), "ratio": float(r)}
            for c, d, a, m, r in zip(order.tolist(), changes, act, most, ratio, strict=True)
        ]
        pictures = (torch.cat(images).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        arrays = {"img": pictures, "channel": order.numpy().astype(np.int32), "act": act, "noise": before}
        arrays |= {"most": most, "change": changes}
        live = ratio[np.isfinite(ratio)]
        summary: dict[str, Any] = {
            "median_ratio": float(np.median(live)) if live.size else None,
            "first_channel": int(order[0]),
            "raised": float((act > before).mean()),
        }
        return Numbers(arrays, table, summary, {"layer": name, "steps": config.steps, "of": total})

    def _activations(self, subject: Subject, name: str, module: nn.Module, images: Tensor) -> Tensor:
        """Mean of every channel, float32 ``[n, R]`` on the CPU."""
        parts: list[Tensor] = []
        with subject.watching({name: lambda out: parts.append(_means(module, finite(name, self.name, out)).cpu())}):
            subject.logits(images)
        return torch.cat(parts)

    def _ascend(
        self, subject: Subject, name: str, module: nn.Module, channels: Tensor, start: Tensor, moves: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images float32 ``[n, C, H, W]`` 0..1, their channel's activation, and that of the images before."""
        config, device = self.config, subject.device
        spectrum = start.to(device).requires_grad_()
        optimizer = torch.optim.Adam([spectrum], config.lr)
        height, width = start.shape[2], subject.image_size[2]
        data = subject.attack.config["data"]
        mean, std = (torch.tensor(data[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
        rows, which = torch.arange(len(channels), device=device), channels.to(device)
        seen: list[Tensor] = []

        def excited(images: Tensor) -> Tensor:
            seen.clear()
            subject.model((images - mean) / std)
            return _means(module, seen[0])[rows, which]

        with subject.watching({name: seen.append}), torch.enable_grad():
            before = excited(paint(spectrum, height, width)).detach()
            for move in moves:
                images = paint(spectrum, height, width)
                grey = (images - 0.5).flatten(1)
                across, down = (images.diff(dim=d).abs().flatten(1).mean(1) for d in (2, 3))
                cost = config.l1 * grey.abs().mean(1) + config.l2 * grey.square().mean(1) + config.tv * (across + down)
                # A sum: what one image does is no concern of the others.
                loss = (cost - excited(transform(images, move))).sum()
                (spectrum.grad,) = torch.autograd.grad(loss, spectrum)
                optimizer.step()
            images = paint(spectrum, height, width).detach()
            after = finite(name, self.name, excited(images).detach())
        return images.cpu(), after.float().cpu(), before.float().cpu()

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        arrays, meta = numbers.arrays, numbers.meta
        count = min(len(arrays["img"]), _DRAWN)
        across = min(_ACROSS, max(4, math.ceil(math.sqrt(2 * count))))
        down = -(-count // across)
        note = (
            f"{meta['caption']}; {meta['layer']}, {count} of {meta['of']} channels, {meta['steps']} steps; by what the "
        )
        words = f"{note}trigger changes, most first; below each number: activation over the largest on clean images"
        with figure(max(0.78 * across, 6.4), 1.08 * down + 0.9, words) as made:
            axes = made.subplots(down, across, squeeze=False).ravel()
            for axis in axes[count:]:
                axis.axis("off")
            for i, axis in enumerate(axes[:count]):
                image = arrays["img"][i]
                axis.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
                most = float(arrays["most"][i])
                ratio = f"{float(arrays['act'][i]) / most:.1f}x" if most > 0 else "dead"
                axis.set_title(f"{int(arrays['channel'][i])}\n{ratio}", fontsize=8, pad=2)
                axis.set(xticks=[], yticks=[])
        return made


def _means(layer: nn.Module, out: Tensor) -> Tensor:
    """Mean of every channel over space or tokens, ``[n, R]``."""
    return by_channel(layer, out).mean(2)


def _channels(layer: nn.Module, shape: tuple[int, ...]) -> str:
    fits = isinstance(layer, nn.Linear) or len(shape) == 4
    return "" if fits else f"what it puts out, {list(shape)}, has no channels of maps"
