"""Checks that every operation shares. Messages name the operation, the argument, the expectation and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "IMAGE_DTYPES",
    "compute_dtype",
    "describe",
    "finite",
    "images",
    "inspectable",
    "same_device",
    "vector",
    "where",
]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IMAGE_DTYPES = (torch.uint8, *FLOATS)


def describe(value: Any) -> str:
    """Short words for what came: dtype and shape of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:80]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inspectable(tensor: Tensor) -> bool:
    """Whether values may be looked at here: on the CPU, outside ``torch.compile``; elsewhere it would cost a wait."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def images(op: str, value: Any) -> None:
    """Images must be ``[N, C, H, W]``, uint8 or floating."""
    if not isinstance(value, Tensor) or value.dtype not in IMAGE_DTYPES:
        raise TypeError(f"{op}: images must be a uint8 or floating tensor [N, C, H, W], got {describe(value)}")
    if value.dim() != 4:
        raise ValueError(f"{op}: images must have four dimensions [N, C, H, W], got {describe(value)}")


def pattern(op: str, value: Any, batch: Tensor) -> Tensor:
    """A second image, ``[C, H, W]`` or ``[N, C, H, W]``, checked; as ``[1 | N, C, H, W]`` in the batch's dtype or
    compute dtype."""
    if not isinstance(value, Tensor) or not (
        value.dtype in FLOATS or (value.dtype == torch.uint8 and batch.dtype == torch.uint8)
    ):
        raise TypeError(f"{op}: pattern must be a floating tensor (or uint8 for uint8 images), got {describe(value)}")
    n, c, h, w = batch.shape
    if tuple(value.shape) not in ((c, h, w), (n, c, h, w)):
        raise ValueError(f"{op}: pattern must be [{c}, {h}, {w}] or [{n}, {c}, {h}, {w}], got {describe(value)}")
    same_device(op, "pattern", value, batch)
    if value.dtype != batch.dtype:
        value = value.to(compute_dtype(batch.dtype))
    return value if value.dim() == 4 else value.unsqueeze(0)


def same_device(op: str, name: str, value: Tensor, other: Tensor) -> None:
    """``value`` must be on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device} like the first argument, got {describe(value)}")


def vector(op: str, name: str, value: Any, dtype: torch.dtype, n: int, other: Tensor) -> None:
    """``value`` must be a tensor ``[n]`` of ``dtype`` on the device of ``other``."""
    if not isinstance(value, Tensor) or value.dtype != dtype:
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a {kind} tensor [{n}], got {describe(value)}")
    if value.dim() != 1 or value.shape[0] != n:
        raise ValueError(f"{op}: {name} must have shape [{n}], got {describe(value)}")
    same_device(op, name, value, other)


def where(op: str, value: Any, batch: Tensor) -> None:
    """``where`` must be None or a bool tensor ``[N]``."""
    if value is not None:
        vector(op, "where", value, torch.bool, batch.shape[0], batch)


def finite(op: str, name: str, value: Tensor) -> None:
    """No NaN in a floating CPU tensor; other devices are not asked."""
    if value.is_floating_point() and inspectable(value) and bool(torch.isnan(value).any()):
        raise ValueError(f"{op}: {name} must not contain NaN")
