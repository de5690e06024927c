"""Ink images: the edges of an image in one colour on white; and the moves that Poison Ink's networks learn to bear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast.attacks.randomness import make_key, uniform

__all__ = ["STAGES", "edge_mask", "fit_colour", "ink_image", "move_grids", "random_colours"]

STAGES = ("rot", "crop", "flip", "adv")
_LUMA = (0.299, 0.587, 0.114)
_ANGLE, _SHIFT, _KEPT = 45.0, 2.0, 28 / 32


def edge_mask(images: Tensor, threshold: float) -> Tensor:
    """Where an image has an edge: Sobel magnitude of its luminance above a threshold.

    ``sqrt((gx^2 + gy^2) / 2)`` with [1 2 1] / 4 across and [1 0 -1] along, the border repeated: a step of s levels
    gives 0.7 s.

    Args:
        images: float ``[B, C, H, W]``, 0..1, C = 1 or 3.
        threshold: In levels of 0..255.

    Returns:
        Like ``images`` but ``[B, 1, H, W]``, of zeros and ones, no gradient.
    """
    with torch.no_grad():
        if images.shape[1] == 1:
            grey = images * 255
        else:
            red, green, blue = images.split(1, dim=1)
            grey = 255 * (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)
        p = F.pad(grey, (1, 1, 1, 1), mode="replicate")
        down = (p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]) / 4
        across = (p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]) / 4
        gx, gy = down[..., 2:] - down[..., :-2], across[:, :, 2:] - across[:, :, :-2]
        return (((gx.square() + gy.square()) / 2).sqrt() > threshold).to(images.dtype)


def ink_image(images: Tensor, colour: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The edges in ``colour`` on white, and the mask of the edges.

    Args:
        images: float ``[B, C, H, W]``, 0..1.
        colour: ``[C]`` or ``[B, C]``, 0..255.
        threshold: See :func:`edge_mask`.

    Returns:
        Ink images ``[B, C, H, W]``, 0..1, and ``[B, 1, H, W]``; neither has a gradient.
    """
    mask = edge_mask(images, threshold)
    tint = (colour.to(images) / 255).view(-1, images.shape[1], 1, 1)
    return mask * tint + (1 - mask), mask


def fit_colour(colour: Sequence[float], channels: int) -> Tensor:
    """A colour of three parts for images of 1 (its luminance) or 3 channels, float32 ``[C]``, 0..255."""
    if channels == 1:
        return torch.tensor([sum(weight * part for weight, part in zip(_LUMA, colour, strict=True))])
    return torch.tensor(colour, dtype=torch.float32)


def random_colours(index: Tensor, channels: int, *key: int | str) -> Tensor:
    """A colour for each sample, every channel a whole number, uniform in 0..255; float32 ``[B, C]``."""
    return (uniform(make_key("ink colour", *key), index, (channels,)) * 256).floor()


def move_grids(index: Tensor, size: tuple[int, int], stage: str, *key: int | str) -> Tensor:
    """A random move for each sample as a field for :func:`bbfast.ops.warp`.

    From ``rot`` on: a rotation of up to 45 degrees and a crop from the image padded by 2 of 32 pixels; from ``crop``
    on, for half of the samples, a crop of 28 of 32 pixels enlarged to the whole; from ``flip`` on, for half of them, a
    horizontal flip. One resampling for all of it; what lies outside the image repeats its border, since a black corner
    would be an edge.

    Args:
        index: Sample numbers, int64 ``[B]``.
        size: ``(H, W)``.
        stage: One of :data:`STAGES`.
        *key: What the draws depend on besides the sample.

    Returns:
        float32 ``[B, H, W, 2]``, (x, y) within -1..1.
    """
    height, width = size
    draw = uniform(make_key("ink move", *key), index, (7,))
    # Half sides and moves in the units of one half side each: a shift of 2 of 32 pixels is 2 * 2 / 32.
    shift = (draw[:, 1:3] * 2 - 1) * (2 * _SHIFT / 32)
    cropped = (draw[:, 3] < 0.5) & (STAGES.index(stage) >= STAGES.index("crop"))
    flipped = (draw[:, 4] < 0.5) & (STAGES.index(stage) >= STAGES.index("flip"))
    offset = (draw[:, 5:7] * 2 - 1) * (1 - _KEPT) * cropped[:, None]
    scale = torch.where(cropped, _KEPT, 1.0)[:, None, None, None]
    x = torch.linspace(-1, 1, width, device=index.device).expand(height, width)
    y = torch.linspace(-1, 1, height, device=index.device)[:, None].expand(height, width)
    place = torch.stack([x, y], -1).expand(len(index), -1, -1, -1)
    mirror = torch.stack([1 - 2 * flipped.float(), torch.ones_like(draw[:, 0])], -1)
    place = place * mirror[:, None, None] * scale + (offset + shift)[:, None, None]
    angle = (draw[:, 0] * 2 - 1) * math.radians(_ANGLE)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    ratio = (height - 1) / max(width - 1, 1)  # a rotation is one of pixels, also in an oblong image
    turned_x = cos * place[..., 0] - sin * ratio * place[..., 1]
    turned_y = sin / ratio * place[..., 0] + cos * place[..., 1]
    return torch.stack([turned_x, turned_y], -1).clamp(-1, 1)
