"""Resampling and blurring along rows and columns, as matrices: one product for a whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["along_axes", "box_matrix", "centre_zoom_matrix", "gaussian_matrix", "mirror_index"]


def along_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ x @ columns.T`` over the last two dimensions."""
    return rows.to(x) @ (x @ columns.to(x).T)


def mirror_index(size: int, margin: int) -> Tensor:
    """Which of ``size`` pixels stand at ``-margin .. size + margin - 1``, mirrored at the centres of the outermost."""
    index = torch.arange(-margin, size + margin)
    if size == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index)


def gaussian_matrix(size: int, sigma: float, truncate: float = 4.0, mirror: bool = False) -> Tensor:
    """Blur by a normal density of ``sigma`` pixels, cut off at ``truncate sigma``: float64 ``[size, size]``.

    Beyond the edge the edge goes on (``mode="nearest"`` of scipy), or (``mirror``) the image is mirrored at its edge
    (``mode="reflect"``).
    """
    radius = int(truncate * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    at = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    at = (
        torch.minimum(at.remainder(2 * size), 2 * size - 1 - at.remainder(2 * size))
        if mirror
        else at.clamp(0, size - 1)
    )
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, at, (weights / weights.sum()).expand(size, -1))


def centre_zoom_matrix(size: int, factor: float) -> Tensor:
    """The middle ``ceil(size / factor)`` pixels, enlarged ``factor`` times, linearly: float64, ``size`` columns.

    As ``scipy.ndimage.zoom(order=1)``: first and last pixel stay first and last.
    """
    kept = math.ceil(size / factor)
    first, count = (size - kept) // 2, round(kept * factor)
    at = torch.arange(count, dtype=torch.float64) * ((kept - 1) / max(count - 1, 1))
    left = at.floor().clamp(max=max(kept - 2, 0)).long()
    matrix = torch.zeros(count, size, dtype=torch.float64)
    matrix.scatter_add_(1, first + left[:, None], (1 - (at - left))[:, None])
    return matrix.scatter_add_(1, first + (left + 1).clamp(max=kept - 1)[:, None], (at - left)[:, None])


def box_matrix(size: int, count: int) -> Tensor:
    """Shrink ``size`` pixels to ``count`` means: float64 ``[count, size]``; a pixel belongs where its centre lies."""
    scale = size / count
    low = (torch.arange(count, dtype=torch.float64) * scale + 0.5).floor()
    high = ((torch.arange(count, dtype=torch.float64) + 1) * scale + 0.5).floor().clamp(max=size)
    at = torch.arange(size)
    inside = ((at >= low[:, None]) & (at < high[:, None])).double()
    return inside / inside.sum(dim=1, keepdim=True)
