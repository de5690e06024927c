"""A batch of superimposed images from index pairs, in one pass: STRIP (Gao et al. 2019, arXiv 1902.06531)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["overlay_batch", "overlay_batch_reference"]

_BLENDS = ("add_clip", "add_normalised", "convex")


def overlay_batch(
    images: Tensor,
    overlays: Tensor,
    pairs: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    blend: str = "add_clip",
    alpha: float = 1.0,
    channels_last: bool = False,
) -> Tensor:
    """Superimpose pairs of images, normalise, and cast; nothing but the result is written.

    With x and r the pixels of an image and an overlay in 0..1 and ``norm(x) = (x - mean) / std``:

    - ``add_clip``: ``norm(min(x + alpha r, 1))``, the sum that saturates.
    - ``add_normalised``: ``norm(x) + alpha norm(r)``, not clipped (BackdoorBench).
    - ``convex``: ``norm(alpha x + (1 - alpha) r)``.

    Normalisation is affine, so each is computed as the sum of two images normalised apart, ``(x - mean) (1 / std)
    weight``, under the ceiling ``(1 - mean) / std`` in the first case; in float32 (float64 for a float64 result), each
    operation rounded on its own, so every device gives the same bits. Pairs of one image that follow each other share
    its normalised pixels. NaN stays NaN. Not differentiable.

    Args:
        images: ``[N, C, H, W]``, uint8 0..255 or floating 0..1. Memory in the order of the result is read in place,
            any other copied first.
        overlays: ``[R, C, H, W]``, dtype and device of ``images``.
        pairs: int64 ``[B, 2]``, positions in ``images`` and in ``overlays``; may repeat.
        mean: One value a channel in 0..1 units; None is 0.
        std: One positive value a channel in 0..1 units; None is 1.
        dtype: Of the result: float32, bfloat16, float16 or float64.
        blend: ``add_clip``, ``add_normalised`` or ``convex``.
        alpha: Weight, see above; positive, and at most 1 for ``convex``.
        channels_last: Whether the result has PyTorch's channels_last memory format.

    Returns:
        New tensor ``[B, C, H, W]`` of ``dtype``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device, ``mean``, ``std``, ``blend`` or ``alpha`` does not fit, or there are more than
            64 channels on CUDA.
        IndexError: on the CPU, if a pair lies outside ``images`` or ``overlays``. On CUDA looking would make the host
            wait: there the kernel prints the pair and stops with a device-side error, and reads nothing.
    """
    images, overlays, means, stds, own, other = _prepare(
        images, overlays, pairs, mean, std, dtype, blend, alpha, channels_last
    )
    clip = blend == "add_clip"
    if _native.usable("overlay_batch", images):
        return torch.ops.bbfast.overlay_batch(
            images, overlays, pairs, means, stds, own, other, clip, dtype, channels_last
        )
    return _compute(images, overlays, pairs, means, stds, own, other, clip, dtype, channels_last)


def overlay_batch_reference(
    images: Tensor,
    overlays: Tensor,
    pairs: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    blend: str = "add_clip",
    alpha: float = 1.0,
    channels_last: bool = False,
) -> Tensor:
    """:func:`overlay_batch` in plain PyTorch."""
    images, overlays, means, stds, own, other = _prepare(
        images, overlays, pairs, mean, std, dtype, blend, alpha, channels_last
    )
    return _compute(images, overlays, pairs, means, stds, own, other, blend == "add_clip", dtype, channels_last)


def _compute(
    images: Tensor,
    overlays: Tensor,
    pairs: Tensor,
    mean: list[float],
    std: list[float],
    own: float,
    other: float,
    clip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    if _check.inspectable(pairs) and pairs.numel():
        for column, bank in enumerate((images, overlays)):
            low, high = int(pairs[:, column].min()), int(pairs[:, column].max())
            if low < 0 or high >= len(bank):
                raise IndexError(f"overlay_batch: pairs[:, {column}] must lie in 0..{len(bank) - 1}, got {low}..{high}")
    compute, c = _check.compute_dtype(dtype), images.shape[1]
    shift = torch.tensor(mean or [0.0] * c, dtype=compute, device=images.device).view(c, 1, 1)
    scale = torch.tensor(std or [1.0] * c, dtype=compute, device=images.device).view(c, 1, 1)

    def normalised(bank: Tensor, index: Tensor, shift: Tensor, weight: float) -> Tensor:
        pixels = bank[index].to(compute)
        if bank.dtype == torch.uint8:
            pixels = pixels / 255
        return (pixels - shift) * (scale.reciprocal() * weight)

    # Clipped, the mean is subtracted once, with the image.
    laid = normalised(overlays, pairs[:, 1], torch.zeros_like(shift) if clip else shift, other)
    result = laid + normalised(images, pairs[:, 0], shift, own)
    if clip:
        result = torch.minimum(result, (1 - shift) / scale)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return result.to(dtype).contiguous(memory_format=layout)


def _prepare(
    images: Any,
    overlays: Any,
    pairs: Any,
    mean: Any,
    std: Any,
    dtype: Any,
    blend: Any,
    alpha: Any,
    channels_last: Any,
) -> tuple[Tensor, Tensor, list[float], list[float], float, float]:
    """Checks everything; returns images and overlays as uint8 or the compute dtype, mean and std as lists, empty for
    none, and the weights of image and overlay."""
    op = "overlay_batch"
    _check.images(op, images)
    if not _check.is_dense(overlays, (images.dtype,)):
        kind = str(images.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: overlays must be a {kind} tensor like images, got {_check.describe(overlays)}")
    if overlays.dim() != 4 or overlays.shape[1:] != images.shape[1:]:
        c, h, w = images.shape[1:]
        raise ValueError(f"{op}: overlays must be [R, {c}, {h}, {w}] like images, got {_check.describe(overlays)}")
    _check.same_device(op, "overlays", overlays, images)
    if not _check.is_dense(pairs, (torch.int64,)):
        raise TypeError(f"{op}: pairs must be an int64 tensor [B, 2], got {_check.describe(pairs)}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{op}: pairs must be [B, 2], got {_check.describe(pairs)}")
    _check.same_device(op, "pairs", pairs, images)
    if not isinstance(dtype, torch.dtype) or dtype not in _check.FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    _check.flag(op, "channels_last", channels_last)
    if blend not in _BLENDS:
        raise ValueError(f"{op}: blend must be one of {', '.join(_BLENDS)}, got {blend!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, Real)):
        raise TypeError(f"{op}: alpha must be a number, got {_check.describe(alpha)}")
    weight = float(alpha)
    if not 0 < weight < float("inf") or (blend == "convex" and weight > 1):
        raise ValueError(f"{op}: alpha must be positive, and at most 1 for blend='convex', got {alpha!r}")
    means = _check.channel_values(op, "mean", mean, images.shape[1])
    stds = _check.channel_values(op, "std", std, images.shape[1])
    if any(s <= 0 for s in stds):
        raise ValueError(f"{op}: std must be positive, got {stds}")
    images, overlays = images.detach(), overlays.detach()
    if images.dtype != torch.uint8:
        compute = _check.compute_dtype(dtype)
        images, overlays = images.to(compute), overlays.to(compute)
    own, other = (weight, 1 - weight) if blend == "convex" else (1.0, weight)
    return images, overlays, means, stds, own, other


def _fake(
    images: Tensor,
    overlays: Tensor,
    pairs: Tensor,
    mean: list[float],
    std: list[float],
    own: float,
    other: float,
    clip: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (pairs.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)


_native.register("overlay_batch", _fake)
