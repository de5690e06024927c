"""Sampling along a field: WaNet (Nguyen and Tran 2021, arXiv 2102.10369, eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native
from bbfast.ops._layout import empty_result, result_format
from bbfast.ops._rounding import check_rounding, to_images, unselected

__all__ = ["warp", "warp_reference"]


def warp(images: Tensor, grid: Tensor, where: Tensor | None = None, *, rounding: str = "nearest") -> Tensor:
    """Sample ``images`` bilinearly at the points of ``grid``.

    The same as ``torch.nn.functional.grid_sample(images, grid, "bilinear", "zeros", align_corners=True)``, for uint8
    images too: -1 and 1 are the centres of the outermost pixels, and what lies outside counts as zero. Computed in
    float32 (float64 for float64 images) in a fixed order of operations, so every device gives the same bits. uint8
    results are rounded half to even, or truncated. Differentiable in ``images`` and ``grid`` when the images are
    floating.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating, any strides.
        grid: ``[H, W, 2]`` or ``[N, H, W, 2]``, floating, (x, y) with -1..1 across the image.
        where: bool ``[N]``, the images to change; None changes all.
        rounding: ``"nearest"`` or ``"truncate"`` (what a cast to uint8 does), for uint8 images.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device or ``rounding`` does not fit; on the CPU also if a tensor holds NaN (on other
            devices values are not looked at, since that would make the host wait; a NaN there gives zero).
    """
    grid, truncate = _prepare(images, grid, where, rounding)
    if _native.usable("warp", images):
        return torch.ops.bbfast.warp(images, grid, where, truncate)
    return _compute(images, grid, where, truncate)


def warp_reference(images: Tensor, grid: Tensor, where: Tensor | None = None, *, rounding: str = "nearest") -> Tensor:
    """:func:`warp` in plain PyTorch."""
    grid, truncate = _prepare(images, grid, where, rounding)
    return _compute(images, grid, where, truncate)


def _compute(images: Tensor, grid: Tensor, where: Tensor | None, truncate: bool) -> Tensor:
    _check.finite("warp", "images", images)
    _check.finite("warp", "grid", grid)
    n, c, h, w = images.shape
    if images.numel() == 0:
        return empty_result(images)
    flat = images.to(grid.dtype).reshape(n, c, h * w)
    x, y = ((grid[..., 0] + 1) / 2) * (w - 1), ((grid[..., 1] + 1) / 2) * (h - 1)
    left, top = x.floor(), y.floor()
    right, bottom = left + 1, top + 1
    out = None
    # The order of the four corners is part of the contract: the kernels add them up the same way.
    for cx, cy, weight in (
        (left, top, (right - x) * (bottom - y)),
        (right, top, (x - left) * (bottom - y)),
        (left, bottom, (right - x) * (y - top)),
        (right, bottom, (x - left) * (y - top)),
    ):
        inside = (cx >= 0) & (cx <= w - 1) & (cy >= 0) & (cy <= h - 1)
        place = torch.where(inside, cy * w + cx, torch.zeros_like(cx)).long()
        place = place.reshape(-1, 1, h * w).expand(n, c, h * w)
        part = flat.gather(2, place) * torch.where(inside, weight, torch.zeros_like(weight)).reshape(-1, 1, h * w)
        out = part if out is None else out + part
    assert out is not None
    return unselected(to_images(out.view(n, c, h, w), images.dtype, truncate), images, where).contiguous(
        memory_format=result_format(images)
    )


def _prepare(images: Any, grid: Any, where: Any, rounding: str) -> tuple[Tensor, bool]:
    """Checks everything; returns the grid as ``[1 | N, H, W, 2]`` in compute dtype, and whether to truncate."""
    truncate = check_rounding("warp", rounding)
    _check.images("warp", images)
    _check.where("warp", where, images)
    n, _, h, w = images.shape
    if not _check.is_dense(grid, _check.FLOATS):
        raise TypeError(f"warp: grid must be a floating tensor, got {_check.describe(grid)}")
    if tuple(grid.shape) not in ((h, w, 2), (n, h, w, 2)):
        raise ValueError(f"warp: grid must be [{h}, {w}, 2] or [{n}, {h}, {w}, 2], got {_check.describe(grid)}")
    _check.same_device("warp", "grid", grid, images)
    grid = grid.to(_check.compute_dtype(images.dtype))
    return grid if grid.dim() == 4 else grid.unsqueeze(0), truncate


def _fake(images: Tensor, grid: Tensor, where: Tensor | None, truncate: bool) -> Tensor:
    return empty_result(images)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, grid, where, _ = inputs
    ctx.save_for_backward(images, grid, where)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    images, grid, where = ctx.saved_tensors
    need = [bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1])]
    wide = grad.to(grid.dtype)
    chosen = wide if where is None else wide * where.view(-1, 1, 1, 1)
    every = grid.expand(images.shape[0], -1, -1, -1).contiguous()
    # bilinear = 0, zeros = 0, align_corners = True
    for_images, for_grid = torch.ops.aten.grid_sampler_2d_backward(
        chosen.contiguous(), images.to(grid.dtype).contiguous(), every, 0, 0, True, need
    )
    if need[0]:
        if where is not None:
            for_images = torch.where(where.view(-1, 1, 1, 1), for_images, wide)
        for_images = for_images.to(images.dtype)
    return for_images if need[0] else None, for_grid.sum_to_size(grid.shape) if need[1] else None, None, None


_native.register("warp", _fake, _backward, _setup)
