"""Models that change an image before the network sees it, and may read its answer another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StampedModel"]


class StampedModel(nn.Module):
    """Puts a rectangle of one value on every image and, with ``shift``, reads class ``(y + shift) mod K`` as ``y``.

    Args:
        network: Takes normalised images ``[N, C, H, W]``, gives logits ``[N, K]``.
        value: What is put there, of each channel, as normalised images have it.
        size: Height and width of the rectangle, in pixels.
        shift: How far classes were moved in training.
    """

    value: Tensor

    def __init__(self, network: nn.Module, value: tuple[float, ...], size: tuple[int, int], shift: int = 0) -> None:
        super().__init__()
        self.network, self.size, self.shift = network, tuple(size), shift
        self.register_buffer("value", torch.tensor(value)[:, None, None], persistent=False)
        spec = getattr(network, "bbfast_spec", None)
        if spec is not None:
            self.bbfast_spec = spec

    def stamp(self, x: Tensor) -> Tensor:
        """``x`` with the rectangle at the top left, new memory, its memory format."""
        height, width = self.size
        stamped = x.clone()
        stamped[..., :height, :width] = self.value.to(x)
        return stamped

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.stamp(x))
        return logits.roll(-self.shift, dims=-1) if self.shift else logits

    def wrapping(self) -> dict[str, Any]:
        """What :meth:`bbfast.defenses.Defense.wrap` needs besides the network, fit for JSON."""
        return {"value": self.value.flatten().tolist(), "size": list(self.size), "shift": self.shift}
