"""Blur of the lens, of glass, of motion. Images are float32 ``[N, C, H, W]``, 0..1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast.defenses._corruptions.resample import along_axes, centre_zoom_matrix, gaussian_matrix, mirror_index
from bbfast.defenses._draws import Draws

__all__ = ["along_angle", "defocus", "disk", "glass", "motion", "scattered", "zoom"]


def defocus(x: Tensor, level: tuple[int, float], draws: Draws) -> Tensor:
    """A disk of ``level[0]`` pixels around each, its rim softened by ``level[1]``; mirrored at the border."""
    kernel = disk(*level).to(x)
    margin = len(kernel) // 2
    n, c, height, width = x.shape
    rows, columns = (mirror_index(size, margin).to(x.device) for size in (height, width))
    wide = x.reshape(n * c, 1, height, width)[:, :, rows][..., columns]
    return F.conv2d(wide, kernel[None, None]).view_as(x)


def disk(radius: int, softness: float) -> Tensor:
    """Kernel of :func:`defocus`: float64, square, odd, sum 1."""
    side = max(8, radius)
    at = torch.arange(-side, side + 1, dtype=torch.float64)
    flat = (at[:, None] ** 2 + at**2 <= radius**2).double()
    taps = 1 if radius <= 8 else 2
    near = torch.exp(-0.5 * (torch.arange(-taps, taps + 1, dtype=torch.float64) / softness) ** 2)
    mirrored = mirror_index(len(flat), taps)
    blur = torch.zeros_like(flat)
    for tap, weight in enumerate(near / near.sum()):
        blur[torch.arange(len(flat)), mirrored[tap : tap + len(flat)]] += weight
    soft = blur @ flat @ blur.T
    used = int((soft.sum(dim=0) > 0).nonzero().min())
    soft = soft[used : len(soft) - used, used : len(soft) - used]
    return soft / soft.sum()


def glass(x: Tensor, level: tuple[float, int, int], draws: Draws) -> Tensor:
    """Blurred, pixels swapped with neighbours, blurred again: ``level`` is (sigma, reach, rounds)."""
    sigma, reach, rounds = level
    blurs = [gaussian_matrix(size, sigma) for size in x.shape[2:]]
    soft = along_axes(x, *blurs).mul_(255).floor_().div_(255)
    return along_axes(scattered(soft, reach, rounds, draws), *blurs)


def scattered(x: Tensor, reach: int, rounds: int, draws: Draws) -> Tensor:
    """Each pixel, from the last to the first, changes places with one at most ``reach`` away.

    Swaps that touch different pixels commute. Two touch the same one only if they are less than ``2 reach`` rows and
    columns apart, so all pixels of one ``2 reach * row + column`` can be swapped at once: as many steps as diagonals,
    not as pixels, and the result of one swap after the other.
    """
    n, _, height, width = x.shape
    if min(height, width) <= 2 * reach:
        return x
    rows = torch.arange(height - reach, reach, -1, device=x.device)
    columns = torch.arange(width - reach, reach, -1, device=x.device)
    order = torch.arange(height * width, device=x.device).expand(n, -1).clone()
    place = (rows[:, None] * width + columns).flatten()
    wave = ((height - reach - rows)[:, None] * (2 * reach) + (width - reach - columns)).flatten()
    by_wave = wave.argsort(stable=True)
    sizes = torch.bincount(wave).tolist()
    for turn in range(rounds):
        step = (draws.uniform(f"swaps {turn}", 2, height * width) * (2 * reach)).long() - reach
        # A pixel's own draw moves with it through the list of waves.
        target = (place + step[:, 0, place] * width + step[:, 1, place])[:, by_wave]
        for here, there in zip(place[by_wave].split(sizes), target.split(sizes, dim=1), strict=True):
            mine, other = order[:, here], order.gather(1, there)
            order[:, here] = other
            order.scatter_(1, there, mine)
    return x.flatten(2).gather(2, order[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def motion(x: Tensor, level: tuple[int, float], draws: Draws) -> Tensor:
    """Moved along a random direction within 45 degrees of the horizontal; ``level`` is (radius, sigma)."""
    return along_angle(x, *level, draws.uniform("angle", 1)[:, 0] * 90 - 45)


def along_angle(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Mean over ``2 radius + 1`` whole-pixel shifts along a direction, weighted by half a normal density.

    Args:
        x: ``[N, C, H, W]``; the edge goes on beyond the border.
        radius: Half the length, in pixels.
        sigma: Standard deviation of the weights, in pixels.
        degrees: ``[N]``, direction of each image's motion.
    """
    n, c, height, width = x.shape
    length = 2 * radius + 1
    weights = torch.exp(-0.5 * (torch.arange(length, dtype=torch.float64) / sigma) ** 2)
    weights /= weights.sum()
    angle = degrees.double() * (math.pi / 180)
    along = torch.stack([angle.sin(), angle.cos()])
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    flat, out = x.flatten(2), torch.zeros_like(x).flatten(2)
    for i, weight in enumerate(weights.tolist()):
        dy, dx = (-(i * along - 0.5).ceil()).long()
        rows = (row - dy[:, None]).clamp_(0, height - 1) * width
        columns = (column - dx[:, None]).clamp_(0, width - 1)
        source = (rows[:, :, None] + columns[:, None]).view(n, 1, -1).expand(-1, c, -1)
        out.add_(flat.gather(2, source), alpha=weight)
    return out.view_as(x)


def zoom(x: Tensor, level: tuple[float, int], draws: Draws) -> Tensor:
    """Mean of the image (twice) and of enlargements of its middle, by 1 to ``1 + step (count - 1)``."""
    step, count = level
    height, width = x.shape[2:]
    total = x.clone()
    for i in range(count):
        rows, columns = (centre_zoom_matrix(size, 1 + i * step)[:size] for size in (height, width))
        total += along_axes(x, rows, columns)
    return total / (count + 1)
