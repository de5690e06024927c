"""WaNet as a transform."""

from __future__ import annotations

import torch
from torch import Tensor

from bbfast import ops
from bbfast.transforms._trigger import Trigger

__all__ = ["WaNet"]


class WaNet(Trigger):
    """A smooth warp of the whole image (Nguyen and Tran 2021, arXiv 2102.10369).

    The field is drawn once, here, and kept in the module's state: the same module gives the same warp.

    Args:
        size: Height and width of the (square) images.
        k: Control points of the field along a side.
        s: Strength of the warp.
        grid_rescale: Factor on the sampling grid.
        grid: A field of your own, float ``[H, W, 2]`` in -1..1; replaces the drawn one.
        generator: Source of the drawn field; None: torch's global one.

    Raises:
        ValueError: as :func:`bbfast.ops.wanet_grid`; when called, if the images are not of this size.
    """

    grid: Tensor

    def __init__(
        self,
        size: int,
        k: int = 4,
        s: float = 0.5,
        grid_rescale: float = 1.0,
        *,
        grid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if grid is None:
            grid = ops.wanet_grid(size, k, s, grid_rescale, generator=generator)
        elif not isinstance(grid, Tensor) or not grid.is_floating_point() or tuple(grid.shape) != (size, size, 2):
            got = f"{grid.dtype} {list(grid.shape)}" if isinstance(grid, Tensor) else type(grid).__name__
            raise ValueError(f"WaNet: grid must be a floating tensor [{size}, {size}, 2], got {got}")
        self.register_buffer("grid", grid)

    def apply(self, images: Tensor) -> Tensor:
        return ops.warp(images, self.grid)
