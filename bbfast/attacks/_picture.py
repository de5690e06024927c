"""Trigger pictures: a user's own file, fitted to the images, or one drawn by code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bbfast.data.resize import resize_u8

__all__ = ["draw_picture", "file_digest", "fit_picture", "load_mask", "load_picture", "match_channels", "noise_picture"]

_SIDE = 256
_STRIPE = 32
_STRIPES = ((250, 244, 232), (38, 60, 112))
_DISCS = (  # centre row, centre column, radius, colour
    (88, 80, 58, (220, 50, 47)),
    (104, 180, 52, (250, 200, 40)),
    (186, 120, 54, (40, 160, 90)),
)


def draw_picture(image_size: tuple[int, int, int]) -> Tensor:
    """The built-in picture: three coloured discs on diagonal stripes, uint8 ``[C, H, W]``.

    Drawn in integers at 256 x 256 and resized, so it is the same on every machine.
    """
    row, column = np.mgrid[:_SIDE, :_SIDE]
    canvas = np.array(_STRIPES, dtype=np.uint8)[(row + column) // _STRIPE % 2]
    for centre_row, centre_column, radius, colour in _DISCS:
        canvas[(row - centre_row) ** 2 + (column - centre_column) ** 2 <= radius**2] = colour
    return fit_picture(torch.from_numpy(canvas).permute(2, 0, 1), image_size)


def noise_picture(image_size: tuple[int, int, int], seed: int) -> Tensor:
    """Uniform noise, uint8 ``[C, H, W]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, image_size, dtype=torch.uint8, generator=generator)


def load_picture(path: Path, image_size: tuple[int, int, int]) -> Tensor:
    """Read a picture and fit it to the images, uint8 ``[C, H, W]``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture.
    """
    return fit_picture(_read(path, "RGB"), image_size)


def load_mask(path: Path, image_size: tuple[int, int, int]) -> Tensor:
    """Read a mask (white = trigger, black = image, grey = partly), float32 ``[1, H, W]`` in 0..1; raises as above."""
    return fit_picture(_read(path, "L"), (1, *image_size[1:])).float() / 255


def fit_picture(picture: Tensor, image_size: tuple[int, int, int]) -> Tensor:
    """Resize as Pillow's bilinear filter does, ignoring the aspect ratio, and match the channels.

    Args:
        picture: uint8 ``[1 or 3, h, w]``.
        image_size: ``(C, H, W)`` of the images, C = 1 or 3.

    Returns:
        uint8 ``[C, H, W]``.

    Raises:
        ValueError: if the images have neither one nor three channels.
    """
    channels, height, width = image_size
    if channels not in (1, 3):
        raise ValueError(
            f"a trigger picture fits images of 1 or 3 channels, got {channels}; give a tensor of the images' size"
        )
    if channels == 1:
        picture = match_channels(picture[None], 1)[0]
    if picture.shape[-2:] != (height, width):
        picture = resize_u8(picture[None].contiguous(), (height, width))[0]
    return picture.expand(channels, -1, -1).contiguous()


def match_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images as coloured ones and coloured ones as Pillow's integer luminance (ITU-R 601-2).

    Args:
        images: uint8 ``[N, c, H, W]``.
        channels: C.

    Returns:
        uint8 ``[N, C, H, W]``, perhaps a view.

    Raises:
        ValueError: if it is neither of the two.
    """
    if images.shape[1] == channels:
        return images
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([19595, 38470, 7471], device=images.device).view(3, 1, 1)
        return ((images.to(torch.int64) * weights).sum(1, keepdim=True) + 0x8000 >> 16).to(torch.uint8)
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    raise ValueError(f"images of {images.shape[1]} channels cannot become images of {channels}")


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(path: Path, mode: str) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"trigger picture {path} does not exist")
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert(mode))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"trigger picture {path} cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
