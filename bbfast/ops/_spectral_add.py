"""Adding to DCT coefficients: FTrojan (Wang et al. 2022, arXiv 2111.10991, section 4) and CTRL (Li et al. 2023, arXiv
2210.07346, section 4.2)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bbfast.ops import _check, _native
from bbfast.ops._dct import check_window
from bbfast.ops._layout import empty_result, result_format
from bbfast.ops._rounding import unselected
from bbfast.ops._ycrcb import from_ycrcb, to_ycrcb

__all__ = ["spectral_add", "spectral_add_reference"]

_ROUNDINGS = ("nearest", "truncate", "wrap")  # the numbers that the kernel knows them by

# What adding 1 to a channel of the colours (a column) does to R, G and B (the rows): the inverse of the conversion from
# RGB. yuv: of Y = .299 R + .587 G + .114 B, U = -.147 R - .289 G + .436 B, V = .615 R - .515 G - .1 B.
# ycrcb: of the same Y, Cr = .713 (R - Y), Cb = .564 (B - Y).
_COLORS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "yuv": (
        (1.0, -0.000039457070707, 1.139827967171717),
        (1.0, -0.394610164141414, -0.580500315656566),
        (1.0, 2.031999684343434, -0.000481376262626),
    ),
    "ycrcb": (
        (1.0, 1 / 0.713, 0.0),
        (1.0, -0.299 / 0.587 / 0.713, -0.114 / 0.587 / 0.564),
        (1.0, 0.0, 1 / 0.564),
    ),
    "rgb": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
}
_MOST_CHANNELS = 4  # that the kernel serves
_LARGEST_MAGNITUDE = 2**24


class _Plan(NamedTuple):
    """What is left of the transform: ``out = images + gains * pattern``."""

    pattern: Tensor  # [tile height, tile width], compute dtype
    gains: list[float]  # one a channel: of the images, or of Y, Cr and Cb
    ycrcb: bool  # whether it is these that are added to, as bytes
    to_byte: int


def spectral_add(
    images: Tensor,
    positions: Sequence[tuple[int, int]],
    magnitude: float,
    channels: Sequence[int] = (1, 2),
    window: int | None = 32,
    color: str = "yuv",
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """Add ``magnitude`` to the DCT coefficients at ``positions`` of each block of each of ``channels``.

    The steps are: RGB to ``color``, orthonormal DCT-II of each ``window x window`` block (:func:`bbfast.ops.dct2`),
    ``+ magnitude``, inverse DCT, back to RGB. The transform is linear and nothing is rounded inside it, so it
    collapses: adding to coefficients is adding ``D = magnitude * sum M[r]' M[c]`` to every block, whatever the image,
    and no image is transformed. Whether the colours collapse too depends on where the method rounds:

    - ``"yuv"`` (CTRL; analog BT.601): not before the end. The way back is the inverse of the way there, so what stays
      of both is a factor for R, G and B: for U and V ``out = x + (1.13979, -0.97511, 2.03152) D``.
    - ``"ycrcb"`` (FTrojan; order Y, Cr, Cb): of uint8 images, Y, Cr and Cb are bytes before and after the transform,
      and so they are here. Both conversions are OpenCV's fixed point, bit for bit. Float images know no such steps and
      are treated as in ``"yuv"``, with factors (1.40252, -1.05874, 1.77305) for Cr and Cb.
    - ``"rgb"``: no conversion (FTrojan without it), any number of channels.

    Computed in float32 (float64 for float64 images), each operation rounded on its own, so every device gives the same
    bits from the same pattern. Float results are not clamped. Differentiable in floating ``images``, whose gradient
    passes unchanged.

    Args:
        images: ``[N, 3, H, W]`` (``[N, C, H, W]`` for ``"rgb"``), uint8 or floating, any strides.
        positions: Pairs (row, column) of coefficients, in ``0..window-1``; a pair that comes twice counts twice.
        magnitude: What is added, in units of 0..255 whatever the dtype (a 255th of it for float images in 0..1).
        channels: Numbers of the channels of ``color`` to change.
        window: Side of a block; must divide ``H`` and ``W``. None takes the whole image as one block.
        color: ``"yuv"``, ``"ycrcb"`` or ``"rgb"``.
        where: bool ``[N]``, the images to change; None changes all, the others are copied.
        rounding: What uint8 images do where the method makes bytes (of YCrCb for ``"ycrcb"``, else of RGB):
            ``"nearest"`` clamps and rounds half to even; ``"truncate"`` clamps and cuts the fraction off; ``"wrap"``
            cuts it off without clamping, modulo 256, as both reference implementations do. The way back from YCrCb
            clamps and rounds whatever is given. Float images have nothing to round.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype or type does not fit.
        ValueError: if a shape, device, position, channel, ``window``, ``color``, ``magnitude`` or ``rounding`` does not
            fit; on the CPU also if ``images`` hold NaN (on other devices values are not looked at, since that would
            make the host wait).

    Deviations: FTrojan's reference transforms there and back in floating point, whose round-off of 1e-13 turns many
    whole numbers into the next lower byte, in unchanged channels too; here a whole number stays what it is. CTRL's
    takes its colours from kornia, whose older versions come back by three digits (1.14, -0.396, -0.581, 2.029), which
    alone moves a pixel by up to half a level; here it is the inverse, as in kornia 0.9.
    """
    plan = _prepare(images, positions, magnitude, channels, window, color, where, rounding)
    if _native.usable("spectral_add", images) and images.shape[1] <= _MOST_CHANNELS:
        return torch.ops.bbfast.spectral_add(images, plan.pattern, plan.gains, plan.ycrcb, plan.to_byte, where)
    return _compute(images, plan, where)


def spectral_add_reference(
    images: Tensor,
    positions: Sequence[tuple[int, int]],
    magnitude: float,
    channels: Sequence[int] = (1, 2),
    window: int | None = 32,
    color: str = "yuv",
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """:func:`spectral_add` in plain PyTorch."""
    return _compute(images, _prepare(images, positions, magnitude, channels, window, color, where, rounding), where)


def _compute(images: Tensor, plan: _Plan, where: Tensor | None) -> Tensor:
    _check.finite("spectral_add", "images", images)
    height, width = images.shape[2:]
    tile = plan.pattern.repeat(height // plan.pattern.shape[0], width // plan.pattern.shape[1])
    x = torch.stack(to_ycrcb(*images.int().unbind(1)), 1) if plan.ycrcb else images
    added = x.to(tile.dtype) + torch.stack([gain * tile for gain in plan.gains])
    out = _to_bytes(added, plan.to_byte) if images.dtype == torch.uint8 else added.to(images.dtype)
    if plan.ycrcb:
        out = from_ycrcb(*out.int().unbind(1))
    return unselected(out, images, where).contiguous(memory_format=result_format(images))


def _to_bytes(value: Tensor, to_byte: int) -> Tensor:
    if _ROUNDINGS[to_byte] == "wrap":
        return value.clamp(-(2.0**24), 2.0**24).trunc().remainder(256).to(torch.uint8)
    whole = value.round() if _ROUNDINGS[to_byte] == "nearest" else value.trunc()
    return whole.clamp(0, 255).to(torch.uint8)


def _prepare(
    images: Any, positions: Any, magnitude: Any, channels: Any, window: Any, color: Any, where: Any, rounding: Any
) -> _Plan:
    """Checks everything, and reduces it to the pattern and the colours' coefficients."""
    op = "spectral_add"
    _check.images(op, images)
    _check.where(op, where, images)
    if not isinstance(color, str) or color not in _COLORS:
        raise ValueError(f"{op}: color must be one of {', '.join(map(repr, _COLORS))}, got {color!r}")
    if rounding not in _ROUNDINGS:
        raise ValueError(f"{op}: rounding must be one of {', '.join(map(repr, _ROUNDINGS))}, got {rounding!r}")
    n_channels, height, width = images.shape[1:]
    if color != "rgb" and n_channels != 3:
        raise ValueError(f"{op}: images must be [N, 3, H, W] for color {color!r}, got {_check.describe(images)}")
    if isinstance(magnitude, bool) or not isinstance(magnitude, (int, float, Real)):
        raise TypeError(f"{op}: magnitude must be a number, got {_check.describe(magnitude)}")
    if not abs(float(magnitude)) <= _LARGEST_MAGNITUDE:
        raise ValueError(f"{op}: magnitude must lie in -2**24..2**24, got {magnitude!r}")
    block = (height, width) if window is None else (check_window(op, window, height, width),) * 2
    places = [_pair(position, block) for position in _sequence("positions", positions)]
    chosen = [_number(channel, n_channels) for channel in _sequence("channels", channels)]

    amount = float(magnitude) if images.dtype == torch.uint8 else float(magnitude) / 255
    pattern = _pattern(places, amount, block, images.device).to(_check.compute_dtype(images.dtype))
    ycrcb = color == "ycrcb" and images.dtype == torch.uint8
    counts = [float(chosen.count(c)) for c in range(n_channels)]
    gains = counts
    if color != "rgb" and not ycrcb:
        gains = [row[0] * counts[0] + row[1] * counts[1] + row[2] * counts[2] for row in _COLORS[color]]
    return _Plan(pattern, gains, ycrcb, _ROUNDINGS.index(rounding))


def _pattern(places: list[tuple[int, int]], amount: float, block: tuple[int, int], device: torch.device) -> Tensor:
    """``amount * sum M[r]' M[c]`` with the basis ``M`` of :func:`bbfast.ops.dct2`, float64; only its rows in use are
    made, on the device, so that nothing is copied there."""
    waves: dict[tuple[int, int], Tensor] = {}
    pattern = None
    for place in places:
        for key in zip(block, place, strict=True):
            if key not in waves:
                n, k = key
                odd = torch.arange(1, 2 * n, 2, dtype=torch.float64, device=device)
                waves[key] = torch.cos((odd * k).remainder(4 * n) * (math.pi / (2 * n)))
        r, c = (waves[key] for key in zip(block, place, strict=True))
        scale = math.sqrt((2 if place[0] else 1) * (2 if place[1] else 1) / (block[0] * block[1]))
        part = (r * (amount * scale)).unsqueeze(1) * c
        pattern = part if pattern is None else pattern + part
    assert pattern is not None  # there is at least one place
    return pattern


def _sequence(name: str, value: Any) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"spectral_add: {name} must be a sequence, got {_check.describe(value)}")
    if not value:
        raise ValueError(f"spectral_add: {name} must not be empty")
    return list(value)


def _pair(value: Any, block: tuple[int, int]) -> tuple[int, int]:
    try:
        row, column = (operator.index(v) for v in value)
    except (TypeError, ValueError):
        kind = _check.describe(value)
        raise TypeError(f"spectral_add: positions must be pairs (row, column) of integers, got {kind}") from None
    if not (0 <= row < block[0] and 0 <= column < block[1]):
        raise ValueError(f"spectral_add: positions must lie in a block of {block[0]} x {block[1]}, got {row, column}")
    return row, column


def _number(value: Any, channels: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"spectral_add: channels must be integers, got {_check.describe(value)}")
    channel = operator.index(value)
    if not 0 <= channel < channels:
        raise ValueError(f"spectral_add: channels must lie in 0..{channels - 1}, got {channel}")
    return channel


def _fake(
    images: Tensor, pattern: Tensor, gains: list[float], ycrcb: bool, to_byte: int, where: Tensor | None
) -> Tensor:
    return empty_result(images)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None, None


_native.register("spectral_add", _fake, _backward)
