"""A horizontal wave over the whole image: SIG (Barni et al. 2019, arXiv 1902.11237, section 2.2)."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check
from bbfast.ops._add import add_prepared, compute, delta_dtype
from bbfast.ops._rounding import check_rounding

__all__ = ["sinusoid", "sinusoid_reference"]


def sinusoid(
    images: Tensor,
    amplitude: float = 20.0,
    frequency: float = 6,
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """Add a sine wave that runs along the columns, the same for all rows and channels.

    Computes ``clamp(images + amplitude * sin(2 pi j frequency / W))`` for column ``j`` of ``W``, with
    ``amplitude / 255`` for float images. The wave is computed in float64 and taken as float32 (float64 for float64
    images); adding, clamping, rounding and gradient are those of :func:`bbfast.ops.add`, whose kernel does the work:
    the wave is a single row, which plain PyTorch makes in microseconds. Differentiable in ``images`` when they are
    floating.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating (then in 0..1), any strides.
        amplitude: Height of the wave in levels of 0..255, whatever the images' dtype.
        frequency: Waves across the image.
        where: bool ``[N]``, the images to change; None changes all. The others are not clamped either.
        rounding: ``"nearest"``, or ``"truncate"`` for the arithmetic of BackdoorBench on uint8 images: a float32 wave
            added in float64, clamped, its fraction cut off. Float images have nothing to round.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype does not fit, or ``amplitude`` or ``frequency`` is not a number.
        ValueError: if a shape, device or ``rounding`` does not fit, or ``amplitude`` or ``frequency`` is not finite; on
            the CPU also if the images hold NaN (on other devices values are not looked at, since that would make the
            host wait).
    """
    return add_prepared(images, *_prepare(images, amplitude, frequency, where, rounding))


def sinusoid_reference(
    images: Tensor,
    amplitude: float = 20.0,
    frequency: float = 6,
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """:func:`sinusoid` in plain PyTorch."""
    return compute(images, *_prepare(images, amplitude, frequency, where, rounding))


def _prepare(
    images: Any, amplitude: Any, frequency: Any, where: Any, rounding: str
) -> tuple[Tensor, Tensor | None, bool]:
    """Checks everything; returns the wave as ``[W]`` in the kernel's dtype, ``where``, and truncation."""
    truncate = check_rounding("sinusoid", rounding)
    _check.images("sinusoid", images)
    _check.where("sinusoid", where, images)
    height, waves = _number("amplitude", amplitude), _number("frequency", frequency)
    width = images.shape[3]
    column = torch.arange(width, dtype=torch.float64, device=images.device)
    # The order of the operations is the field's, so that a wave crosses its zeros on the same side.
    wave = height * torch.sin(2 * math.pi * column * waves / max(width, 1))
    wave = wave.float() if images.dtype == torch.uint8 else wave / 255
    return wave.to(delta_dtype(images.dtype, truncate)), where, truncate


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"sinusoid: {name} must be a number, got {_check.describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"sinusoid: {name} must be finite, got {value!r}")
    return float(value)
