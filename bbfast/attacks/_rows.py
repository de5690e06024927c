"""Changes of single training images, kept by sample number: what clean-label attacks craft for their class."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast import ops
from bbfast.data.imageset import ImageSet

__all__ = ["add_changes", "changes"]


def changes(rows: ImageSet, crafted: Tensor) -> dict[str, Tensor]:
    """What :func:`add_changes` takes, as part of a trigger's state.

    Args:
        rows: The images before.
        crafted: The images after, uint8 ``[P, C, H, W]``.

    Returns:
        ``ids`` int64 ``[P]``, ascending, and ``change`` int16 ``[P, C, H, W]`` in levels.
    """
    ids, order = rows.ids.cpu().sort()
    change = crafted.cpu().to(torch.int16) - rows.images.cpu().to(torch.int16)
    return {"ids": ids, "change": change[order]}


def add_changes(images: Tensor, index: Tensor, ids: Tensor, change: Tensor) -> Tensor:
    """The images of known numbers changed, the others as they are.

    Args:
        images: uint8 or float (0..1) ``[B, C, H, W]``; gradients flow.
        index: Sample numbers, int64 ``[B]``.
        ids: From :func:`changes`, on the device of the images.
        change: From :func:`changes`, anywhere.
    """
    if not len(ids):
        return images.clone()
    place = torch.searchsorted(ids, index).clamp(max=len(ids) - 1)
    known = ids[place] == index
    delta = change[place.to(change.device)].to(images.device, torch.float32)
    if images.is_floating_point():
        return ops.add(images, delta.to(images.dtype) / 255, known)
    return ops.add(images, delta, known)
