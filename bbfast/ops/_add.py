"""Adding a pattern to a batch: LF (Zeng et al. 2021, arXiv 2104.03413), TUAP, Narcissus, the corners of LC."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native
from bbfast.ops._layout import empty_result, result_format
from bbfast.ops._rounding import check_rounding, to_images, unselected

__all__ = ["add", "add_reference"]


def add(images: Tensor, delta: Tensor, where: Tensor | None = None, *, rounding: str = "nearest") -> Tensor:
    """Add ``delta`` to ``images`` and clamp to the images' range.

    Computes ``clamp(images + delta)``, to 0..255 for uint8 and to 0..1 for float images. The exact sum of a byte and a
    float32 is rounded half to even; float images are added in float32 (float64 for float64 images). Every device gives
    the same bits. Differentiable in ``images`` and ``delta`` when the images are floating, with a gradient
    that is whole where the sum lies in 0..1, ends included, and zero beyond (as ``torch.clamp``'s up to torch 2.14).

    Args:
        images: ``[N, C, H, W]``, uint8 or floating (then in 0..1: normalised ones would be clamped to it), any strides.
        delta: ``[C, H, W]`` or ``[N, C, H, W]``, floating, in the images' units: levels of 0..255 for uint8 images. May
            be infinite.
        where: bool ``[N]``, the images to change; None changes all. The others are not clamped either.
        rounding: ``"nearest"``, or ``"truncate"`` for the arithmetic of BackdoorBench on uint8 images: the sum in
            float64, clamped, its fraction cut off. Float images have nothing to round.

    Returns:
        New tensor of the images' shape, dtype, device and memory format.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device or ``rounding`` does not fit; on the CPU also if a tensor holds NaN (on other
            devices values are not looked at, since that would make the host wait).
    """
    return add_prepared(images, *_prepare(images, delta, where, rounding))


def add_reference(images: Tensor, delta: Tensor, where: Tensor | None = None, *, rounding: str = "nearest") -> Tensor:
    """:func:`add` in plain PyTorch."""
    return compute(images, *_prepare(images, delta, where, rounding))


def add_prepared(images: Tensor, delta: Tensor, where: Tensor | None, truncate: bool) -> Tensor:
    """Adds a checked ``delta`` that is ``[1 | N, C, H, W]``, or ``[W]`` for all rows and channels (sinusoid)."""
    if _native.usable("add", images):
        return torch.ops.bbfast.add(images, delta, where, truncate)
    return compute(images, delta, where, truncate)


def compute(images: Tensor, delta: Tensor, where: Tensor | None, truncate: bool) -> Tensor:
    """:func:`add_prepared` in plain PyTorch."""
    op = "sinusoid" if delta.dim() == 1 else "add"
    _check.finite(op, "images", images)
    _check.finite(op, "delta", delta)
    if images.dtype == torch.uint8:
        total = images.double() + delta.double()  # exact, where delta is float32, as far as rounding can tell
        result = to_images(total, images.dtype, truncate)
    else:
        result = _clamped(images.to(delta.dtype) + delta).to(images.dtype)
    return unselected(result, images, where).contiguous(memory_format=result_format(images))


def _clamped(total: Tensor) -> Tensor:
    """To 0..1. The gradient at the ends is written out: that of ``torch.clamp`` changed with torch 2.15."""
    if not total.requires_grad:
        return total.clamp(0, 1)
    bounded = total.detach().clamp(0, 1)
    return torch.where(total == bounded, total, bounded)


def _prepare(images: Any, delta: Any, where: Any, rounding: str) -> tuple[Tensor, Tensor | None, bool]:
    """Checks everything; returns delta as ``[1 | N, C, H, W]`` in the kernel's dtype, ``where``, and truncation."""
    truncate = check_rounding("add", rounding)
    _check.images("add", images)
    _check.where("add", where, images)
    if not _check.is_dense(delta, _check.FLOATS):
        raise TypeError(f"add: delta must be a floating tensor, got {_check.describe(delta)}")
    n, c, h, w = images.shape
    if tuple(delta.shape) not in ((c, h, w), (n, c, h, w)):
        raise ValueError(f"add: delta must be [{c}, {h}, {w}] or [{n}, {c}, {h}, {w}], got {_check.describe(delta)}")
    _check.same_device("add", "delta", delta, images)
    delta = delta.to(delta_dtype(images.dtype, truncate))
    return delta if delta.dim() == 4 else delta.unsqueeze(0), where, truncate


def delta_dtype(dtype: torch.dtype, truncate: bool) -> torch.dtype:
    """The dtype in which the kernel takes delta for images of ``dtype``."""
    return torch.float64 if truncate and dtype == torch.uint8 else _check.compute_dtype(dtype)


def _fake(images: Tensor, delta: Tensor, where: Tensor | None, truncate: bool) -> Tensor:
    return empty_result(images)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, delta, where, _ = inputs
    ctx.save_for_backward(images, delta, where)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    images, delta, where = ctx.saved_tensors
    total = images.to(delta.dtype) + delta
    inside = (total >= 0).logical_and_(total <= 1)
    grad = grad.to(delta.dtype)
    through = grad.where(inside, 0)  # what passes the clamp
    for_images, for_delta = None, None
    if ctx.needs_input_grad[0]:
        for_images = (through if where is None else through.where(where.view(-1, 1, 1, 1), grad)).to(images.dtype)
    if ctx.needs_input_grad[1]:
        chosen = through if where is None else through.where(where.view(-1, 1, 1, 1), 0)
        for_delta = chosen.sum_to_size(delta.shape)
    return for_images, for_delta, None, None


_native.register("add", _fake, _backward, _setup)
