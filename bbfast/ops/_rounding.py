"""From a computed float back to the images' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_rounding", "to_images", "unselected"]


def check_rounding(op: str, rounding: str) -> bool:
    """True for ``"truncate"``, False for ``"nearest"``; anything else is a ``ValueError``."""
    if rounding not in ("nearest", "truncate"):
        raise ValueError(f"{op}: rounding must be 'nearest' or 'truncate', got {rounding!r}")
    return rounding == "truncate"


def to_images(value: Tensor, dtype: torch.dtype, truncate: bool = False) -> Tensor:
    """``value`` as ``dtype``: uint8 rounds half to even (or truncates), then clamps to 0..255."""
    if dtype != torch.uint8:
        return value.to(dtype)
    whole = value.trunc() if truncate else value.round()
    return whole.clamp(0, 255).to(torch.uint8)


def unselected(changed: Tensor, images: Tensor, where: Tensor | None) -> Tensor:
    """``changed`` where ``where`` (bool ``[N]``) is true, ``images`` elsewhere."""
    return changed if where is None else torch.where(where.view(-1, 1, 1, 1), changed, images)
