"""BppAttack as a transform."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger

__all__ = ["BPP"]


class BPP(Trigger):
    """Fewer levels a channel, with dithering (Wang, Zhai and Ma 2022, arXiv 2205.13383).

    Args:
        levels: Levels of a channel.
        dither: Whether the error is diffused (Floyd and Steinberg).
    """

    def __init__(self, levels: int = 8, dither: bool = True) -> None:
        super().__init__()
        ops.quantize(torch.zeros(0, 1, 1, 1), levels, dither)  # says now what is wrong with them
        self.levels, self.dither = levels, dither

    def apply(self, images: Tensor) -> Tensor:
        return ops.quantize(images, self.levels, self.dither)
