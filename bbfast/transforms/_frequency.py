"""Triggers in the frequency domain: FTrojan, CTRL, FIBA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger, check_picture, in_units_of

__all__ = ["CTRL", "FIBA", "FTrojan"]

_POSITIONS = ((15, 15), (31, 31))


class FTrojan(Trigger):
    """Two coefficients of the DCT of Cr and Cb, raised in every block (Wang et al. 2022, arXiv 2111.10991).

    Args:
        positions: Pairs (row, column) of coefficients.
        magnitude: What is added, in levels of 0..255.
        window: Side of a block in pixels; divides the images' sides.
    """

    def __init__(
        self, positions: Sequence[tuple[int, int]] = _POSITIONS, magnitude: float = 30.0, window: int = 32
    ) -> None:
        super().__init__()
        _check(positions, magnitude, window, "ycrcb")
        self.positions, self.magnitude, self.window = tuple(positions), magnitude, window

    def apply(self, images: Tensor) -> Tensor:
        return ops.spectral_add(images, self.positions, self.magnitude, window=self.window, color="ycrcb")


class CTRL(Trigger):
    """Two coefficients of the DCT of U and V over the whole image (Li et al. 2023, arXiv 2210.07346).

    Args:
        positions: Pairs (row, column) of coefficients.
        magnitude: What is added, in levels of 0..255.
    """

    def __init__(self, positions: Sequence[tuple[int, int]] = _POSITIONS, magnitude: float = 100.0) -> None:
        super().__init__()
        _check(positions, magnitude, 1 + max((max(p) for p in positions), default=0), "yuv")
        self.positions, self.magnitude = tuple(positions), magnitude

    def apply(self, images: Tensor) -> Tensor:
        return ops.spectral_add(images, self.positions, self.magnitude, window=None, color="yuv")


class FIBA(Trigger):
    """The low-frequency Fourier amplitude of a picture, mixed in (Feng et al. 2022, arXiv 2112.01148).

    Args:
        pattern: uint8 ``[C, H, W]`` of the images' size, the picture.
        alpha: Weight of its amplitude in 0..1.
        beta: Half side of the window of low frequencies, as a part of the smaller side.

    Raises:
        TypeError: if ``pattern`` is not uint8.
    """

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float = 0.15, beta: float = 0.1) -> None:
        super().__init__()
        check_picture(self, "pattern", pattern)
        ops.amplitude_mix(pattern[None], pattern, alpha, beta)  # says now what is wrong with the numbers
        self.register_buffer("pattern", pattern)
        self.alpha, self.beta = alpha, beta

    def apply(self, images: Tensor) -> Tensor:
        return ops.amplitude_mix(images, in_units_of(images, self.pattern), self.alpha, self.beta)


def _check(positions: Sequence[tuple[int, int]], magnitude: float, window: int, color: str) -> None:
    """Raises now what the operation would raise at the first image."""
    ops.spectral_add(torch.zeros(0, 3, window, window), positions, magnitude, window=window, color=color)
