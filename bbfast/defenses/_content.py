"""Numbers made from an image's pixels alone, so that results do not depend on the order in which samples are stored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["content_keys", "content_order", "mix64"]

_CHUNK_BYTES = 1 << 26


def content_keys(images: Tensor) -> Tensor:
    """A 64-bit key of each image's pixels, int64 ``[N]``; equal images have equal keys, others all but surely not.

    Args:
        images: uint8 ``[N, C, H, W]``.
    """
    flat = images.flatten(1)
    size = flat.shape[1]
    weights = torch.randint(-(1 << 62), 1 << 62, (size,), generator=torch.Generator().manual_seed(size)).mul_(2).add_(1)
    weights = weights.to(images.device)
    step = max(1, _CHUNK_BYTES // (8 * max(size, 1)))
    sums = [(part.long() * weights).sum(dim=1) for part in flat.split(step)]
    return mix64(torch.cat(sums)) if sums else torch.zeros(0, dtype=torch.int64, device=images.device)


def content_order(images: Tensor, labels: Tensor) -> Tensor:
    """An order of a training set that storage has no part in: by pixels, then by label; int64 ``[N]``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
    """
    order = labels.argsort(stable=True)
    return order[content_keys(images)[order].argsort(stable=True)]


def mix64(x: Tensor) -> Tensor:
    """Scramble int64 values one to one, so that neighbours and multiples look unrelated.

    Source: the finaliser of SplitMix64, Steele, Lea and Flood, OOPSLA 2014; arithmetic modulo 2**64.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
