"""Factors on what one module gives: neurons flipped or switched off (FeatureRE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bbfast.models._registry import ADDITIONS
from bbfast.models.additions._mixin import Mixin, mix

__all__ = ["add_feature_factor"]


class _Scaled(Mixin):
    """Mixed into the class of a module: its ``feature_factor`` multiplies what comes out."""

    feature_factor: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * self.feature_factor  # type: ignore[misc]


@ADDITIONS.register("feature_factor")
def add_feature_factor(model: nn.Module, layer: str, shape: Sequence[int]) -> None:
    """Multiply a module's output by a buffer ``feature_factor``, of ones at first. All names of the model stay.

    Args:
        model: Changed in place.
        layer: Dotted name.
        shape: Of the output without the batch.

    Raises:
        ValueError: if the layer has factors already.
    """
    module = model.get_submodule(layer)
    if isinstance(module, _Scaled):
        raise ValueError(f"layer {layer!r} has a feature_factor already")
    at = next((p for p in model.parameters()), torch.empty(0))
    module.register_buffer("feature_factor", torch.ones(tuple(shape), device=at.device, dtype=at.dtype))
    mix(module, _Scaled)
