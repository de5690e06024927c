"""Small steps that the optimised attacks share: images in 0..1 on a device, and seeded choices of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.attacks.randomness import make_key
from bbfast.data.imageset import ImageSet

__all__ = ["class_sample", "draw_rows", "unit_images"]


def unit_images(images: Tensor, device: torch.device) -> Tensor:
    """uint8 ``[B, C, H, W]`` as float32 in 0..1 on ``device``."""
    return images.to(device).float() / 255


def draw_rows(total: int, count: int, *purpose: str | int) -> Tensor:
    """At most ``count`` of ``0..total-1`` in random order, the same for the same purpose (a text and seeds); int64."""
    generator = torch.Generator().manual_seed(make_key(*purpose))
    return torch.randperm(total, generator=generator)[:count]


def class_sample(data: ImageSet, num_classes: int, per_class: int, seed: int) -> ImageSet:
    """Up to ``per_class`` images of each class."""
    order = draw_rows(len(data), len(data), "class sample", seed)
    labels = data.labels.cpu()[order]
    return data.subset(torch.cat([order[labels == k][:per_class] for k in range(num_classes)]))
