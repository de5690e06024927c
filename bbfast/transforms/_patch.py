"""BadNets as a transform."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger, check_picture, in_units_of

__all__ = ["BadNets"]


class BadNets(Trigger):
    """A patch: ``x * (1 - mask) + pattern * mask`` (Gu, Dolan-Gavitt and Garg 2017, arXiv 1708.06733).

    Args:
        pattern: uint8 ``[C, H, W]`` of the images' size; None: a white square.
        mask: Opacity in 0..1, ``[H, W]``, ``[1, H, W]`` or ``[C, H, W]``; None: 1 where ``pattern`` is not 0.
        square_size: Side of the white square in pixels; None: ``round(3 * H / 32)``, at least 1.
        distance_to_right: Columns between the square and the right border.
        distance_to_bottom: Rows between the square and the bottom border.

    Raises:
        TypeError: if ``pattern`` is not uint8, or a number of pixels not an integer.
        ValueError: if ``mask`` is given without ``pattern``, or does not fit it; when called, if the square or the
            pattern does not fit the images.
    """

    pattern: Tensor | None
    mask: Tensor | None

    def __init__(
        self,
        pattern: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        square_size: int | None = None,
        distance_to_right: int = 0,
        distance_to_bottom: int = 0,
    ) -> None:
        super().__init__()
        if pattern is None and mask is not None:
            raise ValueError("BadNets: mask needs pattern")
        if pattern is not None:
            check_picture(self, "pattern", pattern)
            mask = (pattern > 0).float() if mask is None else mask
            ops.patch(pattern[None], pattern, mask)  # says now what is wrong with the mask
            mask = mask.float()
        for name, value, least in (
            ("square_size", 1 if square_size is None else square_size, 1),
            ("distance_to_right", distance_to_right, 0),
            ("distance_to_bottom", distance_to_bottom, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"BadNets: {name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"BadNets: {name} must be at least {least}, got {value}")
        self.register_buffer("pattern", pattern)
        self.register_buffer("mask", mask)
        self.square_size = square_size
        self.distance_to_right = distance_to_right
        self.distance_to_bottom = distance_to_bottom

    def apply(self, images: Tensor) -> Tensor:
        if self.pattern is not None and self.mask is not None:
            return ops.patch(images, in_units_of(images, self.pattern), self.mask)
        mask = self._square(*images.shape[-2:]).to(images.device)
        white = torch.full_like(mask, 255 if images.dtype == torch.uint8 else 1, dtype=images.dtype)
        return ops.patch(images, white.expand(images.shape[1:]), mask)

    def _square(self, height: int, width: int) -> Tensor:
        side = self.square_size or max(1, round(3 * height / 32))
        bottom, right = height - self.distance_to_bottom, width - self.distance_to_right
        if side > min(bottom, right):
            raise ValueError(
                f"BadNets: a square of {side} pixels, {self.distance_to_bottom} from the bottom and "
                f"{self.distance_to_right} from the right, does not fit into {height} x {width} images"
            )
        mask = torch.zeros(height, width)
        mask[bottom - side : bottom, right - side : right] = 1
        return mask
