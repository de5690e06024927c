"""Snow, frost and fog. Images are float32 ``[N, C, H, W]``, 0..1."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast.defenses._corruptions.blur import along_angle
from bbfast.defenses._corruptions.resample import along_axes, centre_zoom_matrix
from bbfast.defenses._draws import Draws

__all__ = ["fog", "frost", "plasma", "snow"]

_LUMA = (0.299, 0.587, 0.114)
_ICE = (0.80, 0.92, 1.0)


def snow(x: Tensor, level: tuple[float, float, float, float, int, float, float], draws: Draws) -> Tensor:
    """Flakes in motion over a whitened image: (mean, deviation, size and threshold of the flakes, radius and sigma of
    their motion, weight of the image)."""
    mean, deviation, size, threshold, radius, sigma, weight = level
    height, width = x.shape[2:]
    layer = draws.normal("flakes", 1, height, width).mul_(deviation).add_(mean)
    layer = along_axes(layer, centre_zoom_matrix(height, size), centre_zoom_matrix(width, size))
    layer = torch.where(layer < threshold, 0.0, layer.clamp(0, 1))
    layer = along_angle(layer, radius, sigma, draws.uniform("angle", 1)[:, 0] * 90 - 135)
    layer = layer.mul_(255).round_().div_(255)[:, :, :height, :width]
    luma = x.new_tensor(_LUMA) if x.shape[1] == 3 else x.new_full((x.shape[1],), 1 / x.shape[1])
    grey = torch.einsum("c,nchw->nhw", luma, x)[:, None]
    white = torch.maximum(x, grey * 1.5 + 0.5)
    return torch.lerp(white, x, weight) + layer + layer.rot90(2, (2, 3))


def frost(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """Ice over the image; ``level`` weighs the image and the ice.

    The package pastes cuts of six photographs. This ice is made: ridges of two random landscapes, a coarse one and a
    fine one, of about the photographs' mean (0.5) and spread.
    """
    height, width = x.shape[2:]
    coarse, fine = (plasma(draws, tag, max(height, width), decay) for tag, decay in (("coarse", 2.0), ("fine", 1.4)))
    ridges = 1 - (2 * coarse - 1).abs()
    ice = (0.55 * ridges + 0.45 * fine)[:, None, :height, :width]
    tint = x.new_tensor(_ICE) if x.shape[1] == 3 else x.new_full((x.shape[1],), sum(_ICE) / 3)
    image, veil = level
    return image * x + veil * ice * tint.view(-1, 1, 1)


def fog(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """A random landscape of ``level[0]`` added, the brightest pixel kept; ``level[1]`` is the landscape's decay."""
    height, width = x.shape[2:]
    amount, decay = level
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    mist = plasma(draws, "mist", max(height, width), decay)[:, None, :height, :width]
    return (x + amount * mist) * (brightest / (brightest + amount))


def plasma(draws: Draws, tag: str, size: int, decay: float) -> Tensor:
    """Random landscapes by the diamond-square algorithm on a torus, each scaled to 0..1.

    Args:
        draws: Random numbers of the images.
        tag: Name of the stream.
        size: Least length of a side; the result's is the next power of two.
        decay: Factor by which the noise falls at each halving of the distance; its square matters.

    Returns:
        float32 ``[N, S, S]``.
    """
    side = 1 << max(size - 1, 1).bit_length()
    noise = draws.uniform(tag, side, side).mul_(2).sub_(1)
    land = torch.zeros_like(noise)
    step, reach = side, 1.0
    while step >= 2:
        half = step // 2
        noise_here = noise * (reach * reach)
        whole, middle = slice(0, side, step), slice(half, side, step)
        corners = land[:, whole, whole]
        around = corners + corners.roll(-1, 1)
        land[:, middle, middle] = (around + around.roll(-1, 2)) / 4 + noise_here[:, middle, middle]
        centres = land[:, middle, middle]
        beside = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        land[:, whole, middle] = beside / 4 + noise_here[:, whole, middle]
        beside = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        land[:, middle, whole] = beside / 4 + noise_here[:, middle, whole]
        step, reach = half, reach / decay
    low = land.amin(dim=(1, 2), keepdim=True)
    return (land - low) / (land.amax(dim=(1, 2), keepdim=True) - low).clamp_(min=torch.finfo(land.dtype).tiny)
