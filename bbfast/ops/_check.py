"""Checks that every operation shares. Messages name the operation, the argument, the expectation and what came."""

from __future__ import annotations

from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bbfast.ops._func import is_wrapped

__all__ = [
    "IMAGE_DTYPES",
    "channel_values",
    "compute_dtype",
    "describe",
    "finite",
    "flag",
    "images",
    "inspectable",
    "is_dense",
    "parameter",
    "pattern",
    "same_device",
    "vector",
    "where",
]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IMAGE_DTYPES = (torch.uint8, *FLOATS)


def describe(value: Any) -> str:
    """Short words for what came: dtype and shape of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{layout}{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:80]


def is_dense(value: Any, dtypes: tuple[torch.dtype, ...]) -> TypeGuard[Tensor]:
    """Whether it is a tensor with strides (not a sparse one) of one of ``dtypes``."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in dtypes


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inspectable(tensor: Tensor) -> bool:
    """Whether values may be looked at here: on the CPU, where it costs no wait, and outside ``torch.compile`` and
    ``torch.func``, where there are none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_wrapped(tensor)


def images(op: str, value: Any) -> None:
    """Images must be ``[N, C, H, W]``, uint8 or floating."""
    if not is_dense(value, IMAGE_DTYPES):
        raise TypeError(f"{op}: images must be a uint8 or floating tensor [N, C, H, W], got {describe(value)}")
    if value.dim() != 4:
        raise ValueError(f"{op}: images must have four dimensions [N, C, H, W], got {describe(value)}")


def pattern(op: str, value: Any, batch: Tensor, name: str = "pattern") -> Tensor:
    """A second image, ``[C, H, W]`` or ``[N, C, H, W]``, checked; as ``[1 | N, C, H, W]`` in the batch's dtype or
    compute dtype."""
    if not is_dense(value, IMAGE_DTYPES if batch.dtype == torch.uint8 else FLOATS):
        raise TypeError(f"{op}: {name} must be a floating tensor (or uint8 for uint8 images), got {describe(value)}")
    n, c, h, w = batch.shape
    if tuple(value.shape) not in ((c, h, w), (n, c, h, w)):
        raise ValueError(f"{op}: {name} must be [{c}, {h}, {w}] or [{n}, {c}, {h}, {w}], got {describe(value)}")
    same_device(op, name, value, batch)
    if value.dtype != batch.dtype:
        value = value.to(compute_dtype(batch.dtype))
    return value if value.dim() == 4 else value.unsqueeze(0)


def parameter(op: str, name: str, value: Any, batch: Tensor, low: float, high: float) -> float | Tensor:
    """A number in ``low..high``, or one for each image: a floating tensor ``[N]``, returned as ``[N, 1, 1, 1]`` in the
    batch's compute dtype. Values of a tensor are looked at on the CPU alone."""
    n = batch.shape[0]
    if is_dense(value, FLOATS):
        if tuple(value.shape) not in ((), (n,)):
            raise ValueError(f"{op}: {name} must be a number or [{n}], got {describe(value)}")
        same_device(op, name, value, batch)
        if inspectable(value) and not bool(((value >= low) & (value <= high)).all()):
            raise ValueError(f"{op}: {name} must lie in {low:g}..{high:g}, got {describe(value)}")
        return value.to(compute_dtype(batch.dtype)).view(-1, 1, 1, 1)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{op}: {name} must be a number or a floating tensor [{n}], got {describe(value)}")
    if not low <= float(value) <= high:
        raise ValueError(f"{op}: {name} must lie in {low:g}..{high:g}, got {value!r}")
    return float(value)


def same_device(op: str, name: str, value: Tensor, other: Tensor) -> None:
    """``value`` must be on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device} like the first argument, got {describe(value)}")


def vector(op: str, name: str, value: Any, dtype: torch.dtype, n: int, other: Tensor) -> None:
    """``value`` must be a tensor ``[n]`` of ``dtype`` on the device of ``other``."""
    if not is_dense(value, (dtype,)):
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a {kind} tensor [{n}], got {describe(value)}")
    if value.dim() != 1 or value.shape[0] != n:
        raise ValueError(f"{op}: {name} must have shape [{n}], got {describe(value)}")
    same_device(op, name, value, other)


def where(op: str, value: Any, batch: Tensor) -> None:
    """``where`` must be None or a bool tensor ``[N]``."""
    if value is not None:
        vector(op, "where", value, torch.bool, batch.shape[0], batch)


def channel_values(op: str, name: str, values: Any, channels: int) -> list[float]:
    """One number for each channel, as floats; empty for None."""
    if values is None:
        return []
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a sequence of numbers, got {describe(values)}") from None
    if len(numbers) != channels or any(v != v for v in numbers):
        raise ValueError(f"{op}: {name} must be one number for each of {channels} channels, got {numbers}")
    return numbers


def flag(op: str, name: str, value: Any) -> None:
    """``value`` must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {describe(value)}")


def finite(op: str, name: str, value: Tensor) -> None:
    """No NaN in a floating CPU tensor; other devices are not asked."""
    if value.is_floating_point() and inspectable(value) and bool(torch.isnan(value).any()):
        raise ValueError(f"{op}: {name} must not contain NaN")
