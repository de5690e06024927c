"""Blended as a transform."""

from __future__ import annotations

from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger, check_picture, in_units_of

__all__ = ["Blended"]


class Blended(Trigger):
    """A faint picture over the whole image: ``(1 - alpha) * x + alpha * pattern`` (Chen et al. 2017, arXiv 1712.05526).

    Args:
        pattern: uint8 ``[C, H, W]`` of the images' size.
        alpha: Weight of the pattern in 0..1.

    Raises:
        TypeError: if ``pattern`` is not uint8, or ``alpha`` not a number.
        ValueError: if ``alpha`` leaves 0..1; when called, if the pattern does not fit the images.
    """

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float = 0.2) -> None:
        super().__init__()
        check_picture(self, "pattern", pattern)
        ops.blend(pattern[None], pattern, alpha)  # says now what is wrong with alpha
        self.register_buffer("pattern", pattern)
        self.alpha = alpha

    def apply(self, images: Tensor) -> Tensor:
        return ops.blend(images, in_units_of(images, self.pattern), self.alpha)
