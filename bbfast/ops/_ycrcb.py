"""RGB and YCrCb in OpenCV's fixed point, with 14 bits of fraction, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_ycrcb", "to_ycrcb"]


def _descale(value: Tensor) -> Tensor:
    return (value + (1 << 13)) >> 14


def to_ycrcb(r: Tensor, g: Tensor, b: Tensor) -> list[Tensor]:
    """8-bit RGB to YCrCb: three integer ``[N, H, W]`` with values in 0..255 each."""
    y = _descale(4899 * r + 9617 * g + 1868 * b)
    cr = _descale(11682 * (r - y)) + 128
    cb = _descale(9241 * (b - y)) + 128
    return [y, cr.clamp(0, 255), cb.clamp(0, 255)]


def from_ycrcb(y: Tensor, cr: Tensor, cb: Tensor) -> Tensor:
    """Back, as OpenCV: three integer ``[N, H, W]`` to uint8 ``[N, 3, H, W]``, clamped."""
    cr, cb = cr - 128, cb - 128
    r = y + _descale(22987 * cr)
    g = y + _descale(-11698 * cr - 5636 * cb)
    b = y + _descale(29049 * cb)
    return torch.stack((r, g, b), 1).clamp(0, 255).to(torch.uint8)
