"""Random views of images for contrastive training: a batch at a time, each image with parameters of its own."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

__all__ = ["Views", "crop_matrix", "gaussian_matrices", "shift_hue"]

_TRIES = 10
_SCALE, _RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
_JITTER, _P_JITTER, _HUE = 0.4, 0.8, 0.1
_P_GRAY = 0.2
_P_BLUR, _SIGMA = 0.5, (0.1, 2.0)
_LUMA = (0.2989, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Views:
    """SimCLR's augmentation.

    In this order: a crop of 20 to 100 % of the area, sides 3:4 to 4:3, resized to the whole image; a mirror image with
    probability .5; with probability .8 brightness, contrast and saturation times U(.6, 1.4) and hue shifted by
    U(-.1, .1), in random order; grey with probability .2; a normal blur of .1 to 2 pixels with probability .5. Images
    of other than three channels have no hue and no saturation.

    Random numbers are drawn from torch's global CPU generator, so that every device sees the same views.

    Args:
        mirror: Whether to mirror.
        blur: Whether to blur.
        cubic: Resize by a cubic (Pillow's) instead of a linear kernel.
    """

    mirror: bool = True
    blur: bool = True
    cubic: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """One view of each of uint8 ``[B, C, H, W]``: float32, 0..1, on the images' device."""
        n, channels, height, width = images.shape
        rows, columns = self._crops(n, height, width)
        x = images.float() / 255
        x = (rows.to(x)[:, None] @ (x @ columns.to(x).transpose(1, 2)[:, None])).clamp_(0, 1)
        x = self._jittered(x)
        gray = torch.rand(n) < _P_GRAY
        if channels == 3:
            x = torch.where(gray.to(x.device)[:, None, None, None], _gray(x), x)
        if self.blur:
            blurred, sigma = torch.rand(n) < _P_BLUR, torch.empty(n).uniform_(*_SIGMA)
            sigma = torch.where(blurred, sigma, 0.0).double()
            down, across = (gaussian_matrices(size, sigma).to(x) for size in (height, width))
            x = down[:, None] @ (x @ across.transpose(1, 2)[:, None])
        return x

    def _crops(self, n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Matrices ``[B, H, H]`` and ``[B, W, W]`` that crop, resize and mirror."""
        h, w = _crop_sizes(n, height, width)
        at = torch.rand(2, n)
        top, left = (at[0] * (height - h + 1)).long(), (at[1] * (width - w + 1)).long()
        mirrored = (torch.rand(n) < 0.5) & self.mirror
        columns = crop_matrix(width, left, w, self.cubic)
        return crop_matrix(height, top, h, self.cubic), torch.where(mirrored[:, None, None], columns.flip(1), columns)

    def _jittered(self, x: Tensor) -> Tensor:
        n = len(x)
        # Each image's own order of the four changes, as in torchvision; what is drawn here decides, so nothing is read
        # back from the device.
        order = torch.rand(n, 4).argsort(dim=1)
        order[torch.rand(n) >= _P_JITTER] = -1
        factor = torch.empty(n, 3).uniform_(1 - _JITTER, 1 + _JITTER)
        hue = torch.empty(n).uniform_(-_HUE, _HUE)
        factors = torch.cat([factor, hue[:, None]], dim=1).to(x)
        for turn in order.T:
            for kind, change in enumerate(_CHANGES if x.shape[1] == 3 else _CHANGES[:2]):
                chosen = (turn == kind).nonzero()[:, 0].to(x.device)
                x.index_copy_(0, chosen, change(x[chosen], factors[chosen, kind, None, None, None]))
        return x


def _crop_sizes(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Heights and widths ``[n]``: the first of ten draws that fits, else as much of the image as the ratios allow."""
    area = height * width * torch.empty(n, _TRIES).uniform_(*_SCALE)
    ratio = torch.empty(n, _TRIES).uniform_(*(math.log(r) for r in _RATIO)).exp()
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    whole_h, whole_w = min(height, round(width / _RATIO[0])), min(width, round(height * _RATIO[1]))
    some = fits.any(dim=1)
    return torch.where(some, h.gather(1, first)[:, 0], whole_h), torch.where(some, w.gather(1, first)[:, 0], whole_w)


def crop_matrix(size: int, start: Tensor, length: Tensor, cubic: bool) -> Tensor:
    """Pixels ``start .. start + length - 1`` of a line resized to all of it: float64 ``[B, size, size]``.

    As Pillow and torchvision with ``antialias`` do when they enlarge: what the kernel would take from beyond the crop
    is left out and the rest weighs more.

    Args:
        size: Pixels of the line.
        start: int64 ``[B]``.
        length: int64 ``[B]``, 1 to ``size``.
        cubic: Cubic kernel with a = -1/2; else linear.
    """
    at = torch.arange(size, dtype=torch.float64)
    centre = start[:, None] + (at + 0.5) * (length[:, None] / size)
    distance = (at + 0.5 - centre[:, :, None]).abs()
    if cubic:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    else:
        weight = (1 - distance).clamp(min=0)
    inside = (at >= start[:, None]) & (at < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=2, keepdim=True)


def gaussian_matrices(size: int, sigma: Tensor) -> Tensor:
    """Blur of a line by normal densities, beyond whose ends its last pixels go on: float64 ``[B, size, size]``.

    Args:
        size: Pixels of the line.
        sigma: float64 ``[B]``, in pixels, up to 2; 0 leaves the line as it is.
    """
    radius = math.ceil(4 * _SIGMA[1])
    reach = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (reach / sigma[:, None].clamp(min=1e-3)) ** 2)
    weight = weight / weight.sum(dim=1, keepdim=True)
    at = (torch.arange(size)[:, None] + reach.long()).clamp(0, size - 1)
    matrix = torch.zeros(len(sigma), size, size, dtype=torch.float64)
    shape = (len(sigma), size, len(reach))
    return matrix.scatter_add_(2, at.expand(shape), weight[:, None].expand(shape))


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(dim=1)
    return (_LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b)[:, None].expand_as(x)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(x)[:, :1] if x.shape[1] == 3 else x.mean(dim=1, keepdim=True)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    return (x * factor + mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + _gray(x) * (1 - factor)).clamp_(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """RGB images ``[B, 3, H, W]`` with their hue turned by ``shift`` (of a full turn), ``[B, 1, 1, 1]``."""
    value, low = x.amax(dim=1), x.amin(dim=1)
    span = value - low
    r, g, b = x.unbind(dim=1)
    safe = torch.where(span > 0, span, 1.0)
    sector = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = 6 * (sector / 6 + shift[:, 0]).remainder(1)
    # Each channel is the value less a trapezoid of the hue.
    turns = x.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (turns + hue[:, None]).remainder(6)
    return value[:, None] - span[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


_CHANGES = (_brightness, _contrast, _saturation, shift_hue)
