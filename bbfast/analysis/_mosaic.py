"""Many small pictures in one: quick to draw, however many there are."""

from __future__ import annotations

import numpy as np

__all__ = ["EDGE", "FOOT", "HEAD", "mosaic"]

EDGE, HEAD, FOOT = 0.12, 0.2, 0.04
"""White space of a cell: at both sides, above for a word, below. Shares that leave a square."""
_SIDE = 100


def mosaic(images: np.ndarray) -> np.ndarray:
    """Lay uint8 images ``[rows, columns, C, H, W]`` on white: uint8 ``[rows s, columns s, 3]``, pixels enlarged."""
    rows, columns = images.shape[:2]
    left, top = round(EDGE * _SIDE), round(HEAD * _SIDE)
    wide, high = _SIDE - 2 * left, _SIDE - top - round(FOOT * _SIDE)
    y = np.arange(high) * images.shape[3] // high
    x = np.arange(wide) * images.shape[4] // wide
    made = np.full((rows, columns, _SIDE, _SIDE, 3), 255, dtype=np.uint8)
    cells = images[:, :, :, y][..., x].transpose(0, 1, 3, 4, 2)
    made[:, :, top : top + high, left : left + wide] = cells if cells.shape[-1] == 3 else cells[..., :1]
    return made.transpose(0, 2, 1, 3, 4).reshape(rows * _SIDE, columns * _SIDE, 3)
