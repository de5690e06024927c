"""Random numbers that are a function of an image and a counter, whatever the batch and the order of images."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from bbfast.data.loader import derive_seed
from bbfast.defenses._content import mix64

__all__ = ["Draws"]

_BITS = 24  # what a float32 in 0..1 holds


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Streams of random numbers of its own for each image.

    Args:
        keys: int64 ``[N]``, see :func:`bbfast.defenses._content.content_keys`.
        seed: Any 63-bit number.
    """

    keys: Tensor
    seed: int

    def uniform(self, tag: str, *shape: int) -> Tensor:
        """float32 ``[N, *shape]`` in ``[0, 1)``; another ``tag`` is another stream."""
        return _unit(self._bits(tag, math.prod(shape)) >> (63 - _BITS)).view(-1, *shape)

    def normal(self, tag: str, *shape: int) -> Tensor:
        """float32 ``[N, *shape]``, standard normal: Box and Muller, both numbers of each pair."""
        count = math.prod(shape)
        bits = self._bits(tag, (count + 1) // 2)
        radius = (_unit(bits >> (63 - _BITS)) + 0.5 ** (_BITS + 1)).log_().mul_(-2).sqrt_()
        angle = _unit(bits >> (62 - 2 * _BITS)) * (2 * math.pi)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :count].reshape(-1, *shape)

    def _bits(self, tag: str, count: int) -> Tensor:
        device = self.keys.device
        base = mix64(self.keys ^ derive_seed("draws", self.seed, tag))
        return mix64(base[:, None] + mix64(torch.arange(count, device=device)))


def _unit(bits: Tensor) -> Tensor:
    return (bits & ((1 << _BITS) - 1)).float().div_(1 << _BITS)
