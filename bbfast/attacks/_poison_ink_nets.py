"""Poison Ink's networks: injector, extractor, discriminator (spec/attacks section 11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Discriminator", "Extractor", "Injector", "InkNets"]


class Injector(nn.Module):
    """U-Net that draws an ink image into an image so that it is not seen.

    Args:
        channels: Channels of the images; it takes twice as many: image, then ink image.
        width: Channels of the first level.
    """

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        w = width
        self.first = _double(2 * channels, w, w)
        self.down = nn.ModuleList(
            [_double(w, 2 * w, 2 * w), _double(2 * w, 4 * w, 4 * w), _double(4 * w, 8 * w, 8 * w)]
        )
        self.down.append(_double(8 * w, 8 * w, 8 * w))
        plan = ((16 * w, 4 * w), (8 * w, 2 * w), (4 * w, w), (2 * w, w))
        self.up = nn.ModuleList([_double(inside, inside // 2, outside) for inside, outside in plan])
        self.pool = nn.MaxPool2d(2)
        self.enlarge = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.out = nn.Conv2d(w, channels, 1)

    def forward(self, both: Tensor) -> Tensor:
        """Images with ink ``[B, C, H, W]``, not clamped, of images and ink images ``[B, 2 C, H, W]`` in 0..1."""
        levels = [self.first(both)]
        for block in self.down:
            levels.append(block(self.pool(levels[-1])))
        x = levels.pop()
        for block in self.up:
            x = block(torch.cat([levels.pop(), self.enlarge(x)], 1))
        drawn: Tensor = self.out(x)
        return drawn if drawn.dtype == torch.float64 else drawn.float()


class Extractor(nn.Module):
    """Reads the ink image back; used in training only.

    Args:
        channels: Channels of the images.
        width: Channels of its layers.
    """

    def __init__(self, channels: int = 3, width: int = 128) -> None:
        super().__init__()
        w = width
        last = nn.Conv2d(w, channels, 1)
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(channels, w, 3, padding=1), w),
            *_normed(nn.Conv2d(w, w, 3, padding=1), w),
            *_normed(nn.Conv2d(w, w, 3, stride=2, padding=1), w),
            *(_Residual(w, dilation) for dilation in (2, 2, 2, 4, 4, 4, 1)),
            *_normed(nn.ConvTranspose2d(w, w, 4, stride=2, padding=1), w),
            *_normed(nn.Conv2d(w, w, 3, padding=1), w),
            last,
            nn.ReLU(),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0, 0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        # White paper to begin with. From black, the large error on clean images fills Adam's second moments, which then
        # hold the learning back for a thousand steps.
        assert last.bias is not None
        nn.init.ones_(last.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Ink images ``[B, C, H, W]`` of images in 0..1; white (1) where there is no ink."""
        ink: Tensor = self.layers(images)
        return ink.float()


class Discriminator(nn.Module):
    """Tells images with ink from images without, patch by patch; for the stage ``adv``.

    Args:
        channels: Channels of the images.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inside in (64, 128, 256):
            layers.append(nn.Conv2d(inside, 2 * inside, 3, stride=2, padding=1))
            layers += [nn.InstanceNorm2d(2 * inside), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Scores, ``[B, 1, h, w]``."""
        scores: Tensor = self.layers(images)
        return scores


class InkNets(nn.Module):
    """Injector and extractor, trained together."""

    def __init__(self, injector: Injector, extractor: Extractor) -> None:
        super().__init__()
        self.injector, self.extractor = injector, extractor


class _Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        second = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.layers = nn.Sequential(*_normed(first, width), second, nn.InstanceNorm2d(width, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.layers(x))


def _double(inside: int, middle: int, outside: int) -> nn.Sequential:
    def one(a: int, b: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()

    return nn.Sequential(*one(inside, middle), *one(middle, outside))


def _normed(conv: nn.Module, width: int) -> tuple[nn.Module, ...]:
    return conv, nn.InstanceNorm2d(width, affine=True), nn.ReLU()
