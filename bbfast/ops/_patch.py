"""Stamping a trigger: BadNets (Gu et al. 2017, arXiv 1708.06733), and the mask and pattern of Neural Cleanse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native
from bbfast.ops._layout import empty_result, result_format
from bbfast.ops._rounding import to_images, unselected

__all__ = ["patch", "patch_reference"]


def patch(images: Tensor, pattern: Tensor, mask: Tensor, where: Tensor | None = None) -> Tensor:
    """Put ``pattern`` on ``images`` where ``mask`` says so.

    Computes ``images * (1 - mask) + pattern * mask`` in float32 (float64 for float64 images), each operation rounded
    on its own, so every device gives the same bits; a mask of 0 keeps the image's value and a mask of 1 takes the
    pattern's, exactly. uint8 results are rounded half to even and clamped to 0..255; float results are not clamped.
    Differentiable in ``images``, ``pattern`` and ``mask`` when they are floating.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating, any strides.
        pattern: ``[C, H, W]`` or ``[N, C, H, W]``, in the images' units: floating for float images, uint8 or floating
            in 0..255 for uint8 images.
        mask: ``[H, W]``, ``[1, H, W]`` or ``[C, H, W]``, or one for each image, ``[N, 1, H, W]`` or ``[N, C, H, W]``;
            floating, bool or uint8, values in 0..1.
        where: bool ``[N]``, the images to change; None changes all.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit; on the CPU also if the mask leaves 0..1 or a float tensor holds
            NaN (on other devices values are not looked at, since that would make the host wait).
    """
    pattern, mask = _prepare(images, pattern, mask, where)
    if _native.usable("patch", images):
        return torch.ops.bbfast.patch(images, pattern, mask, where)
    return _compute(images, pattern, mask, where)


def patch_reference(images: Tensor, pattern: Tensor, mask: Tensor, where: Tensor | None = None) -> Tensor:
    """:func:`patch` in plain PyTorch."""
    pattern, mask = _prepare(images, pattern, mask, where)
    return _compute(images, pattern, mask, where)


def _compute(images: Tensor, pattern: Tensor, mask: Tensor, where: Tensor | None) -> Tensor:
    if _check.inspectable(mask) and mask.numel() and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("patch: mask must lie in 0..1")
    _check.finite("patch", "images", images)
    _check.finite("patch", "pattern", pattern)
    compute = _check.compute_dtype(images.dtype)
    x, p = images.to(compute), pattern.to(compute)
    mixed = x * (1 - mask) + p * mask
    result = unselected(to_images(mixed, images.dtype), images, where)
    return result.contiguous(memory_format=result_format(images))


def _prepare(images: Any, pattern: Any, mask: Any, where: Any) -> tuple[Tensor, Tensor]:
    """Checks everything; returns pattern ``[1 | N, C, H, W]`` and mask ``[1 | N, 1 | C, H, W]`` (compute dtype)."""
    _check.images("patch", images)
    _check.where("patch", where, images)
    n, c, h, w = images.shape
    pattern = _check.pattern("patch", pattern, images)
    if not _check.is_dense(mask, (*_check.FLOATS, torch.bool, torch.uint8)):
        raise TypeError(f"patch: mask must be a floating, bool or uint8 tensor, got {_check.describe(mask)}")
    shapes = ((h, w), (1, h, w), (c, h, w), (n, 1, h, w), (n, c, h, w))
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"patch: mask must be [{h}, {w}], [1, {h}, {w}], [{c}, {h}, {w}], [{n}, 1, {h}, {w}] or "
            f"[{n}, {c}, {h}, {w}], got {_check.describe(mask)}"
        )
    _check.same_device("patch", "mask", mask, images)
    compute = _check.compute_dtype(images.dtype)
    mask = mask.to(compute)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return pattern, mask


def _fake(images: Tensor, pattern: Tensor, mask: Tensor, where: Tensor | None) -> Tensor:
    return empty_result(images)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    images, pattern, mask, where = inputs
    need_images, need_pattern, need_mask = ctx.needs_input_grad[:3]
    ctx.like = [(t.shape, t.dtype) for t in (images, pattern, mask)]
    ctx.save_for_backward(
        images if need_mask else None,
        pattern if need_mask else None,
        mask if need_pattern or need_images else None,
        where,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    images, pattern, mask, where = ctx.saved_tensors
    (_, image_dtype), (pattern_shape, pattern_dtype), (mask_shape, mask_dtype) = ctx.like
    grad = grad.to(mask_dtype)
    chosen = None if where is None else where.view(-1, 1, 1, 1)
    # Zero outside `where`, so that an image that was passed through gets its gradient whole.
    weight = mask if chosen is None or mask is None else mask * chosen
    for_images, for_pattern, for_mask = None, None, None
    if ctx.needs_input_grad[0]:
        for_images = (grad * (1 - weight)).to(image_dtype)
    if ctx.needs_input_grad[1]:
        for_pattern = _summed_product(grad, weight, pattern_shape).to(pattern_dtype)
    if ctx.needs_input_grad[2]:
        own = grad if chosen is None else grad * chosen
        with_pattern = _summed_product(own, pattern.to(mask_dtype), mask_shape)
        for_mask = (with_pattern - _summed_product(own, images.to(mask_dtype), mask_shape)).to(mask_dtype)
    return for_images, for_pattern, for_mask, None


def _summed_product(grad: Tensor, factor: Tensor, shape: torch.Size) -> Tensor:
    """``(grad * factor).sum_to_size(shape)``, summed over the samples first where the factor is the same for all."""
    if factor.shape[0] == 1 and shape[0] == 1:
        return (grad.sum(0, keepdim=True) * factor).sum_to_size(shape)
    return (grad * factor).sum_to_size(shape)


_native.register("patch", _fake, _backward, _setup)
