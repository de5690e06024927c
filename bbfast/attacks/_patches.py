"""Patch triggers drawn by code, at the places that the papers' pictures have on a 32-pixel image."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.attacks._picture import fit_picture
from bbfast.attacks.randomness import integers, make_key

__all__ = ["PATCHES", "draw_patch"]

_SIDE = 32
_Box = tuple[int, int, int, int]
"""Rows top..bottom and columns left..right of a 32-pixel image, the ends not included."""

PATCHES = ("corner", "corners", "logo", "checkers", "square")


def draw_patch(name: str, image_size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A patch trigger at the images' size.

    Args:
        name: ``square``: 8 x 8 cells of dark and bright noise in turn, rows and columns 21..28. ``corner``: 5 x 5
            coloured cells, bottom right. ``corners``: the same bottom left too. ``logo``: an irregular emblem of 140
            cells, rows 1..13, columns 18..30. ``checkers``: 3 x 3 black and white cells in every corner, 4 of them
            white.
        image_size: ``(C, H, W)``; places and cells scale with it.

    Returns:
        Pattern uint8 ``[C, H, W]`` and mask float32 ``[1, H, W]``, 1 where the trigger is: its black counts.

    Raises:
        ValueError: if the images have neither one nor three channels.
    """
    _, height, width = image_size
    pattern = torch.zeros(3, height, width, dtype=torch.uint8)
    mask = torch.zeros(1, height, width)
    for box in _BOXES[name]:
        top, bottom = _scaled(box[:2], height)
        left, right = _scaled(box[2:], width)
        cells, opaque = _cells(name, bottom - top, right - left)
        rows, columns = _nearest(cells.shape[1], bottom - top), _nearest(cells.shape[2], right - left)
        shown = opaque[rows[:, None], columns]
        pattern[:, top:bottom, left:right] = cells[:, rows[:, None], columns] * shown
        mask[:, top:bottom, left:right] = shown.float()
    return fit_picture(pattern, image_size), mask


_BOXES: dict[str, tuple[_Box, ...]] = {
    "square": ((21, 29, 21, 29),),
    "corner": ((27, 32, 27, 32),),
    "corners": ((27, 32, 0, 5), (27, 32, 27, 32)),
    "logo": ((1, 14, 18, 31),),
    "checkers": ((0, 3, 0, 3), (0, 3, 29, 32), (29, 32, 0, 3), (29, 32, 29, 32)),
}


def _cells(name: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Colours uint8 ``[3, h, w]`` and opacity bool ``[h, w]`` of one box that is ``height`` x ``width`` pixels."""
    if name == "checkers":
        # No more cells than pixels: on small images black and white still take turns.
        bright = _chess(min(3, height), min(3, width)) == 1
        return (bright * 255).to(torch.uint8).expand(3, -1, -1), torch.ones_like(bright)
    if name == "logo":
        row, column = torch.meshgrid(torch.arange(13), torch.arange(13), indexing="ij")
        disc = (row - 6) ** 2 + (column - 6) ** 2 <= 42
        notch = (row == 6) & (column >= 9)
        stem = (row >= 10) & (column <= 3)
        opaque = (disc & ~notch) | stem
        colours = torch.tensor([[235, 110, 30], [40, 70, 190]], dtype=torch.uint8)
        inner = ((row - 6) ** 2 + (column - 6) ** 2 <= 16).long()
        return colours[inner].permute(2, 0, 1), opaque
    side = 8 if name == "square" else 5
    noise = integers(make_key("patch", "corner" if name == "corners" else name), torch.arange(side**2), (3,), 0, 127)
    cells = noise.view(side, side, 3).permute(2, 0, 1) + 128 * (1 - _chess(side, side))
    return cells.to(torch.uint8), torch.ones(side, side, dtype=torch.bool)


def _chess(height: int, width: int) -> Tensor:
    return (torch.arange(height)[:, None] + torch.arange(width)) % 2


def _scaled(ends: tuple[int, ...], pixels: int) -> tuple[int, int]:
    """The two ends at another size, at least one pixel apart and symmetric to the middle of the image."""
    start, stop = ends
    if start + stop > _SIDE:
        first, last = _scaled((_SIDE - stop, _SIDE - start), pixels)
        return pixels - last, pixels - first
    first = round(start * pixels / _SIDE)
    return first, first + max(1, round((stop - start) * pixels / _SIDE))


def _nearest(cells: int, pixels: int) -> Tensor:
    """Which cell each pixel shows."""
    return (2 * torch.arange(pixels) + 1) * cells // (2 * pixels)
