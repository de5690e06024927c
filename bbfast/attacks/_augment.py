"""Random crop, rotation and flip of a normalised batch, after the poison was put in (spec/attacks 0.6)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bbfast.attacks.randomness import integers, make_key, uniform

__all__ = ["TensorAugment", "keep_layout", "rearrange"]


@dataclasses.dataclass(frozen=True)
class TensorAugment:
    """Augmentation of training-controlled attacks.

    In this order: with probability .8 a random crop from the zero-padded image; with probability .5 a rotation (nearest
    pixel, zero fill); with ``flip`` a horizontal flip with probability .5. Zero is the mean colour of a normalised
    image.

    Args:
        crop: Zero padding of the crop, in pixels; 0 switches it off.
        rotation: Largest angle in degrees, either way; 0 switches it off.
        flip: Whether to flip.
        per_sample: Draw for each sample (the marginal law is the same); False draws once a batch, as the reference
            does.
    """

    crop: int = 5
    rotation: float = 10.0
    flip: bool = False
    per_sample: bool = True
    p_crop: float = 0.8
    p_rotation: float = 0.5

    def __call__(self, x: Tensor, index: Tensor, *, seed: int, epoch: int, step: int) -> Tensor:
        """Augment a batch.

        Args:
            x: float ``[B, C, H, W]``, normalised.
            index: Sample numbers, int64 ``[B]``: with ``per_sample`` a draw depends on these, the seed and the epoch
                alone.
            seed: Seed of the run.
            epoch: Epoch number.
            step: Step within the epoch; one draw a batch depends on it.

        Returns:
            float ``[B, C, H, W]``, new memory, in the memory format of ``x``.
        """
        rows = index if self.per_sample else torch.full((1,), step, dtype=torch.int64, device=x.device)
        key = ("augment", seed, epoch)
        offset = integers(make_key(*key, "offset"), rows, (2,), -self.crop, self.crop)
        cropped = uniform(make_key(*key, "crop?"), rows) < self.p_crop
        angle = uniform(make_key(*key, "angle"), rows, (), -math.radians(self.rotation), math.radians(self.rotation))
        rotated = uniform(make_key(*key, "rotate?"), rows) < self.p_rotation
        flipped = (uniform(make_key(*key, "flip?"), rows) < 0.5) & self.flip
        return rearrange(x, offset * cropped[:, None], angle * rotated, flipped)


def rearrange(x: Tensor, offset: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """Crop, then rotate, then flip, in one gather.

    Nearest-pixel moves only pick pixels, so the three in a row are one lookup: the same values as one after the other,
    the pixels that a step fills with zeros included.

    Args:
        x: float ``[B, C, H, W]``.
        offset: Crop offset (down, right), int64 ``[B, 2]`` or ``[1, 2]`` for the whole batch.
        angle: Counter-clockwise rotation about the centre, radians, float ``[B]`` or ``[1]``.
        flip: Horizontal flip, bool ``[B]`` or ``[1]``.

    Returns:
        float ``[B, C, H, W]``, new memory, in the memory format of ``x``.
    """
    batch, channels, height, width = x.shape
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    rows = torch.arange(height, device=x.device)[None, :, None]
    columns = torch.arange(width, device=x.device)[None, None, :]
    columns = torch.where(flip[:, None, None], width - 1 - columns, columns)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    from_x = (cos * (columns - centre_x) - sin * (rows - centre_y) + centre_x).round().to(torch.int64)
    from_y = (sin * (columns - centre_x) + cos * (rows - centre_y) + centre_y).round().to(torch.int64)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    from_y, from_x = from_y + offset[:, 0, None, None], from_x + offset[:, 1, None, None]
    inside &= (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    source = torch.where(inside, from_y * width + from_x, 0).reshape(-1, 1, height * width)
    picked = x.reshape(batch, channels, -1).gather(2, source.expand(batch, channels, -1))
    out = (picked * inside.reshape(-1, 1, height * width)).reshape(batch, channels, height, width)
    return keep_layout(out, x)


def keep_layout(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the memory format of ``like``."""
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()
