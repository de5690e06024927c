"""A small U-Net from images to images: what defenses put in front of a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet", "depth_for"]


def depth_for(height: int, width: int, blocks: int) -> int:
    """How often images can be halved, ``blocks`` times at most, so that the smallest map has more than one position."""
    depth = 0
    while depth < blocks and min(height, width) >> (depth + 1) >= 2:
        depth += 1
    return depth


class _Block(nn.Module):
    """Two 3x3 convolutions, each with an instance norm and a leaky ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm1 = nn.InstanceNorm2d(outputs, affine=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)))
        return F.leaky_relu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Encoder, bottleneck and decoder with skip connections; no image of a batch touches another.

    Args:
        channels: Channels of the images.
        width: Channels of the first block, doubled by each one up to 512.
        depth: Number of encoder blocks, each followed by a 2x2 max-pooling.

    Source: Ronneberger, Fischer, Brox, MICCAI 2015, arXiv 1505.04597; instance norms and leaky ReLUs as in the
    generators of FeatureRE and BTI-DBF.
    """

    def __init__(self, channels: int = 3, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [min(width * 2**i, 512) for i in range(depth)]
        self.down = nn.ModuleList(
            _Block(before, after) for before, after in zip([channels, *widths], widths, strict=False)
        )
        last = widths[-1] if widths else channels
        inner = 2 * widths[-1] if widths else width
        self.bottom = _Block(last, inner)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for size in reversed(widths):
            self.up.append(nn.ConvTranspose2d(inner, size, 2, stride=2))
            self.merge.append(_Block(2 * size, size))
            inner = size
        self.out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape; the range is unbounded."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = up(x)
            # An odd side lost a row or column in the pooling.
            right, below = skip.shape[-1] - x.shape[-1], skip.shape[-2] - x.shape[-2]
            if right or below:
                x = F.pad(x, (0, right, 0, below), mode="replicate")
            x = merge(torch.cat([skip, x], dim=1))
        images: Tensor = self.out(x)
        return images
