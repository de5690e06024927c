"""Small images inside a page: PNG as data URI."""

from __future__ import annotations

import base64
from io import BytesIO

import torch
from torch import Tensor

__all__ = ["png_uri", "to_uint8"]


def png_uri(image: Tensor) -> str:
    """An image as ``data:image/png;base64,...``, without loss.

    Args:
        image: uint8 ``[C, H, W]`` with one or three channels, 0..255.

    Raises:
        TypeError: if the dtype is another.
        ValueError: if the shape is another.
    """
    from PIL import Image

    if image.dtype != torch.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}".replace("torch.", ""))
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be [C, H, W] with one or three channels, got shape {list(image.shape)}")
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    buffer = BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def to_uint8(image: Tensor) -> Tensor:
    """A float image in 0..1, ``[C, H, W]``, as uint8; values outside are clamped."""
    return (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
