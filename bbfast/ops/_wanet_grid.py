"""The smooth field along which WaNet warps (Nguyen and Tran 2021, arXiv 2102.10369, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bbfast.ops import _check

__all__ = ["wanet_grid"]


def wanet_grid(
    size: int, k: int = 4, s: float = 0.5, grid_rescale: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a warping field for :func:`bbfast.ops.warp`.

    ``k x k`` control points uniform in -1..1, divided by their mean absolute value, are upsampled (bicubic, corners
    aligned) to ``noise``; the field is ``clamp((identity + s * noise / size) * grid_rescale, -1, 1)``. Made once for an
    attack, so there is no kernel for it.

    Args:
        size: Side of the images in pixels.
        k: Control points along a side.
        s: Strength: the mean displacement is ``s * (size - 1) / (2 * size)`` pixels along each axis.
        grid_rescale: Factor on the field.
        generator: Where the control points come from; None takes torch's global generator.

    Returns:
        float32 ``[size, size, 2]``, (x, y) in -1..1, on the generator's device.

    Raises:
        TypeError: if ``generator`` is not one.
        ValueError: if ``size`` or ``k`` is below 2, or ``s`` or ``grid_rescale`` is not positive.
    """
    for name, value in (("size", size), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ValueError(f"wanet_grid: {name} must be an integer of at least 2, got {_check.describe(value)}")
    for name, factor in (("s", s), ("grid_rescale", grid_rescale)):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"wanet_grid: {name} must be a positive number, got {_check.describe(factor)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"wanet_grid: generator must be a torch.Generator or None, got {_check.describe(generator)}")
    device = torch.device("cpu") if generator is None else generator.device
    control = torch.rand(1, 2, k, k, generator=generator, device=device) * 2 - 1
    control = control / control.abs().mean()
    noise = F.interpolate(control, size=(size, size), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    axis = torch.linspace(-1, 1, size, device=device)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    identity = torch.stack((columns, rows), dim=-1)
    return ((identity + s * noise / size) * grid_rescale).clamp(-1, 1).contiguous()
