"""Resizing of uint8 images as every pipeline of the benchmark does it: Pillow's antialiased BILINEAR."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["resize_u8"]


def resize_u8(images: Tensor | Sequence[np.ndarray], size: int | tuple[int, int]) -> Tensor:
    """Resize images with Pillow's fixed-point BILINEAR filter, bit for bit.

    Pillow itself does the work: torch's and torchvision's antialiased kernels are equal to it only on some processors.

    Args:
        images: uint8 tensor ``[N, C, h, w]``, or a sequence of uint8 arrays ``[h, w, C]`` or ``[h, w]`` of any sizes
            and one number of channels.
        size: New ``(H, W)``, or one number for both.

    Returns:
        uint8 ``[N, C, H, W]``, on the device of an input tensor, which is returned itself if it has that size.

    Raises:
        TypeError: if an image is not uint8.
        ValueError: if an image has another number of dimensions, the numbers of channels differ, or ``size`` is not
            positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {(height, width)}")
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {images.dtype}")
        if images.dim() != 4:
            raise ValueError(f"images must have four dimensions [N, C, H, W], got shape {list(images.shape)}")
        if tuple(images.shape[2:]) == (height, width):
            return images
        arrays = list(images.cpu().permute(0, 2, 3, 1).contiguous().numpy())
        return _resize(arrays, height, width, images.shape[1]).to(images.device)
    arrays = [_as_hwc(image, position) for position, image in enumerate(images)]
    channels = {array.shape[2] for array in arrays} or {3}
    if len(channels) > 1:
        raise ValueError(f"images must have one number of channels, got {sorted(channels)}")
    return _resize(arrays, height, width, channels.pop())


def _as_hwc(image: np.ndarray, position: int) -> np.ndarray:
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {array.dtype} at position {position}")
    if array.ndim not in (2, 3):
        raise ValueError(f"images must have shape [h, w, C] or [h, w], got {list(array.shape)} at position {position}")
    return array[..., None] if array.ndim == 2 else array


def _resize(arrays: Sequence[np.ndarray], height: int, width: int, channels: int) -> Tensor:
    out = np.empty((len(arrays), channels, height, width), dtype=np.uint8)
    for row, array in zip(out, arrays, strict=True):
        if channels == 3:
            row[:] = np.asarray(_pillow(array, height, width)).transpose(2, 0, 1)
        else:
            # Pillow filters every band on its own, so band by band gives the same bits.
            for band in range(channels):
                row[band] = np.asarray(_pillow(array[..., band], height, width))
    return torch.from_numpy(out)


def _pillow(array: np.ndarray, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array)).resize((width, height), Image.Resampling.BILINEAR)
