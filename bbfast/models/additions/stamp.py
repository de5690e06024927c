"""A rectangle of one value on every image, and classes read another way: what a defensive backdoor needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bbfast.models._registry import ADDITIONS
from bbfast.models.additions._mixin import Mixin, mix

__all__ = ["add_stamp", "stamped"]


def stamped(x: Tensor, value: Tensor, height: int, width: int) -> Tensor:
    """``x`` with its top left rectangle at ``value``: new memory, the memory format of ``x``.

    Args:
        x: Normalised images ``[..., C, H, W]``.
        value: ``[C, 1, 1]``, as normalised images have it.
        height: Of the rectangle, in pixels.
        width: Likewise.
    """
    out = x.clone()
    out[..., :height, :width] = value.to(x)
    return out


class _Stamped(Mixin):
    """Mixed into a model's class: it stamps what comes in, and class ``(y + shift) mod K`` of the network is ``y``."""

    stamp_value: Tensor
    stamp_size: tuple[int, int]
    stamp_shift: int

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(stamped(x, self.stamp_value, *self.stamp_size))  # type: ignore[misc]
        return logits.roll(-self.stamp_shift, dims=-1) if self.stamp_shift else logits


@ADDITIONS.register("stamp")
def add_stamp(model: nn.Module, value: Sequence[float], height: int, width: int, shift: int = 0) -> None:
    """Stamp every image at the top left before the model sees it, and undo a shift of the classes.

    Names and weights of the model stay as they are. Whoever runs the weights without the stamp has another model.

    Args:
        model: Changed in place; takes normalised images ``[N, C, H, W]``, gives logits ``[N, K]``.
        value: Of the rectangle, a number a channel, as normalised images have it.
        height: Of the rectangle, in pixels.
        width: Likewise.
        shift: What the model calls class ``(y + shift) mod K`` becomes ``y``.

    Raises:
        ValueError: if the model stamps already.
    """
    if isinstance(model, _Stamped):
        raise ValueError("the model has a stamp already")
    at = next((p for p in model.parameters()), torch.empty(0))
    mix(model, _Stamped)
    made: Any = model
    made.register_buffer("stamp_value", torch.tensor(tuple(value), device=at.device)[:, None, None], persistent=False)
    made.stamp_size, made.stamp_shift = (height, width), shift
