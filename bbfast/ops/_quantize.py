"""Fewer levels a channel: BppAttack (Wang et al. 2022, arXiv 2205.13383, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native
from bbfast.ops._layout import empty_result, result_format
from bbfast.ops._rounding import check_rounding, to_images, unselected

__all__ = ["quantize", "quantize_reference"]


def quantize(
    images: Tensor,
    levels: int = 8,
    dither: bool = False,
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """Squeeze every channel to ``levels`` even levels, from 0 to 255 (uint8) or to 1 (float images).

    With ``K = levels - 1`` and ``top`` 255 or 1, a value ``v`` becomes ``Q(v) = round(v K / top) top / K``, halves to
    even; a uint8 result is rounded as well. With ``dither``, Floyd-Steinberg error diffusion (1976): pixels are taken
    row by row from left to right, each channel on its own, and the error ``v - Q(v)`` is handed to the neighbours not
    yet done, 7/16 to the right, 3/16 below left, 5/16 below, 1/16 below right; nothing is clamped or rounded between.
    Computed in float32 (float64 for float64 images) in a fixed order of operations: every device gives the same bits.

    A step has no gradient, so the result carries none. For a straight-through gradient write
    ``images + (quantize(images) - images).detach()``.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating (then in 0..1), any strides. Values beyond the range go to the next
            multiple of ``top / K``; float results are not clamped.
        levels: Number of levels, 2..256.
        dither: Whether to hand on the errors.
        where: bool ``[N]``, the images to change; None changes all.
        rounding: ``"nearest"``, or ``"truncate"`` to cut the fraction of a level off (what a cast to uint8 does: the
            stored test images of BackdoorBench), for uint8 images.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype does not fit, ``levels`` is not an integer or ``dither`` not a bool.
        ValueError: if a shape, device or ``rounding`` does not fit, or ``levels`` leaves 2..256; on the CPU also if the
            images hold NaN, or, with ``dither``, the chosen ones infinity or numbers so large that a result is not
            finite (on other devices values are not looked at, since that would make the host wait).

    Deviation: the field diffuses a float64 error over a float32 image. The results agree but for values that lie within
    a rounding error of half way between two levels.
    """
    truncate = _check_arguments(images, levels, dither, where, rounding)
    images = images.detach()
    if _native.usable("quantize", images):
        return torch.ops.bbfast.quantize(images, levels, dither, where, truncate)
    return _compute(images, levels, dither, where, truncate)


def quantize_reference(
    images: Tensor,
    levels: int = 8,
    dither: bool = False,
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """:func:`quantize` in plain PyTorch."""
    truncate = _check_arguments(images, levels, dither, where, rounding)
    return _compute(images.detach(), levels, dither, where, truncate)


def _compute(images: Tensor, levels: int, dither: bool, where: Tensor | None, truncate: bool) -> Tensor:
    _check.finite("quantize", "images", images)
    steps, top = levels - 1, 255 if images.dtype == torch.uint8 else 1
    values = images.to(_check.compute_dtype(images.dtype))
    if dither and images.numel():
        values = _diffuse(values, steps, top)
        if _check.inspectable(values) and not bool(torch.isfinite(values if where is None else values[where]).all()):
            raise ValueError("quantize: images must be finite, and not huge, for dithering")
    else:
        values = (values * (steps / top)).round() * top / steps
    result = unselected(to_images(values, images.dtype, truncate), images, where)
    return result.contiguous(memory_format=result_format(images))


def _diffuse(values: Tensor, steps: int, top: int) -> Tensor:
    """Levels ``[N, C, H, W]`` by error diffusion, along the diagonals ``x + 2 y``, whose pixels do not wait for each
    other. The order in which the errors reach a pixel is part of the contract: the kernels add them up the same way."""
    n, c, h, w = values.shape
    pitch = w + 2  # a column at either end takes what leaves the image
    flat = torch.nn.functional.pad(values.reshape(n * c, h, w), (1, 1, 0, 1)).view(n * c, -1)
    for diagonal in range(w + 2 * (h - 1)):
        first, last = max(0, (diagonal - w + 2) // 2), min(h - 1, diagonal // 2)
        begin, count = first * pitch + diagonal - 2 * first + 1, last - first + 1
        places = torch.arange(count, device=values.device) * (pitch - 2) + begin
        value = flat[:, places]
        level = (value * (steps / top)).round() * top / steps
        error = value - level
        for shift, share in ((pitch + 1, 1 / 16), (pitch, 5 / 16), (pitch - 1, 3 / 16), (1, 7 / 16)):
            flat[:, places + shift] += error * share
        flat[:, places] = level
    return flat.view(n, c, h + 1, pitch)[:, :, :h, 1 : w + 1]


def _check_arguments(images: Any, levels: Any, dither: Any, where: Any, rounding: str) -> bool:
    truncate = check_rounding("quantize", rounding)
    _check.images("quantize", images)
    _check.where("quantize", where, images)
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"quantize: levels must be an integer, got {_check.describe(levels)}")
    if not 2 <= levels <= 256:
        raise ValueError(f"quantize: levels must lie in 2..256, got {levels}")
    _check.flag("quantize", "dither", dither)
    return truncate and images.dtype == torch.uint8


def _fake(images: Tensor, levels: int, dither: bool, where: Tensor | None, truncate: bool) -> Tensor:
    return empty_result(images)


_native.register("quantize", _fake)
