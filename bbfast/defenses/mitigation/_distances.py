"""What MOTH knows of the distances between classes, and which pair it takes next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bbfast.data.loader import derive_seed

__all__ = ["Distances"]


class Distances:
    """What is known of every directed pair of classes ``[K, K]``: trigger, its size, and how the size changed."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        k = num_classes
        self.trigger = torch.zeros(k, k, *shape)
        self.size = torch.zeros(k, k, dtype=torch.float64)
        self.gain = torch.zeros(k, k, dtype=torch.float64)
        self.drop = torch.zeros(k, k, dtype=torch.float64)
        self.first = torch.zeros(k, k, dtype=torch.float64)
        self.counts = torch.zeros(k, k, dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def choose(self, turn: int, count: int, random_share: float, seed: int) -> Tensor:
        """Unordered pairs ``[count, 2]``, the lower class first.

        Each is drawn at random with probability ``random_share``, else the best left of ``(1 - a) drop + a gain`` over
        both directions, with ``a`` rising from 0 to 1 in the first 1,000 steps.
        """
        k = len(self.size)
        g = torch.Generator().manual_seed(derive_seed("pair", seed, turn))
        a = min(turn / 1000, 1.0)
        value = (1 - a) * (self.drop + self.drop.T) + a * (self.gain + self.gain.T)
        value = value.masked_fill(~torch.ones(k, k, dtype=torch.bool).triu(1), -math.inf)
        found = []
        for _ in range(min(count, k * (k - 1) // 2)):
            free = torch.nonzero(value.isfinite().flatten()).flatten()
            if float(torch.rand((), generator=g)) < random_share:
                best = int(free[int(torch.randint(len(free), (), generator=g))])
            else:
                best = int(value.argmax())
            found.append((best // k, best % k))
            value[found[-1]] = -math.inf
        return torch.tensor(found)

    def record(self, pairs: Tensor, sizes: Tensor) -> None:
        """Mean sizes of a period, ``[P]`` of directed pairs ``[P, 2]``; infinite ones say nothing."""
        for (s, t), size in zip(pairs.tolist(), sizes.tolist(), strict=True):
            if not math.isfinite(size):
                continue
            last = float(self.size[s, t])
            if last > 0:
                self.gain[s, t] = (self.gain[s, t] + (size - last) / last) / 2
            if self.counts[s, t] == 0:
                self.first[s, t] = size
            self.counts[s, t] += 1
            self.size[s, t] = size
