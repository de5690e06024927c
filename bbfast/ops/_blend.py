"""Mixing a trigger image into a batch: Blended (Chen et al. 2017, arXiv 1712.05526, section 4.2)."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native
from bbfast.ops._layout import empty_result, result_format
from bbfast.ops._rounding import check_rounding, to_images, unselected

__all__ = ["blend", "blend_reference"]


def blend(
    images: Tensor,
    pattern: Tensor,
    alpha: float | Tensor,
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """Mix ``pattern`` into ``images`` with weight ``alpha``.

    Computes ``(1 - alpha) * images + alpha * pattern`` in float32 (float64 for float64 images), each operation
    rounded on its own, so every device gives the same bits. uint8 results are rounded half to even and clamped to
    0..255; float results are not clamped. Differentiable in ``images``, ``pattern`` and a tensor ``alpha`` when they
    are floating.

    Args:
        images: ``[N, C, H, W]``, uint8 or floating, any strides.
        pattern: ``[C, H, W]`` or ``[N, C, H, W]``, in the images' units: floating for float images, uint8 or floating
            in 0..255 for uint8 images.
        alpha: Weight of the pattern in 0..1: a number, ``[N]`` (one for each image) or ``[H, W]`` (one for each pixel).
        where: bool ``[N]``, the images to change; None changes all.
        rounding: ``"nearest"``, or ``"truncate"`` for the arithmetic of BackdoorBench on uint8 images: ``(1 - alpha)
            * images`` in float64, ``alpha * pattern`` in float32, their sum in float64, clamped, its fraction cut
            off. Float images have nothing to round.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device or ``rounding`` does not fit, or a number ``alpha`` leaves 0..1; on the CPU
            also if a tensor ``alpha`` does, or a float tensor holds NaN (on other devices values are not looked at,
            since that would make the host wait).
    """
    pattern, number, weights, truncate = _prepare(images, pattern, alpha, where, rounding)
    if _native.usable("blend", images):
        return torch.ops.bbfast.blend(images, pattern, number, weights, where, truncate)
    return _compute(images, pattern, number, weights, where, truncate)


def blend_reference(
    images: Tensor,
    pattern: Tensor,
    alpha: float | Tensor,
    where: Tensor | None = None,
    *,
    rounding: str = "nearest",
) -> Tensor:
    """:func:`blend` in plain PyTorch."""
    pattern, number, weights, truncate = _prepare(images, pattern, alpha, where, rounding)
    return _compute(images, pattern, number, weights, where, truncate)


def _compute(
    images: Tensor, pattern: Tensor, number: float, weights: Tensor | None, where: Tensor | None, truncate: bool
) -> Tensor:
    if weights is not None and _check.inspectable(weights) and not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError("blend: alpha must lie in 0..1")
    _check.finite("blend", "images", images)
    _check.finite("blend", "pattern", pattern)
    compute = torch.float64 if truncate else _check.compute_dtype(images.dtype)
    alpha = weights if weights is not None else torch.full((1, 1, 1, 1), number, dtype=compute, device=images.device)
    if truncate:
        mixed = images.to(compute) * (1 - alpha) + (pattern.float() * alpha.float()).to(compute)
    else:
        mixed = images.to(compute) * (1 - alpha) + pattern.to(compute) * alpha
    result = unselected(to_images(mixed, images.dtype, truncate), images, where)
    return result.contiguous(memory_format=result_format(images))


def _prepare(
    images: Any, pattern: Any, alpha: Any, where: Any, rounding: str
) -> tuple[Tensor, float, Tensor | None, bool]:
    """Checks everything; returns pattern ``[1 | N, C, H, W]``, alpha as number or broadcastable weights, truncation."""
    truncate = check_rounding("blend", rounding)
    _check.images("blend", images)
    _check.where("blend", where, images)
    n, _, h, w = images.shape
    pattern = _check.pattern("blend", pattern, images)
    truncate = truncate and images.dtype == torch.uint8
    compute = _check.compute_dtype(images.dtype)
    if not isinstance(alpha, Tensor):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float, Real)):
            raise TypeError(f"blend: alpha must be a number or a floating tensor, got {_check.describe(alpha)}")
        number = float(alpha)
        if not 0 <= number <= 1:
            raise ValueError(f"blend: alpha must lie in 0..1, got {alpha!r}")
        return pattern, number, None, truncate
    if not _check.is_dense(alpha, _check.FLOATS):
        raise TypeError(f"blend: alpha must be a number or a floating tensor, got {_check.describe(alpha)}")
    if tuple(alpha.shape) not in ((), (n,), (h, w)):
        raise ValueError(f"blend: alpha must be a number, [{n}] or [{h}, {w}], got {_check.describe(alpha)}")
    _check.same_device("blend", "alpha", alpha, images)
    weights = alpha.to(torch.float64 if truncate else compute)
    return pattern, 0.0, weights.view(-1, 1, 1, 1) if weights.dim() < 2 else weights.view(1, 1, h, w), truncate


def _fake(
    images: Tensor, pattern: Tensor, alpha: float, weights: Tensor | None, where: Tensor | None, truncate: bool
) -> Tensor:
    return empty_result(images)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, pattern, alpha, weights, where, _ = inputs
    need_weights = weights is not None and ctx.needs_input_grad[3]
    ctx.alpha = alpha
    ctx.like = [None if t is None else (t.shape, t.dtype) for t in (images, pattern, weights)]
    ctx.save_for_backward(images if need_weights else None, pattern if need_weights else None, weights, where)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, pattern, weights, where = ctx.saved_tensors
    image_like, pattern_like, weights_like = ctx.like
    grad = grad.to(_check.compute_dtype(grad.dtype))
    chosen = grad if where is None else grad * where.view(-1, 1, 1, 1)
    alpha = ctx.alpha if weights is None else weights
    for_images, for_pattern, for_weights = None, None, None
    if ctx.needs_input_grad[0]:
        # chosen is zero outside `where`, so an image that was passed through gets its gradient whole.
        for_images = (grad - chosen * alpha).to(image_like[1])
    if ctx.needs_input_grad[1]:
        for_pattern = (chosen * alpha).sum_to_size(pattern_like[0]).to(pattern_like[1])
    if weights is not None and ctx.needs_input_grad[3]:
        difference = pattern.to(grad.dtype) - images.to(grad.dtype)
        for_weights = (chosen * difference).sum_to_size(weights_like[0]).to(weights_like[1])
    return for_images, for_pattern, None, for_weights, None, None


_native.register("blend", _fake, _backward, _setup)
