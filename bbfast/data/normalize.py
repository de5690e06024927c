"""Normalisation constants of the benchmark's data sets, and both directions of the mapping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NORMALIZATION", "channel_mean_std", "denormalize", "normalize"]

NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
"""Mean and standard deviation a channel, in 0..1 units (attacks.md 0.1)."""


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(x - mean) / std`` a channel, with ``x`` in 0..1.

    Args:
        images: ``[N, C, H, W]`` or ``[C, H, W]``, uint8 (0..255, divided by 255 first) or float (0..1).
        mean: One value a channel.
        std: One positive value a channel.

    Returns:
        Float tensor of the same shape: float32 for uint8 input, else the input's dtype.

    Raises:
        TypeError: if ``images`` is neither uint8 nor float.
        ValueError: if there is not one ``mean`` and ``std`` a channel, or a ``std`` is not positive.
    """
    x = images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
    shift, scale = _constants(x, mean, std)
    return (x - shift) / scale


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of :func:`normalize`: float ``[N, C, H, W]`` or ``[C, H, W]`` to 0..1 (not clamped)."""
    shift, scale = _constants(images, mean, std)
    return images * scale + shift


def channel_mean_std(images: Tensor, digits: int = 4) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of every channel over all pixels, in 0..1 units.

    Both come from a histogram of the 256 values, so the result is exact and the same on every machine.

    Args:
        images: uint8 ``[N, C, H, W]``, N >= 1.
        digits: Decimal places to round to.

    Returns:
        ``(mean, std)``, C values each; a constant channel gets std 1.

    Raises:
        ValueError: if there are no pixels.
    """
    if images.numel() == 0:
        raise ValueError(f"images must hold at least one pixel, got shape {list(images.shape)}")
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.transpose(0, 1):
        # Pieces bound the memory: a histogram needs its input as one contiguous vector.
        counts = torch.stack([torch.bincount(piece.reshape(-1), minlength=256) for piece in channel.split(8192)]).sum(0)
        weight = counts.cpu().to(torch.float64) / int(counts.sum())
        mean = float((weight * values).sum())
        variance = float((weight * (values - mean) ** 2).sum())
        means.append(round(mean, digits))
        stds.append(round(variance**0.5, digits) or 1.0)
    return tuple(means), tuple(stds)


def _constants(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    if not x.is_floating_point():
        raise TypeError(f"images must be uint8 (0..255) or float (0..1), got {x.dtype}")
    channels = x.shape[-3]
    if len(mean) != channels or len(std) != channels:
        given = f"{len(mean)} and {len(std)}"
        raise ValueError(f"mean and std must have one value for each of {channels} channels, got {given}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {tuple(std)}")
    shape = (channels, 1, 1)
    return x.new_tensor(list(mean)).view(shape), x.new_tensor(list(std)).view(shape)
