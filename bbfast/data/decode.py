"""Image files to one uint8 tensor, decoded once, on all cores."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bbfast.errors import DatasetError

__all__ = ["IMAGE_SUFFIXES", "image_files", "read_images"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_CHUNK = 256
# Pillow's conversion of these to RGB cuts off what exceeds 255: a 16-bit picture would come out white.
_NOT_8_BIT = ("I", "F")
_log = logging.getLogger(__name__)


def image_files(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, sorted by name: those with an image suffix that are not hidden."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.is_file()]
    return [folder / name for name in sorted(names) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]


def read_images(paths: Sequence[Path], size: tuple[int, int] | None, remedy: str) -> Tensor:
    """Decode image files as RGB and resize them with Pillow's BILINEAR.

    Args:
        paths: One file an image.
        size: ``(H, W)`` to resize to; None keeps the size, which all files must then share.
        remedy: What to do about a damaged file; ends the message.

    Returns:
        uint8 ``[N, 3, H, W]``.

    Raises:
        DatasetError: naming the file that cannot be decoded or has more than 8 bits a channel, or two files of other
            sizes if ``size`` is None.
    """
    if size is None and paths:
        with _opened(paths[0], remedy) as first:
            size = (first.height, first.width)
        resize = False
    else:
        resize = True
    height, width = size or (0, 0)
    out = np.empty((len(paths), 3, height, width), dtype=np.uint8)
    if len(paths) >= 10_000:
        _log.info("decoding %d images of %s", len(paths), os.path.commonpath([paths[0], paths[-1]]))

    def decode(start: int) -> None:
        for position in range(start, min(start + _CHUNK, len(paths))):
            path = paths[position]
            with _opened(path, remedy) as image:
                if not resize and (image.height, image.width) != (height, width):
                    raise DatasetError(
                        f"images have different sizes: {paths[0]} is {height}x{width}, {path} is "
                        f"{image.height}x{image.width}; pass size= to resize them"
                    )
                out[position] = np.asarray(_rgb(image, path, (width, height), remedy)).transpose(2, 0, 1)

    # Pillow releases the interpreter lock while it decodes and resizes, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(0, len(paths), _CHUNK)):
            pass
    return torch.from_numpy(out)


def _opened(path: Path, remedy: str) -> Image.Image:
    try:
        return Image.open(path)
    except _DECODE_ERRORS as error:
        raise _damaged(path, error, remedy) from error


def _rgb(image: Image.Image, path: Path, size: tuple[int, int], remedy: str) -> Image.Image:
    if image.mode.startswith(_NOT_8_BIT):
        raise DatasetError(f"{path} must have 8 bits a channel, got Pillow's mode {image.mode!r}; {remedy}")
    try:
        rgb = image.convert("RGB")
    except _DECODE_ERRORS as error:
        raise _damaged(path, error, remedy) from error
    return rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BILINEAR)


def _damaged(path: Path, error: BaseException, remedy: str) -> DatasetError:
    if isinstance(error, FileNotFoundError):
        return DatasetError(f"{path} is missing; {remedy}")
    return DatasetError(f"{path} cannot be decoded as an image ({type(error).__name__}: {error}); {remedy}")
