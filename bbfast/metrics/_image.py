"""How much an image was changed: peak signal-to-noise ratio and structural similarity, per image."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["psnr", "ssim"]

_TAPS, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_ROUNDING = 1e-3
"""How far float pixels may lie outside 0..1, as denormalised ones do; they are clipped."""
_PIXELS = 1 << 20
"""Most pixels a pass: five float64 planes of them."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images: ``10 log10(1 / MSE)`` decibels for pixels in 0..1.

    Args:
        a: uint8 (0..255) or float (0..1) ``[N, C, H, W]``.
        b: Likewise, of the same type.

    Returns:
        float64 ``[N]`` on the device of ``a``; infinite where two images are equal.

    Raises:
        TypeError: if the two are not uint8 or float tensors of one type.
        ValueError: if the shapes are not ``[N, C, H, W]`` and equal, a float lies outside 0..1, or an image is empty.
    """
    _check("psnr", a, b)
    parts = _parts(a, b)
    errors = [(_unit(x) - _unit(y)).square().mean(dim=(1, 2, 3)) for x, y in parts]
    return -10 * torch.log10(torch.cat(errors))


def ssim(a: Tensor, b: Tensor, *, border: Literal["valid", "reflect"] = "valid") -> Tensor:
    """Structural similarity of each pair of images, with a Gaussian window of 11 x 11 pixels and sigma 1.5.

    Means, variances and covariance are weighted by the window; constants are K1 = .01 and K2 = .03 for a data range of
    1. The mean over channels and places.

    Args:
        a: uint8 (0..255) or float (0..1) ``[N, C, H, W]``, H and W at least 11.
        b: Likewise, of the same type.
        border: ``valid`` counts the places where the whole window lies in the image, as the paper's authors do;
            ``reflect`` all places, images mirrored at their edges, as torchmetrics does (1.9; older versions crop).

    Returns:
        float64 ``[N]`` on the device of ``a``, at most 1, which equal images have.

    Raises:
        TypeError: if the two are not uint8 or float tensors of one type.
        ValueError: if the shapes are not ``[N, C, H, W]`` and equal, a float lies outside 0..1, an image is empty or
            smaller than the window, or ``border`` is unknown.

    Source: Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13(4), 2004, eq. 13.
    """
    if border not in ("valid", "reflect"):
        raise ValueError(f"ssim: border must be 'valid' or 'reflect', got {border!r}")
    _check("ssim", a, b)
    if min(a.shape[-2:]) < _TAPS:
        raise ValueError(
            f"ssim: images must be at least {_TAPS} x {_TAPS} pixels, the size of the window, got "
            f"{a.shape[-2]} x {a.shape[-1]}"
        )
    windows = [_window(side, border, a.device) for side in a.shape[-2:]]
    return torch.cat([_ssim(_unit(x), _unit(y), *windows) for x, y in _parts(a, b)])


def _ssim(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    planes = torch.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = rows @ planes @ columns.T
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    # A variance is a difference of two numbers that may be equal: rounding must not make it negative.
    var_x, var_y = (xx - mean_x**2).clamp_min(0), (yy - mean_y**2).clamp_min(0)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window(side: int, border: str, device: torch.device) -> Tensor:
    """The window at each of its places along a side, float64 ``[places, side]``: filtering is a matrix product."""
    reach = _TAPS // 2
    places = torch.arange(side) if border == "reflect" else torch.arange(reach, side - reach)
    offset = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(offset.double() ** 2) / (2 * _SIGMA**2))
    pixel = (places[:, None] + offset).abs()
    pixel = torch.minimum(pixel, 2 * (side - 1) - pixel)
    filters = torch.zeros(len(places), side, dtype=torch.float64)
    return filters.scatter_add_(1, pixel, (weights / weights.sum()).expand_as(pixel).contiguous()).to(device)


def _unit(images: Tensor) -> Tensor:
    return images.double() / 255 if images.dtype == torch.uint8 else images.double().clamp(0, 1)


def _parts(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, _PIXELS // max(1, math.prod(a.shape[1:])))
    return list(zip(a.detach().split(rows), b.detach().to(a.device).split(rows), strict=True))


def _check(name: str, a: object, b: object) -> None:
    for which, images in (("a", a), ("b", b)):
        if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{name}: {which} must be a uint8 or float tensor [N, C, H, W], got {came}")
        if images.dim() != 4 or 0 in images.shape[1:]:
            raise ValueError(f"{name}: {which} must be images [N, C, H, W], got shape {list(images.shape)}")
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if a.dtype != b.dtype:
        raise TypeError(f"{name}: both must be of one type, got {a.dtype} and {b.dtype}")
    if a.shape != b.shape:
        raise ValueError(f"{name}: both must have one shape, got {list(a.shape)} and {list(b.shape)}")
    for which, images in (("a", a), ("b", b)):
        if images.is_floating_point() and images.numel():
            low, high = (float(v) for v in images.detach().aminmax())
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
                raise ValueError(
                    f"{name}: float images must lie in 0..1 (not normalised), got {which} in {low}..{high}"
                )
