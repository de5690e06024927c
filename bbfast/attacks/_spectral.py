"""Settings that FTrojan and CTRL share: which DCT coefficients of which channels, and how they scale with the image."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from bbfast import ops

__all__ = ["Channels", "Positions", "check_spectrum", "default_channels", "default_positions"]

Positions = Annotated[tuple[tuple[int, int], ...], Field(min_length=1)]
Channels = Annotated[tuple[int, ...], Field(min_length=1)]

_SIDE = 32
"""Side of the images that the papers' positions, (15, 15) and (31, 31), are made for."""


def default_positions(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The middle and the highest frequency of a 32-pixel block, or of a smaller one along a shorter side."""
    rows, columns = min(height, _SIDE), min(width, _SIDE)
    return ((rows // 2 - 1, columns // 2 - 1), (rows - 1, columns - 1))


def default_channels(channels: int) -> tuple[int, ...]:
    """The two channels of colour; of greyscale images the only one."""
    return (0,) if channels == 1 else (1, 2)


def check_spectrum(
    name: str,
    image_size: tuple[int, int, int],
    positions: Positions,
    channels: Channels,
    window: int | None,
    color: str,
) -> None:
    """Raise ``ValueError``, in the attack's name, for what does not fit the images."""
    try:
        ops.spectral_add(torch.zeros(0, *image_size), positions, 1.0, channels, window, color)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('spectral_add: ')}") from None
