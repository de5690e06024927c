"""A training batch from images in memory, in one pass: gather, crop, flip, normalise, cast, layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check, _native

__all__ = ["gather_augment", "gather_augment_reference"]


def gather_augment(
    images: Tensor,
    index: Tensor,
    *,
    offset: Tensor | None = None,
    flip: Tensor | None = None,
    padding: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Take ``images[index]``, crop and flip each one, normalise, and cast.

    A sample is padded by ``padding`` black pixels on every side, cut at its ``offset`` back to ``H x W``, mirrored if
    its ``flip`` says so, and becomes ``((v / 255) - mean) / std``: what torchvision's RandomCrop,
    RandomHorizontalFlip, ToTensor and Normalize do to it, bit for bit. Computed in float32 (float64 for a float64
    result), each operation rounded on its own.

    Args:
        images: uint8 ``[M, C, H, W]``, any strides; read in place.
        index: int64 ``[B]``, positions in ``0..M-1``, may repeat.
        offset: integer ``[B, 2]``, (top, left) of the crop in the padded image, ``0..2*padding``; None leaves the
            image in place.
        flip: bool ``[B]``, samples to mirror left to right; None mirrors none.
        padding: Black pixels added on every side before cropping, >= 0.
        mean: One value a channel in 0..1 units; None is 0.
        std: One positive value a channel in 0..1 units; None is 1.
        dtype: Of the result: float32, bfloat16, float16, float64; or uint8, which takes no ``mean`` and ``std`` and
            leaves the pixels as they are.
        channels_last: Whether the result has PyTorch's channels_last memory format.

    Returns:
        New tensor ``[B, C, H, W]`` of ``dtype``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, device, ``padding``, ``mean``, ``std`` or (on the CPU) an offset does not fit, or there
            are more than 64 channels on CUDA.
        IndexError: on the CPU, if an index lies outside ``0..M-1``. On CUDA looking would make the host wait: there
            the kernel prints the index and stops with a device-side error, as PyTorch's own indexing does, and reads
            nothing.
    """
    offset, means, stds = _prepare(images, index, offset, flip, padding, mean, std, dtype, channels_last)
    if _native.usable("gather_augment", images):
        return torch.ops.bbfast.gather_augment(images, index, offset, flip, padding, means, stds, dtype, channels_last)
    return _compute(images, index, offset, flip, padding, means, stds, dtype, channels_last)


def gather_augment_reference(
    images: Tensor,
    index: Tensor,
    *,
    offset: Tensor | None = None,
    flip: Tensor | None = None,
    padding: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """:func:`gather_augment` in plain PyTorch."""
    offset, means, stds = _prepare(images, index, offset, flip, padding, mean, std, dtype, channels_last)
    return _compute(images, index, offset, flip, padding, means, stds, dtype, channels_last)


def _compute(
    images: Tensor,
    index: Tensor,
    offset: Tensor | None,
    flip: Tensor | None,
    padding: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    m, _, h, w = images.shape
    b = index.shape[0]
    if _check.inspectable(index) and b and (int(index.min()) < 0 or int(index.max()) >= m):
        raise IndexError(f"gather_augment: index must lie in 0..{m - 1}, got {int(index.min())}..{int(index.max())}")
    if offset is not None and _check.inspectable(offset) and b:
        low, high = int(offset.min()), int(offset.max())
        if low < 0 or high > 2 * padding:
            raise ValueError(f"gather_augment: offset must lie in 0..{2 * padding}, got {low}..{high}")
    batch = images[index]
    if offset is not None:
        batch = torch.nn.functional.pad(batch, (padding, padding, padding, padding))
        rows = offset[:, :1] + torch.arange(h, device=images.device)
        columns = offset[:, 1:] + torch.arange(w, device=images.device)
        sample = torch.arange(b, device=images.device)
        batch = batch[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip is not None:
        batch = torch.where(flip.view(-1, 1, 1, 1), batch.flip(3), batch)
    if dtype != torch.uint8:
        compute = _check.compute_dtype(dtype)
        batch = batch.to(compute) / 255
        if mean:
            batch = batch - torch.tensor(mean, dtype=compute, device=images.device).view(-1, 1, 1)
        if std:
            batch = batch / torch.tensor(std, dtype=compute, device=images.device).view(-1, 1, 1)
        batch = batch.to(dtype)
    return batch.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _prepare(
    images: Any,
    index: Any,
    offset: Any,
    flip: Any,
    padding: int,
    mean: Any,
    std: Any,
    dtype: torch.dtype,
    channels_last: Any,
) -> tuple[Tensor | None, list[float], list[float]]:
    """Checks everything; returns the offset as int64 and mean and std as lists, empty for none."""
    if not _check.is_dense(images, (torch.uint8,)):
        raise TypeError(f"gather_augment: images must be a uint8 tensor [M, C, H, W], got {_check.describe(images)}")
    if images.dim() != 4:
        raise ValueError(f"gather_augment: images must be [M, C, H, W], got {_check.describe(images)}")
    if not _check.is_dense(index, (torch.int64,)):
        raise TypeError(f"gather_augment: index must be an int64 tensor [B], got {_check.describe(index)}")
    if index.dim() != 1:
        raise ValueError(f"gather_augment: index must be [B], got {_check.describe(index)}")
    _check.same_device("gather_augment", "index", index, images)
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"gather_augment: padding must be an integer >= 0, got {padding!r}")
    if offset is not None:
        if not _check.is_dense(offset, (torch.int64, torch.int32, torch.int16, torch.uint8)):
            raise TypeError(f"gather_augment: offset must be an integer tensor [B, 2], got {_check.describe(offset)}")
        if tuple(offset.shape) != (index.shape[0], 2):
            raise ValueError(f"gather_augment: offset must be [{index.shape[0]}, 2], got {_check.describe(offset)}")
        _check.same_device("gather_augment", "offset", offset, images)
        offset = offset.long()
    if flip is not None:
        _check.vector("gather_augment", "flip", flip, torch.bool, index.shape[0], images)
    _check.flag("gather_augment", "channels_last", channels_last)
    if not isinstance(dtype, torch.dtype) or dtype not in _check.IMAGE_DTYPES:
        raise TypeError(f"gather_augment: dtype must be float32, bfloat16, float16, float64 or uint8, got {dtype!r}")
    means = _check.channel_values("gather_augment", "mean", mean, images.shape[1])
    stds = _check.channel_values("gather_augment", "std", std, images.shape[1])
    if any(s <= 0 for s in stds):
        raise ValueError(f"gather_augment: std must be positive, got {stds}")
    if dtype == torch.uint8 and (means or stds):
        raise ValueError("gather_augment: dtype uint8 leaves the pixels as they are and takes no mean and std")
    return offset, means, stds


def _fake(
    images: Tensor,
    index: Tensor,
    offset: Tensor | None,
    flip: Tensor | None,
    padding: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (index.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=layout)


_native.register("gather_augment", _fake)
