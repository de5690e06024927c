"""Grad-CAM of a batch, and the regions that it picks out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bbfast.errors import UnsupportedModelError
from bbfast.training.prediction import probe

__all__ = ["grad_cam", "map_positions", "salient"]


def grad_cam(model: nn.Module, layer: nn.Module, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where in each image the evidence for a class lies, by one forward and half a backward pass for the whole batch.

    ``relu(sum_c w_c A_c)`` with the activations ``A`` of ``layer`` and ``w_c`` the mean over positions of the gradient
    of the class's logit, interpolated to the size of the image, its minimum at 0 and its maximum at 1. Of a transformer
    block (tokens ``[B, 1 + g*g, D]``) the *input* is taken, without the class token: at the output of the last block
    no logit depends on the other tokens. A constant map is 0 everywhere.

    Args:
        model: In eval mode; gradients of its parameters are neither needed nor made.
        layer: One of its modules.
        x: Normalised images ``[B, C, H, W]``.
        labels: int64 ``[B]``; None takes the predicted classes.

    Returns:
        Maps float32 ``[B, H, W]`` in 0..1, and the predicted classes int64 ``[B]``.

    Raises:
        UnsupportedModelError: if the layer gives no map of more than one position.

    Source: Selvaraju et al., ICCV 2017, arXiv 1610.02391, eq. 1 and 2.
    """
    kept: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        kept.append(value.detach().requires_grad_())
        return kept[-1].clone()  # what follows may work in place

    handles = _listen(layer, leaf)
    try:
        with torch.enable_grad():
            logits = model(x)
            predicted = logits.detach().argmax(1)
            wanted = logits.gather(1, (predicted if labels is None else labels)[:, None]).sum()
            gradient = torch.autograd.grad(wanted, kept[0])[0] if kept else None
    finally:
        for handle in handles:
            handle.remove()
    maps = None if gradient is None else _grid(kept[0].detach()), None if gradient is None else _grid(gradient)
    if maps[0] is None or maps[1] is None or maps[0].shape[2:].numel() < 2:
        shape = "no map" if maps[0] is None else "a map of one position"
        reason = f"the layer that Grad-CAM reads gives {shape} for images of {x.shape[2]}x{x.shape[3]}"
        raise UnsupportedModelError("Grad-CAM", type(model).__name__, reason, "choose an earlier layer")
    activation, slope = maps[0].float(), maps[1].float()
    cam = (slope.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1, keepdim=True).relu()
    cam = nn.functional.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = cam.amin(dim=(1, 2), keepdim=True), cam.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (cam - low) / (high - low), 0.0), predicted


def map_positions(model: nn.Module, layer: nn.Module, image_size: Sequence[int]) -> int:
    """How many positions the map has that :func:`grad_cam` would read; 0 if it gets none.

    Args:
        model: May be on the meta device.
        layer: One of its modules.
        image_size: ``(C, H, W)``.
    """
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    probe(model, image_size, _listen(layer, keep))
    grid = _grid(kept[0]) if kept else None
    return 0 if grid is None else grid.shape[2:].numel()


def salient(cam: Tensor, rule: str, level: float) -> Tensor:
    """Masks bool ``[B, H, W]``: the ``level`` part of the pixels with the highest values (``top``; of equal ones the
    first), or those of at least ``level`` (``threshold``). Pixels at the minimum never belong, so that a constant map
    gives none."""
    if rule == "threshold":
        return (cam >= level) & (cam > 0)
    flat = cam.flatten(1)
    count = math.ceil(round(level * flat.shape[1], 9))
    top = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True)
    return (chosen & (flat > 0)).view_as(cam)


def _listen(layer: nn.Module, keep: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Put what ``keep`` makes of the map in its place: tokens that go in, else the feature map that comes out."""
    tokens: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        tokens.append(args[0].dim() == 3)
        return (keep(args[0]), *args[1:]) if tokens[-1] else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        feature_map = isinstance(output, Tensor) and output.dim() == 4
        return keep(output) if feature_map and not any(tokens) else None

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def _grid(value: Tensor) -> Tensor | None:
    """``[B, C, h, w]`` of a feature map or of tokens with a class token in front; None of anything else."""
    if value.dim() == 4:
        return value
    side = math.isqrt(value.shape[1] - 1)
    if side * side != value.shape[1] - 1:
        return None
    return value[:, 1:].transpose(1, 2).unflatten(2, (side, side))
