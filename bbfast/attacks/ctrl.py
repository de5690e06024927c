"""CTRL: raised DCT coefficients of the chroma over the whole image (Li et al., arXiv 2210.07346; spec/attacks 10)."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from bbfast import ops
from bbfast.attacks._spectral import Channels, Positions, check_spectrum, default_channels, default_positions
from bbfast.attacks.base import Attack, AttackConfig, AttackContext, Stage, register_attack
from bbfast.attacks.card import Card
from bbfast.attacks.poisoning import LabelMode
from bbfast.data.imageset import ImageSet

__all__ = ["CTRL"]

_SIDE = 32
_SMALLEST_SIDE = 8


@register_attack("ctrl")
class CTRL(Attack):
    """Adds to two coefficients of the DCT of U and V, taken over the whole image.

    Made for self-supervised learning, here on supervised training: images of the target class get the trigger and keep
    their label. In RGB it is one constant pattern for each channel, whatever the image.
    """

    card = Card(
        title="CTRL",
        paper="An Embarrassingly Simple Backdoor Attack on Self-supervised Learning",
        year=2023,
        arxiv="2210.07346",
        threat="poison-only",
        label_modes=("clean_label", "all2one", "all2all", "one2one"),
        summary="Two DCT coefficients of the chroma of the whole image are raised.",
        deviations=(
            "Colours are clipped and rounded half to even; the reference truncates them without clipping, so that "
            "values out of range wrap around (compat='reference' does so).",
            "At other sizes than 32 pixels the magnitude is scaled so that the pattern keeps its height; in the "
            "reference it fades with the size (compat='reference' or scale_with_size=False).",
            "Images with a side below 32 pixels take the middle and the highest frequency there is.",
            "Greyscale images, which have no chroma, carry the coefficients in their only channel.",
            "The way back from YUV is the exact inverse, as in kornia 0.9; older versions round its factors.",
            "The switch between two implementations of the same DCT (use_dct) is not offered.",
            "Dirty-label modes are offered too; the reference has clean labels only.",
        ),
    )

    class Config(AttackConfig):
        """Settings of CTRL.

        Args:
            magnitude_train: What is added to a coefficient in training images, in units of 0..255.
            magnitude_test: The same in test images.
            positions: Pairs (row, column) of coefficients; None: (15, 15) and (31, 31), along a side of n < 32 pixels
                n / 2 - 1 and n - 1.
            channels: Channels of Y, U, V to change; None: 1 and 2, of greyscale images 0.
            scale_with_size: Multiply the magnitudes by ``sqrt(H * W) / 32``; not in reference mode.
        """

        ratio: float | None = Field(0.05, gt=0, le=1)
        label_mode: LabelMode = "clean_label"
        magnitude_train: float = Field(100.0, gt=0, le=10_000)
        magnitude_test: float = Field(100.0, gt=0, le=10_000)
        positions: Positions | None = None
        channels: Channels | None = None
        scale_with_size: bool = True

    config: Config

    def fit(self, data: ImageSet, num_classes: int, seed: int, context: AttackContext | None) -> dict[str, Tensor]:
        _, height, width = data.image_size
        if self.config.positions is None and min(height, width) < _SMALLEST_SIDE:
            raise ValueError(
                f"{self.name}: images must have at least {_SMALLEST_SIDE} pixels a side for the default positions, got "
                f"{height} x {width}; give positions"
            )
        positions, chosen, color = self._plan(data.image_size)
        check_spectrum(self.name, data.image_size, positions, chosen, None, color)
        return {}

    def apply(self, images: Tensor, index: Tensor, stage: Stage) -> Tensor:
        c, (channels, height, width) = self.config, images.shape[1:]
        positions, chosen, color = self._plan((channels, height, width))
        magnitude = c.magnitude_train if stage == "train" else c.magnitude_test
        if c.scale_with_size and c.compat == "paper":
            magnitude *= math.sqrt(height * width) / _SIDE
        rounding = "wrap" if c.compat == "reference" else "nearest"
        out = ops.spectral_add(images, positions, magnitude, chosen, None, color, rounding=rounding)
        return out.clamp(0, 1) if images.is_floating_point() else out

    def _plan(self, image_size: tuple[int, int, int]) -> tuple[Positions, Channels, str]:
        """Positions, channels and colours for images of this size."""
        channels, height, width = image_size
        positions = self.config.positions or default_positions(height, width)
        return positions, self.config.channels or default_channels(channels), "yuv" if channels > 1 else "rgb"
