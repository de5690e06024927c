"""FTrojan: raised DCT coefficients of the chroma in every block (Wang et al., arXiv 2111.10991; spec/attacks 9)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from bbfast import ops
from bbfast.attacks._spectral import Channels, Positions, check_spectrum, default_channels, default_positions
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LABEL_MODES
from bbfast.data.imageset import ImageSet

__all__ = ["FTrojan", "natural_window"]

_WINDOW = 32
_SMALLEST_WINDOW = 8


@register_attack("ftrojan")
class FTrojan(Attack):
    """Adds to two coefficients, middle and highest frequency, of the block-wise DCT of Cr and Cb.

    The change is at most about six levels, and the same tile whatever the image: the transform is linear.
    """

    card = Card(
        title="FTrojan",
        paper="An Invisible Black-Box Backdoor Attack Through Frequency Domain",
        year=2022,
        arxiv="2111.10991",
        threat="poison-only",
        label_modes=LABEL_MODES,
        summary="Two DCT coefficients of the chroma are raised in every 32-pixel block.",
        deviations=(
            "Chroma is clipped and rounded half to even; the reference truncates it without clipping, so that values "
            "out of range wrap around (compat='reference' does so).",
            "The round-off of the reference's DCT, which makes whole numbers, those of Y included, one level lower at "
            "many pixels, is reproduced in neither mode: it depends on the library's version.",
            "Images whose sides 32 does not divide take smaller blocks, with positions and magnitude scaled along; "
            "the reference leaves the rest undefined (compat='reference' refuses them).",
            "Greyscale images, which have no chroma, carry the coefficients in their only channel.",
            "Clean-label and source-specific modes are offered too; the reference has all2one and all2all.",
        ),
    )

    class Config(AttackConfig):
        """Settings of FTrojan.

        Args:
            magnitude: What is added to a coefficient, in units of 0..255, for blocks of 32 pixels; a smaller block that
                the library chose takes ``magnitude * window / 32``, the same height of the wave.
            window: Side of a block; None: 32 where it divides both sides of the images, else (paper mode) the largest
                that does, of at least 8.
            positions: Pairs (row, column) of coefficients; None: (15, 15) and (31, 31), in smaller blocks
                (window / 2 - 1, window / 2 - 1) and (window - 1, window - 1).
            channels: Channels of ``color`` to change; None: 1 and 2, of greyscale images 0.
            color: ``ycrcb`` (channels Y, Cr, Cb) or ``rgb``; greyscale images are not converted.
        """

        magnitude: float = Field(30.0, gt=0, le=10_000)
        window: int | None = Field(None, ge=1)
        positions: Positions | None = None
        channels: Channels | None = None
        color: Literal["ycrcb", "rgb"] = "ycrcb"

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        window, positions, _, channels, color = self._plan(data.image_size)
        check_spectrum(self.name, data.image_size, positions, channels, window, color)
        return {}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        channels, height, width = images.shape[1:]
        window, positions, magnitude, chosen, color = self._plan((channels, height, width))
        rounding = "wrap" if self.config.compat == "reference" else "nearest"
        out = ops.spectral_add(images, positions, magnitude, chosen, window, color, rounding=rounding)
        return out.clamp(0, 1) if images.is_floating_point() else out

    def _plan(self, image_size: tuple[int, int, int]) -> tuple[int, Positions, float, Channels, str]:
        """Window, positions, magnitude, channels and colours for images of this size."""
        c, (channels, height, width) = self.config, image_size
        window = c.window or (natural_window(height, width) if c.compat == "paper" else _WINDOW)
        if window < _SMALLEST_WINDOW and c.window is None:
            raise ValueError(
                f"{self.name}: no block of {_SMALLEST_WINDOW} to {_WINDOW} pixels divides images of {height} x "
                f"{width}; give a window"
            )
        positions = c.positions or default_positions(window, window)
        magnitude = c.magnitude if c.window else c.magnitude * window / _WINDOW
        color = c.color if channels > 1 else "rgb"
        return window, positions, magnitude, c.channels or default_channels(channels), color


def natural_window(height: int, width: int) -> int:
    """The largest side of a block, up to 32, that divides both sides of the images."""
    common = math.gcd(height, width)
    return max(n for n in range(1, min(_WINDOW, common) + 1) if common % n == 0)
