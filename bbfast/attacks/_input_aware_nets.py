"""The pattern and mask networks of Input-Aware (Nguyen and Tran, arXiv 2010.08138, appendix A)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Generator", "blend_in", "distance", "threshold", "widths_for"]


class Generator(nn.Module):
    """Encoder and decoder without skips: an image of values in 0.12..0.88 (one tanh: 0..1) from a normalised image.

    For each width two convolutions and a max-pooling; one convolution; then, in reverse, bilinear enlargement and two
    convolutions, the second of which narrows. Every convolution is 3 x 3 and followed by BatchNorm and, but for the
    last, ReLU. Sides that pooling cannot halve evenly are enlarged to what they were.

    Args:
        channels: Channels of the images.
        outputs: Channels of the result.
        widths: Channels of each level.
        double_tanh: Squash twice before the shift to 0..1, as the reference does; the paper squashes once.
    """

    def __init__(self, channels: int, outputs: int, widths: tuple[int, ...], double_tanh: bool = True) -> None:
        super().__init__()
        self.double_tanh = double_tanh
        before = (channels, *widths[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(*_unit(c, w), *_unit(w, w)) for c, w in zip(before, widths, strict=True)
        )
        self.middle = nn.Sequential(*_unit(widths[-1], widths[-1]))
        after = (*reversed(widths[:-1]), outputs)
        last = len(widths) - 1
        self.up = nn.ModuleList(
            nn.Sequential(*_unit(w, w), *_unit(w, narrow, relu=i < last))
            for i, (w, narrow) in enumerate(zip(reversed(widths), after, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for level in self.down:
            x = level(x)
            sizes.append(x.shape[-2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for level, size in zip(self.up, reversed(sizes), strict=True):
            x = level(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
        x = x.float().tanh()
        return _to_unit(x.tanh() if self.double_tanh else x)


def widths_for(channels: int) -> tuple[int, ...]:
    """Three levels for colour images, two narrow ones for grey ones (the authors' MNIST networks)."""
    return (16, 32) if channels == 1 else (32, 64, 128)


def threshold(mask: Tensor) -> Tensor:
    """Drive a mask network's output to 0 or 1: ``tanh(20 m - 10) / 2 + 0.5``."""
    return _to_unit((20 * mask - 10).tanh())


def blend_in(x: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """``x + (pattern - x) * mask``, ``[B, C, H, W]`` and mask ``[B, 1, H, W]``."""
    return x + (pattern - x) * mask


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Root of the mean squared difference of each pair, ``[B]``; without gradient where it vanishes."""
    return (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(1e-12).sqrt()


def _to_unit(x: Tensor) -> Tensor:
    # The summand is the authors'; it keeps the result off 0 and 1.
    return x / (2 + 1e-7) + 0.5


def _unit(channels: int, outputs: int, relu: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05)]
    return [*layers, nn.ReLU()] if relu else layers
