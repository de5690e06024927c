"""Light, contrast, distortion and compression. Images are float32 ``[N, C, H, W]``, 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast.defenses._corruptions.jpeg import jpeg
from bbfast.defenses._corruptions.resample import along_axes, box_matrix, gaussian_matrix
from bbfast.defenses._draws import Draws

__all__ = ["brightness", "contrast", "elastic", "jpeg_compression", "pixelate"]

_ELASTIC_SIGMA, _ELASTIC_REACH = 0.01, 0.005


def brightness(x: Tensor, amount: float, draws: Draws) -> Tensor:
    """The value of HSV raised by ``amount``: hue and saturation kept, so all channels grow by one factor."""
    value = x.amax(dim=1, keepdim=True)
    raised = (value + amount).clamp_(max=1)
    return torch.where(value > 0, x * (raised / value), raised)


def contrast(x: Tensor, factor: float, draws: Draws) -> Tensor:
    """Distances to each channel's mean times ``factor``."""
    return torch.lerp(x.mean(dim=(2, 3), keepdim=True), x, factor)


def elastic(x: Tensor, alpha: float, draws: Draws) -> Tensor:
    """Each pixel from a place nearby: smoothed uniform displacements of up to half a per cent of the size, times
    ``alpha``."""
    height, width = x.shape[2:]
    # Both axes as far as the height allows, as in the package.
    raw = draws.uniform("displacement", 2, height, width).mul_(2).sub_(1).mul_(_ELASTIC_REACH * height * alpha)
    blurs = [gaussian_matrix(size, _ELASTIC_SIGMA * size, truncate=3.0, mirror=True) for size in (height, width)]
    dx, dy = along_axes(raw, *blurs).unbind(dim=1)
    column = torch.arange(width, device=x.device) + dx
    row = torch.arange(height, device=x.device)[:, None] + dy
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def pixelate(x: Tensor, factor: float, draws: Draws) -> Tensor:
    """Means of boxes, shown as boxes: ``int(factor size)`` pixels a side."""
    pixels = x * 255
    for dim in (3, 2):  # 8 bits after each direction, as Pillow
        size = x.shape[dim]
        shrunk = box_matrix(size, max(int(size * factor), 1)).to(x)
        at = (2 * torch.arange(size, device=x.device) + 1) * len(shrunk) // (2 * size)
        pixels = torch.einsum("ij,...j->...i", shrunk, pixels.transpose(dim, -1)).add_(0.5).floor_()
        pixels = pixels[..., at].transpose(dim, -1)
    return pixels / 255


def jpeg_compression(x: Tensor, quality: int, draws: Draws) -> Tensor:
    """JPEG at ``quality``, there and back."""
    return jpeg((x * 255).round_(), quality) / 255
