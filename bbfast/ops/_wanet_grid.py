"""The smooth field along which WaNet warps (Nguyen and Tran 2021, arXiv 2102.10369, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
        ValueError: if ``size`` or ``k`` is below 2, or ``s`` or ``grid_rescale`` is not positive.
    """
    if size < 2 or k < 2:
        raise ValueError(f"wanet_grid: size and k must be at least 2, got {size} and {k}")
    if not (s > 0 and grid_rescale > 0):
        raise ValueError(f"wanet_grid: s and grid_rescale must be positive, got {s} and {grid_rescale}")
    device = torch.device("cpu") if generator is None else generator.device
    control = torch.rand(1, 2, k, k, generator=generator, device=device) * 2 - 1
    control = control / control.abs().mean()
    noise = F.interpolate(control, size=(size, size), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    axis = torch.linspace(-1, 1, size, device=device)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    identity = torch.stack((columns, rows), dim=-1)
    return ((identity + s * noise / size) * grid_rescale).clamp(-1, 1).contiguous()
