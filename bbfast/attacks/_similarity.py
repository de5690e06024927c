"""How alike two images look: SSIM, and the image loss of SSBA's own paper where LPIPS weights are not to be had."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["perceptual_distance", "ssim"]

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, float ``[N]``.

    Args:
        images: float ``[N, C, H, W]``, 0..1, H and W at least 11.
        others: Like ``images``.

    Source: Wang et al. 2004, Gaussian window of 11 x 11 with sigma 1.5, mean over the places where it fits.
    """
    channels = images.shape[1]
    offset = torch.arange(_WINDOW, device=images.device, dtype=images.dtype) - _WINDOW // 2
    line = torch.exp(-offset.square() / (2 * _SIGMA**2))
    line = (line / line.sum()).expand(channels, 1, 1, -1)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line, groups=channels), line.mT, groups=channels)

    # A variance is the small difference of two means: in bfloat16 nothing would be left of it.
    with torch.autocast(images.device.type, enabled=False):
        a, b = blurred(images), blurred(others)
        var_a, var_b = blurred(images.square()) - a.square(), blurred(others.square()) - b.square()
        covariance = blurred(images * others) - a * b
    likeness = (2 * a * b + _C1) * (2 * covariance + _C2) / ((a.square() + b.square() + _C1) * (var_a + var_b + _C2))
    return likeness.mean(dim=(1, 2, 3))


def perceptual_distance(images: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical gradients plus ``1 - SSIM``; scalar.

    Args:
        images: float32 ``[N, C, H, W]``, 0..1.
        others: Like ``images``.
    """
    change = images - others
    gradient = change.diff(dim=-1).abs().mean() + change.diff(dim=-2).abs().mean()
    return gradient + 1 - ssim(images, others).mean()
