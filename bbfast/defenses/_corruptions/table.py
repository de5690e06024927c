"""Which corruptions there are, with the constants of each severity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bbfast.data.loader import derive_seed
from bbfast.defenses._corruptions import blur, digital, noise, weather
from bbfast.defenses._draws import Draws

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)

_TABLE: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "gaussian_noise": (noise.gaussian, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (noise.shot, (60, 25, 12, 5, 3)),
    "impulse_noise": (noise.impulse, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (blur.defocus, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (blur.glass, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (blur.motion, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    # Step and number of the enlargements that are averaged, from 1 on.
    "zoom_blur": (blur.zoom, ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))),
    "snow": (
        weather.snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (weather.frost, ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (weather.fog, ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))),
    "brightness": (digital.brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (digital.contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (digital.elastic, (12.5, 16.25, 21.25, 25.0, 30.0)),
    "pixelate": (digital.pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (digital.jpeg_compression, (25, 18, 15, 10, 7)),
}

CORRUPTIONS = tuple(_TABLE)


def corrupt(images: Tensor, keys: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Images under one corruption, rounded to 8 bits.

    What is random is a function of ``(seed, key, name, severity)``, so that an image is corrupted in the same way in
    every batch and order. Constants are those of ImageNet-C and of the package ``imagecorruptions``, whatever the size
    of the image; small images are corrupted harder.

    Args:
        images: uint8 ``[N, C, H, W]``.
        keys: int64 ``[N]``, see :func:`bbfast.defenses._content.content_keys`.
        name: One of ``CORRUPTIONS``.
        severity: 1..5.
        seed: Any 63-bit number.

    Returns:
        uint8 ``[N, C, H, W]``, new memory.

    Source: Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; constants of imagecorruptions (Michaelis et al.,
    arXiv 1907.07484).
    """
    if not len(images):
        return images.clone()
    function, levels = _TABLE[name]
    draws = Draws(keys, derive_seed("corruption", name, severity, seed))
    corrupted = function(images.float().div_(255), levels[severity - 1], draws)
    return corrupted.mul(255).round_().clamp_(0, 255).to(images.dtype)
