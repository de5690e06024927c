"""Mixing the low frequencies of a picture into images: FIBA (Feng et al. 2022, arXiv 2112.01148, section 3.2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check
from bbfast.ops._func import holds_nothing
from bbfast.ops._layout import result_format
from bbfast.ops._rounding import to_images, unselected

__all__ = ["amplitude_mix"]


def amplitude_mix(
    images: Tensor, trigger: Tensor, alpha: float | Tensor, beta: float, where: Tensor | None = None
) -> Tensor:
    """Mix the low-frequency Fourier amplitude of ``trigger`` into ``images`` and keep their phase.

    With ``F`` the two-dimensional Fourier transform of a channel and ``b = floor(beta * min(H, W))``, every coefficient
    whose frequencies lie in ``-b..b`` along both axes becomes ``((1 - alpha) |F(x)| + alpha |F(trigger)|) exp(i arg
    F(x))``; the others stay. The window holds frequency 0: the mean brightness moves as well. The phase of a
    coefficient that is zero counts as 0.

    Plain torch: the transforms of whole images take nearly all of the time, and what lies between them touches ``(2 b +
    1) (b + 1)`` numbers a channel. Computed in float32 (float64 for float64 images). uint8 results are rounded half to
    even and clamped to 0..255; float results are not clamped. Differentiable in floating ``images``, ``trigger`` and a
    tensor ``alpha``.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating, any strides.
        trigger: ``[C, H, W]`` or ``[N, C, H, W]`` (cross samples take other pictures), in the images' units: floating
            for float images, uint8 or floating in 0..255 for uint8 images.
        alpha: Weight of the trigger's amplitude in 0..1: a number or ``[N]``.
        beta: Size of the window relative to the shorter side, >= 0 and with ``2 b < min(H, W)``: below 0.5, since the
            window must be symmetric.
        where: bool ``[N]``, the images to change; None changes all, the others are copied.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype or type does not fit.
        ValueError: if a shape or device does not fit, ``beta`` is too large, or a number ``alpha`` leaves 0..1; on the
            CPU also if a tensor ``alpha`` does, or a float tensor holds NaN (on other devices values are not looked at,
            since that would make the host wait). An infinity makes its channel NaN.
    """
    op = "amplitude_mix"
    _check.images(op, images)
    _check.where(op, where, images)
    trigger = _check.pattern(op, trigger, images, "trigger")
    weight = _check.parameter(op, "alpha", alpha, images, 0, 1)
    height, width = images.shape[2:]
    b = _half_window(op, beta, height, width)
    _check.finite(op, "images", images)
    _check.finite(op, "trigger", trigger)
    if holds_nothing(images) or holds_nothing(trigger):
        return images.clone(memory_format=result_format(images))
    compute = _check.compute_dtype(images.dtype)
    spectrum = torch.fft.rfft2(images.to(compute))
    wanted = torch.fft.rfft2(trigger.to(compute))
    # Half of the window, frequencies 0..b and -b..-1 along the rows; the other half follows by symmetry. Joined rather
    # than written in place, which vmap refuses where the trigger alone is batched.
    columns, wanted = spectrum[..., : b + 1], wanted[..., : b + 1]
    top, bottom = (
        _mixed(columns[..., rows, :], wanted[..., rows, :], weight) for rows in (slice(b + 1), slice(height - b, None))
    )
    window = torch.cat((top, columns[..., b + 1 : height - b, :], bottom), -2)
    mixed = torch.fft.irfft2(torch.cat((window, spectrum[..., b + 1 :]), -1), s=(height, width))
    result = unselected(to_images(mixed, images.dtype), images, where)
    return result.contiguous(memory_format=result_format(images))


def _mixed(spectrum: Tensor, wanted: Tensor, weight: float | Tensor) -> Tensor:
    """The phase of ``spectrum`` with an amplitude between its own and that of ``wanted``."""
    own = torch.view_as_real(spectrum)
    target = torch.linalg.vector_norm(torch.view_as_real(wanted), dim=-1)
    size = torch.linalg.vector_norm(own, dim=-1)
    nothing = size == 0
    factor = (1 - weight) + weight * target / torch.where(nothing, 1, size)
    born = torch.where(nothing, weight * target, 0)
    return torch.view_as_complex(own * factor.unsqueeze(-1) + torch.stack((born, torch.zeros_like(born)), -1))


def _half_window(op: str, beta: Any, height: int, width: int) -> int:
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"{op}: beta must be a number, got {_check.describe(beta)}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"{op}: beta must be at least 0 and finite, got {beta!r}")
    side = min(height, width)
    b = math.floor(beta * side)
    if side and 2 * b >= side:
        raise ValueError(f"{op}: beta must keep 2 * floor(beta * {side}) below {side}, got {beta!r}")
    return b
