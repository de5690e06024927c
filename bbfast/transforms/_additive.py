"""Triggers that add a pattern: LF, TUAP, Narcissus, SIG."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger

__all__ = ["LF", "SIG", "TUAP", "Additive", "Narcissus"]


class Additive(Trigger):
    """A pattern that is added: ``clip(x + delta)``.

    Args:
        delta: Floating ``[C, H, W]`` of the images' size, in levels of 0..255 whatever the images' dtype.

    Raises:
        TypeError: if ``delta`` is not floating.
        ValueError: if it does not have three dimensions; when called, if it does not fit the images.
    """

    delta: Tensor

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        if not isinstance(delta, Tensor) or not delta.is_floating_point():
            got = delta.dtype if isinstance(delta, Tensor) else type(delta).__name__
            raise TypeError(f"{type(self).__name__}: delta must be a floating tensor [C, H, W], got {got}")
        if delta.dim() != 3:
            raise ValueError(f"{type(self).__name__}: delta must be [C, H, W], got {list(delta.shape)}")
        self.register_buffer("delta", delta)

    def apply(self, images: Tensor) -> Tensor:
        return ops.add(images, self.delta / 255 if images.is_floating_point() else self.delta)


class LF(Additive):
    """Low-frequency trigger: a smooth universal pattern (Zeng et al. 2021, arXiv 2104.03413)."""


class TUAP(Additive):
    """Targeted universal adversarial perturbation (Zhao et al. 2020, arXiv 2003.03030)."""


class Narcissus(Additive):
    """A pattern that points inwards to the target class (Zeng et al. 2022, arXiv 2204.05255)."""


class SIG(Trigger):
    """A sine wave along the columns (Barni, Kallas and Tondi 2019, arXiv 1902.11237).

    Args:
        amplitude: In levels of 0..255 whatever the images' dtype.
        frequency: Periods over the width.
    """

    def __init__(self, amplitude: float = 40.0, frequency: float = 6) -> None:
        super().__init__()
        ops.sinusoid(torch.zeros(0, 1, 1, 1), amplitude, frequency)  # says now what is wrong with them
        self.amplitude, self.frequency = amplitude, frequency

    def apply(self, images: Tensor) -> Tensor:
        return ops.sinusoid(images, self.amplitude, self.frequency)
