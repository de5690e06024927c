"""Baseline JPEG, there and back, on tensors: what the quantisation does to an image, without the bit stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast import ops

__all__ = ["jpeg", "quantisation_table"]

# ITU-T T.81, tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
# JFIF: RGB to Y, Cb, Cr less their offsets.
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Compress and decompress: 8 x 8 blocks, colour at half the resolution (4:2:0), smooth upsampling of colour.

    Not the bits of libjpeg, whose transform and rounding of colour are in fixed point: less than a grey level apart on
    average.

    Args:
        x: float ``[N, C, H, W]`` with whole values 0..255; three channels are RGB, otherwise each channel is grey.
        quality: 1..100, as libjpeg counts.

    Returns:
        float ``[N, C, H, W]``, whole values 0..255.
    """
    height, width = x.shape[2:]
    if x.shape[1] != 3:
        return _blocks(x - 128, quality, chroma=False) + 128
    ycc = torch.einsum("ij,njhw->nihw", x.new_tensor(_TO_YCC), x).round_()
    luma = _blocks(ycc[:, :1] - 128, quality, chroma=False) + 128
    # As libjpeg: right of the image the edge is repeated before colour is halved, below after it.
    sums = 4 * F.avg_pool2d(F.pad(ycc[:, 1:], (0, -width % 16, 0, height % 2), mode="replicate"), 2)
    # Halves are rounded down in even columns and up in odd ones.
    bias = 1 + torch.arange(sums.shape[3], device=x.device) % 2
    colour = _blocks((sums + bias).div_(4).floor_(), quality, chroma=True)[..., : (width + 1) // 2]
    colour = F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False).round_()
    ycc = torch.cat([luma, colour[:, :, :height, :width]], dim=1)
    return torch.einsum("ij,njhw->nihw", x.new_tensor(_TO_RGB), ycc).round_().clamp_(0, 255)


def _blocks(x: Tensor, quality: int, chroma: bool) -> Tensor:
    """Values around 0 through transform, quantisation and back; whole, in -128..127."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    table = quantisation_table(quality, chroma).to(x)
    steps = table.repeat(x.shape[2] // 8, x.shape[3] // 8)
    decoded = ops.idct2(ops.dct2(x, 8).div_(steps).round_().mul_(steps), 8).round_().clamp_(-128, 127)
    return decoded[:, :, :height, :width]


def quantisation_table(quality: int, chroma: bool) -> Tensor:
    """Steps of the 64 coefficients, int64 ``[8, 8]``: the standard table scaled as libjpeg does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(_CHROMINANCE if chroma else _LUMINANCE)
    return ((table * scale + 50) // 100).clamp_(1, 255)
