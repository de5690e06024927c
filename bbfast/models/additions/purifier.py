"""A U-Net that every image goes through before the model sees it (BTI-DBF)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bbfast.models._registry import ADDITIONS
from bbfast.models._unet import UNet
from bbfast.models.additions._mixin import Mixin, mix

__all__ = ["add_purifier"]


class _Purified(Mixin):
    """Mixed into the class of the first layer: its ``purifier`` acts on the images that come in."""

    purifier: UNet

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.purifier(x))  # type: ignore[misc]


@ADDITIONS.register("purifier")
def add_purifier(model: nn.Module, layer: str, channels: int, width: int, depth: int) -> None:
    """Put a fresh :class:`bbfast.models._unet.UNet` in front of the layer that receives the images, as its child
    ``purifier``. All names of the model stay.

    Args:
        model: Changed in place.
        layer: Dotted name of a layer that is no container.
        channels: Channels of the images.
        width: See the network.
        depth: Likewise.

    Raises:
        ValueError: if the layer has a purifier already.
    """
    module = model.get_submodule(layer)
    if isinstance(module, _Purified):
        raise ValueError(f"layer {layer!r} has a purifier already")
    at = next((p for p in model.parameters()), None)
    purifier = UNet(channels, width, depth)
    if at is not None:
        purifier = purifier.to(at.device, at.dtype)
    module.add_module("purifier", purifier.train(module.training))
    mix(module, _Purified)
