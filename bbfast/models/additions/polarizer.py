"""A linear layer over the channels in front of one layer of a frozen network (NPD)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bbfast.models._registry import ADDITIONS
from bbfast.models.additions._mixin import Mixin, mix

__all__ = ["Polarizer", "add_polarizer"]

Structure = Literal["convbn", "conv", "linear"]


class Polarizer(nn.Module):
    """A mixing of channels at every position, first the identity.

    Args:
        channels: Number of channels C.
        structure: ``convbn``: a matrix ``[C, C]`` without bias and a BatchNorm; ``conv``: the matrix alone;
            ``linear``: matrix and bias.
    """

    def __init__(self, channels: int, structure: Structure = "convbn") -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels, bias=structure == "linear")
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(channels))
            if self.mix.bias is not None:
                self.mix.bias.zero_()
        # Over samples and positions, whatever the layout; not BatchNorm2d, by which layers of a network are found.
        self.bn = nn.BatchNorm1d(channels) if structure == "convbn" else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, h, w]`` or tokens ``[B, T, C]``; same shape."""
        if x.dim() == 4:
            bias = self.mix.bias
            y = nn.functional.conv2d(x, self.mix.weight[:, :, None, None], bias)
            return y if self.bn is None else self.bn(y.flatten(2)).view_as(y)
        tokens: Tensor = self.mix(x)
        return tokens if self.bn is None else self.bn(tokens.flatten(0, 1)).view_as(tokens)


class _Polarized(Mixin):
    """Mixed into the class of a layer: its ``polarizer`` acts on what comes in."""

    polarizer: Polarizer

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.polarizer(x))  # type: ignore[misc]


@ADDITIONS.register("polarizer")
def add_polarizer(model: nn.Module, layer: str, channels: int, structure: Structure = "convbn") -> None:
    """Put a fresh :class:`Polarizer` in front of a layer, as its child ``polarizer``.

    All names of the model stay, and nothing is hooked: a copy of the model is polarized too.

    Args:
        model: Changed in place.
        layer: Dotted name.
        channels: Channels of the layer's input.
        structure: See :class:`Polarizer`.

    Raises:
        ValueError: if the layer has a polarizer already.
    """
    module = model.get_submodule(layer)
    if isinstance(module, _Polarized):
        raise ValueError(f"layer {layer!r} has a polarizer already")
    at = next((p for p in module.parameters()), None)
    polarizer = Polarizer(channels, structure)
    if at is not None:
        polarizer = polarizer.to(at.device, at.dtype)
    module.add_module("polarizer", polarizer.train(module.training))
    mix(module, _Polarized)
