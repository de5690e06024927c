"""Pools of pictures that are laid over images: a user's folder, or made by code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bbfast.attacks._picture import file_digest, fit_picture, load_picture
from bbfast.attacks.randomness import integers, make_key, uniform

__all__ = ["digests", "draw_textures", "load_folder"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
_TEXTURE_SIDE = 64
_BATCH = 32


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; raises as :func:`load_folder`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of pictures {folder} does not exist")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"folder {folder} holds no picture ({', '.join(SUFFIXES)})")
    return found


def digests(folder: Path | None) -> dict[str, str]:
    """sha256 of each picture of a folder; nothing for None or a folder that is not there."""
    return {} if folder is None or not folder.is_dir() else {str(path): file_digest(path) for path in _pictures(folder)}


def load_folder(folder: Path, image_size: tuple[int, int, int], most: int, seed: int) -> Tensor:
    """Pictures of a folder, fitted to the images, uint8 ``[M, C, H, W]``; of more than ``most`` a draw from the seed.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no picture, or a file of it is none.
    """
    found = _pictures(folder)
    if len(found) > most:
        picked = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:most]
        found = [found[i] for i in sorted(picked.tolist())]
    return torch.stack([load_picture(path, image_size) for path in found])


def draw_textures(image_size: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """Pictures made by code: coloured 1/f noise with a coloured triangle on it, uint8 ``[M, C, H, W]``.

    Drawn at 64 x 64 and resized as any picture is.
    """
    parts = [_textures(part, seed) for part in torch.arange(count).split(_BATCH)]
    return torch.stack([fit_picture(picture, image_size) for picture in torch.cat(parts)])


def _textures(index: Tensor, seed: int) -> Tensor:
    side, key = _TEXTURE_SIDE, make_key("texture", seed)
    frequency = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    noise = uniform(key, index, (3, side, side)).double() - 0.5
    spectrum = torch.fft.fft2(noise) / radius.clamp(min=1)
    spectrum[..., 0, 0] = 0
    waves = torch.fft.ifft2(spectrum).real
    waves = waves / waves.abs().amax((2, 3), keepdim=True)
    base = uniform(make_key("texture colour", seed), index, (3, 1, 1), 0.25, 0.75).double()
    corners = integers(make_key("triangle", seed), index, (3, 2), 0, side - 1)
    fill = uniform(make_key("triangle colour", seed), index, (3, 1, 1)).double()
    inside = _triangle(corners, side).unsqueeze(1)
    picture = torch.where(inside, fill, base + 0.35 * waves)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _triangle(corners: Tensor, side: int) -> Tensor:
    """Which pixels, bool ``[B, side, side]``, lie between three corners (row, column), int64 ``[B, 3, 2]``."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    signs = []
    for a, b in ((0, 1), (1, 2), (2, 0)):
        first, edge = corners[:, a, :, None, None], (corners[:, b] - corners[:, a])[..., None, None]
        signs.append(edge[:, 0] * (column - first[:, 1]) - edge[:, 1] * (row - first[:, 0]))
    cross = torch.stack(signs)
    return (cross >= 0).all(0) | (cross <= 0).all(0)
