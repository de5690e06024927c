"""The generators of LIRA (Doan et al., ICCV 2021): an autoencoder and a U-Net, outputs in -1..1."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Autoencoder", "UNet"]


class Autoencoder(nn.Module):
    """Four strided convolutions (16, 32, 64, 128 channels) and four transposed ones, 4 x 4; any side from 16 on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64, 128)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        for before, after in zip(widths[:1:-1], widths[-2:0:-1], strict=True):
            up += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(widths[1], channels, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for layer in self.encoder:
            if isinstance(layer, nn.Conv2d):
                sizes.append(x.shape[-2:])
            x = layer(x)
        for layer in self.decoder:
            # The size resolves what an odd side leaves open: both 14 and 15 are halved to 7.
            x = layer(x, output_size=sizes.pop()) if isinstance(layer, nn.ConvTranspose2d) else layer(x)
        return x.float().tanh()


class UNet(nn.Module):
    """Double convolutions (64, 128, 256, 512 channels), average pooling, bilinear enlargement with skips."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        before = (channels, *widths[:-1])
        self.down = nn.ModuleList(_double(c, w) for c, w in zip(before, widths, strict=True))
        self.up = nn.ModuleList(_double(w + deep, w) for w, deep in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.last = nn.Sequential(nn.Conv2d(widths[0], channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.avg_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for level in self.up:
            skip = kept.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
            x = level(torch.cat([x, skip], 1))
        return self.last(x).float().tanh()


def _double(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )
